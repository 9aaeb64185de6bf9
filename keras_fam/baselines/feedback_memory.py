"""FM: memory segments that hold a layer's outputs (App. C.2).

The tokens of a block attend to keys and values projected from this layer's *outputs* in the m previous blocks, by the
layer's own norm and projections; in their own block they attend to projected inputs, as ever. An output exists once
its block is computed, so blocks are read one after the other. Outputs are projected once, when they are computed: the
weights do not change within a call, so projecting them afresh in every later block would give the same numbers.

A segment is a whole past block: what the unfinished block puts out waits in `LayerState.output_key` until it is full.
"""

from keras import ops

from keras_fam.ops import block_layout as block_ops
from keras_fam.ops import ragged as row_ops
from keras_fam.ops.random import fold_in
from keras_fam.ops.rope import rotate
from keras_fam.ops.scan import scan

SEEDS = 2048  # numbers of the seeds of tokens; smaller ones are those of memory rows


def project_outputs(layer, y, table, hooks):
    """Keys, rotated by place in block, and values of outputs `[B, *, D]`."""
    key, value = layer.project_key_value(hooks.norm(y))
    return rotate(key, table), value


def read_in_turn(layer, plan, tokens, state, position, taken, hooks, read):
    """Attention and everything after it, block after block.

    Args:
        layer: a `FeedbackAttention`.
        plan: how the tokens lie in blocks, see `reading.py`.
        tokens: `(x, query, keys, values, memory_key, memory_value)` of the call; keys and values are
            `[B, m+n, S, K, H]`, the m held segments first.
        state: `LayerState` before the call.
        position: `StreamPosition` before the call.
        taken: int or int32 `[B]`, how many tokens each row takes in.
        hooks: `Hooks`.
        read: function that reads whole blocks, see `reading.py`.

    Returns:
        `(y, output_keys, output_values)`: `[B, T, D]` and `[B, n, S, K, H]`.
    """
    x, query, keys, values, memory_key, memory_value = tokens
    S, m, length, num_blocks = layer.block_size, layer.memory_segments, ops.shape(x)[1], plan.num_blocks
    if plan.aligned:
        begin, placed = 0, [block_ops.to_blocks(part, S, num_blocks) for part in (x, query)]
    else:
        begin = ops.expand_dims(position.offset, 1)
        placed = [block_ops.place_queries(part, position.offset, S, num_blocks) for part in (x, query)]
    end = begin + (ops.expand_dims(taken, 1) if len(getattr(taken, "shape", ())) else taken)
    table = layer.positions.tokens(ops.arange(S, dtype="int32"))
    index = ops.arange(num_blocks, dtype="int32")
    xs = dict(zip(("x", "query"), placed, strict=True), key=keys[:, m:], value=values[:, m:])
    if memory_key is not None:
        xs.update(memory_key=memory_key, memory_value=memory_value)
    xs = {name: ops.moveaxis(part, 1, 0) for name, part in xs.items()}
    xs["index"] = index
    if hooks.seed is not None:
        xs["seed"] = fold_in(hooks.seed, SEEDS + 4 * index)
    one = plan._replace(aligned=True, in_slots=False, num_blocks=1, segments=m)

    def step(segments, given):
        window = [
            ops.concatenate([held, ops.expand_dims(given[name], 1)], axis=1)
            for held, name in zip(segments, ("key", "value"), strict=True)
        ]
        memory = [ops.expand_dims(given[name], 1) if name in given else None for name in ("memory_key", "memory_value")]
        here = position._replace(
            block_index=position.block_index + given["index"],
            visible_memories=position.visible_memories + given["index"],
        )
        attended = read(layer, one, given["query"], *window, *memory, here)
        y = hooks.transform(layer.project_output(attended), given["x"], given.get("seed"))
        place = ops.expand_dims(given["index"] * S + ops.arange(S, dtype="int32"), 0)
        real = ops.broadcast_to(ops.logical_and(place >= begin, place < end), ops.shape(y)[:2])
        outputs = [row_ops.zero_rows(part, real) for part in project_outputs(layer, y, table, hooks)]
        if not plan.aligned:  # the first block may hold outputs of earlier calls; zeros stand behind them
            first = ops.cast(given["index"] == 0, outputs[0].dtype)
            outputs = [part + first * held for part, held in zip(outputs, _held(state), strict=True)]
        segments = tuple(
            ops.concatenate([held[:, 1:], ops.expand_dims(part, 1)], axis=1)
            for held, part in zip(segments, outputs, strict=True)
        )
        return segments, (y, *outputs)

    like = (xs["x"][0], xs["key"][0], xs["value"][0])
    _, ys = scan(step, (keys[:, :m], values[:, :m]), xs, like)
    y, output_keys, output_values = (ops.moveaxis(part, 0, 1) for part in ys)
    y = block_ops.to_slots(y)[:, :length] if plan.aligned else block_ops.read_back(y, position.offset, length)
    return y, output_keys, output_values


def _held(state):
    return state.output_key, state.output_value


def lay_out_outputs(layer, y, table, state, position, taken, hooks):
    """Projected outputs of one token a row, `[B, 1, S, K, H]` each, with those of earlier calls before them."""
    new = project_outputs(layer, y, table, hooks)
    real = ops.broadcast_to(ops.reshape(ops.convert_to_tensor(taken) > 0, (-1, 1)), ops.shape(y)[:2])
    return [
        block_ops.lay_out(held, row_ops.zero_rows(part, real), position.offset, taken, layer.block_size, 1)
        for held, part in zip(_held(state), new, strict=True)
    ]


def keep_outputs(layer, state, keys, values, outputs, completed):
    """The `LayerState` after a call: segments of outputs, and inputs and outputs of the unfinished block."""
    m = layer.memory_segments
    slots, waiting = [], []
    for inputs, part in zip((keys, values), outputs, strict=True):
        kept = block_ops.keep_last(ops.concatenate([inputs[:, :m], part], axis=1), completed, m)
        own = block_ops.keep_last(inputs[:, m:], completed, 0)
        slots.append(ops.concatenate([kept[:, : m * layer.block_size], own], axis=1))
        waiting.append(kept[:, m * layer.block_size :])
    return state._replace(key=slots[0], value=slots[1], output_key=waiting[0], output_value=waiting[1])
