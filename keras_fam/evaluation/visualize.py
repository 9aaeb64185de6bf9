"""Pictures: who sees whom (Fig. 1), attention over time (Fig. 4 and 11), the memory over time.

All of them show what the layers compute: masks and maps are the attention weights of a real layer or model, taken from
its own attention. Plots need matplotlib, `pip install 'keras-fam[plot]'`.
"""

import numpy as np
from keras import ops

from keras_fam.evaluation.ablation import layers_of
from keras_fam.layers.transformer_fam_block import TransformerFAMBlock
from keras_fam.ops.attention import record_attention

# The systems of Fig. 1: settings of one layer, for blocks of S tokens and one memory segment.
SYSTEMS = {
    "full attention": lambda size, count: {"block_size": size * count, "fam_length": 0, "memory_segments": 0},
    "sliding window, w = S/2": lambda size, count: {
        "fam_length": 0,
        "memory_segments": 1,
        "attention_window": size // 2,
    },
    "Transformer-XL, w = S": lambda size, count: {"fam_length": 0, "memory_segments": 1, "attention_window": size},
    "BSWA, m = 1": lambda size, count: {"fam_length": 0, "memory_segments": 1},
    "FAM, m = 1": lambda size, count: {"fam_length": max(size // 4, 1), "memory_segments": 1},
}


def _pyplot():
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'keras-fam[plot]'.") from error
    return pyplot


# Attention weights ----------------------------------------------------------------------------------------------------


def attention_maps(model, tokens):
    """Attention weights of every layer while a text is read, block after block.

    Args:
        model: a language model, backbone or layer (`TransformerFAMBlock`); F < S.
        tokens: int `[B, T]` (`[B, T, D]` for a layer), whole blocks, read from a fresh start.

    Returns:
        One dict per layer: `"tokens"`, NumPy `[n, B, S, N, W]`, what each token gives to the W = P·F + (m+1)·S keys
        that it may see (memory rows, previous blocks oldest first, own block); `"memory"`, `[n, B, F, N, P·F + S]`,
        what each memory row gives to the memory and to the block that it compresses; None without memory. What goes to
        attention sinks is left out.

    Raises:
        ValueError: for tokens that are not whole blocks.
    """
    tokens, reader = np.asarray(tokens), getattr(model, "backbone", model)
    size, num_layers = model.block_size, len(getattr(reader, "blocks", [reader]))
    if not tokens.shape[1] or tokens.shape[1] % size:
        raise ValueError(f"Attention is mapped for whole blocks of {size} tokens; received {tokens.shape[1]} tokens.")
    state, per_layer = reader.get_initial_state(len(tokens)), 2 if model.fam_length else 1
    found = []
    for first in range(0, tokens.shape[1], size):
        with record_attention() as records:
            _, state = reader.advance(tokens[:, first : first + size], state, aligned=True)
        records = [np.asarray(ops.convert_to_numpy(r)) for r in records[: num_layers * per_layer]]
        found.append([records[i * per_layer : (i + 1) * per_layer] for i in range(num_layers)])
    maps = []
    for i in range(num_layers):
        parts = [np.stack(p) for p in zip(*(block[i] for block in found), strict=True)]
        sinks = layers_of(model)[i].attention_sinks  # their columns come first
        maps.append({"tokens": parts[-1][..., sinks:], "memory": parts[0][..., sinks:] if model.fam_length else None})
    return maps


def masks(block_size: int = 8, num_blocks: int = 4, systems=SYSTEMS):
    """Who may see whom in each system: where a real layer's attention weights are above 0.

    Args:
        block_size: S, at least 2.
        num_blocks: blocks in the text.
        systems: dict from a name to a function `(S, num_blocks)` that returns settings of `TransformerFAMBlock`.

    Returns:
        Dict from a name to `(seen, is_memory)`: bool `[R, R]`, rows see columns, and bool `[R]`. R counts the tokens
        and, where there is a memory, the rows of F_0 before block 1 and of F_τ behind block τ.
    """
    found, x = {}, np.random.default_rng(0).normal(size=(1, block_size * num_blocks, 4)).astype("float32")
    for name, settings in systems.items():
        given = {"block_size": block_size, "num_query_heads": 1, "head_dim": 4, "intermediate_dim": 4}
        layer = TransformerFAMBlock(**{**given, **settings(block_size, num_blocks)})
        layer.build((None, None, 4))
        (maps,) = attention_maps(layer, x)
        found[name] = _visibility(maps, layer.attention)
    return found


def _visibility(maps, layer):
    """`(seen, is_memory)` of one layer from its attention maps."""
    S, F, m = layer.block_size, layer.fam_length, layer.memory_segments
    count = len(maps["tokens"])
    size = F + count * (S + F)
    token = [F + b * (S + F) + np.arange(S) for b in range(count)]  # where the tokens of each block stand
    memory = [b * (S + F) + np.arange(F) for b in range(count + 1)]  # and F_0, F_1, …
    seen = np.zeros((size, size), bool)
    for b in range(count):
        weights = maps["tokens"][b, 0, :, 0] > 0
        columns = [memory[b], *(token[j] if j >= 0 else np.full(S, -1) for j in range(b - m, b + 1))]
        columns = np.concatenate(columns)
        exists = columns >= 0
        seen[np.ix_(token[b], columns[exists])] = weights[:, exists]
        if F:
            columns = np.concatenate([memory[b], token[b]])
            seen[np.ix_(memory[b + 1], columns)] = maps["memory"][b, 0, :, 0] > 0
    is_memory = np.zeros(size, bool)
    is_memory[np.concatenate(memory)] = True
    return seen, is_memory


def plot_masks(block_size: int = 8, num_blocks: int = 4, systems=SYSTEMS):
    """Fig. 1: the masks of each system, drawn from `masks`. Returns a matplotlib figure."""
    pyplot = _pyplot()
    found = masks(block_size, num_blocks, systems)
    figure, axes = pyplot.subplots(1, len(found), figsize=(3.0 * len(found), 4.2), layout="constrained")
    colors = np.array([[255, 255, 255], [66, 114, 176], [221, 132, 42], [85, 160, 104]], "uint8")
    for axis, (name, (seen, is_memory)) in zip(np.atleast_1d(axes), found.items(), strict=True):
        kind = np.where(is_memory[:, None], 3, np.where(is_memory[None], 2, 1))
        axis.imshow(colors[np.where(seen, kind, 0)], interpolation="nearest")
        edges = np.arange(len(seen) + 1) - 0.5
        axis.set_xticks(edges, minor=True)
        axis.set_yticks(edges, minor=True)
        axis.grid(which="minor", color="#d9d9d9", linewidth=0.4)
        axis.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
        rows = int(is_memory.sum()) // (num_blocks + 1)
        for b in range(num_blocks + 1):  # the edges of blocks
            for line in (axis.axhline, axis.axvline):
                line(rows + b * (block_size + rows) - 0.5, color="#555555", linewidth=0.7)
        axis.set_title(f"{name}\n{int(seen.sum())} of {seen.size} pairs", fontsize=10)
        axis.set_xlabel("keys", fontsize=9)
    np.atleast_1d(axes)[0].set_ylabel("queries, in order of time", fontsize=9)
    names = ("token sees token", "token sees memory", "memory row sees memory or block")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=c / 255) for c in colors[1:]]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


