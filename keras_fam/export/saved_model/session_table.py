"""Sessions on the server: a table of streams, advanced by session number.

How concurrent calls stay apart:

- A call copies its rows out of the table, computes, and writes the new rows back. Only the copying holds a lock (a
  mutex of the session's resource manager, known by name to all signatures; it is released when the call ends, however
  it ends). Calls for different sessions compute side by side.
- Every row carries a version. Rows are written back only if their sessions are still open and their versions are those
  that were taken out; otherwise the call fails and the other call's result stands. So of two concurrent calls for one
  session one is refused, and never is half of each kept.
- A row is written back by one scatter: a call that fails or is cancelled at any moment has changed all of a row's
  state or nothing. That is why a row holds all leaves as float32 words instead of there being one variable per leaf.
- Session numbers are drawn at random and cannot be guessed (`session_numbers.py`): whoever knows a number may use the
  session. A late call for a closed session cannot reach the one that took its place.
"""

import uuid
from typing import NamedTuple

from keras_fam.export.saved_model.float32_packing import PackedTensor
from keras_fam.export.saved_model.serving_functions import Reader, after, require, tensorflow
from keras_fam.export.saved_model.session_numbers import AdminSecret, NumberGenerator
from keras_fam.export.saved_model.signatures import OPTIONS, PER_ROW, TOKENS, function
from keras_fam.export.saved_model.token_choice import Options, check_options, generate


class SessionLimits(NamedTuple):
    """When a session ends by itself; None is never.

    Attributes:
        seconds: idle seconds after which it is no longer open.
        calls: calls that it takes (`append`, `append_last`, `session_generate`, `reset`).
    """

    seconds: float | None = None
    calls: int | None = None


