"""One process of a training on JAX with `keras.distribution`, as each machine would run it.

    python -m examples.distributed.jax_processes --folder SHARED --addresses HOST_0:1234,HOST_1:1234 --process 0

and with `--process 1` on the second machine. `python -m examples.distributed.processes jax` starts two on this
machine, with simulated devices, and compares them with one.
"""

import contextlib

from examples.distributed import starting, work

VARIANTS = ("model", "data")


def distribution_of(variant, processes):
    """Rows over the processes and heads over the devices of each, or rows over all devices.

    `auto_shard_dataset=False`, because each process reads the rows of its own shard.
    """
    import keras

    import keras_fam

    devices = keras.distribution.list_devices()
    if variant == "data":
        return keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    mesh = keras.distribution.DeviceMesh((processes, len(devices) // processes), ("batch", "model"), devices)
    layouts = keras_fam.layout_map(mesh, work.SETTINGS)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False)


def parser():
    found = work.arguments(__doc__, VARIANTS)
    found.add_argument("--simulate", type=int, default=4, help="CPU devices of each process; 0 uses its accelerators")
    found.add_argument("--float64", action="store_true", help="computes in float64")
    return found


def results(args):
    """What was found, by variant; of one process on one device, for each of them."""
    found = {}
    for variant in args.variants:
        many = args.processes > 1
        with distribution_of(variant, args.processes).scope() if many else contextlib.nullcontext():
            found[variant] = work.run_phases(args, variant)
    return found


def main(argv=None):
    args = work.parse(parser(), argv)
    starting.environment("jax", args.folder, args.simulate if args.processes > 1 else min(args.simulate, 1))
    import jax
    import keras

    if args.float64:
        jax.config.update("jax_enable_x64", True)
        keras.config.set_floatx("float64")
    if args.processes > 1:
        keras.distribution.initialize(args.addresses[0], args.processes, args.process)
    work.write(args, results(args))
    if args.processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
