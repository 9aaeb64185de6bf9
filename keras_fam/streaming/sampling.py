"""Sampling on a copy of a stream's state: one compiled loop of one-token steps around a KerasHub sampler."""

import contextlib

import numpy as np
from keras import ops

from keras_fam.ops.backend import compiled, small_step

SMALLEST_BUFFER = 16


def sample(model, state, next_logits, max_new_tokens, sampler, stop_token_ids=(), *, steps=None):
    """The next tokens of every row, chosen by a KerasHub sampler; a pure function, to be compiled by the caller.

    Random samplers advance their own seed generators by `assign`: in a `keras.StatelessScope` the caller hands those
    values in and takes them out.

    Args:
        model: a built `TransformerFAMCausalLM`.
        state: `StreamState` of B rows. It is not changed.
        next_logits: `[B, V]`, the logits after the last token that each row has read.
        max_new_tokens: N, a Python int, the width of the result.
        sampler: a `keras_hub.samplers.Sampler`.
        stop_token_ids: ints or int32 scalar tensors. Sampling ends once every row has chosen one of them.
        steps: None (N), or an int32 scalar tensor from 1 to N: how many tokens are wanted. They are the last `steps`
            columns of the result, so that one program serves every number up to N. Not for the contrastive sampler,
            which looks at all columns.

    Returns:
        int32 `[B, N]`; what stands behind a row's first stop token is undefined.
    """
    first = ops.cast(0 if steps is None else max_new_tokens - steps, "int32")
    rows, width = ops.shape(next_logits)[0], max_new_tokens
    with_hidden = class_name(sampler) == "ContrastiveSampler"
    given = {}
    hidden = ()
    if with_hidden:
        hidden = ops.zeros((rows, model.backbone.hidden_dim), "float32")
        given["hidden_states"] = ops.zeros((rows, width, model.backbone.hidden_dim), "float32")

    def one_token(token, state):
        if not with_hidden:
            logits, state = model.advance(token, state)
            return state, ops.cast(logits[:, 0], "float32"), ()
        hidden, state = model.backbone.advance(token, state)
        logits = model.backbone.token_embedding(hidden, reverse=True)
        return state, ops.cast(logits[:, 0], "float32"), ops.cast(hidden[:, 0], "float32")

    step = small_step(model, ("one token", with_hidden), one_token)

    def read(tokens, state, index):
        return step(ops.expand_dims(ops.take(tokens, index - 1, axis=1), 1), state)

    def following(tokens, cache, index):
        """What KerasHub calls `next`: `(logits, hidden, cache)` for the token at `index`; the first logits are here."""
        cache = ops.cond(index > first, lambda: read(tokens, cache[0], index), lambda: cache)
        return cache[1], cache[2], cache

    tokens = sampler(
        next=following,
        prompt=ops.full((rows, width), -1, "int32"),  # no token: it could be a stop token
        cache=(state, ops.cast(next_logits, "float32"), hidden),
        index=first,
        mask=ops.broadcast_to(ops.expand_dims(ops.arange(width, dtype="int32") < first, 0), (rows, width)),
        stop_token_ids=tuple(stop_token_ids) or None,
        model=model,
        **given,
    )
    return ops.cast(tokens, "int32")


def class_name(sampler):
    """Name of the KerasHub sampler that this one is, or is derived from."""
    names = [c.__name__ for c in type(sampler).__mro__ if c.__module__.startswith("keras_hub.")]
    return names[0] if names else ""


def _samplers():
    try:
        from keras_hub import samplers
    except ImportError as error:
        raise ImportError("Generation uses KerasHub's samplers: pip install 'keras-fam[hub]'.") from error
    return samplers


def chooses_one_by_one(sampler):
    """Whether a KerasHub sampler looks at the logits of the next token alone."""
    return type(sampler).__call__ is _samplers().Sampler.__call__


