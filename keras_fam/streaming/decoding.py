"""Decoding: a stream's rows choose a token, read it, and so on, many tokens in one program.

On JAX and TensorFlow, a call is one compiled loop. Within it, an inner loop runs over the tokens with which no row
completes its block: its body has no branch, and writes new keys into the buffers where they lie. A token that completes
a block is read by the outer loop. On torch, steps are recorded and, on a GPU, captured several at a time (`TokenLoop`);
the host, which knows where the rows stand, picks the steps that complete blocks.

Either way the tokens, and the state after them, are those of reading each token as it is chosen.
"""

import numpy as np
from keras import ops

from keras_fam.ops.backend import compiled, runs_eagerly, token_loop
from keras_fam.ops.programs import programs_of, small_step
from keras_fam.ops.scan import branch
from keras_fam.ops.torch_graph import WARMUP_CALLS
from keras_fam.streaming.sampling import buffer_size, padded_stops


def decode(stream, count, call, stops, alive=None):
    """Lets a stream choose and read up to `count` tokens per row, fewer where rows end.

    The stream itself is not changed.

    Args:
        stream: a `StreamingModel` of a language model, with known logits in all rows.
        count: a positive int.
        call: a `SamplerCall` that chooses tokens one by one.
        stops: tuple of ints, tokens at which a row ends, which it still reads.
        alive: None (all), or int32 `[B]`: 1 in rows that have not ended.

    Returns:
        `(tokens, seeds, state, logits)`: NumPy int32 `[B, count]`, −1 behind a row's end; the seeds after the last
        draw; `StreamState` and float32 `[B, V]` after the tokens.
    """
    alive = np.ones(stream.batch_size, "int32") if alive is None else alive
    _, given = padded_stops(stops)
    start = (call.seeds, stream.state, stream.next_logits, ops.convert_to_tensor(alive), ops.convert_to_tensor(given))
    run = _step_by_step if runs_eagerly() else _in_one_program
    return run(stream, count, call, start, alive, stops)


def _token_step(model, choose, completes, all_alive):
    """`step(seeds, state, logits, alive, stops)`: the rows choose a token each, and those that go on read it.

    Returns `(token, carry)`: int32 `[B]`, −1 in rows that have ended, and the next arguments.
    """

    def advance(token, state, alive):
        return model.advance(token, state, lengths=None if all_alive else alive, completes=completes)

    # A step whose sampler can't be traced is not traced as a whole: then this is.
    read = small_step(model, "read_rows", advance, completes, all_alive, warmup_calls=2 * WARMUP_CALLS)

    def step(seeds, state, logits, alive, stops):
        token, seeds = choose(logits, seeds)
        outputs, state = read(ops.expand_dims(token, 1), state, alive)
        after = ops.cast(outputs[:, 0], logits.dtype)
        if not all_alive:
            going = alive > 0
            after = ops.where(ops.expand_dims(going, 1), after, logits)
            token = ops.where(going, token, -1)
        if stops.shape[0]:
            stopped = ops.any(ops.expand_dims(token, 1) == stops, axis=1)
            alive = ops.where(stopped, ops.zeros_like(alive), alive)
        return token, (seeds, state, after, alive, stops)

    return step


def _in_one_program(stream, count, call, start, alive, stops):
    """A buffer of a power of two, of which the first `count` columns are filled: few programs."""
    model = stream.model
    size, num_stops = buffer_size(count), start[-1].shape[0]

    def make():
        return compiled(_loop(model, call.chooser(), size), lambda: model.variables)

    run = programs_of(model).get("decode", size, num_stops, *call.key, make=make)
    tokens, seeds, state, logits = run(*start, ops.convert_to_tensor(count, dtype="int32"))
    return np.array(ops.convert_to_numpy(tokens))[:, :count], seeds, state, logits


def _loop(model, choose, size):
    """`run(seeds, state, logits, alive, stops, count)` for a compiled program; see `decode` for its result."""
    steps = {completes: _token_step(model, choose, completes, all_alive=False) for completes in (False, True)}
    last = model.block_size - 1

    def run(seeds, state, logits, alive, stops, count):
        def goes_on(index, tokens, seeds, state, logits, alive):
            return ops.logical_and(index < count, ops.any(alive > 0))

        def within_blocks(index, tokens, seeds, state, logits, alive):
            completing = ops.any(ops.logical_and(alive > 0, state.position.offset == last))
            return ops.logical_and(goes_on(index, tokens, seeds, state, logits, alive), ops.logical_not(completing))

        def token(completes, index, tokens, *carry):
            chosen, (*carry, _) = steps[completes](*carry, stops)
            return index + 1, ops.slice_update(tokens, [0, index], ops.expand_dims(chosen, 1)), *carry

        def to_block_end(*carry):
            carry = ops.while_loop(within_blocks, lambda *carry: token(False, *carry), carry)
            return branch(goes_on(*carry), lambda: token(True, *carry), lambda: tuple(carry))

        tokens = ops.full((ops.shape(logits)[0], size), -1, "int32")
        carry = (ops.zeros((), "int32"), tokens, seeds, state, logits, alive)
        _, tokens, seeds, state, logits, _ = ops.while_loop(goes_on, to_block_end, carry)
        return tokens, seeds, state, logits

    return run


def _step_by_step(stream, count, call, start, alive, stops):
    """Launches of recorded steps; the host follows where the rows stand and which have ended."""
    model, block_size = stream.model, stream.block_size
    chooser = call.chooser()

    def make():
        return token_loop(lambda kind: _token_step(model, chooser, *kind), lambda: model.variables)

    loop = programs_of(model).get("decode", stream.batch_size, *call.key, make=make)()
    tokens, index = np.full((stream.batch_size, count), -1, "int32"), 0
    going, offset = alive > 0, stream.position % block_size
    with loop.holding(start):
        while index < count and going.any():
            room = int((block_size - 1 - offset[going]).min())  # tokens before some row completes its block
            size = min(room, count - index, loop.tokens_per_launch)
            size = 1 << (size.bit_length() - 1) if size else 1
            all_alive = bool(going.all()) and (size == 1 or not stops)
            for token in loop.launch((not room, all_alive), size):
                token = ops.convert_to_numpy(token)
                tokens[:, index] = np.where(going, token, -1)
                offset, going = offset + going, going & ~np.isin(token, stops)
                index += 1
                offset = np.where(offset == block_size, 0, offset)
        seeds, state, logits, _, _ = loop.carry()
    return tokens, seeds, state, logits