# Attention over time --------------------------------------------------------------------------------------------------


def token_to_memory(maps, row=0):
    """What each token gives to each memory row, heads averaged: `[P·F, T]` of one batch row of one layer's maps."""
    tokens, memory = maps["tokens"], maps["memory"]
    rows = memory.shape[-1] - tokens.shape[2]
    weights = tokens[:, row, :, :, :rows].mean(2)  # [n, S, P·F]
    return weights.reshape(-1, rows).T


def memory_to_token(maps, row=0):
    """What each memory row gives to each token of the block that it compresses, heads averaged: `[F, T]`."""
    memory = maps["memory"]
    rows = memory.shape[-1] - maps["tokens"].shape[2]
    weights = memory[:, row, :, :, rows:].mean(2)  # [n, F, S]
    return weights.transpose(1, 0, 2).reshape(memory.shape[2], -1)


def memory_to_memory(maps, row=0):
    """How much each memory row keeps looking at the memory before it, heads averaged: `[F, n]`."""
    memory = maps["memory"]
    rows = memory.shape[-1] - maps["tokens"].shape[2]
    return memory[:, row, :, :, :rows].sum(-1).mean(-1).T


def plot_attention_maps(maps, words=None, highlights=None, row=0):
    """Fig. 11: over a text, what memory rows take from it and what its tokens take from the memory, layer by layer.

    Args:
        maps: of `attention_maps`.
        words: None, or T strings, written under the tokens of `highlights`.
        highlights: None, or a dict from a label to token positions that are marked.
        row: which batch row.

    Returns:
        A matplotlib figure.
    """
    pyplot = _pyplot()
    S, length = maps[0]["tokens"].shape[2], maps[0]["tokens"].shape[0] * maps[0]["tokens"].shape[2]
    figure, axes = pyplot.subplots(
        2 * len(maps), 1, figsize=(12, 3.4 * len(maps)), layout="constrained", sharex=True, squeeze=False
    )
    for i, layer in enumerate(maps):
        pictures = {
            "memory rows\nread the block": memory_to_token(layer, row),
            "tokens read\nthe memory": token_to_memory(layer, row),
        }
        for axis, (name, weights) in zip(axes[2 * i : 2 * i + 2, 0], pictures.items(), strict=True):
            top = max(np.quantile(weights, 0.995), 1e-6)
            image = axis.imshow(
                weights, aspect="auto", interpolation="nearest", cmap="magma", vmin=0, vmax=top,
                extent=(-0.5, length - 0.5, len(weights) - 0.5, -0.5),
            )  # fmt: skip
            figure.colorbar(image, ax=axis, pad=0.01, extend="max").ax.tick_params(labelsize=7)
            axis.set_ylabel(f"layer {i + 1}\n{name}", fontsize=8)
            axis.set_yticks(range(0, len(weights), max(len(weights) // 4, 1)))
            axis.tick_params(labelsize=7)
            for edge in range(0, length + 1, S):
                axis.axvline(edge - 0.5, color="white", linewidth=0.6, alpha=0.8)
    _mark(axes[:, 0], highlights or {}, words)
    axes[-1, 0].set_xlabel("token (white lines: blocks)", fontsize=9)
    return figure


def _mark(axes, highlights, words):
    """Marks positions above the first axis and in colour under the last one."""
    for j, (label, places) in enumerate(highlights.items()):
        color = f"C{j}"
        places = np.asarray(places)
        axes[0].plot(places, np.full(len(places), -1.1), "v", color=color, clip_on=False, markersize=4, label=label)
    if highlights:
        axes[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.08), ncols=len(highlights), fontsize=8, frameon=False)


def animate_attention(maps, path, words, row=0, layer=None, milliseconds=900):
    """Fig. 4 over time: one frame a block, the memory reading it and its tokens reading the memory; a GIF.

    Args:
        maps: of `attention_maps`.
        path: where the GIF goes.
        words: T strings, the tokens.
        row: which batch row.
        layer: which layer; None is the last.
        milliseconds: how long a frame stays.
    """
    pyplot = _pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter

    layer = len(maps) - 1 if layer is None else layer
    chosen = maps[layer]
    count, S = chosen["tokens"].shape[0], chosen["tokens"].shape[2]
    reads, writes = token_to_memory(chosen, row), memory_to_token(chosen, row)
    kept = memory_to_memory(chosen, row)
    F = len(writes)
    top = {"reads": np.quantile(reads, 0.998), "writes": np.quantile(writes, 0.998)}
    x_token = np.arange(S, dtype="float64")
    x_memory = np.linspace(S * 0.18, S * 0.82, F)
    figure = pyplot.figure(figsize=(9.6, 4.4), dpi=80)
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.9))

    def draw(b):
        axis.clear()
        axis.set(xlim=(-1, S + 0.5), ylim=(-0.75, 3.4))
        axis.axis("off")
        figure.suptitle(f"block {b + 1} of {count}, layer {layer + 1}", fontsize=12)
        span = slice(b * S, (b + 1) * S)
        for lines, y, color, limit in (
            (reads[:, span], (2.75, 1.55), "#dd842a", top["reads"]),
            (writes[:, span], (0.1, 1.25), "#4272b0", top["writes"]),
        ):
            for f in range(F):
                for t in range(S):
                    strength = min(lines[f, t] / max(limit, 1e-9), 1.0)
                    if strength > 0.12:
                        axis.plot(
                            (x_token[t], x_memory[f]), y, color=color, alpha=strength**1.3, linewidth=1.8 * strength
                        )
        for y, text in (
            (2.85, "tokens read F\nof the block before"),
            (-0.02, "F reads the whole block\nand becomes the next"),
        ):
            for t in range(S):
                axis.text(
                    x_token[t], y, words[b * S + t], rotation=60 if y > 1 else -60, fontsize=7,
                    ha="left", va="bottom" if y > 1 else "top",
                )  # fmt: skip
            axis.text(
                -0.9, 2.0 if y > 1 else 0.75, text, fontsize=9,
                color="#dd842a" if y > 1 else "#4272b0", bbox={"color": "white", "alpha": 0.8, "pad": 1},
            )  # fmt: skip
        shade = [str(0.95 - 0.75 * k) for k in kept[:, b]]
        axis.scatter(x_memory, np.full(F, 1.4), s=230, c=shade, edgecolors="black", zorder=3, marker="s")
        axis.text(S - 0.2, 1.4, "memory rows\n(dark: looks at\nits own past)", fontsize=8, va="center", ha="right")

    animation = FuncAnimation(figure, draw, frames=count, interval=milliseconds)
    animation.save(path, writer=PillowWriter(fps=1000 / milliseconds))
    pyplot.close(figure)


# The memory over time -------------------------------------------------------------------------------------------------


def plot_memory_statistics(statistics):
    """`memory_statistics` over blocks, one panel a number and one line a layer. Returns a matplotlib figure."""
    pyplot = _pyplot()
    titles = {
        "rms": "root mean square",
        "drift": "drift from one block to the next (1 − cosine)",
        "drift_from_first": "drift from the first memory (1 − cosine)",
        "effective_rank": "effective rank",
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5.5), layout="constrained", sharex=True)
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=True):
        for i, layer in enumerate(statistics[name]):
            values = [np.nan if v is None else v for v in layer]
            axis.plot(statistics["block"], values, label=f"layer {i + 1}", linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.1 * np.nanmax([v for layer in statistics[name] for v in layer if v is not None]))
        if len(statistics["block"]) > 64:
            axis.set_xscale("log")
    for axis in axes[-1]:
        axis.set_xlabel("block")
    axes[0, 0].legend(fontsize=8)
    return figure
