"""Turns in the store: where one begins, what is kept of it on the way, and that it is done once.

Beside its state, a stored version has the record of the turn that wrote it (`Turn.record`). From it an engine that is
given a request finds out whether it was done already, by whomever; whether it was begun, and how far it came; or
whether what was stored is the middle of another turn, which is nobody's any more: then the version before that counts.
"""

import numpy as np
from keras import ops

from keras_fam.serve.errors import StaleOwner, Unavailable
from keras_fam.serve.object_log import missing
from keras_fam.serve.store import unpack
from keras_fam.serve.turn import Before
from keras_fam.streaming import session as sessions

UNKNOWN = {"request": None, "reason": None}  # a session that `SessionStore.put` wrote


class Ledger:
    """The turns of one model's sessions in a store; shared by threads.

    Args:
        model: the model.
        store: `SessionStore`.
        initial: `(state, logits)` of one row that has read nothing.
        statistics: `Statistics`.
    """

    def __init__(self, model, store, initial, statistics):
        self.model, self.store, self.initial, self.statistics = model, store, initial, statistics
        self.identity = sessions.model_identity(model)

    def begin(self, turn):
        """Sets where a turn begins: at the start, at what its row holds, at a stored state, or within itself.

        Returns:
            None, or the record of the same turn, which was done before.

        Raises:
            NoSuchSession, DamagedSession, Unavailable.
        """
        request, name, row = turn.request, turn.request.session, turn.row
        if name is None:
            turn.state = self.initial
            return None
        token = self.call(self.store.token, name)
        if row.session == name and row.token == token:  # nobody wrote since this engine did
            turn.token, turn.base, found, record = token, token, None, row.record
        elif not token:
            row.forget_session()
            if not request.create:
                raise missing(name)
            turn.state = self.initial
            return None
        else:
            row.forget_session()
            found = self.call(self.store.read, name)
            turn.token, record = found.token, found.record or {**UNKNOWN, "base": found.token}
            turn.base = record["base"]
            self.statistics.add(loads=1)
        if record["request"] == request.request_id:
            if record["base"] == turn.token:
                self.statistics.add(replayed=1)
                return record
            self._resume(turn, found, record)
            return None
        if turn.base != turn.token:  # the middle of another turn
            if not turn.base:
                raise missing(name)  # it was to be the first, and nobody was told that it ended
            found = self.call(self.store.read, name, turn.base)
            record = found.record or UNKNOWN
        if found is not None:
            turn.state = self._unpack(found, name)
        turn.before = Before(record.get("position") or self._position(turn), record["reason"])
        return None

    def _resume(self, turn, found, record):
        turn.state = self._unpack(found, turn.request.session)
        turn.read, turn.before = record["read"], Before(*record["before"])
        for token in record["tokens"]:
            turn.add(token)
        self.statistics.add(resumed=1)

    def _unpack(self, found, name):
        state, extras = unpack(found, name, self.model, identity=self.identity)
        logits = extras.get("next_logits")
        return state, self.initial[1] if logits is None else ops.convert_to_tensor(logits, "float32")

    def _position(self, turn):
        place = turn.state[0].position
        blocks, offset = (int(ops.convert_to_numpy(x)[0]) for x in (place.block_index, place.offset))
        return blocks * self.model.block_size + offset

    def progress(self, turn, held, record):
        """Stores the state of a turn that goes on; `held` is `(state, logits)` of its row when `record` was made."""
        try:
            self._write(turn, held, record, keep=(turn.base,))
        except Unavailable:
            pass  # the next one may work; the end of the turn has to
        except StaleOwner as error:  # the end would be refused, too
            turn.refused = error
            turn.wake()

    def end(self, turn, held):
        """Stores the end of a turn: from now on it is done.

        Returns:
            `(token, record)` for the row that holds the session, or None if another engine has stored the same end.

        Raises:
            StaleOwner, Unavailable: the session is as it was before the turn.
        """
        if turn.saving is not None:
            turn.saving.result()
        record = turn.record(done=True, base=turn.token + 1)
        try:
            self._write(turn, held, record)
            return turn.token, record
        except StaleOwner:
            found = self.call(self.store.read, turn.request.session)
            other = found.record or UNKNOWN
            if other["request"] != turn.request.request_id or other["base"] != found.token:
                raise
            return None

    def place(self, name):
        """`{"position": n}`: how many tokens a session has read at the end of its last turn. Reads headers only.

        Raises:
            NoSuchSession, DamagedSession, Unavailable.
        """
        record = self.call(self.store.header, name)
        if record["base"] != record["token"]:
            record = self.call(self.store.header, name, record["base"])
        return {"position": record["position"]}

    def _write(self, turn, held, record, keep=()):
        state, logits = held
        extras = {"position": np.array([record["position"]]), "next_logits": ops.convert_to_numpy(logits)}
        arrays, fields = sessions.pack(self.model, state, extras, self.identity)
        write = self.store.write
        turn.token = self.call(write, turn.request.session, arrays, fields, token=turn.token, keep=keep, record=record)
        self.statistics.add(saves=1)

    def call(self, function, *args, **kwargs):
        """`function(...)` of the store, whose OSError becomes Unavailable."""
        try:
            return function(*args, **kwargs)
        except OSError as error:
            self.statistics.add(store_failures=1)
            raise Unavailable(
                f"The store of sessions did not answer ({error!r:.200}). Nothing of this turn was kept: send the same "
                "request again."
            ) from error