def find_sampler(sampler, seed, stepwise=False):
    """A sampler object from what the user gave, seeded anew if `seed` is given."""
    samplers = _samplers()
    found = samplers.get(sampler)
    if not isinstance(found, samplers.Sampler):
        raise ValueError(
            f"`sampler` is a name such as 'greedy' or 'top_k', or a keras_hub.samplers.Sampler; received {sampler!r}."
        )
    name = class_name(found)
    if name == "SpeculativeSampler":
        raise ValueError("The speculative sampler needs a second model; received it for one. Choose another sampler.")
    if getattr(found, "return_all_beams", False):
        raise ValueError("A stream goes on with one beam; received `return_all_beams=True`. Leave it at False.")
    if stepwise and not chooses_one_by_one(found):
        raise ValueError(
            f"Tokens come one by one from samplers that choose them one by one; received {type(found).__name__}. "
            "Use `generate`, or a greedy, random, top-k or top-p sampler."
        )
    if seed is not None:
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
            raise ValueError(f"`seed` is a whole number from 0 to 2³² − 1; received {seed!r}.")
        for i, variable in enumerate(found.variables):
            variable.assign(np.array([(int(seed) + i) % 2**32, 0], variable.dtype))
    return found


@contextlib.contextmanager
def program(stream, kind, sampler, make):
    """A compiled function around a sampler: `run(*tensors)`, whose draws go on from the sampler's seeds.

    Samplers of KerasHub with equal settings share one program, which holds a copy; others are told apart by identity,
    so keep one object for many calls. If the block raises, the sampler's seeds are as they were.

    Args:
        stream: `StreamingModel`; its model keeps the program, for all streams.
        kind: what tells programs apart, besides the sampler.
        sampler: the sampler of this call.
        make: `make(sampler)` returns the function of tensors to compile. It may hold the model, but not the stream.
    """
    ours = type(sampler).__module__.startswith("keras_hub.")
    config = {k: v for k, v in sampler.get_config().items() if k != "seed"} if ours else {}
    key = (*kind, type(sampler), repr(sorted(config.items()))) if ours else (*kind, sampler)
    if key not in stream._programs:
        own = type(sampler).from_config(config) if ours else sampler
        function = make(own)

        def seeded(seeds, *args):
            for variable, seed in zip(own.variables, seeds, strict=True):
                variable.assign(seed)
            result = function(*args)
            return result, [ops.copy(variable.value) for variable in own.variables]

        model = stream.model
        stream._programs[key] = compiled(seeded, lambda: model.variables)
    call, before = stream._programs[key], [copied(v.value) for v in sampler.variables]

    def run(*args):
        seeds = [ops.convert_to_tensor(v.value) for v in sampler.variables]
        result, seeds = call(seeds, *args)
        for variable, seed in zip(sampler.variables, seeds, strict=True):
            variable.assign(seed)
        return result

    try:
        yield run
    except BaseException:
        for variable, seed in zip(sampler.variables, before, strict=True):
            variable.assign(seed)
        raise


def copied(x):
    return np.array(ops.convert_to_numpy(x))


def choose(stream, count, sampler, stops):
    """`(tokens, lengths)`: NumPy int32 `[B, count]`, and how many of them each row keeps: its stop token is the last.

    The buffer is a power of two, the loop runs `count` times whatever its size: few programs and no wasted step.
    """
    exact = class_name(sampler) == "ContrastiveSampler"
    size = count if exact else max(SMALLEST_BUFFER, 1 << (count - 1).bit_length())
    num_stops = 1 << (len(stops) - 1).bit_length() if stops else 0
    given = np.array([*stops, *[-2] * (num_stops - len(stops))], "int32")  # a program serves any stop tokens

    model = stream.model

    def make(sampler):
        def run(state, logits, steps, given):
            ends = [given[i] for i in range(num_stops)]
            return sample(model, state, logits, size, sampler, ends, steps=None if exact else steps)

        return run

    with program(stream, ("sample", size, num_stops), sampler, make) as run:
        steps = ops.convert_to_tensor(count, dtype="int32")
        tokens = run(stream.state, stream.next_logits, steps, ops.convert_to_tensor(given))
        tokens = ops.convert_to_numpy(tokens)[:, size - count :]
    stopped = np.isin(tokens, stops)
    return tokens, np.where(stopped.any(axis=1), stopped.argmax(axis=1) + 1, count).astype("int32")
