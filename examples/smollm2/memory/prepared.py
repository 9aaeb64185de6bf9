"""The prepared files, and the models that are made of them; KerasHub is not needed."""

import io
import json
import pathlib
import tempfile

import keras
import numpy as np

import keras_fam
from examples.datasets.python_docs import topics_text
from examples.smollm2 import weights
from keras_fam.hub.convert import MEMORY
from keras_fam.hub.weights import draw_memory

PARTS = "model.gguf."  # and a number: the pieces of the weights' file
WEIGHTS = "weights.npz"  # of another model, in their place
WORTH = "worth.npz"  # what long context is worth to each token of the training prose, see `weigh.py`
# A small model with random weights, for trials of the whole command on a CPU.
TINY = {"vocabulary_size": 256, "num_layers": 2, "hidden_dim": 32, "num_query_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 8, "intermediate_dim": 64}


class Prepared:
    """What `prepare` wrote, in one folder or in several below it; without a folder, bytes of Python's documentation.

    Attributes:
        config: dict, settings of a `TransformerFAMBackbone`.
        tokenizer: for `keras_fam.tasks`.
        train, held_out: `keras_fam.tasks.Prose`.
        stream: int32 `[tokens]`, one long text.
    """

    def __init__(self, folder=None):
        self.folder = None if folder is None else pathlib.Path(folder)
        if folder is None:
            self.config, self.tokenizer = dict(TINY), lambda text: list(text.encode())
            train, held_out = keras_fam.tasks.split_documents(topics_text())
            self.train, self.held_out = (
                keras_fam.tasks.Prose.from_texts(texts, self.tokenizer) for texts in (train, held_out)
            )
            self.stream = self.train.token_ids
            return
        from tokenizers import Tokenizer

        self.config = json.loads(self._find("config.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(self._find("tokenizer.json")))
        with np.load(self._find("texts.npz")) as held:
            arrays = {name: held[name].astype("int32") for name in held.files}
        self.train, self.held_out = (
            keras_fam.tasks.Prose(arrays[f"{name}_ids"], arrays[f"{name}_gaps"]) for name in ("train", "held_out")
        )
        self.stream = arrays["stream"]

    def _find(self, name):
        found = sorted(self.folder.rglob(name))
        if not found:
            raise FileNotFoundError(
                f"{self.folder} has no {name}. Run `python -m examples.smollm2.memory prepare`, and copy all of its "
                "folders here."
            )
        return found[0]

    def weighted(self, path=None):
        """The training prose with loss weights for books, from a file of `weigh`.

        Args:
            path: None (the prepared folder's), or a path.
        """
        path = self._find(WORTH) if path is None else path
        with np.load(path) as held:
            return keras_fam.tasks.Prose(self.train.token_ids, self.train.gaps, held["weights"].astype("float32"))

    def arrays(self):
        """The model's weights by the names of `examples.smollm2.weights.read`."""
        if any(self.folder.rglob(WEIGHTS)):
            with np.load(self._find(WEIGHTS)) as held:
                return {name: held[name].astype("float32") for name in held.files}
        pieces = sorted(self.folder.rglob(PARTS + "*"), key=lambda path: int(path.suffix[1:]))
        if [int(piece.suffix[1:]) for piece in pieces] != list(range(len(pieces))) or not pieces:
            raise FileNotFoundError(
                f"{self.folder} must have all pieces {PARTS}0, {PARTS}1, … of the weights. Found: "
                f"{[piece.name for piece in pieces]}. Copy all folders that `prepare` wrote."
            )
        with tempfile.NamedTemporaryFile(suffix=".gguf") as whole:
            for piece in pieces:
                whole.write(piece.read_bytes())
            whole.flush()
            return weights.read(whole.name)[1]


def read_config(prepared, args, **changes):
    """Settings of a backbone: those of the prepared model, the command's, and `changes`."""
    window = {"block_size": args.block, "memory_segments": args.segments, "fam_length": args.fam}
    memory = {"fam_query": args.fam_query, **MEMORY[args.fam_query], "attention_sinks": args.sinks}
    if args.gate is not None:
        memory["fam_gate"] = args.gate
    if args.memory_update is not None:
        memory["memory_update"] = args.memory_update
    config = {**prepared.config, **window, **memory}
    if args.tiny:
        config |= {key: value for key, value in TINY.items() if key != "vocabulary_size"}
    return {**config, **changes}


def build(prepared, config, *, dtype, seed=0, random=False):
    """A `TransformerFAMCausalLM` with the prepared weights, or with random ones."""
    keras.utils.set_random_seed(seed)
    backbone = keras_fam.TransformerFAMBackbone(**config, dtype=dtype)
    backbone.build()
    if prepared.folder is not None and not random:
        assign(backbone, prepared.arrays())
    draw_memory(backbone, seed)
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    return lm


def assign(backbone, arrays):
    """Writes weights into a backbone."""
    for name, variable in named(backbone).items():
        variable.assign(arrays[name])


def arrays_of(backbone):
    """A backbone's weights in float16 as the bytes of an npz file."""
    content = io.BytesIO()
    arrays = {name: keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")) for name, v in named(backbone).items()}
    np.savez(content, **{name: array.astype("float16") for name, array in arrays.items()})
    return content.getbuffer()


def named(backbone):
    """dict from the names of `examples.smollm2.weights.read` to variables."""
    found = {"embeddings": backbone.token_embedding.embeddings, "norm": backbone.final_norm.scale}
    for i, block in enumerate(backbone.blocks):
        attention = block.attention
        found |= {
            f"{i}/attention_norm": block.attention_norm.scale,
            f"{i}/feedforward_norm": block.feedforward_norm.scale,
            f"{i}/query": attention.query.kernel,
            f"{i}/key": attention.key.kernel,
            f"{i}/value": attention.value.kernel,
            f"{i}/output": attention.output_projection.kernel,
            f"{i}/gate": block.gate.kernel,
            f"{i}/up": block.up.kernel,
            f"{i}/down": block.down.kernel,
        }
    return found
