"""One process of a training on PyTorch: Keras' `fit`, DistributedDataParallel, or FSDP, as each machine would run it.

    python -m examples.distributed.torch_processes --folder SHARED --addresses HOST_0:1234,HOST_1:1234 --process 0
    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m examples.distributed.torch_processes --folder SHARED --variants ddp    # the same, on every machine

`python -m examples.distributed.processes torch` starts two on this machine and compares them with one. A Keras model is
a `torch.nn.Module`, so DDP wraps it; FSDP needs `keras_fam.distribution.fully_shard`.
"""

import functools
import os

import numpy as np

from examples.distributed import starting, work
from examples.distributed.common import make_lm

MOMENTUM = 0.9


class Advance:
    """Makes a module whose call is `lm.advance`, which continues from a state, for DDP to wrap."""

    def __new__(cls, lm):
        import torch

        class Module(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.lm = lm

            def forward(self, *args, **kwargs):
                return self.lm.advance(*args, **kwargs)

        return Module()


def wrapped(lm, kind, advance=False):
    """`lm`, or its `advance`, as a module that one process or all of them train."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    import keras_fam

    if not distributed.is_initialized():
        return Advance(lm) if advance else lm
    if kind == "fsdp":
        return keras_fam.distribution.fully_shard(lm, forward=lm.advance if advance else None)
    return DistributedDataParallel(Advance(lm) if advance else lm)


def optimizer_of(module, lm, rate, momentum=0.0):
    """SGD on the trainable weights in the order of the model's variables, whether they are whole or in parts."""
    import torch

    whole = [variable.value for variable in lm.trainable_variables]
    parameters = module.parameters() if hasattr(module, "whole_weights") else whole
    return torch.optim.SGD(parameters, rate, momentum=momentum)


def step(optimizer, logits, targets, weights=None):
    """One step with the mean loss over this process's rows; returns the mean over all processes."""
    import torch

    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="none")
    loss = losses.mean() if weights is None else (losses * weights.flatten()).mean()
    optimizer.zero_grad()
    loss.backward()  # DDP and FSDP average the gradients over all processes
    optimizer.step()
    return mean(loss.detach())


def mean(loss):
    from torch import distributed

    if distributed.is_initialized():
        distributed.all_reduce(loss)
        loss = loss / distributed.get_world_size()
    return float(loss)


def passing(steps, kind):
    """Losses of steps with Random State Passing, and the memory that is passed on."""
    import torch

    lm = make_lm(random_state_passing=work.RATE)
    module = wrapped(lm, kind)
    optimizer, losses = optimizer_of(module, lm, 0.5), []
    for batch in work.own_batches(steps):
        ids = torch.as_tensor(batch)
        losses.append(step(optimizer, module(ids[:, :-1], training=True), ids[:, 1:]))
    return losses, lm.backbone.random_state_passing.memory.numpy()


def carried(until, kind, path=None):
    """Losses of steps on carried state, and the state after them, of all rows.

    Args:
        until: int, the step to end with.
        kind: "ddp" or "fsdp".
        path: None, or a checkpoint: training resumes from it if it exists, and writes it at the end.
    """
    import keras
    import torch

    import keras_fam

    lm, rows = make_lm(random_state_passing=0.0), work.document_rows()
    state = lm.get_initial_state(rows.batch_size)
    saved = torch.load(path, weights_only=False) if path and path.exists() else None
    if saved:
        for variable, value in zip(lm.variables, saved["variables"], strict=True):
            variable.assign(value)
        own = keras_fam.distribution.own_rows(saved["state"])
        state = keras.tree.map_structure(lambda x: torch.as_tensor(np.array(x)), own)
        rows.load_state_dict(saved["position"])
    module = wrapped(lm, kind, advance=True)
    optimizer, losses = optimizer_of(module, lm, 0.1, MOMENTUM), []
    if saved:
        optimizer.load_state_dict(in_parts(saved["optimizer"], optimizer))
    while rows.position < until:
        chunk, targets, weights = rows[0]
        ids, reset = torch.as_tensor(chunk["token_ids"]), torch.as_tensor(chunk["reset"])
        logits, state = module(ids, detached(state), reset=reset, aligned=True, training=True)
        losses.append(step(optimizer, logits, torch.as_tensor(targets), torch.as_tensor(weights)))
        rows.advance(1)
    state = keras_fam.distribution.gather_rows(detached(state))
    if path:
        save(path, module, lm, optimizer, state, rows)
    return losses, state


def resumed(until, path, kind):
    return carried(until, kind, path)[0]


def detached(state):
    import keras

    return keras.tree.map_structure(lambda x: x.detach(), state)


def save(path, module, lm, optimizer, state, rows):
    """Process 0 writes weights, moments, the state of all rows and the position of the whole dataset."""
    import contextlib

    import torch

    import keras_fam

    with module.whole_weights() if hasattr(module, "whole_weights") else contextlib.nullcontext():
        variables = [variable.numpy() for variable in lm.variables]
    moments = torch.utils._pytree.tree_map(lambda x: getattr(x, "full_tensor", lambda: x)(), optimizer.state_dict())
    position = keras_fam.distribution.gather_position(rows)
    if keras_fam.distribution.process_shard()[0] == 0:
        torch.save({"variables": variables, "optimizer": moments, "state": state, "position": position}, path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def in_parts(moments, optimizer):
    """The state of a torch optimizer, divided as its parameters are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def part(value, parameter):
        if isinstance(parameter, DTensor) and getattr(value, "shape", None) == parameter.shape:
            return distribute_tensor(value, parameter.device_mesh, parameter.placements)
        return value

    state = {i: {k: part(v, parameters[i]) for k, v in of_one.items()} for i, of_one in moments["state"].items()}
    return {**moments, "state": state}


def parser():
    return work.arguments(__doc__, ("fit", "ddp", "fsdp"))


def results(args):
    """What was found, by variant: Keras' `fit`, and a loop of our own around DDP and FSDP."""
    found = {}
    for variant in args.variants:
        own = {}
        if variant != "fit":
            own["passing"] = functools.partial(passing, kind=variant)
            own["carried"] = functools.partial(carried, kind=variant)
            own["resumed"] = functools.partial(resumed, kind=variant)
        found[variant] = work.run_phases(args, variant, **own)
    return found


def main(argv=None):
    args = work.parse(parser(), argv)
    starting.environment("torch", args.folder)
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if gpus else "gloo"
    if args.processes > 1:
        address = f"tcp://{args.addresses[0]}"
        distributed.init_process_group(backend, init_method=address, rank=args.process, world_size=args.processes)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        distributed.init_process_group(backend)
        args.process = distributed.get_rank()
    work.write(args, results(args))
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
