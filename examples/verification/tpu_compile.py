"""Compiles the paper's models for TPUs, on a machine that has none: do they fit, and on how many chips?

    make tpu                                            # installs libtpu beside JAX, compiles all programs
    make tpu ARGS="--only 'paper_1b train v5e:4x4'"     # parts of names, separated by commas
    python -m examples.verification.tpu_compile --only "paper_1b stream"   # where libtpu is installed

XLA's TPU compiler (libtpu) compiles each program ahead of time for a real topology and reports the memory of each chip;
it refuses what does not fit. NOTHING IS EXECUTED: no speed is measured and no number is computed.

The programs are the train step of `fit` (mixed bfloat16, Adafactor, Random State Passing, remat) and the streaming step
(`advance`, bfloat16 weights), for one chunk and for one token. Weights, optimizer
and state are laid out by `keras_fam.layout_map`. No weight is allocated: the Keras model is built under
`jax.eval_shape`. The lowered program is searched for host callbacks, dynamic shapes and float64.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import re
from importlib import metadata
from time import perf_counter

GIB = 2**30
# High-bandwidth memory of a chip as stated by Google; the runtime uses some of it.
CHIP_GB = {"v5e": 16, "v5p": 95, "v6e": 32, "v4": 32}


@dataclasses.dataclass
class Program:
    """One program to compile. `mesh` is (data parallel, tensor parallel); `batch` counts all rows of all chips."""

    model: str
    what: str  # "train", "stream" (a chunk) or "decode" (one token)
    topology: str
    mesh: tuple
    batch: int
    tokens: int
    blocks_per_step: int | None = None
    optimizer: str = "adafactor"
    changes: dict = dataclasses.field(default_factory=dict)

    @property
    def name(self):
        return f"{self.model} {self.what} {self.topology}"


PROGRAMS = [
    Program("paper_1b", "train", "v5e:4x4", (4, 4), 4, 8192, 1),
    Program("paper_1b", "train", "v5p:2x2x2", (8, 1), 8, 8192, 1),
    Program("paper_1b", "stream", "v5e:2x2", (1, 4), 4, 4096),
    Program("paper_1b", "decode", "v5e:2x2", (1, 4), 4, 1),
    Program("paper_1b", "stream", "v5p:2x2x1", (1, 4), 4, 4096),
    # As one compiled loop over the layers: unrolled, compilation did not finish.
    # On 16 chips of v5e, the activations of all layers for one block do not fit: each layer is rematerialized.
    Program("paper_8b", "train", "v5e:4x4", (1, 16), 1, 8192, 1, changes={"scan_layers": True, "remat": "layers"}),
    Program("paper_8b", "train", "v5e:8x8", (4, 16), 4, 8192, 1, changes={"scan_layers": True}),
    Program("paper_8b", "train", "v5p:2x2x4", (4, 4), 4, 8192, 1, changes={"scan_layers": True}),
    Program("paper_8b", "stream", "v5e:2x2", (1, 4), 4, 4096),
    Program("paper_8b", "decode", "v5e:2x2", (1, 4), 4, 1),
    Program("paper_8b", "stream", "v5p:2x2x1", (1, 4), 4, 4096),
    # Programs of the tests, which compile in seconds.
    Program("tiny", "train", "v5e:2x2", (2, 2), 4, 256, 1, changes={"vocabulary_size": 512}),
    Program("tiny", "stream", "v5e:2x2", (2, 2), 4, 128, changes={"vocabulary_size": 512}),
]


def topology_devices(name):
    """The devices of a TPU topology, for example `"v5e:4x4"`."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def build(program, make_optimizer=True):
    """A compiled Keras model whose variables have shapes, dtypes and layouts but no values."""
    import jax

    import keras_fam

    training = program.what == "train"
    settings = keras_fam.model_config(program.model, **program.changes)
    dtype = "mixed_bfloat16" if training else "bfloat16"
    found = []

    def make():
        backbone = keras_fam.TransformerFAMBackbone(
            **{"remat": training, **settings}, blocks_per_step=program.blocks_per_step, dtype=dtype
        )
        lm = keras_fam.TransformerFAMCausalLM(backbone)
        lm.build()
        if training:
            lm.compile(program.optimizer, weighted_metrics=None)
            lm.optimizer.build(lm.trainable_variables)
        found.append(lm)

    jax.eval_shape(make)
    return found[0]


def specs_of(variables, distribution):
    """`ShapeDtypeStruct`s of variables, laid out as the distribution says."""
    import jax

    from keras_fam.distribution.state_sharding import fitted

    def spec(v):
        layout = fitted(distribution.get_variable_layout(v), v.shape)
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=layout.backend_layout)

    return [spec(v) for v in variables]