class SessionTable:
    """Room for `size` sessions of one model.

    Args:
        reader: `Reader` of the model.
        size: N, sessions that can be open at a time.
        limits: None (sessions end when they are closed) or `SessionLimits`.
        admin_secret: None (no `list`), or the string that `list` asks for.

    Attributes:
        numbers: int64 `[N]`, the number of the session in each place; −1 where there is none.
        used: float64 `[N]`, when each place was last used, in seconds since 1970.
        rows: float32 `[0 or N, W]`, version and state as words; allocated by the first `open`, so that an export is
            not as large as its table.
    """

    def __init__(self, reader: Reader, size: int, limits=None, admin_secret: str | None = None):
        tf = tensorflow()
        self.reader, self.size, self.limits = reader, size, limits or SessionLimits()
        self.layout = [PackedTensor(spec.shape[1:], spec.dtype) for spec in reader.leaf_specs()]
        self.width = 1 + sum(words.count for words in self.layout)
        self.numbers = tf.Variable(tf.fill([size], tf.constant(-1, tf.int64)), trainable=False, name="numbers")
        self.used = tf.Variable(tf.zeros([size], tf.float64), trainable=False, name="used")
        empty = tf.zeros([0, self.width])
        self.rows = tf.Variable(empty, shape=[None, self.width], trainable=False, name="rows")
        self.generator = NumberGenerator()
        self.secret = None if admin_secret is None else AdminSecret(admin_secret)
        self.lock_name = f"keras_fam_sessions_{uuid.uuid4().hex}"

    def variables(self):
        """All variables of the table."""
        return [self.numbers, self.used, self.rows, *self.generator.variables()]

    # Rows as words ----------------------------------------------------------------------------------------------

    def encode(self, version, served):
        """int32 `[R]` versions and a `Served` state as float32 `[R, W]`."""
        tf = tensorflow()
        leaves = [words.encode(x) for words, x in zip(self.layout, self.reader.flatten(served), strict=True)]
        return tf.concat([tf.bitcast(tf.expand_dims(version, 1), tf.float32), *leaves], axis=1)

    def decode(self, rows):
        """The inverse of `encode`."""
        tf = tensorflow()
        version, *leaves = tf.split(rows, [1] + [words.count for words in self.layout], axis=1)
        leaves = [words.decode(x) for words, x in zip(self.layout, leaves, strict=True)]
        return tf.bitcast(version[:, 0], tf.int32), self.reader.pack(leaves)

    # The table: all of this is called under the lock ------------------------------------------------------------

    def locked(self, body, first=()):
        """`body()`, a list of tensors or ops, while no other call touches the table."""
        tf = tensorflow()
        with tf.control_dependencies(first):
            lock = tf.raw_ops.MutexLock(mutex=tf.raw_ops.MutexV2(shared_name=self.lock_name))
        with tf.control_dependencies([lock]):
            results = body()
        with tf.control_dependencies(results):
            return results, tf.raw_ops.ConsumeMutexLock(mutex_lock=lock)

    def places(self, sessions):
        """`(places, known)` of session numbers: int64 `[R]` rows of the table, 0 where `known` bool `[R]` is False."""
        tf = tensorflow()
        same = tf.expand_dims(sessions, 1) == self.numbers.read_value()
        known = tf.logical_and(sessions >= 0, tf.reduce_any(same, axis=1))
        return tf.argmax(tf.cast(same, tf.int32), axis=1), known

    def occupied(self):
        """bool `[N]`, places whose session is open: neither closed nor at the end of its limits."""
        tf = tensorflow()
        occupied = self.numbers.read_value() >= 0
        if self.limits.seconds is not None:
            idle = tf.timestamp() - self.used.read_value()
            occupied = tf.logical_and(occupied, idle <= self.limits.seconds)
        if self.limits.calls is not None:
            occupied = tf.logical_and(occupied, self.versions() < self.limits.calls)
        return occupied

    def versions(self):
        """int32 `[N]`, calls that each place has taken since its session was opened."""
        tf = tensorflow()
        allocated = tf.raw_ops.VariableShape(input=self.rows.handle)[0]
        first = tf.range(allocated)
        found = tf.gather_nd(self.rows, tf.stack([first, tf.zeros_like(first)], axis=1))  # never the whole table
        return tf.pad(tf.bitcast(found, tf.int32), [[0, self.size - allocated]])

    def check_open(self, sessions):
        """`(places, check)`: rows of open sessions, and an op that fails unless all of them are open."""
        tf = tensorflow()
        places, known = self.places(sessions)
        is_open = tf.logical_and(known, tf.gather(self.occupied(), places))
        ended = "" if self.limits == SessionLimits() else " (it may have expired)"
        message = f"No such session{ended}: call `open` and use the number it returns; not open:"
        return places, require(is_open, message, tf.boolean_mask(sessions, ~is_open))

    def write(self, variable, places, values):
        return tensorflow().raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=places, updates=values)

    def touch(self, places):
        """Notes that places are used now."""
        tf = tensorflow()
        return self.write(self.used, places, tf.fill(tf.shape(places), tf.timestamp()))

    # Taking rows out and putting them back ----------------------------------------------------------------------

    def check_sessions(self, sessions):
        """Ops that fail if a session is named twice."""
        tf = tensorflow()
        distinct = tf.size(tf.unique(sessions).y) == tf.size(sessions)
        return [require(distinct, "A call names each session once; received", sessions)]

    def take(self, sessions):
        """`(version, served)`: a copy of the rows of open sessions."""
        tf = tensorflow()

        def body():
            places, check = self.check_open(sessions)
            with tf.control_dependencies([check]):
                return [tf.gather(self.rows, places)]

        (rows,), released = self.locked(body, self.check_sessions(sessions))
        return self.decode(*after([released], rows))

    def put(self, sessions, version, served, results):
        """Writes rows back, if their sessions were not changed since they were taken; `results` once that is done."""
        tf = tensorflow()
        rows = self.encode(version + 1, served)

        def body():
            places, known = self.places(sessions)
            at = tf.stack([places, tf.zeros_like(places)], axis=1)
            now = tf.bitcast(tf.gather_nd(self.rows, at), tf.int32)
            same = tf.logical_and(known, now == version)
            check = require(
                same,
                "Another call changed these sessions while this one ran. Its result stands and nothing of this call "
                "was kept: send one call at a time per session, and this one again. Sessions:",
                tf.boolean_mask(sessions, ~same),
            )
            with tf.control_dependencies([check]):
                touched = self.touch(places)
            with tf.control_dependencies([touched]):
                return [self.write(self.rows, places, rows)]

        _, released = self.locked(body, [rows, *results.values()])
        return dict(zip(results, after([released], *results.values()), strict=True))

    # Signatures -------------------------------------------------------------------------------------------------

    def open(self, count):
        tf = tensorflow()
        (count,) = after([require(count >= 0, "count, the sessions to open, is at least 0; received", count)], count)
        rows = self.encode(tf.zeros([count], tf.int32), self.reader.initial(count))

        def body():
            free = tf.where(~self.occupied())[:, 0]
            left = tf.size(free)
            enough = require(
                count <= left,
                f"This server holds {self.size} sessions: close some first. Wanted and free:",
                count,
                left,
            )
            with tf.control_dependencies([enough]):
                places = free[:count]
                numbers = self.generator.draw(count)
                # A place is free until its new number is there: the old number goes first, the new one comes last.
                cleared = self.write(self.numbers, places, tf.fill(tf.shape(places), tf.constant(-1, tf.int64)))
            with tf.control_dependencies([cleared]):
                table = tf.raw_ops.VariableShape(input=self.rows.handle)
            with tf.control_dependencies([tf.cond(table[0] == 0, self._allocate, lambda: False), self.touch(places)]):
                written = self.write(self.rows, places, rows)
            with tf.control_dependencies([written]):
                done = self.write(self.numbers, places, numbers)
            return [numbers, done]

        (opened, _), released = self.locked(body, [rows])
        return {"sessions": after([released], opened)[0]}

    def _allocate(self):
        tf = tensorflow()
        self.rows.assign(tf.zeros([self.size, self.width]))
        return True

    def close(self, sessions):
        tf = tensorflow()

        def body():
            places, check = self.check_open(sessions)
            with tf.control_dependencies([check]):
                done = self.write(self.numbers, places, tf.fill(tf.shape(places), tf.constant(-1, tf.int64)))
            with tf.control_dependencies([done]):
                return [tf.reduce_sum(tf.cast(~self.occupied(), tf.int32))]

        (free,), released = self.locked(body, self.check_sessions(sessions))
        return {"free": after([released], free)[0]}

    def list_open(self, count, secret):
        tf = tensorflow()
        checks = [
            require(count >= 0, "count, the sessions to list, is at least 0; received", count),
            require(self.secret.matches(secret), "`list` needs the secret that was chosen at export."),
        ]

        def body():
            return [tf.sort(tf.boolean_mask(self.numbers.read_value(), self.occupied()))]

        (numbers,), released = self.locked(body, checks)
        return {"sessions": after([released], numbers)[0][:count]}

    def reset(self, sessions):
        tf = tensorflow()
        version, _ = self.take(sessions)
        served = self.reader.initial(tf.size(sessions))
        return self.put(sessions, version, served, {"positions": self.reader.position(served)})

    def append(self, sessions, token_ids, lengths, every=True):
        checks = self.check_chunk(sessions, token_ids, lengths)
        sessions, token_ids, lengths = after(checks, sessions, token_ids, lengths)
        version, served = self.take(sessions)
        outputs, served = self.reader.read(token_ids, lengths, served, every=every)
        results = {
            self.reader.output: outputs if every else served.logits,
            "positions": self.reader.position(served),
        }
        return self.put(sessions, version, served, results)

    def append_last(self, sessions, token_ids, lengths):
        return self.append(sessions, token_ids, lengths, every=False)

    def generate(self, sessions, token_ids, lengths, **options):
        options = Options(**options)
        checks = [*self.check_chunk(sessions, token_ids, lengths), *check_options(options, token_ids)]
        sessions, token_ids, lengths = after(checks, sessions, token_ids, lengths)
        version, served = self.take(sessions)
        tokens, counts, served = generate(self.reader, token_ids, lengths, served, options)
        results = {"tokens": tokens, "lengths": counts, "positions": self.reader.position(served)}
        return self.put(sessions, version, served, results)

    def check_chunk(self, sessions, token_ids, lengths):
        """Ops that fail for a chunk that does not fit the sessions."""
        tf = tensorflow()
        rows, named = tf.shape(token_ids)[0], tf.size(sessions)
        match = require(rows == named, "token_ids have one row per session; rows and sessions:", rows, named)
        return [match, *self.reader.check_tokens(token_ids, lengths)]

    def signatures(self):
        """`open`, `append`, `append_last`, `session_generate`, `reset`, `close`, perhaps `list`: names to functions."""
        sessions = ((None,), "int64")
        found = {
            "open": function(self.open, count=((), "int32")),
            "append": function(self.append, sessions=sessions, token_ids=TOKENS, lengths=PER_ROW),
            "reset": function(self.reset, sessions=sessions),
            "close": function(self.close, sessions=sessions),
        }
        if self.secret is not None:
            found["list"] = function(self.list_open, count=((), "int32"), secret=((), "string"))
        if self.reader.generates:
            given = {"sessions": sessions, "token_ids": TOKENS, "lengths": PER_ROW}
            found["append_last"] = function(self.append_last, **given)
            found["session_generate"] = function(self.generate, **given, **OPTIONS)
        return found
