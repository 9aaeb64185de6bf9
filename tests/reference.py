"""TransformerFAM as a plain NumPy loop in float64: the oracle that the package is compared with.

Written from the specification (Hwang et al., arXiv 2404.09173, Alg. 1, Alg. 2, App. B, App. C) and importing nothing
of the package. One batch row at a time, block by block, token by token, with absolute positions: token t of a row's
stream stands at position t (plus the random position offset), the memory written for block b stands in block b, and
the initial memory F_0 counts as the memory of block -1. Blocks are numbered from 0 here.

Weights may hold others for memory rows, a dict under "memory".

Axes: B batch, T tokens of one call, S block, F memory rows, P visible memories, N query heads, K key/value heads,
G = N // K, H head width, D model width, M feed-forward width, V vocabulary, L layers; R any number of rows, J any
number of keys.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import reference_experts
from reference_parts import attend, finish, norm, project_key_value, project_query, rms_norm, wide

FROM_BELOW = ("anchored", "layer_inputs")  # fam_query: the rows of the layer below write (not the paper's)
DEFAULTS = {
    "num_query_heads": None,  # N, required
    "num_key_value_heads": None,  # K; None: N
    "head_dim": None,  # H, required
    "intermediate_dim": None,  # M, required
    "block_size": 1024,  # S
    "memory_segments": 3,  # m
    "fam_length": 64,  # F; 0: BSWA
    "attention_window": None,  # None: breathing BSWA; w: a token sees at most the last w tokens, itself included
    "attention_sinks": 0,  # W: the first tokens, read as if at the W positions before the window once they left it
    "num_visible_memories": 1,  # P (Table 6)
    "fam_query": "feedback",  # "static": SUM FAM (App. C.3); FROM_BELOW: the rows of the layer below
    "fam_gate": None,  # not None: a bias per query head on memory rows as tokens read them (not the paper's)
    "fam_position": "last",  # "last" | "float" (App. B.2)
    "fam_query_position": "previous",  # "previous" | "current"
    # "residual" (the paper's) | "normalized" | "average" (of one half) | "learned_average" | "hard_gate"
    "memory_update": "residual",
    "initial_fam": "prompt",  # "prompt" | "summary" | "prefix" (App. B.1)
    "stop_memory_gradient": False,  # has no effect on values; see `frozen` of `layer`
    "activation": "silu",
    "gated": True,
    "norm": "rms_norm",  # "rms_norm" | "layer_norm"
    "norm_epsilon": 1e-6,
    "use_attention_bias": False,
    "use_output_bias": False,
    "use_feedforward_bias": False,
    "feed_forward": None,  # a dict: a mixture of experts, see `reference_experts`
    "query_key_norm": None,  # "rms_norm"
    "query_key_norm_epsilon": None,  # None: norm_epsilon
    "use_post_norm": False,
    "parallel_residual": False,  # the feed-forward part reads the residual, not what the attention made of it
    "attention_scale": None,  # None: H ** -0.5
    "attention_softcap": None,
    "softmax_sink": False,  # one more term of every softmax: a logit per query head, without a value
    "rope_wavelength": 10000.0,  # None: no rotation
    "rotary_dim": None,  # how many features of a head are rotated, the first ones; None: all
    "rope_scaling": None,
    "dropout": 0.0,  # the oracle has none
}


def settings(**overrides):
    """All settings of a layer: DEFAULTS with `overrides`."""
    assert set(overrides) <= set(DEFAULTS), sorted(set(overrides) - set(DEFAULTS))
    return {**DEFAULTS, **overrides}


def random_weights(cfg, hidden_dim, rng, scale=0.3):
    """Exactly the weights that one layer of these settings has, float64: normal with standard deviation `scale`
    around 0, norm scales around 1. `initial_fam` [F, D] is there with initial_fam="prefix" only.
    """
    d, n, h, m = hidden_dim, cfg["num_query_heads"], cfg["head_dim"], cfg["intermediate_dim"]
    k = cfg["num_key_value_heads"] or n
    shapes = {"query_kernel": (d, n, h), "key_kernel": (d, k, h), "value_kernel": (d, k, h), "output_kernel": (n, h, d)}
    if cfg["feed_forward"] is not None:
        shapes |= reference_experts.shapes(cfg["feed_forward"], d)
    else:
        shapes |= ({"gate_kernel": (d, m)} if cfg["gated"] else {}) | {"up_kernel": (d, m), "down_kernel": (m, d)}
    if cfg["use_attention_bias"]:
        shapes |= {"query_bias": (n, h), "key_bias": (k, h), "value_bias": (k, h)}
    if cfg["use_output_bias"]:
        shapes |= {"output_bias": (d,)}
    if cfg["use_feedforward_bias"]:
        shapes |= ({"gate_bias": (m,)} if cfg["gated"] else {}) | {"up_bias": (m,), "down_bias": (d,)}
    if cfg["query_key_norm"]:
        shapes |= {"query_norm_scale": (h,), "key_norm_scale": (h,)}
    for name in ("attention", "feedforward", "post_attention", "post_feedforward"):
        if cfg["use_post_norm"] or not name.startswith("post"):
            shapes |= {f"{name}_norm_scale": (d,)}
            shapes |= {f"{name}_norm_bias": (d,)} if cfg["norm"] == "layer_norm" else {}
    if cfg["initial_fam"] == "prefix" and cfg["fam_length"]:
        shapes |= {"initial_fam": (cfg["fam_length"], d)}
    if cfg["softmax_sink"]:
        shapes |= {"softmax_sink": (n,)}
    if cfg["fam_gate"] is not None and cfg["fam_length"]:
        shapes |= {"fam_gate": (n,)}
    if cfg["memory_update"] == "learned_average" and cfg["fam_length"]:
        shapes |= {"update_logit": (cfg["fam_length"],)}
    if cfg["memory_update"] == "hard_gate" and cfg["fam_length"]:
        shapes |= {"update_kernel": (3 * d,), "update_bias": (cfg["fam_length"],)}
    return {name: name.endswith("scale") + scale * rng.normal(size=shape) for name, shape in shapes.items()}


def random_model_weights(cfgs, vocabulary_size, hidden_dim, rng, tied=True, scale=0.3):
    """A model's weights: embedding, "layers" (a list of `random_weights`), final norm, prompt and head as needed."""
    weights = {"embedding": rng.normal(size=(vocabulary_size, hidden_dim))}
    weights["layers"] = [random_weights(cfg, hidden_dim, rng, scale) for cfg in cfgs]
    weights["final_norm_scale"] = 1.0 + scale * rng.normal(size=hidden_dim)
    if cfgs[-1]["norm"] == "layer_norm":
        weights["final_norm_bias"] = scale * rng.normal(size=hidden_dim)
    if cfgs[0]["initial_fam"] != "prefix" and cfgs[0]["fam_length"]:
        weights["prompt"] = rng.normal(size=(cfgs[0]["fam_length"], hidden_dim))
    if not tied:
        weights["head_kernel"] = scale * rng.normal(size=(hidden_dim, vocabulary_size))
    return weights


