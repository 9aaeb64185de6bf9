"""Training over several processes with torch's DistributedDataParallel: the same numbers as one process.

    python -m examples.distributed.torch_ddp --processes 2     # gloo on a CPU; nccl where each process has its GPU

A Keras model on torch is a `torch.nn.Module`, so DDP wraps it directly. Every process has its own rows, and the state
of a stream stays with its rows. Only the memory of Random State Passing must be synchronized: that of rank 0 is
broadcast after each step.
"""

import argparse
import os
import tempfile

import numpy as np

from examples.distributed.common import ROWS, SETTINGS, batches, make_lm, report


def loss_of(logits, targets):
    import torch

    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten().long())


def train(rank, processes, steps, carried):
    """Losses (means over all rows) of this process's part of the batches.

    Args:
        carried: bool, whether each step continues from the state of the one before; otherwise it starts from the memory
            of Random State Passing (p is 1 here, since the choice of rows would depend on how rows are split).
    """
    import torch
    from torch import distributed

    lm = make_lm(random_state_passing=0.0 if carried else 1.0)
    model, passing = lm, lm.backbone.random_state_passing
    if processes > 1:
        # When rows continue from their own states, the memory prompt is not used in a step.
        model = torch.nn.parallel.DistributedDataParallel(lm, find_unused_parameters=carried)
    optimizer = torch.optim.SGD([p for p in lm.parameters() if p.requires_grad], lr=0.5)
    rows = slice(rank * ROWS // processes, (rank + 1) * ROWS // processes)
    losses, state = [], None
    for batch in batches(steps):
        ids = torch.as_tensor(batch[rows])
        if carried:
            logits, state = model(ids[:, :-1], initial_state=state, return_state=True, training=True)
            state = detached(state)
        else:
            logits = model(ids[:, :-1], training=True)
        loss = loss_of(logits, ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach() / processes
        if processes > 1:
            distributed.all_reduce(loss)
            if passing is not None:
                with torch.no_grad():
                    distributed.broadcast(passing.memory.value, src=0)
        losses.append(float(loss))
    weights = np.concatenate([v.numpy().ravel() for v in lm.trainable_variables])
    return losses, weights


def detached(state):
    import keras

    return keras.tree.map_structure(lambda x: x.detach(), state)


def work(rank, processes, args, folder):
    """One process: joins the others and trains twice; rank 0 saves the results."""
    os.environ["KERAS_BACKEND"] = "torch"
    SETTINGS["num_layers"] = args.layers
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    if processes > 1:
        gpus = torch.cuda.is_available() and torch.cuda.device_count() >= processes
        if gpus:
            torch.cuda.set_device(rank)
        distributed.init_process_group(
            "nccl" if gpus else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
        )
    found = {}
    for name, carried in (("training, RSP 1", False), ("training, carried state", True)):
        found[name], found[f"after: weights, {name}"] = train(rank, processes, args.steps, carried)
    if rank == 0:
        np.savez(f"{folder}/{processes}.npz", **found)
    if processes > 1:
        distributed.destroy_process_group()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=SETTINGS["num_layers"])
    args = parser.parse_args(argv)
    if args.processes < 2 or ROWS % args.processes:
        parser.error(f"--processes must be at least 2 and divide {ROWS} rows")
    os.environ["KERAS_BACKEND"] = "torch"
    import torch

    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, processes in (("one process", 1), (f"{args.processes} processes", args.processes)):
            torch.multiprocessing.spawn(work, (processes, args, folder), nprocs=processes)
            runs[name] = dict(np.load(f"{folder}/{processes}.npz"))
    print(f"{ROWS} rows, vocabulary {SETTINGS['vocabulary_size']}")
    report(runs)


if __name__ == "__main__":
    main()