def lower(program, distribution):
    """The program, lowered for TPU; `(lowered, parameters)`."""
    import jax
    import keras

    from keras_fam.distribution.state_sharding import map_fields, state_layout

    lm = build(program)
    shape = (program.batch, program.tokens)
    tokens = jax.ShapeDtypeStruct(shape, "int32", sharding=distribution.get_data_layout(shape).backend_layout)
    count = sum(v.value.size for v in lm.trainable_variables)
    if program.what == "train":
        groups = lm.trainable_variables, lm.non_trainable_variables, lm.optimizer.variables, lm.metrics_variables
        state = tuple(specs_of(group, distribution) for group in groups)
        step, args = lm.train_step, (state, (tokens, tokens))
        options = {"donate_argnums": 0, "out_shardings": (None, [[s.sharding for s in group] for group in state])}
        options["out_shardings"] = (None, tuple(options["out_shardings"][1]))
    else:

        def step(values, state, tokens):
            with keras.StatelessScope(state_mapping=list(zip(lm.variables, values, strict=True))):
                outputs, state = lm.advance(tokens, state, aligned=program.what == "stream")
                return state, outputs

        state = map_fields(
            lambda field, s: jax.ShapeDtypeStruct(
                s.shape, s.dtype, sharding=state_layout(field, s.shape).backend_layout
            ),
            lm.state_spec(program.batch),
        )
        args = (specs_of(lm.variables, distribution), state, tokens)
        shardings = jax.tree.map(lambda s: s.sharding, state)
        options = {"donate_argnums": 1, "out_shardings": (shardings, None)}
    return jax.jit(step, **options).trace(*args).lower(lowering_platforms=("tpu",)), count


def check(text):
    """Raises AssertionError unless the lowered program is one that a TPU can run alone: MLIR text."""
    targets = set(re.findall(r"custom_call @(\w+)", text))
    called = [t for t in targets if "callback" in t.lower() or "host" in t.lower()]
    assert not called, f"the program calls the host: {called}"
    assert not re.search(r"stablehlo\.(infeed|outfeed|send|recv)\b", text), (
        "the program transfers data to or from the host"
    )
    assert not re.search(r"tensor<[^>]*\?", text), "the program has shapes that are not static"
    assert not re.search(r"(tensor<|x)f64\b", text), "the program computes in float64"


def compile_one(program):
    """Compiles a program; a dict of bytes per chip and seconds, with `"refused"` if it does not fit."""
    import keras

    import keras_fam
    from keras_fam.ops import attention

    attention.WHOLE_BYTES = 1 << 62  # on a TPU, attention is not computed in steps
    devices = topology_devices(program.topology)
    mesh = keras.distribution.DeviceMesh(program.mesh, ("batch", "model"), devices)
    settings = keras_fam.model_config(program.model, **program.changes)
    distribution = keras.distribution.ModelParallel(
        layout_map=keras_fam.layout_map(mesh, settings), batch_dim_name="batch"
    )
    result = {"name": program.name, **dataclasses.asdict(program), "chips": len(devices)}
    start = perf_counter()
    with distribution.scope():
        lowered, result["parameters"] = lower(program, distribution)
    result["lowering_seconds"] = perf_counter() - start
    check(lowered.as_text())
    start = perf_counter()
    try:
        compiled = lowered.compile()
    except Exception as error:
        if "memory" not in str(error):
            raise
        result["refused"] = str(error).split("\n")[0]
        return result
    result["compile_seconds"] = perf_counter() - start
    memory = compiled.memory_analysis()
    for part in ("argument", "output", "alias", "temp"):
        result[f"{part}_bytes"] = getattr(memory, f"{part}_size_in_bytes")
    result["total_bytes"] = (
        result["argument_bytes"] + result["output_bytes"] - result["alias_bytes"] + result["temp_bytes"]
    )
    text = compiled.as_text()
    collectives = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    result["collectives"] = {c: len(re.findall(rf" {c}(?:-start)?\(", text)) for c in collectives}
    return result


def row(result):
    """One line of the table."""
    chip = CHIP_GB[result["topology"].split(":")[0]]
    mesh = "x".join(map(str, result["mesh"]))
    head = f"{result['name']:28}{mesh:>7}{result['batch']:>4} x {result['tokens']:<5}"
    if "refused" in result:
        return f"{head} refused: {result['refused']}"
    parts = "".join(f"{result[f'{part}_bytes'] / 1e9:8.2f}" for part in ("argument", "output", "temp", "total"))
    return f"{head}{parts}{chip:>5}{result['compile_seconds']:7.0f} s"


HEAD = f"{'GB per chip':28}{'mesh':>7}{'rows x tokens':>12}{'arguments':>9}{'output':>7}{'temp':>8}{'total':>8}"
HEAD += f"{'chip':>5}{'compile':>9}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="paper", help="parts of names, separated by commas")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="a JSON file; results are added to those in it")
    parser.add_argument("--override", default=None, help="JSON with fields of `Program` to change")
    args = parser.parse_args(argv)
    os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is executed, so several processes may compile
    chosen = [p for p in PROGRAMS if any(part in p.name for part in args.only.split(","))]
    if args.override:
        chosen = [dataclasses.replace(p, **json.loads(args.override)) for p in chosen]
    print(HEAD, flush=True)
    for program in chosen:
        result = compile_one(program)
        print(row(result), flush=True)
        if args.out:
            versions = {name: metadata.version(name) for name in ("jax", "libtpu", "keras")}
            known = json.loads(args.out.read_text()) if args.out.exists() else {"programs": {}}
            known["programs"][program.name] = result
            known |= {"versions": versions, "machine": f"{platform.machine()}, {os.cpu_count()} cores, no TPU"}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
