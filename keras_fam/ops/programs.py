"""The compiled programs of a model: made once, kept with the model, shared by the streams and threads that run it."""

import collections
import threading

from keras_fam.ops.backend import compiled, runs_eagerly


class ProgramCache:
    """Compiled programs by kind and details, such as `("sample", 16, 2)`; each is made once, also for several threads.

    A copy or pickle of a cache is empty: a program reads the variables of the model that it was made for.
    """

    def __init__(self):
        self._programs, self._uses, self._lock = {}, collections.Counter(), threading.RLock()

    def get(self, kind: str, *details, make):
        """The program of this kind; `make()` returns it if there is none yet."""
        key = (kind, *details)
        with self._lock:
            if key not in self._programs:
                self._programs[key] = make()
            return self._programs[key]

    def get_after(self, uses: int, kind: str, *details, make, until):
        """As `get`, but the first `uses` calls return `until`, a function that needs no compilation."""
        key = (kind, *details)
        with self._lock:
            self._uses[key] += 1
            if self._uses[key] <= uses:
                return until
        return self.get(*key, make=make)

    def keys(self, kind=None):
        """The keys of all programs, or of those of one kind."""
        with self._lock:
            return [key for key in self._programs if kind in (None, key[0])]

    def __len__(self):
        return len(self._programs)

    def __copy__(self):
        return type(self)()

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return type(self), ()


def programs_of(model) -> ProgramCache:
    """The programs of a model."""
    return vars(model).setdefault("_programs_of_streams", ProgramCache())  # past Keras' tracking of attributes


def small_step(model, name: str, function, *details, warmup_calls=None):
    """A function of tensors that a compiled loop calls: unchanged, except on torch, where it runs from a traced graph.

    Args:
        model: the model whose variables it reads, which keeps the graph.
        name, *details: what tells it from other functions of the model.
        warmup_calls: see `compiled`. More than the default where the loop's step itself may be traced before.
        function: see `compiled`.
    """
    if not runs_eagerly():
        return function
    return programs_of(model).get(
        name,
        *details,
        make=lambda: compiled(function, lambda: model.variables, record="anywhere", warmup_calls=warmup_calls),
    )
