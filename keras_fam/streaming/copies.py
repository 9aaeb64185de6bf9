"""Copies and pickles of a `StreamingModel`."""

import copy
import threading

import keras
from keras import ops

from keras_fam.state import map_specs


class StreamCopies:
    """`copy.copy`, `copy.deepcopy` and `pickle` of streams: the copy continues from the position of the streams."""

    def __copy__(self):
        """Streams of their own over the same model."""
        return self._copied(lambda value: value)

    def __deepcopy__(self, memo):
        """Streams of their own over a copy of the model."""
        return self._copied(lambda value: copy.deepcopy(value, memo), memo)

    def __getstate__(self):
        with self._lock:
            self._refuse_compiled("pickled")
            kept = {name: value for name, value in vars(self).items() if name not in ("_lock", "_state")}
            leaves = [ops.convert_to_numpy(x) for x in keras.tree.flatten(self._state)]
            logits = self.next_logits if isinstance(self.next_logits, tuple) else ops.convert_to_numpy(self.next_logits)
            return {**kept, "next_logits": logits, "_leaves": leaves}

    def __setstate__(self, kept):
        leaves = iter(kept.pop("_leaves"))
        vars(self).update(kept, _lock=threading.RLock())
        spec = self.model.state_spec(self.batch_size)
        self._state = map_specs(lambda s: ops.convert_to_tensor(next(leaves), dtype=s.dtype), spec)
        if not isinstance(self.next_logits, tuple):
            self.next_logits = ops.convert_to_tensor(self.next_logits)

    def _copied(self, copied, memo=None):
        with self._lock:
            self._refuse_compiled("copied")
            new = object.__new__(type(self))
            if memo is not None:
                memo[id(self)] = new
            own = {"_lock": threading.RLock(), "_state": self._state, "next_logits": self.next_logits}
            others = {name: copied(value) for name, value in vars(self).items() if name not in own}
            vars(new).update(others, **own)  # tensors are never written in place, so both may hold them
            new.position = self.position.copy()
            return new

    def _refuse_compiled(self, what):
        if self._trainer is not None:
            raise TypeError(
                f"A stream that trains cannot be {what}: its optimizer's state would be lost. Copy or save the model, "
                "make a StreamingModel of it, and hand over `get_state()` and `next_logits` with `set_state`."
            )
