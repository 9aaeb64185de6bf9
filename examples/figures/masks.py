"""Fig. 1: who sees whom under full attention, sliding windows, Transformer-XL, BSWA and FAM.

The masks are the attention weights of real layers, so the picture cannot differ from what is computed.

    python -m examples.figures.masks --out out/figures
"""

import argparse
import pathlib

from keras_fam.evaluation import visualize


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/figures"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "masks.png"
    visualize.plot_masks(args.block_size, args.blocks).savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
