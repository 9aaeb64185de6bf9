"""Samplers: how the next token follows from a model's logits. They need no KerasHub, and may be shared by threads.

```python
sampler = keras_fam.samplers.TopPSampler(p=0.9, temperature=0.7, seed=1)
stream.generate([[5, 3, 8]], max_new_tokens=20, sampler=sampler)
lm.compile(sampler="top_k")     # "greedy", "random", "top_k", "top_p": the defaults of each
```
"""

import random
import threading

import keras
import numpy as np
from keras import ops

from keras_fam.ops.backend import categorical

_drawing = threading.Lock()


class Sampler:
    """Base of the samplers. A subclass implements `choose` and, if it has arguments, `get_config`.

    ```python
    @keras.saving.register_keras_serializable(package="mine")
    class Unlike(keras_fam.samplers.Sampler):
        def __init__(self, token, **kwargs):
            super().__init__(**kwargs)
            self.token = token

        def choose(self, logits, seed):
            unwanted = keras.ops.arange(logits.shape[1]) == self.token
            return self.draw(keras.ops.where(unwanted, -float("inf"), logits), seed)

        def get_config(self):
            return {**super().get_config(), "token": self.token}
    ```

    Args:
        temperature: divides the logits; above 1 the tokens become more equally likely, below 1 less. Positive.
        seed: None, or an integer from 0 to 2³² − 1. A sampler keeps its random state from call to call; two samplers
            with the same seed draw the same tokens in the same calls. Numbers differ between backends. None takes a
            seed from Python's `random` (see `keras.utils.set_random_seed`).
    """

    def __init__(self, *, temperature: float = 1.0, seed: int | None = None):
        if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
            raise ValueError(
                f"`temperature` must be a positive number; received {temperature!r}. For the most likely token, take "
                "the greedy sampler."
            )
        self.temperature, self.seed = float(temperature), check_seed(seed)
        self._own_seed, self._drawn = self.seed, 0

    def choose(self, logits, seed):
        """The next token of every row; a pure function of tensors, which runs in compiled programs.

        Args:
            logits: float32 `[B, V]`.
            seed: int32 `[2]`, another one for every token.

        Returns:
            int32 `[B]`.
        """
        raise NotImplementedError

    def draw(self, logits, seed):
        """A random token of every row, int32 `[B]`: each as likely as softmax(logits / temperature) says."""
        return categorical(logits / self.temperature, seed)

    def take_seeds(self, count: int):
        """`(seed, first)`: the sampler's seed, and the number of the first of `count` draws that no other call gets."""
        with _drawing:
            if self._own_seed is None:
                self._own_seed = random.getrandbits(32)
            first, self._drawn = self._drawn, self._drawn + count
        return self._own_seed, first

    def return_seeds(self, first: int, count: int):
        """Undoes `take_seeds`, for a call that failed, unless another call has taken seeds since."""
        with _drawing:
            if self._drawn == first + count:
                self._drawn = first

    def get_config(self):
        return {"temperature": self.temperature, "seed": self.seed}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.get_config().items())})"


@keras.saving.register_keras_serializable(package="keras_fam")
class GreedySampler(Sampler):
    """The most likely token, always. `"greedy"`"""

    def __init__(self):
        super().__init__()

    def choose(self, logits, seed):
        return ops.cast(ops.argmax(logits, axis=-1), "int32")

    def get_config(self):
        return {}


@keras.saving.register_keras_serializable(package="keras_fam")
class RandomSampler(Sampler):
    """Any token, as likely as the model says. `"random"`

    Args: see `Sampler`.
    """

    def choose(self, logits, seed):
        return self.draw(logits, seed)


@keras.saving.register_keras_serializable(package="keras_fam")
class TopKSampler(Sampler):
    """One of the `k` most likely tokens. `"top_k"`

    Args:
        k: a positive integer; more than V means V.
        temperature, seed: see `Sampler`.
    """

    def __init__(self, k: int = 5, **kwargs):
        super().__init__(**kwargs)
        self.k = _check_k(k)

    def choose(self, logits, seed):
        return _draw_among_best(self, logits, self.k, seed)

    def get_config(self):
        return {"k": self.k, **super().get_config()}


@keras.saving.register_keras_serializable(package="keras_fam")
class TopPSampler(Sampler):
    """One of the fewest tokens that together have at least the probability `p`. `"top_p"`

    Args:
        p: above 0, at most 1. The most likely token is always among them.
        k: None, or how many of the most likely tokens are looked at: for a large vocabulary, sorting fewer is faster.
        temperature, seed: see `Sampler`.
    """

    def __init__(self, p: float = 0.1, k: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if not isinstance(p, int | float) or not 0 < p <= 1:
            raise ValueError(f"`p` must be a probability above 0 and at most 1; received {p!r}.")
        self.p, self.k = float(p), None if k is None else _check_k(k)

    def choose(self, logits, seed):
        return _draw_among_best(self, logits, self.k, seed, self.p)

    def get_config(self):
        return {"p": self.p, "k": self.k, **super().get_config()}


def _draw_among_best(sampler, logits, k, seed, p=1.0):
    """A token drawn among the `k` best (None: all), of them among the fewest with probability `p` together."""
    size = logits.shape[-1] if k is None else min(k, logits.shape[-1])
    best, tokens = ops.top_k(logits, size)
    if p < 1.0:
        probabilities = ops.softmax(logits / sampler.temperature, axis=-1)
        probabilities = ops.take_along_axis(probabilities, tokens, axis=-1)
        before = ops.cumsum(probabilities, axis=-1) - probabilities  # what the more likely tokens have together
        first = ops.arange(size) == 0  # rounding could leave none
        best = ops.where(ops.logical_or(before < p, first), best, -float("inf"))
    place = ops.expand_dims(sampler.draw(best, seed), 1)
    return ops.cast(ops.take_along_axis(tokens, place, axis=-1)[:, 0], "int32")


def _check_k(k):
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"`k` must be a positive integer; received {k!r}.")
    return int(k)


def check_seed(seed):
    """None or `seed` as an int; ValueError if it is neither."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be an integer from 0 to 2³² − 1; received {seed!r}.")
    return int(seed)


NAMES = {"greedy": GreedySampler, "random": RandomSampler, "top_k": TopKSampler, "top_p": TopPSampler}
