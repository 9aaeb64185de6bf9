"""A window with attention sinks against StreamingLLM (arXiv 2309.17453), written independently in plain NumPy.

    KERAS_BACKEND=torch python -m examples.verification.streaming_llm --tokens 4096 --out out/streaming_llm.json

SmolLM2-135M reads a novel in both ways, and the losses of all tokens are compared. The independent version keeps keys
as they are projected, not rotated. For every block it puts the sinks, the window and the block side by side, counts
positions from 0 over what is there, rotates keys and queries by these positions, and masks what comes later.
"""

import argparse
import json
import pathlib

import keras
import numpy as np

import keras_fam
from examples.smollm2.books import HELD_OUT, book_ids
from examples.smollm2.evaluate import log_losses
from examples.smollm2.model import load


class StreamingLlama:
    """Logits of a Llama of KerasHub, block by block, with the first tokens kept.

    Args:
        backbone: a `keras_hub.models.LlamaBackbone` with tied embeddings.
        block_size: S, tokens read at once.
        segments: m, blocks before the own one that stay visible.
        sinks: W, first tokens that stay visible for good.
    """

    def __init__(self, backbone, block_size, segments, sinks):
        self.S, self.m, self.W = block_size, segments, sinks
        self.wavelength, self.epsilon = backbone.rope_max_wavelength, backbone.layer_norm_epsilon
        self.groups = backbone.num_query_heads // backbone.num_key_value_heads
        get = keras.ops.convert_to_numpy
        self.table, self.final = get(backbone.token_embedding.embeddings), get(backbone.layer_norm.scale)
        self.layers = []
        for layer in backbone.transformer_layers:
            attention = layer._self_attention_layer
            kernels = [attention._query_dense, attention._key_dense, attention._value_dense, attention._output_dense]
            kernels += [layer._feedforward_gate_dense, layer._feedforward_intermediate_dense]
            kernels += [layer._feedforward_output_dense]
            norms = [layer._self_attention_layernorm.scale, layer._feedforward_layernorm.scale]
            self.layers.append([get(x) for x in (*norms, *(kernel.kernel for kernel in kernels))])
        self.seen = [([], []) for _ in self.layers]  # keys and values of all tokens, not rotated

    def norm(self, x, scale):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + self.epsilon) * scale

    def rotate(self, x, positions):
        half = x.shape[-1] // 2
        angles = positions[:, None] * self.wavelength ** (-np.arange(half) / half)
        cos, sin = (f(angles)[:, None].astype("float32") for f in (np.cos, np.sin))
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attend(self, query, keys, values):
        """`[S, N, H]`: the block's queries over what is visible, of which the block's own keys are the last S."""
        count, size = len(query), len(keys)
        positions = np.arange(size, dtype="float64")
        query, keys = self.rotate(query, positions[-count:]), self.rotate(keys, positions)
        keys, values = (np.repeat(x, self.groups, axis=1) for x in (keys, values))
        logits = np.einsum("qnh,knh->nqk", query, keys) / np.sqrt(query.shape[-1])
        logits = np.where(positions[None, None] <= positions[-count:][None, :, None], logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), values)

    def read(self, ids):
        """Logits `[T, V]` of a text whose length is a multiple of S, from its first token."""
        found = []
        for start in range(0, len(ids), self.S):
            x = self.table[ids[start : start + self.S]]
            first = max(0, start - self.m * self.S)
            places = [*range(min(self.W, first)), *range(first, start + len(x))]
            for (norm, other_norm, q, k, v, o, gate, up, down), (keys, values) in zip(
                self.layers, self.seen, strict=True
            ):
                normed = self.norm(x, norm)
                keys.extend(np.einsum("td,dnh->tnh", normed, k))
                values.extend(np.einsum("td,dnh->tnh", normed, v))
                visible = [np.stack([part[place] for place in places]) for part in (keys, values)]
                attended = self.attend(np.einsum("td,dnh->tnh", normed, q), *visible)
                x = x + np.einsum("tnh,nhd->td", attended, o)
                normed = self.norm(x, other_norm)
                hidden = normed @ gate
                x = x + (hidden / (1 + np.exp(-hidden)) * (normed @ up)) @ down
            found.append(self.norm(x, self.final) @ self.table.T)
        return np.concatenate(found)


def losses_of(logits, targets):
    """−log p of every target, `[T]`."""
    largest = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
    return total - logits[np.arange(len(targets)), targets]


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--block", type=int, default=128, help="S")
    parser.add_argument("--segments", type=int, default=1, help="m")
    parser.add_argument("--sinks", type=int, default=4, help="W")
    parser.add_argument("--tokens", type=int, default=4096, help="a multiple of the block size")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("out/smollm2"))
    parser.add_argument("--out", type=pathlib.Path, default=None)
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    source = load()
    ids = book_ids(source.preprocessor.tokenizer, args.data)[HELD_OUT[0]][: args.tokens + 1]
    there = losses_of(
        StreamingLlama(source.backbone, args.block, args.segments, args.sinks).read(ids[:-1]), ids[1:].astype("int64")
    )
    settings = {"block_size": args.block, "memory_segments": args.segments, "attention_sinks": args.sinks}
    lm = keras_fam.hub.convert(source, **settings, fam_length=0, weights="share")
    here = log_losses(lm, ids[None], 4 * args.block)[0]
    found = {**settings, "tokens": args.tokens, "backend": keras.backend.backend(), "keras": keras.__version__}
    found["perplexity"] = float(np.exp(here.mean()))
    found["largest difference of a token's loss"] = float(np.abs(here - there).max())
    print(found)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
