"""How a result was made, for the JSON that keeps it: command, arguments, backend, versions and machine."""

import os
import pathlib
import platform
import shlex
import sys

import keras

import keras_fam


def run_record(module, args, argv=None):
    """The entries that every result has.

    Args:
        module: str, name of the module that was run.
        args: `argparse.Namespace` of its arguments.
        argv: list of str, the command line; that of this process if None.
    """
    argv = sys.argv[1:] if argv is None else argv
    return {
        "command": shlex.join(["python", "-m", module, *map(str, argv)]),
        "arguments": {name: str(v) if isinstance(v, pathlib.Path) else v for name, v in vars(args).items()},
        "backend": keras.backend.backend(),
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "keras_fam": keras_fam.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
