"""Continuous batching: many sessions of one model, each at its own place, as rows of one compiled step.

A thread of the engine steps as long as there are turns. A step reads one piece of one long prompt, apart from the
batch, and then a few tokens of every row: the next ones of a short prompt, or the one that was chosen last. So a turn
that comes in waits for one piece of another's prompt at most, however long that is. Rows join and leave between steps.

What a session has read belongs to the store; a row is a cache of it. A turn counts once it is stored, and only then
does it end: whoever was told that a turn is done finds it in the store, whatever happens to this process. A turn that
fails, is cancelled, or whose process is killed leaves the session as it was before. While a turn runs its state is
stored now and then, beside the one before it, so that another engine that is given the same request goes on from
there (`ledger.py`). Nobody holds a lease on a session: the store refuses whoever is late (`object_log.py`).
"""

import collections
import concurrent.futures
import logging
import threading
import time

import numpy as np
from keras import ops

from keras_fam.serve.errors import BadRequest, Full, ServeError, SessionBusy, Unavailable
from keras_fam.serve.ledger import Ledger
from keras_fam.serve.object_log import check_name
from keras_fam.serve.rows import Row, Rows
from keras_fam.serve.sampling import draw
from keras_fam.serve.statistics import Statistics
from keras_fam.serve.store import SessionStore
from keras_fam.serve.turn import Request, Turn, checked_ids

log = logging.getLogger(__name__)
STORE_THREADS = 4  # at least; a store far away answers slowly
STEPPED = ("queued", "loaded", "apart", "batch")  # phases of a turn that belong to the thread that steps


