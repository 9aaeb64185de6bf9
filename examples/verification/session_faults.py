"""Kills processes while they save sessions, and damages session files: nothing is lost, nothing damaged is loaded.

    KERAS_BACKEND=torch python -m examples.verification.session_faults --kills 200 --out out/faults.json

Each kill: a process alternately saves two sessions to one path and gets SIGKILL at a random moment; the file must then
load as one of the two. Each mutation: a session file with bits flipped, truncated, with bytes swapped, inserted, moved
or zeroed, or the file of another model or version; loading must raise ValueError.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import signal
import sys
import tempfile
import time

import keras
import numpy as np

import keras_fam
from examples.record import run_record
from keras_fam.state import named_leaves
from keras_fam.streaming import session


def build(width, seed=0, **changes):
    keras.utils.set_random_seed(seed)
    settings = {"vocabulary_size": 64, "num_layers": 2, "hidden_dim": width, "num_query_heads": 4,
                "intermediate_dim": 2 * width, "block_size": 16, "memory_segments": 1, "fam_length": 4}  # fmt: skip
    model = keras_fam.TransformerFAMCausalLM(keras_fam.TransformerFAMBackbone(**{**settings, **changes}))
    model.build()
    return model


def two_sessions(model, rows, rng):
    """Two states of a stream, one after more tokens than the other."""
    stream = keras_fam.StreamingModel(model, rows)
    found = []
    for _ in range(2):
        stream.predict(rng.integers(0, 64, (rows, 16)))
        found.append((stream.state, {"position": stream.position}))
    return found


def contents(state, extras):
    arrays = {name: keras.ops.convert_to_numpy(leaf) for name, leaf in named_leaves(state)}
    return {name: array.tobytes() for name, array in {**arrays, **extras}.items()}


def save_repeatedly(path, model, pair, ready):
    """A child process: saves both sessions alternately until it is killed."""
    count = 0
    while True:
        session.save(path, model, *pair[count % 2])
        count += 1
        os.write(ready, b".")


def kill_writers(path, model, pair, kills, rng):
    """Kills `kills` writers; raises AssertionError if the file is ever not one of the two sessions."""
    known = [contents(*session) for session in pair]
    session.save(path, model, *pair[0])
    left, saves, partial = collections.Counter(), 0, 0
    start = time.perf_counter()
    for _ in range(20):
        session.save(path, model, *pair[0])
    one_save = (time.perf_counter() - start) / 20
    for _ in range(kills):
        reading, ready = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(reading)
                save_repeatedly(path, model, pair, ready)
            finally:
                os._exit(1)
        os.close(ready)
        os.read(reading, 1)  # its first save is done
        time.sleep(rng.uniform(0, 5 * one_save))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise AssertionError("The writer ended on its own: its error is printed above.")
        while done := os.read(reading, 4096):
            saves += len(done)
        os.close(reading)
        found = contents(*session.load(path, model))
        if found not in known:
            raise AssertionError("The file is neither of the two sessions.")
        left["AB"[known.index(found)]] += 1
        names = sorted(os.listdir(path.parent))
        if names not in ([path.name], [f".{path.name}.partial", path.name]):
            raise AssertionError(f"The folder holds {names}.")
        partial += len(names) == 2
    session.save(path, model, *pair[0])
    if os.listdir(path.parent) != [path.name]:
        raise AssertionError("A killed writer's partial file was left behind.")
    return {
        "kills": kills,
        "whole": sum(left.values()),
        "session_a": left["A"],
        "session_b": left["B"],
        "killed_while_writing_bytes": partial,
        "saves_before_kills": saves,
        "ms_per_save": round(1e3 * one_save, 2),
    }


def reseal(data):
    """Gives modified bytes a valid digest."""
    start = data.index(b'"digest":"') + 10
    blank = data[:start] + b"0" * 64 + data[start + 64 :]
    return blank[:start] + hashlib.blake2b(blank, digest_size=32).hexdigest().encode() + blank[start + 64 :]


def mutate(kind, data, foreign, rng):
    """The bytes of a session file, modified."""
    header = 8 + int.from_bytes(data[:8], "little")
    place, other = (int(n) for n in rng.integers(len(data), size=2))
    changed = bytearray(data)
    if kind in ("bit", "bit of the header"):
        changed[place if kind == "bit" else rng.integers(header)] ^= 1 << rng.integers(8)
    elif kind == "several bits":
        for place in rng.integers(len(data), size=rng.integers(2, 20)):
            changed[place] ^= 1 << rng.integers(8)
    elif kind == "truncated":
        del changed[place:]
    elif kind == "truncated header":
        del changed[rng.integers(header) :]
    elif kind == "swapped bytes":
        changed[place], changed[other] = changed[other], changed[place]
    elif kind == "moved piece":
        piece = changed[place : place + 512]
        changed[other : other + len(piece)] = piece
    elif kind == "inserted bytes":
        changed[place:place] = rng.bytes(int(rng.integers(1, 100)))
    elif kind == "zeroed sector":
        first = place // 512 * 512
        changed[first : first + 512] = bytes(len(changed[first : first + 512]))
    elif kind == "noise":
        changed = rng.bytes(len(data))
    elif kind == "other version":
        version = b'"format_version":"%d"' % rng.integers(2, 10)
        changed = reseal(data.replace(b'"format_version":"1"', version))
    else:
        changed = foreign[rng.integers(len(foreign))]
    return bytes(changed)


KINDS = ("bit", "bit of the header", "several bits", "truncated", "truncated header", "swapped bytes", "moved piece",
         "inserted bytes", "zeroed sector", "noise", "other version", "other model")  # fmt: skip


def damage_files(path, model, foreign, mutations, rng):
    """Loads `mutations` damaged files: counts of ValueError, of success, and of other exceptions."""
    data, done, tried = path.read_bytes(), 0, 0
    refused, accepted, crashed = (collections.Counter() for _ in range(3))
    while done < mutations:
        kind = KINDS[tried % len(KINDS)]
        tried += 1
        changed = mutate(kind, data, foreign, rng)
        if changed == data:  # for example two equal bytes swapped
            continue
        done += 1
        path.write_bytes(changed)
        try:
            session.load(path, model)
        except ValueError:
            refused[kind] += 1
        except Exception:
            crashed[kind] += 1
        else:
            accepted[kind] += 1
    path.write_bytes(data)
    session.load(path, model)
    return {"mutations": done, "refused": dict(refused), "accepted": dict(accepted), "other_errors": dict(crashed)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    args = parser.parse_args(argv)
    if args.kills and keras.backend.backend() != "torch":
        # A fork of a process with the threads of JAX or TensorFlow may hang; the file format is the same.
        sys.exit("Writers are forked, which is safe on torch alone: set KERAS_BACKEND=torch, or pass --kills 0.")
    if args.kills:
        import torch

        torch.set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    model = build(args.width, args.seed)
    pair = two_sessions(model, args.rows, rng)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "session.safetensors"
        session.save(path, model, *pair[0])
        size, foreign = path.stat().st_size, []
        others = ({"seed": args.seed + 1}, {"num_layers": 1}, {"block_size": 32}, {"fam_length": 0},
                  {"rope_wavelength": 5e5}, {"memory_update": "normalized"}, {"vocabulary_size": 65})  # fmt: skip
        for changes in others:
            other = build(args.width, **{"seed": args.seed, **changes})
            session.save(path, other, other.get_initial_state(args.rows))
            foreign.append(path.read_bytes())
        started = time.perf_counter()
        killed = kill_writers(path, model, pair, args.kills, rng) if args.kills else None
        between = time.perf_counter()
        session.save(path, model, *pair[0])
        damaged = damage_files(path, model, foreign, args.mutations, rng)
        ended = time.perf_counter()
    report = {
        **run_record("examples.verification.session_faults", args, argv),
        "file_bytes": size,
        "kills": killed,
        "damage": damaged,
        "seconds": {"kills": round(between - started, 1), "damage": round(ended - between, 1)},
    }
    if killed:
        print(f"{killed['kills']} writers killed: {killed['whole']} files whole "
              f"({killed['session_a']} A, {killed['session_b']} B), "
              f"{killed['killed_while_writing_bytes']} killed with a partial file, none left behind.")  # fmt: skip
    refused, accepted, crashed = (damaged[name] for name in ("refused", "accepted", "other_errors"))
    print(f"{damaged['mutations']} damaged files: {sum(refused.values())} refused with ValueError, "
          f"{sum(accepted.values())} accepted, {sum(crashed.values())} other errors.")  # fmt: skip
    for kind, count in refused.items():
        print(f"  {kind:20} {count:4} refused")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if accepted or crashed:
        sys.exit(f"Accepted: {dict(accepted)}; other errors: {dict(crashed)}")


if __name__ == "__main__":
    main()
