"""One turn of a stream: new tokens to read, tokens to generate, and what has become of it."""

import dataclasses
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_fam.serve.errors import BadRequest, ServeError


class Before(NamedTuple):
    """Where a stream stands when a turn begins.

    Attributes:
        position: tokens that it has read; 0 for a new one.
        reason: why its last turn ended (`"stop"`, `"length"`), or None.
    """

    position: int = 0
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What a turn is to do.

    Args:
        token_ids: ids that the stream reads first, or a function of `Before` that returns them.
        max_tokens: how many tokens are generated at most; 0 reads only.
        session: the name of a session, or None for a stream of this turn alone.
        create: whether the session begins with this turn.
        temperature: 0 takes the most likely token.
        top_p: see `sampling.draw`.
        seed: an integer from 0 to 2⁶⁴ − 1, for temperatures above 0.
        stop_token_ids: ids that end the turn; the one that ends it is read and is among its tokens.
        until: None, or a function that is given each token in order and returns True after the last one.
        request_id: tells a repeated request from a new one: a turn that is already done is not done again.

    Raises:
        BadRequest: for options that do not fit.
    """

    token_ids: Sequence[int] | Callable[[Before], Sequence[int]]
    max_tokens: int = 16
    session: str | None = None
    create: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    until: Callable[[int], bool] | None = None
    request_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self):
        def check(name, rule, fits):
            if not fits:
                raise BadRequest(f"`{name}` must be {rule}; received {getattr(self, name)!r:.80}.", name)

        def number(value):
            return isinstance(value, int | float) and not isinstance(value, bool)

        def integer(value):
            return isinstance(value, int) and not isinstance(value, bool)

        check("max_tokens", "an integer, at least 0", integer(self.max_tokens) and self.max_tokens >= 0)
        check("temperature", "a number from 0 to 100", number(self.temperature) and 0 <= self.temperature <= 100)
        check("top_p", "a number above 0, at most 1", number(self.top_p) and 0 < self.top_p <= 1)
        check("seed", "an integer from 0 to 2⁶⁴ − 1", integer(self.seed) and 0 <= self.seed < 2**64)
        check("stop_token_ids", "integers", all(map(integer, self.stop_token_ids)))


class Turn:
    """A turn in an engine. Threads may iterate over its tokens as they come, or wait for its `result`.

    Attributes:
        tokens: the tokens generated so far, a list that only grows.
        reason: None, then why it ended: `"stop"` or `"length"`.
        position: tokens that the stream has read at the end of the turn.
        prompt_tokens: how many of them this turn read first.
        steps: steps of the engine from the row that the turn got to its first token.
    """

    def __init__(self, request: Request):
        self.request, self.tokens, self.reason, self.error = request, [], None, None
        self.position, self.prompt_tokens, self.steps = 0, 0, 0
        self.cancelled, self.finished = False, False
        self._changed, self._watchers, self._listeners = threading.Condition(), 1, []
        # Held by the engine from here on.
        self.phase, self.row, self.saving, self.refused, self.wake = "queued", None, None, None, lambda: None
        self.state: Any = None  # (state, logits) of one row, while it is in no row of the batch
        self.pending, self.ending, self.read, self.unsaved = np.zeros(0, "int32"), None, 0, 0
        self.before, self.token, self.base = Before(), 0, 0

    # For those who wait ---------------------------------------------------------------------------------------------

    def __iter__(self):
        """The tokens, as they come; raises the turn's error."""
        given = 0
        while True:
            with self._changed:
                while given == len(self.tokens) and not self.finished:
                    self._changed.wait()
                ready = self.tokens[given:]
            given += len(ready)
            yield from ready
            if not ready:
                break
        self.result()

    def result(self, timeout=None):
        """The list of all tokens, once the turn has ended.

        Args:
            timeout: None, or seconds after which a TimeoutError is raised.

        Raises:
            ServeError: if the turn failed; its session is as it was before.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.finished, timeout):
                raise TimeoutError("The turn has not ended.")
        if self.error is not None:
            raise self.error
        return self.tokens

    def listen(self, callback):
        """Calls `callback()` from another thread whenever there are tokens or the turn ended, and once now."""
        with self._changed:
            self._listeners.append(callback)
        callback()

    def join(self):
        """Counts another one who waits for the turn."""
        with self._changed:
            self._watchers += 1

    def leave(self):
        """One who waits goes away; when the last one does, an unfinished turn is cancelled and undone."""
        with self._changed:
            self._watchers -= 1
            self.cancelled = self.cancelled or (self._watchers <= 0 and not self.finished)
        self.wake()

    # For the engine -------------------------------------------------------------------------------------------------

    def add(self, token):
        """Takes note of a token, and of whether it is the last (`ending`)."""
        until = self.request.until is not None and self.request.until(token)  # told of every token
        with self._changed:
            self.tokens.append(token)
            if token in self.request.stop_token_ids or until:
                self.ending = "stop"
            elif len(self.tokens) >= self.request.max_tokens:
                self.ending = "length"
        self._notify()

    def finish(self, reason=None, position=0, error: ServeError | None = None):
        with self._changed:
            if self.finished:
                return
            self.reason, self.position, self.error, self.finished = reason, position, error, True
            self.phase, self.state = "done", None
        self._notify()

    def _notify(self):
        with self._changed:
            self._changed.notify_all()
            listeners = list(self._listeners)
        for callback in listeners:
            callback()

    def record(self, done, base):
        """What is stored beside the state, so that another engine can go on, or tell what was done.

        Args:
            done: whether the turn has ended.
            base: the version of the session that a next turn begins from: this one, if it has ended, or else the last
                one before it.
        """
        return {
            "request": self.request.request_id,
            "tokens": list(self.tokens),
            "read": self.read,
            "prompt": self.prompt_tokens,
            "before": list(self.before),
            "position": self.before.position + self.read,
            "reason": self.ending if done else None,
            "base": base,
        }


def checked_ids(name, ids, size):
    """Token ids as int32 `[n]`; BadRequest unless all are from 0 to `size` − 1."""
    array = np.asarray(ids)
    integers = array.ndim == 1 and (not array.size or array.dtype.kind in "iu")
    if not integers or (array.size and not 0 <= array.min() <= array.max() < size):
        raise BadRequest(
            f"`{name}` must be token ids from 0 to {size - 1}; received {ids!r:.80}. Use the model's own tokenizer.",
            name,
        )
    return array.astype("int32")
