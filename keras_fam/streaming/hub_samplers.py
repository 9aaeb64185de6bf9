"""Samplers of KerasHub, where KerasHub is installed: beam and contrastive search, and objects of its other samplers."""

import threading

import keras
import numpy as np
from keras import ops

from keras_fam.ops.programs import small_step
from keras_fam.streaming.samplers import NAMES, check_seed
from keras_fam.streaming.sampling import SamplerCall, token_reader

HUB_NAMES = ("beam", "contrastive")
_searching = threading.Lock()


def find_hub_sampler(sampler):
    """A sampler of KerasHub from a name, a config or an object.

    Raises:
        ValueError: for anything else.
        ImportError: without KerasHub.
    """
    if isinstance(sampler, str) and sampler not in HUB_NAMES:
        raise ValueError(f"The names of samplers are {', '.join([*NAMES, *HUB_NAMES])}; received {sampler!r}.")
    try:
        from keras_hub import samplers
    except ImportError as error:
        raise ImportError(
            f"The sampler {sampler!r} needs KerasHub: pip install 'keras-fam[hub]'. Without it, there are "
            f"{', '.join(NAMES)}."
        ) from error
    found = samplers.get(sampler) if isinstance(sampler, str | dict) else sampler
    if not isinstance(found, samplers.Sampler):
        raise ValueError(
            f"`sampler` must be a name such as 'greedy' or 'top_k', or a sampler of keras_fam.samplers or "
            f"keras_hub.samplers; received {sampler!r}."
        )
    if _hub_class(found) == "SpeculativeSampler":
        raise ValueError("The speculative sampler needs a second model; received it for one. Choose another sampler.")
    if getattr(found, "return_all_beams", False):
        raise ValueError("A stream continues with one beam; received `return_all_beams=True`. Leave it at False.")
    return found


def _hub_class(sampler):
    """Name of the KerasHub sampler that this one is, or is derived from."""
    names = [c.__name__ for c in type(sampler).__mro__ if c.__module__.startswith("keras_hub.")]
    return names[0] if names else ""


class HubSamplerCall(SamplerCall):
    """`SamplerCall` of a KerasHub sampler, whose random numbers come from seed generators of its own.

    The generators go on when a call has ended well. Two threads that draw from one object at once draw the same
    numbers: give each thread its own.
    """

    def __init__(self, sampler, seed, count):
        from keras_hub import samplers

        self.sampler, self.keeps_seeds = sampler, seed is None
        self.stepwise = type(sampler).__call__ is samplers.Sampler.__call__
        self.exact_width = _hub_class(sampler) == "ContrastiveSampler"  # looks at all columns
        seed = check_seed(seed)
        self.seeds = [
            ops.copy(v.value) if seed is None else ops.convert_to_tensor(np.array([(seed + i) % 2**32, 0]), v.dtype)
            for i, v in enumerate(sampler.variables)
        ]
        own = type(sampler).__module__.startswith("keras_hub.")
        config = {name: value for name, value in sampler.get_config().items() if name != "seed"} if own else {}
        self.key = (type(sampler), repr(sorted(config.items()))) if own else (sampler,)
        if sampler.variables and not self.stepwise:
            self.guard = _searching  # KerasHub's own loop holds the seeds in variables while it runs
        self._make = (lambda: type(sampler).from_config(config)) if own else (lambda: sampler)

    def chooser(self):
        sampler = self._make()

        def choose(logits, seeds):
            pairs = list(zip(sampler.variables, seeds, strict=True))
            with keras.StatelessScope(state_mapping=pairs) as scope:
                token = sampler.get_next_token(sampler.compute_probabilities(logits))
            return ops.cast(token, "int32"), [_value(scope, *pair) for pair in pairs]

        return choose

    def loop(self, model, size):
        if self.stepwise:
            return super().loop(model, size)
        sampler, exact = self._make(), self.exact_width

        def run(seeds, state, logits, steps, stops):
            ends = [stops[i] for i in range(stops.shape[0])]
            for variable, seed in zip(sampler.variables, seeds, strict=True):
                variable.assign(seed)
            tokens = _sample(model, state, logits, size, sampler, ends, None if exact else steps)
            return tokens, [ops.copy(variable.value) for variable in sampler.variables]

        return run

    def commit(self, seeds):
        self.seeds = seeds
        if self.keeps_seeds:
            for variable, seed in zip(self.sampler.variables, seeds, strict=True):
                variable.assign(seed)

    def undo(self):
        pass  # seeds are kept at the end of a call


def _value(scope, variable, before):
    after = scope.get_current_value(variable)
    return before if after is None else after


def _sample(model, state, next_logits, size, sampler, stop_token_ids, steps):
    """Tokens `[B, size]` from KerasHub's own loop; see `keras_fam.streaming.sampling.sample`."""
    first = ops.cast(0 if steps is None else size - steps, "int32")
    rows = ops.shape(next_logits)[0]
    with_hidden = _hub_class(sampler) == "ContrastiveSampler"
    hidden, given = (), {}
    read = token_reader(model)
    if with_hidden:
        width = model.backbone.hidden_dim
        hidden = ops.zeros((rows, width), "float32")
        given["hidden_states"] = ops.zeros((rows, size, width), "float32")
        read = small_step(model, "read_token_with_hidden", lambda token, state: _read_with_hidden(model, token, state))

    def step(tokens, state, index):
        token = ops.expand_dims(ops.take(tokens, index - 1, axis=1), 1)
        logits, *hidden, state = read(token, state)
        return state, logits, hidden[0] if hidden else ()

    def following(tokens, cache, index):
        """What KerasHub calls `next`: `(logits, hidden, cache)` for the token at `index`; the first logits are here."""
        cache = ops.cond(index > first, lambda: step(tokens, cache[0], index), lambda: cache)
        return cache[1], cache[2], cache

    tokens = sampler(
        next=following,
        prompt=ops.full((rows, size), -1, "int32"),  # no token: it could be a stop token
        cache=(state, ops.cast(next_logits, "float32"), hidden),
        index=first,
        mask=ops.broadcast_to(ops.expand_dims(ops.arange(size, dtype="int32") < first, 0), (rows, size)),
        stop_token_ids=tuple(stop_token_ids) or None,
        model=model,
        **given,
    )
    return ops.cast(tokens, "int32")


def _read_with_hidden(model, token, state):
    hidden, state = model.backbone.advance(token, state)
    logits = model.backbone.token_embedding(hidden, reverse=True)
    return ops.cast(logits[:, 0], "float32"), ops.cast(hidden[:, 0], "float32"), state
