"""Choosing tokens on a copy of a stream's state: one compiled loop of one-token steps around a sampler."""

import contextlib
import json

import numpy as np
from keras import ops

from keras_fam.ops.backend import compiled
from keras_fam.ops.programs import programs_of, small_step
from keras_fam.ops.random import fold_in
from keras_fam.streaming.samplers import check_seed

SMALLEST_BUFFER = 16


def sample(model, state, next_logits, max_new_tokens, choose, seeds, stop_token_ids=(), *, steps=None):
    """The next tokens of every row; a pure function, to be compiled by the caller.

    Args:
        model: a built `TransformerFAMCausalLM`.
        state: `StreamState` of B rows. It is not changed.
        next_logits: `[B, V]`, the logits after the last token that each row has read.
        max_new_tokens: N, a Python int, the width of the result.
        choose: `choose(logits, seeds)` returns int32 `[B]` and the next seeds; see `SamplerCall.chooser`.
        seeds: a list of tensors.
        stop_token_ids: int32 `[n]`. Sampling ends once every row has chosen one of them.
        steps: None (N), or an int32 scalar tensor from 1 to N: how many tokens are wanted. They are the last `steps`
            columns of the result, so that one program serves every number up to N.

    Returns:
        `(tokens, seeds)`: int32 `[B, N]`, undefined behind a row's first stop token; and the seeds after the last draw.
    """
    step = token_reader(model)
    stops = ops.reshape(ops.cast(ops.convert_to_tensor(stop_token_ids), "int32"), (-1,))

    def stopped(token):
        return ops.any(ops.expand_dims(token, 1) == stops, axis=1)

    def write(tokens, token, index):
        return ops.slice_update(tokens, [0, index], ops.expand_dims(token, 1))

    def going(index, tokens, token, done, state, seeds):
        return ops.logical_and(index < max_new_tokens, ops.logical_not(ops.all(done)))

    def body(index, tokens, token, done, state, seeds):
        logits, state = step(ops.expand_dims(token, 1), state)
        token, seeds = choose(logits, seeds)
        tokens = write(tokens, token, index)
        return index + 1, tokens, token, ops.logical_or(done, stopped(token)), state, seeds

    first = ops.cast(0 if steps is None else max_new_tokens - steps, "int32")
    token, seeds = choose(ops.cast(next_logits, "float32"), seeds)
    tokens = ops.full((ops.shape(next_logits)[0], max_new_tokens), -1, "int32")  # no token: it could be a stop token
    start = (first + 1, write(tokens, token, first), token, stopped(token), state, seeds)
    _, tokens, _, _, _, seeds = ops.while_loop(going, body, start)
    return tokens, seeds


def token_reader(model):
    """`read(token, state)` for a compiled loop: int32 `[B, 1]` to float32 logits `[B, V]` and the next state."""

    def read(token, state):
        logits, state = model.advance(token, state)
        return ops.cast(logits[:, 0], "float32"), state

    return small_step(model, "read_token", read)


class SamplerCall:
    """One call's use of a sampler: the programs that it needs, and where its random numbers come from.

    Args:
        sampler: a `keras_fam.samplers.Sampler`.
        seed: None (the sampler's own), or an integer for this call alone.
        count: how many tokens a row is to get at most.

    Attributes:
        key: tells the programs of samplers with other settings apart. Those of custom classes are told apart by the
            object: keep one for many calls.
        seeds: a list of tensors, which programs take and return.
        stepwise: whether tokens are chosen one by one, from the logits of the next token alone.
        exact_width: whether a program serves one number of tokens only.
        guard: context in which its programs run.
    """

    stepwise, exact_width, guard = True, False, contextlib.nullcontext()

    def __init__(self, sampler, seed, count):
        self.sampler, self.count, self.first = sampler, count, None
        seed = check_seed(seed)
        number = 0
        if seed is None:
            seed, number = sampler.take_seeds(count)
            self.first = number
        own = type(sampler).__module__.startswith("keras_fam.")
        config = {name: value for name, value in sampler.get_config().items() if name != "seed"} if own else {}
        self.key = (type(sampler), json.dumps(config, sort_keys=True)) if own else (sampler,)
        seed = np.array([seed, 0], "uint32").astype("int32")
        self.seeds = [ops.convert_to_tensor(seed), ops.convert_to_tensor(np.int32(number % 2**31))]

    def chooser(self):
        """`choose(logits, seeds)`: the next token of every row, int32 `[B]`, and the seeds of the token after it."""
        sampler = self.sampler

        def choose(logits, seeds):
            seed, number = seeds
            return ops.cast(sampler.choose(logits, fold_in(seed, number)), "int32"), [seed, number + 1]

        return choose

    def loop(self, model, size):
        """`run(seeds, state, logits, steps, stops)`: the tokens of `sample`, and the seeds after them."""
        choose = self.chooser()

        def run(seeds, state, logits, steps, stops):
            return sample(model, state, logits, size, choose, seeds, stops, steps=steps)

        return run

    def commit(self, seeds):
        """Takes note of how far the random numbers were used."""
        self.seeds = seeds

    def undo(self):
        """Gives the random numbers of a failed call back."""
        if self.first is not None:
            self.sampler.return_seeds(self.first, self.count)


def choose(stream, count, call, stops):
    """`(tokens, lengths)`: NumPy int32 `[B, count]`, and how many of them each row keeps: its stop token is the last.

    The buffer is a power of two, the loop runs `count` times whatever its size: few programs and no wasted step.
    """
    model = stream.model  # programs outlive the stream
    size = count if call.exact_width else max(SMALLEST_BUFFER, 1 << (count - 1).bit_length())
    num_stops = 1 << (len(stops) - 1).bit_length() if stops else 0
    given = np.array([*stops, *[-2] * (num_stops - len(stops))], "int32")  # a program serves any stop tokens
    run = programs_of(model).get(
        "sample", size, num_stops, *call.key, make=lambda: compiled(call.loop(model, size), lambda: model.variables)
    )
    steps = ops.convert_to_tensor(count, dtype="int32")
    with call.guard:
        tokens, seeds = run(call.seeds, stream.state, stream.next_logits, steps, ops.convert_to_tensor(given))
    tokens = ops.convert_to_numpy(tokens)[:, size - count :]
    call.commit(seeds)
    stopped = np.isin(tokens, stops)
    return tokens, np.where(stopped.any(axis=1), stopped.argmax(axis=1) + 1, count).astype("int32")