@dataclass
class Row:
    """Where one row's stream stands in one layer. Everything of the past is kept, by absolute position."""

    count: int = 0  # real tokens so far; the next one stands at position `count`, in block `count // S`
    keys: list = field(default_factory=list)  # of every token so far, rotated, each [K, H]
    values: list = field(default_factory=list)  # each [K, H]
    inputs: list = field(default_factory=list)  # of every token so far, [D]
    memories: list = field(default_factory=list)  # (block that it compressed, memory [F, D]); F_0 has block -1
    static: np.ndarray | None = None  # [F, D], the rows that ask when fam_query="static"
    fresh: bool = True  # no memory has been written yet: the first update has no residual (App. B.1)

    def copy(self):
        return Row(self.count, self.keys[:], self.values[:], self.inputs[:], self.memories[:], self.static, self.fresh)


def fam_positions(block, cfg, position_offset=0.0):
    """Positions [F] of the memory that compressed `block`; -1 is "before the first block" (App. B.2)."""
    s, f, i = cfg["block_size"], cfg["fam_length"], np.arange(cfg["fam_length"])
    within = {"last": s - f + i, "float": (i + 1) * s / f - 1}[cfg["fam_position"]]
    return block * s + within + position_offset


def project_memories(memories, weights, cfg, position_offset):
    """k_F and v_F (lists of P * F, each [K, H]) of some memories [(block, [F, D]), ...], projected afresh (Alg. 2)."""
    weights = weights.get("memory", weights)
    k_f, v_f = [], []
    for block, memory in memories:
        k, v = project_key_value(memory, fam_positions(block, cfg, position_offset), weights, cfg)
        k_f, v_f = k_f + list(k), v_f + list(v)
    return k_f, v_f