class SessionEngine:
    """Runs turns of sessions over one model.

    ```python
    store = keras_fam.serve.SessionStore("sessions")
    with keras_fam.serve.SessionEngine(lm, store, rows=8) as engine:
        name = store.new_name()
        first = engine.submit(keras_fam.serve.Request([5, 3, 8], max_tokens=20, session=name, create=True))
        for token in first:                                   # as they come
            ...
        second = engine.submit(keras_fam.serve.Request([2], max_tokens=20, session=name)).result()
    ```

    Greedy tokens are those of a `StreamingModel` that reads the same and generates the same alone.

    Args:
        model: a built `TransformerFAMCausalLM`. Its weights must not change.
        store: `SessionStore`; None keeps sessions in memory, until the engine is closed.
        rows: B, how many turns run at a time; as many sessions are also kept at hand.
        max_waiting: how many further turns may wait for a row; one more is refused with `Full`.
        save_every: after how many tokens of a turn its state is stored, while it goes on.
        blocks_per_step: how many blocks of a long prompt are read between two steps of the batch.

    Raises:
        BadRequest (a ValueError): for a number that is too small.

    Attributes:
        statistics: `Statistics`, counters of what was done.
    """

    def __init__(self, model, store=None, *, rows=8, max_waiting=64, save_every=1024, blocks_per_step=4):
        for name, value, least in (("rows", rows, 1), ("max_waiting", max_waiting, 0), ("save_every", save_every, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise BadRequest(f"`{name}` must be an integer, at least {least}; received {value!r}.", name)
        self._own_store = None if store is not None else SessionStore(f"memory://keras_fam-{id(self)}")
        self.model, self.store = model, store or self._own_store
        self.max_waiting, self.save_every = max_waiting, save_every
        self.tensors, self.statistics = Rows(model, rows, blocks_per_step), Statistics(rows)
        self.ledger = Ledger(model, self.store, self.tensors.initial, self.statistics)
        self._rows = [Row(number) for number in range(rows)]  # those used last come last
        self._changed = threading.Condition(threading.RLock())
        self._queue, self._running, self._by_session = collections.deque(), [], {}
        self._closed, self._steps = False, 0
        self._pool = concurrent.futures.ThreadPoolExecutor(max(STORE_THREADS, rows), "keras_fam-store")
        self._thread = threading.Thread(target=self._run, name="keras_fam-engine", daemon=True)
        self._thread.start()

    # Turns ----------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Turn:
        """Begins a turn, or joins it if the same request is running.

        Returns:
            `Turn`. What goes wrong from here on is its error: NoSuchSession, BadRequest (token ids that are none, or
            no token to go on from), DamagedSession, StaleOwner (another process wrote the session meanwhile),
            Unavailable. The session is then as it was.

        Raises:
            SessionBusy: if another turn of the session runs.
            Full: if too many turns wait.
            BadRequest: for a name that cannot be a session's.
            Unavailable: if the engine is closed.
        """
        if request.session is not None:
            check_name(request.session)
        with self._changed:
            if not self.healthy():
                raise Unavailable("This engine was closed, or its thread has ended. Send the request again.")
            other = self._by_session.get(request.session)
            if other is not None and other.request.request_id == request.request_id and not other.cancelled:
                other.join()
                return other
            if other is not None:
                raise SessionBusy(
                    "A session takes one turn at a time; another one of it runs. Wait for its end, or cancel it.",
                    "session",
                )
            if len(self._queue) >= self.max_waiting and not any(row.turn is None for row in self._rows):
                raise Full(
                    f"This engine runs {len(self._rows)} turns and lets {self.max_waiting} wait; as many are here. "
                    "Nothing was read: send the same request again, a little later."
                )
            turn = Turn(request)
            turn.wake, turn.arrived = self._wake, time.perf_counter()
            if request.session is not None:
                self._by_session[request.session] = turn
            self._queue.append(turn)
            self._admit()
        return turn

    def delete(self, name):
        """Deletes a session. Raises SessionBusy while a turn of it runs, NoSuchSession if there is none."""
        check_name(name)
        with self._changed:
            if name in self._by_session:
                raise SessionBusy("A session is deleted between turns; one of it runs. Wait for its end.", "session")
            for row in self._rows:
                if row.session == name and row.turn is None:
                    row.forget_session()
        self.ledger.call(self.store.delete, name)

    def healthy(self):
        """Whether turns are run."""
        return not self._closed and self._thread.is_alive()

    def snapshot(self):
        """`statistics` as a dict, with how many turns run and wait, and how many sessions are at hand."""
        with self._changed:
            held = sum(row.session is not None or row.turn is not None for row in self._rows)
            busy = sum(row.turn is not None for row in self._rows)
            return self.statistics.snapshot(running=busy, waiting=len(self._queue), sessions=held)

    def close(self):
        """Ends the thread. Turns that run fail with Unavailable, their sessions as they were before."""
        with self._changed:
            self._closed = True
        self._wake()
        self._thread.join()
        self._pool.shutdown(wait=True)
        for name in self._own_store.list() if self._own_store else ():
            self._own_store.delete(name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # Rows for turns -------------------------------------------------------------------------------------------------

    def _wake(self):
        with self._changed:
            self._changed.notify_all()

    def _admit(self):
        """Gives rows to turns that wait, in their order; called under the lock."""
        while self._queue and not self._closed:
            name = self._queue[0].request.session
            idle = [row for row in self._rows if row.turn is None]
            if not idle:
                return
            at_hand = next((row for row in idle if name is not None and row.session == name), None)
            row = at_hand or next((row for row in idle if row.session is None), idle[0])
            if at_hand is None:
                row.forget_session()
            self._rows.remove(row)
            self._rows.append(row)
            turn = self._queue.popleft()
            row.turn, turn.row, turn.phase = turn, row, "loading"
            self._running.append(turn)
            self._pool.submit(self._load, turn)

    def _release(self, turn, keep=None):
        """Frees the row of a turn that has ended; `keep` is `(token, record)` if it holds the session from now on."""
        with self._changed:
            if turn.row is not None:
                turn.row.turn = None
                turn.row.forget_session()
                if keep is not None:
                    turn.row.session, (turn.row.token, turn.row.record) = turn.request.session, keep
            for turns in (self._running, self._queue):
                if turn in turns:
                    turns.remove(turn)
            if self._by_session.get(turn.request.session) is turn:
                del self._by_session[turn.request.session]
            self._admit()
            self._changed.notify_all()

    def _fail(self, turn, error):
        """Ends a turn with an error, once nothing of it is being stored any more."""
        if not isinstance(error, ServeError):
            log.error("A turn failed.", exc_info=error)
            error = Unavailable(f"The engine failed in this turn ({error!r:.200}); it was not kept. Send it again.")

        def end(_=None):
            self._release(turn)
            self.statistics.failed(error)
            turn.finish(error=error)

        turn.phase = "failing"
        if turn.saving is None:
            end()
        else:
            turn.saving.add_done_callback(end)

    # In threads of the pool -----------------------------------------------------------------------------------------

    def _load(self, turn):
        """Finds out where the turn begins, and hands it to the thread that steps."""
        try:
            done = self.ledger.begin(turn)
            if done is not None:
                held = turn.row.session is not None
                turn.tokens.extend(done["tokens"])
                turn.prompt_tokens = done["prompt"]
                self._release(turn, (turn.token, done) if held else None)
                turn.finish(done["reason"], done["position"])
                return
            self._take_prompt(turn)
            with self._changed:
                turn.phase = "loaded"
                self._changed.notify_all()
        except Exception as error:
            self._fail(turn, error)

    def _take_prompt(self, turn):
        given, size = turn.request.token_ids, self.model.output_width
        prompt = checked_ids("token_ids", given(turn.before) if callable(given) else given, size)
        checked_ids("stop_token_ids", turn.request.stop_token_ids, size)
        turn.prompt_tokens = len(prompt)
        turn.pending = np.concatenate([prompt, np.array(turn.tokens, "int32")])[turn.read :]
        if not turn.request.max_tokens:
            turn.ending = "length"
        elif not len(turn.pending) and turn.state is not None and np.isnan(ops.convert_to_numpy(turn.state[1])).any():
            raise BadRequest(
                "A stream goes on from the last token that it read, and this one has read none. Give at least one "
                "token.",
                "prompt",
            )

    def _finish(self, turn, held):
        """Stores the end of a turn; then it has ended."""
        try:
            keep = None if held is None else self.ledger.end(turn, held)
            self._release(turn, keep)
            self.statistics.add(turns=1)
            turn.finish(turn.ending, turn.before.position + turn.read)
        except Exception as error:
            self._fail(turn, error)

    # Steps, in the engine's thread ----------------------------------------------------------------------------------

    def _run(self):
        error = Unavailable("The engine was closed; this turn was not kept. Send it again.")
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._work())
                    if self._closed:
                        return
                    turns = [turn for turn in [*self._running, *self._queue] if turn.phase in STEPPED]
                self._step(turns)
        finally:
            with self._changed:
                self._closed = True
                left = [turn for turn in [*self._running, *self._queue] if turn.phase in STEPPED]
            for turn in left:
                self._fail(turn, error)

    def _work(self):
        turns = [*self._running, *self._queue]
        return any(
            turn.phase in STEPPED and (turn.phase != "queued" or turn.cancelled or turn.refused) for turn in turns
        )

    def _step(self, turns):
        """One step of the turns in `turns` that are ready."""
        self._steps += 1
        for turn in turns:
            if turn.cancelled or turn.refused:
                self._fail(turn, turn.refused or SessionBusy("The turn was cancelled; nothing of it was kept."))
        for turn in turns:
            if turn.phase == "loaded":
                self._try([turn], self._place, turn)
        apart = [turn for turn in turns if turn.phase == "apart"]
        if apart:
            turn = min(apart, key=lambda turn: turn.stepped)  # long prompts take turns
            self._try([turn], self._read_apart, turn)
        batch = [turn for turn in turns if turn.phase == "batch"]
        if batch:
            self._try(batch, self._read_batch, batch)

    def _try(self, turns, function, argument):
        """A failing step fails its turns. It has replaced no tensor, so the other rows are whole."""
        try:
            function(argument)
        except Exception as error:
            for turn in turns:
                if turn.phase in STEPPED:
                    self._fail(turn, error)

    def _place(self, turn):
        """Puts a turn's row where its tokens are read: in the batch or, while many are to be read, apart from it."""
        turn.started = turn.stepped = self._steps
        number = turn.row.number
        if len(turn.pending) > self.tensors.block_size:
            turn.state = turn.state or self.tensors.take(number)
            turn.phase = "apart"
        else:
            self._join_batch(turn)

    def _join_batch(self, turn):
        if turn.state is not None:
            self.tensors.put(turn.row.number, turn.state)
        turn.state, turn.phase = None, "batch"

    def _read_apart(self, turn):
        turn.stepped = self._steps
        offset = (turn.before.position + turn.read) % self.tensors.block_size
        turn.state, count = self.tensors.read_apart(turn.state, turn.pending, offset)
        self._took(turn, count, lambda: turn.state)
        if len(turn.pending) <= self.tensors.block_size:
            self._join_batch(turn)

    def _read_batch(self, batch):
        self._choose(batch)  # of turns without a prompt
        reading = {turn: turn.pending[: self.tensors.block_size] for turn in batch if len(turn.pending)}
        if reading:
            self.tensors.read({turn.row.number: tokens for turn, tokens in reading.items()})
            self.statistics.add(steps=1, rows_read=len(reading))
        for turn, tokens in reading.items():
            self._took(turn, len(tokens), lambda turn=turn: self.tensors.take(turn.row.number))
        self._choose(batch)
        for turn in batch:
            if turn.phase == "batch" and not len(turn.pending):
                held = None if turn.request.session is None else self.tensors.take(turn.row.number)
                turn.phase = "saving"
                self._pool.submit(self._finish, turn, held)

    def _took(self, turn, count, held):
        """Takes note of tokens that were read; after many, has the state `held()` stored."""
        prompt = min(max(turn.prompt_tokens - turn.read, 0), count)
        self.statistics.add(prompt_tokens=prompt, generated_tokens=count - prompt)
        turn.pending, turn.read, turn.unsaved = turn.pending[count:], turn.read + count, turn.unsaved + count
        due = turn.request.session is not None and turn.unsaved >= self.save_every
        if due and (len(turn.pending) or not turn.ending) and (turn.saving is None or turn.saving.done()):
            turn.unsaved = 0
            record = turn.record(done=False, base=turn.base)
            turn.saving = self._pool.submit(self.ledger.progress, turn, held(), record)

    def _choose(self, batch):
        """The next token of each turn that has read all it was given and goes on."""
        turns = [turn for turn in batch if turn.phase == "batch" and not len(turn.pending) and turn.ending is None]
        if not turns:
            return
        tokens, logits = self.tensors.best()
        for turn in turns:
            number, request = turn.row.number, turn.request
            if not np.isfinite(logits[number]):
                self._fail(turn, Unavailable("The model's logits are not finite; this turn was not kept."))
                continue
            token = int(tokens[number])
            if request.temperature:
                position = turn.before.position + turn.read
                token = draw(self.tensors.logits(number), request.temperature, request.top_p, request.seed, position)
            if not turn.tokens:
                turn.steps = self._steps - turn.started + 1
                self.statistics.first_token(time.perf_counter() - turn.arrived)
            turn.pending = np.array([token], "int32")
            turn.add(token)
