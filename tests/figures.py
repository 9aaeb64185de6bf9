"""Prints how exact the package is on the chosen backend, and may record it:

    KERAS_BACKEND=torch python tests/figures.py --out examples/results/json/exactness_torch.json

The largest relative difference over all variants of the layer, from the NumPy loop and between chunks and the whole.
"""

import argparse
import json
import os
import pathlib
import platform
from importlib import metadata

import keras
import support
from support import VARIANTS, make
from test_oracle import FLOAT64, SMOOTH, forward_errors, gradient_errors

import keras_fam


def measure():
    """What was compared to the largest relative difference and the variant that it is from."""
    worst = {}

    def note(name, error, variant):
        if name not in worst or error > worst[name]["difference"]:
            worst[name] = {"difference": float(error), "variant": variant}

    for variant in VARIANTS:
        for dtype in ("float32", "float64") if variant in FLOAT64 else ("float32",):
            for name, error in forward_errors(variant, dtype).items():
                note(f"{dtype} {name}", error, variant)
            if (variant, dtype) in SMOOTH:
                note(f"{dtype} gradients", max(gradient_errors(variant, dtype).values()), variant)
        for name, error in keras_fam.check_streaming(make(variant)[0], tokens=10).items():
            note(f"contract {name}", error, variant)
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file")
    args = parser.parse_args()
    backend, worst = keras.backend.backend(), measure()
    print(f"{backend}, keras {keras.__version__}, {len(VARIANTS)} variants, width {support.HIDDEN_DIM}")
    for name, found in sorted(worst.items()):
        print(f"{name:28} {found['difference']:9.2e}  {found['variant']}")
    if args.out:
        record = {
            "command": f"KERAS_BACKEND={backend} python tests/figures.py",
            "backend": backend,
            "versions": {"python": platform.python_version()}
            | {package: metadata.version(package) for package in ("keras", "numpy", backend)},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "variants": len(VARIANTS),
            "width": support.HIDDEN_DIM,
            "largest": dict(sorted(worst.items())),
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
