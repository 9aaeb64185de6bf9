"""Runs the code cells of a notebook in this process and stores what they print and draw: Jupyter is not needed.

    python -m examples.notebooks.run examples/notebooks/quickstart.ipynb
    python -m examples.notebooks.run examples/notebooks/quickstart.ipynb --set STEPS=20 --output out/short.ipynb

Cells are plain Python, without magics. `--set` replaces values of the cell with the tag "parameters".
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import pathlib


def run(path, parameters=None):
    """Runs a notebook.

    Args:
        path: the notebook.
        parameters: None, or a dict of names and values that are set after the cell with the tag "parameters".

    Returns:
        The notebook as a dict, with new outputs.
    """
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib import pyplot

    pyplot.close("all")  # figures that are open already are not the notebook's
    notebook = json.loads(pathlib.Path(path).read_text())
    names = {"__name__": "__main__"}
    for number, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
        source = "".join(cell["source"])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(source, f"{path}, cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= parameters or {}
        outputs = []
        if printed.getvalue():
            lines = printed.getvalue().splitlines(keepends=True)
            outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=80)
            data = {"image/png": base64.b64encode(image.getvalue()).decode(), "text/plain": ["<Figure>"]}
            outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        pyplot.close("all")
        cell["execution_count"], cell["outputs"] = number, outputs
    return notebook


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=pathlib.Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="values of the parameters cell")
    parser.add_argument("--output", type=pathlib.Path, help="where to store it; the notebook itself if not given")
    args = parser.parse_args(argv)
    parameters = {name: ast.literal_eval(value) for name, value in (pair.split("=", 1) for pair in args.set)}
    notebook = run(args.notebook, parameters)
    target = args.output or args.notebook
    target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