def sinks(row, block, weights, cfg, position_offset):
    """Keys and values (lists of W, each [K, H]) of the first W tokens of the stream, for a query in `block`: keys as
    of tokens that stand at the W positions just before the m previous blocks."""
    count = cfg["attention_sinks"]
    if not count:
        return [], []
    start = (block - cfg["memory_segments"]) * cfg["block_size"] - count + position_offset
    k, v = project_key_value(np.stack(row.inputs[:count]), start + np.arange(count), weights, cfg)
    return list(k), list(v)


def token_output(i_t, row, k_f, v_f, weights, cfg, position_offset, frozen):
    """O_t [1, D] of token i_t [1, D]; its own key is the last of `row` (Alg. 1 and 2, BSWA and FAM)."""
    t = row.count
    block = t // cfg["block_size"]
    first = max(0, (block - cfg["memory_segments"]) * cfg["block_size"])  # the m previous blocks and its own
    if cfg["attention_window"] is not None:
        first = max(first, t - cfg["attention_window"] + 1)
    keys, values = list(k_f), list(v_f)
    if block > cfg["memory_segments"]:
        more = sinks(row, block, weights, cfg, position_offset)
        keys, values = keys + more[0], values + more[1]
    for s in range(first, t + 1):
        in_segment = s // cfg["block_size"] < block
        source = frozen if in_segment and frozen is not None else row
        keys.append(source.keys[s])
        values.append(source.values[s])
    q = project_query(i_t, [t + position_offset], weights, cfg)
    gate = None if cfg["fam_gate"] is None else (weights["fam_gate"], len(k_f))
    sink = weights.get("softmax_sink")
    return finish(attend(q, np.stack(keys), np.stack(values), cfg, gate, sink), i_t, weights, cfg)


def update_memory(written, previous, first, weights, cfg):
    """What becomes of the memory [F, D], from what the layer wrote and what was there; not the paper's, but "residual".

    An average and a gate take the first thing that is written as it is.
    """
    weights = weights.get("memory", weights)
    kind = cfg["memory_update"]
    if kind == "residual" or (first and kind in ("average", "learned_average", "hard_gate")):
        return written
    if kind == "normalized":
        return rms_norm(written, 1.0, 1e-6)
    if kind != "hard_gate":
        weight = 0.5 if kind == "average" else 1.0 / (1.0 + np.exp(-weights["update_logit"][:, None]))
        return (1.0 - weight) * previous + weight * written
    held, new = rms_norm(previous, 1.0, 1e-6), rms_norm(written, 1.0, 1e-6)
    features = np.concatenate([held, new, held * new], axis=1)
    z = 4.0 / math.sqrt(written.shape[1]) * (features @ weights["update_kernel"]) + weights["update_bias"]
    soft = 1.0 / (1.0 + np.exp(-z))
    gate = np.where(np.real(soft) > 0.5, 1.0, 0.0) + 1j * np.imag(soft)  # backward, the gradient of the soft gate
    gate = (gate if np.iscomplexobj(z) else np.real(gate))[:, None]
    return gate * written + (1.0 - gate) * previous


def write_memory(row, rows_below, weights, cfg, position_offset):
    """(memory, written), each [F, D], for the block b that has just become full (Alg. 2, the memory rows).

    The rows attend to k_F of the visible memories and to the whole block, never to the memory segments. With
    initial_fam="summary" the first block has no memory yet: the rows from below take its place. With
    fam_query="anchored" they ask, and are the residual, in every block; with "layer_inputs" they are also what is
    remembered.
    """
    tokens, weights = weights, weights.get("memory", weights)
    s = cfg["block_size"]
    block = row.count // s - 1
    memories = row.memories[-cfg["num_visible_memories"] :] or [(-1, rows_below)]
    previous_block, asking = memories[-1]
    if cfg["fam_query"] == "static" and row.memories:
        asking = row.static
    if cfg["fam_query"] in FROM_BELOW:
        asking = rows_below
    query_block = previous_block if cfg["fam_query_position"] == "previous" else block
    q_f = project_query(asking, fam_positions(query_block, cfg, position_offset), weights, cfg)
    k_f, v_f = project_memories(memories, weights, cfg, position_offset)
    if block > 0:
        more = sinks(row, block, tokens, cfg, position_offset)
        k_f, v_f = k_f + more[0], v_f + more[1]
    keys = np.stack(k_f + row.keys[block * s : (block + 1) * s])
    values = np.stack(v_f + row.values[block * s : (block + 1) * s])
    # These rows keep their residual: they are the stream of the layer below.
    no_residual = row.fresh and row.memories and cfg["fam_query"] not in FROM_BELOW
    residual = np.zeros_like(asking) if no_residual else asking  # "FAM copy"
    attended = attend(q_f, keys, values, cfg, sink=weights.get("softmax_sink"))
    written = finish(attended, residual, weights, cfg)
    new = rows_below if cfg["fam_query"] == "layer_inputs" else written
    return update_memory(new, memories[-1][1], row.fresh, weights, cfg), written


