"""A call's use of a sampler, and the searches that choose several tokens together, on a copy of a stream's state."""

import contextlib
import json

import numpy as np
from keras import ops

from keras_fam.ops.backend import compiled
from keras_fam.ops.programs import programs_of, small_step
from keras_fam.ops.random import fold_in
from keras_fam.streaming.samplers import check_seed


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
        """Of a sampler that is not `stepwise`: `run(seeds, state, logits, steps, stops)`, which returns int32
        `[B, size]`, the last `steps` columns of which are the tokens, and the seeds after them."""
        raise NotImplementedError

    def commit(self, seeds):
        """Takes note of how far the random numbers were used."""
        self.seeds = seeds

    def undo(self):
        """Gives the random numbers of a failed call back."""
        if self.first is not None:
            self.sampler.return_seeds(self.first, self.count)


def search(stream, count, call, stops):
    """The tokens of a sampler that is not `stepwise`; the stream is not changed.

    Returns:
        `(tokens, lengths)`: NumPy int32 `[B, count]`, and how many of them each row keeps: its stop token is the last.

    The buffer is a power of two, the loop runs `count` times whatever its size: few programs and no wasted step.
    """
    model = stream.model  # programs outlive the stream
    size, num_stops, given = count, *padded_stops(stops)
    if not call.exact_width:
        size = buffer_size(count)
    run = programs_of(model).get(
        "search", size, num_stops, *call.key, make=lambda: compiled(call.loop(model, size), lambda: model.variables)
    )
    steps = ops.convert_to_tensor(count, dtype="int32")
    with call.guard:
        tokens, seeds = run(call.seeds, stream.state, stream.next_logits, steps, ops.convert_to_tensor(given))
    tokens = ops.convert_to_numpy(tokens)[:, size - count :]
    call.commit(seeds)
    stopped = np.isin(tokens, stops)
    return tokens, np.where(stopped.any(axis=1), stopped.argmax(axis=1) + 1, count).astype("int32")


def buffer_size(count):
    """Columns of the buffer of a program for `count` tokens: a power of two, so that few programs serve all counts."""
    return max(16, 1 << (count - 1).bit_length())


def padded_stops(stops):
    """`(n, int32 [n])`: stop tokens padded to a power of two with what is no token; 0 without any."""
    number = 1 << (len(stops) - 1).bit_length() if stops else 0
    return number, np.array([*stops, *[-2] * (number - len(stops))], "int32")
