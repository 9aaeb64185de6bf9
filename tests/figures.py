"""Prints how exact the package is on the chosen backend: `KERAS_BACKEND=torch python tests/figures.py`.

The largest relative difference over all variants, from the NumPy loop and between chunks and the whole.
"""

import sys

import keras
import support
from support import VARIANTS, make
from test_oracle import FLOAT64, SMOOTH, forward_errors, gradient_errors

import keras_fam


def main():
    worst = {}

    def note(name, error, variant):
        worst[name] = max(worst.get(name, (0.0, "")), (error, variant))

    for variant in VARIANTS:
        for dtype in ("float32", "float64") if variant in FLOAT64 else ("float32",):
            for name, error in forward_errors(variant, dtype).items():
                note(f"{dtype} {name}", error, variant)
            if (variant, dtype) in SMOOTH:
                note(f"{dtype} gradients", max(gradient_errors(variant, dtype).values()), variant)
        for name, error in keras_fam.check_streaming(make(variant)[0], tokens=10).items():
            note(f"contract {name}", error, variant)
    print(f"{keras.backend.backend()}, keras {keras.__version__}, {len(VARIANTS)} variants, width {support.HIDDEN_DIM}")
    for name, (error, variant) in sorted(worst.items()):
        print(f"{name:28} {error:9.2e}  {variant}")


if __name__ == "__main__":
    sys.exit(main())
