"""Fig. 1: who sees whom under full attention, sliding windows, Transformer-XL, BSWA and FAM.

The masks are read off the attention weights of real layers, so the picture cannot differ from what is computed.

    python examples/figures/masks.py --out examples/results
"""

import argparse
import os
import pathlib

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"], default="jax")
parser.add_argument("--block-size", type=int, default=8)
parser.add_argument("--blocks", type=int, default=4)
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/figures"))
ARGS = parser.parse_args()
os.environ["KERAS_BACKEND"] = ARGS.backend

from keras_fam import visualize  # noqa: E402  (the backend is chosen before)

ARGS.out.mkdir(parents=True, exist_ok=True)
path = ARGS.out / "masks.png"
visualize.plot_masks(ARGS.block_size, ARGS.blocks).savefig(path, dpi=110)
print(f"wrote {path}")