def layer(
    x, weights, cfg, fam0=None, row=None, rows_below=None, position_offset=0.0, fresh=True, static=None, frozen=None
):
    """One layer over the next tokens of one row: x [T, D], real tokens only -> (y [T, D], row, info).

    A stream starts with row=None and, if F > 0, with its memory fam0 [F, D]: F_0 of "prompt" or "prefix", or with
    fresh=False a memory that was passed on or loaded, whose first update keeps its residual. `static` [F, D] is what
    asks when fam_query="static", if that is not fam0. Without fam0, initial_fam="summary" starts with no memory.
    It goes on with the `row` that the last call returned (left as it is; fam0, fresh and static then do not matter).

    rows_below [F, D] is what the layer below wrote for the first block (layer 0: the learned rows), used only in the
    call in which the first block of a "summary" stream becomes full. With fam_query in FROM_BELOW it is what the layer
    below made of the rows in each block that becomes full in this call (a list), or the same [F, D] for all of them.

    frozen is the row that a recorded run over the same stream returned. Tokens then read keys and values of blocks
    earlier than their own from it, so that `gradient` sees what stop_memory_gradient=True leaves.

    info: "fam", the current memory [F, D] (None before a summary stream has one); "fams", the memories written in
    this call; "rows_below", what the layer above gets: the memory written for the first block of a summary stream, if
    in this call, else None; with fam_query in FROM_BELOW, what was made of the rows in each block, a list.
    """
    s, with_fam = cfg["block_size"], cfg["fam_length"] > 0
    if row is None:
        row = Row(fresh=fresh, static=fam0 if static is None else static)
        if with_fam and fam0 is not None:
            row.memories.append((-1, wide(fam0)))
        assert row.memories or not with_fam or cfg["initial_fam"] == "summary", "a stream starts from fam0 [F, D]"
    row = row.copy()
    anchored = cfg["fam_query"] in FROM_BELOW
    outputs, fams, rows_above = [], [], [] if anchored else None
    x = wide(x)
    while len(outputs) < len(x):
        visible = row.memories[-cfg["num_visible_memories"] :]
        k_f, v_f = project_memories(visible, weights, cfg, position_offset)  # once per block
        block_end = (row.count // s + 1) * s
        for i_t in x[len(outputs) : len(outputs) + block_end - row.count]:
            i_t = i_t[None]
            k, v = project_key_value(i_t, [row.count + position_offset], weights, cfg)
            row.keys.append(k[0])
            row.values.append(v[0])
            row.inputs.append(i_t[0])
            outputs.append(token_output(i_t, row, k_f, v_f, weights, cfg, position_offset, frozen)[0])
            row.count += 1
        if with_fam and row.count == block_end:  # a partial last block writes no memory
            assert row.memories or rows_below is not None, (
                "`rows_below` [F, D] is needed in the call that fills the first block"
            )
            rows = rows_below[len(fams)] if anchored and isinstance(rows_below, list) else rows_below
            fam, written = write_memory(row, rows, weights, cfg, position_offset)
            fams.append(fam)
            if anchored:
                rows_above.append(written)
            elif not row.memories:
                row.static, rows_above = rows_below, fam
            row.memories.append((row.count // s - 1, fams[-1]))
            row.fresh = False
    y = np.array(outputs).reshape(x.shape)
    return y, row, {"fam": row.memories[-1][1] if row.memories else None, "fams": fams, "rows_below": rows_above}


def batch_layer(x, padding_mask, weights, cfg, fam0=None, rows=None, rows_below=None, position_offset=0.0, fresh=True,
                static=None, frozen=None):  # fmt: skip
    """`layer` for every row of x [B, T, D] by itself -> (y [B, T, D], rows, infos), two lists of B.

    Padding (padding_mask [B, T] False) does not exist: it is squeezed out before, and is 0 in y. fam0, rows_below,
    static are shared [F, D] or one per row (a list of B, or [B, F, D]); offset and fresh are scalars or [B]; rows and
    frozen are lists of B.
    """
    x = wide(x)
    real = np.ones(x.shape[:2], dtype=bool) if padding_mask is None else np.asarray(padding_mask, dtype=bool)
    fam0, rows_below, static = (per_row(value, len(x)) for value in (fam0, rows_below, static))
    offsets, fresh = np.broadcast_to(position_offset, len(x)), np.broadcast_to(fresh, len(x))
    rows, frozen = rows or [None] * len(x), frozen or [None] * len(x)
    outputs, new_rows, infos = [], [], []
    for b in range(len(x)):
        out, row, info = layer(x[b, real[b]], weights, cfg, fam0[b], rows[b], rows_below[b], offsets[b],
                               fresh[b], static[b], frozen[b])  # fmt: skip
        outputs.append(out)
        new_rows.append(row)
        infos.append(info)
    y = np.zeros(x.shape, dtype=np.result_type(x, *outputs))
    for b, out in enumerate(outputs):
        y[b, real[b]] = out
    return y, new_rows, infos


def per_row(value, batch):
    """A list of B from something shared (None or [F, D]) or already one per row (a list, or [B, F, D])."""
    return list(value) if isinstance(value, (list, tuple)) or np.ndim(value) == 3 else [value] * batch


def prompt_forward(rows, layers_weights, cfgs):
    """F_0 [F, D] of each layer (App. B.1): the prompt rows [F, D] alone, up through the layers, seeing one another."""
    x, initial = wide(rows), []
    for weights, cfg in zip(layers_weights, cfgs, strict=True):
        initial.append(x)
        positions = fam_positions(-1, cfg)
        k, v = project_key_value(x, positions, weights, cfg)
        q = project_query(x, positions, weights, cfg)
        x = finish(attend(q, k, v, cfg, sink=weights.get("softmax_sink")), x, weights, cfg)
    return initial


def initial_memories(weights, cfgs):
    """The learned F_0 of each layer [F, D]; None where there is none (BSWA, or "summary")."""
    if cfgs[0]["fam_length"] == 0 or cfgs[0]["initial_fam"] == "summary":
        return [None] * len(cfgs)
    if cfgs[0]["initial_fam"] == "prefix":
        return [layer_weights["initial_fam"] for layer_weights in weights["layers"]]
    return prompt_forward(weights["prompt"], weights["layers"], cfgs)


def model(tokens, weights, cfg_list, padding_mask=None, rows=None, passed=None, position_offset=0.0, frozen=None):
    """Logits of tokens [B, T] -> (logits [B, T, V], final memories per layer [B, F, D], rows[layer][b]).

    rows: what the last call returned, to go on with. passed: random state passing (App. B.2.3), for each row None or
    a list of L memories [F, D] to start from. frozen: the rows of a recorded run, see `layer`. Logits at padding are
    0, and so is the memory of a row that has none yet ("summary" within the first block).
    """
    tokens, batch = np.asarray(tokens), len(tokens)
    real = np.ones(tokens.shape, dtype=bool) if padding_mask is None else np.asarray(padding_mask, dtype=bool)
    passed = passed or [None] * batch
    x = weights["embedding"][np.where(real, tokens, 0)]
    learned = initial_memories(weights, cfg_list)
    rows_below, fams, new_rows = per_row(weights.get("prompt"), batch), [], []
    for i, (layer_weights, cfg) in enumerate(zip(weights["layers"], cfg_list, strict=True)):
        fam0 = [learned[i] if memories is None else memories[i] for memories in passed]
        x, layer_rows, infos = batch_layer(
            x, real, layer_weights, cfg, fam0, rows and rows[i], rows_below, position_offset,
            [memories is None for memories in passed], learned[i], frozen and frozen[i])  # fmt: skip
        rows_below = [
            info["rows_below"] for info in infos
        ]  # of layers that did not fill the first block: None, and unused
        none = np.zeros((cfg["fam_length"], x.shape[-1]))
        fams.append(np.stack([none if info["fam"] is None else info["fam"] for info in infos]))
        new_rows.append(layer_rows)
    hidden = norm(x, weights, cfg_list[-1], "final_norm")
    head = weights["head_kernel"] if "head_kernel" in weights else weights["embedding"].T
    return np.where(real[..., None], hidden @ head, 0.0), fams, new_rows


def gradient(fn, array, direction, step=1e-20):
    """Derivative of the scalar fn at array along direction (same shape), by a complex step: the imaginary part of
    fn(array + i·step·direction) over the step, which subtracts nothing and so is exact to rounding."""
    return np.imag(fn(np.asarray(array, dtype="float64") + 1j * step * direction)) / step
