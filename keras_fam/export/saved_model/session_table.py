"""Sessions on the server: a table of streams, advanced by number.

How calls that run at the same time stay apart:

- A call copies its rows out of the table, computes, and puts the new rows back. Only the copying holds a lock (a
  mutex of the session's resource manager, known by name to all signatures; it is released when the call ends, however
  it ends). Calls for different sessions compute side by side.
- Every row carries a version. Rows are put back only if their sessions are still open and their versions are those
  that were taken out; else the call fails and the other call's result stands. So of two calls for one session at the
  same time one is refused, never half of each kept.
- A row is put back by one scatter: a call that fails or is cancelled at any moment has changed all of a row's state
  or nothing. That is why a row holds all leaves as float32 words instead of there being one variable per leaf.
- Numbers are never used twice: a late call for a closed session cannot reach the one that took its place.
"""

import uuid

from keras_fam.export.saved_model.float32_packing import PackedTensor
from keras_fam.export.saved_model.serving_functions import Reader, after, require, tensorflow
from keras_fam.export.saved_model.signatures import OPTIONS, PER_ROW, TOKENS, function
from keras_fam.export.saved_model.token_choice import Options, check_options, generate


class SessionTable:
    """Room for `size` sessions of one model.

    Args:
        reader: `Reader` of the model.
        size: N, sessions that can be open at a time.

    Attributes:
        numbers: int64 `[N]`, the number of the session in each place; −1−n where it is free and n is the next number.
        rows: float32 `[0 or N, W]`, version and state as words; allocated by the first `open`, so that an export is
            not as large as its table.
    """

    def __init__(self, reader: Reader, size: int):
        tf = tensorflow()
        self.reader, self.size = reader, size
        self.layout = [PackedTensor(spec.shape[1:], spec.dtype) for spec in reader.leaf_specs()]
        self.width = 1 + sum(words.count for words in self.layout)
        self.numbers = tf.Variable(-1 - tf.range(size, dtype=tf.int64), trainable=False, name="numbers")
        empty = tf.zeros([0, self.width])
        self.rows = tf.Variable(empty, shape=[None, self.width], trainable=False, name="rows")
        self.lock_name = f"keras_fam_sessions_{uuid.uuid4().hex}"

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

    # The table --------------------------------------------------------------------------------------------------

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
        """Rows of the table that belong to session numbers."""
        tf = tensorflow()
        return tf.math.floormod(sessions, self.size)

    def is_open(self, sessions):
        """bool `[R]`; to be called under the lock."""
        tf = tensorflow()
        return tf.logical_and(sessions >= 0, tf.gather(self.numbers, self.places(sessions)) == sessions)

    def check_open(self, sessions):
        tf = tensorflow()
        is_open = self.is_open(sessions)
        closed = tf.boolean_mask(sessions, ~is_open)
        return require(is_open, "No such session: call `open` and use the number it returns; not open:", closed)

    def check_sessions(self, sessions):
        """Ops that fail if a session is named twice."""
        tf = tensorflow()
        distinct = tf.size(tf.unique(sessions).y) == tf.size(sessions)
        return [require(distinct, "A call names each session once; received", sessions)]

    def take(self, sessions):
        """`(version, served)`: a copy of the rows of open sessions."""
        tf = tensorflow()

        def body():
            with tf.control_dependencies([self.check_open(sessions)]):
                return [tf.gather(self.rows, self.places(sessions))]

        (rows,), released = self.locked(body, self.check_sessions(sessions))
        return self.decode(*after([released], rows))

    def put(self, sessions, version, served, results):
        """Puts rows back, if nothing happened to their sessions since they were taken; `results` once that is done."""
        tf = tensorflow()
        places, rows = self.places(sessions), self.encode(version + 1, served)

        def body():
            at = tf.stack([places, tf.zeros_like(places)], axis=1)
            now = tf.bitcast(tf.gather_nd(self.rows, at), tf.int32)
            same = tf.logical_and(self.is_open(sessions), now == version)
            check = require(
                same,
                "Another call changed these sessions while this one ran. Its result stands and nothing of this call "
                "was kept: send one call at a time per session, and this one again. Sessions:",
                tf.boolean_mask(sessions, ~same),
            )
            with tf.control_dependencies([check]):
                return [tf.raw_ops.ResourceScatterUpdate(resource=self.rows.handle, indices=places, updates=rows)]

        _, released = self.locked(body, [rows, *results.values()])
        return dict(zip(results, after([released], *results.values()), strict=True))

    # Signatures -------------------------------------------------------------------------------------------------

    def open(self, count):
        tf = tensorflow()
        (count,) = after([require(count >= 0, "count, the sessions to open, is at least 0; received", count)], count)
        rows = self.encode(tf.zeros([count], tf.int32), self.reader.initial(count))

        def body():
            numbers = self.numbers.read_value()
            free = tf.where(numbers < 0)[:, 0]
            left = tf.size(free)
            enough = require(
                count <= left,
                f"This server holds {self.size} sessions: close some first. Wanted and free:",
                count,
                left,
            )
            with tf.control_dependencies([enough]):
                places = free[:count]
                opened = -1 - tf.gather(numbers, places)
                table = tf.raw_ops.VariableShape(input=self.rows.handle)
            with tf.control_dependencies([tf.cond(table[0] == 0, self._allocate, lambda: False)]):
                written = tf.raw_ops.ResourceScatterUpdate(resource=self.rows.handle, indices=places, updates=rows)
            with tf.control_dependencies([written]):  # the rows first: until its number is there, a place is free
                done = tf.raw_ops.ResourceScatterUpdate(resource=self.numbers.handle, indices=places, updates=opened)
            return [opened, done]

        (opened, _), released = self.locked(body, [rows])
        return {"sessions": after([released], opened)[0]}

    def _allocate(self):
        tf = tensorflow()
        self.rows.assign(tf.zeros([self.size, self.width]))
        return True

    def close(self, sessions):
        tf = tensorflow()

        def body():
            with tf.control_dependencies([self.check_open(sessions)]):
                free = -1 - (sessions + self.size)
                places = self.places(sessions)
                done = tf.raw_ops.ResourceScatterUpdate(resource=self.numbers.handle, indices=places, updates=free)
            with tf.control_dependencies([done]):
                return [tf.reduce_sum(tf.cast(self.numbers.read_value() < 0, tf.int32))]

        (free,), released = self.locked(body, self.check_sessions(sessions))
        return {"free": after([released], free)[0]}

    def list_open(self, count):
        tf = tensorflow()

        def body():
            numbers = self.numbers.read_value()
            return [tf.sort(tf.boolean_mask(numbers, numbers >= 0))]

        checked = require(count >= 0, "count, the sessions to list, is at least 0; received", count)
        (numbers,), released = self.locked(body, [checked])
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
        """`open`, `list`, `append`, `append_last`, `session_generate`, `reset`, `close`: names to functions."""
        sessions = ((None,), "int64")
        found = {
            "open": function(self.open, count=((), "int32")),
            "list": function(self.list_open, count=((), "int32")),
            "append": function(self.append, sessions=sessions, token_ids=TOKENS, lengths=PER_ROW),
            "reset": function(self.reset, sessions=sessions),
            "close": function(self.close, sessions=sessions),
        }
        if self.reader.generates:
            given = {"sessions": sessions, "token_ids": TOKENS, "lengths": PER_ROW}
            found["append_last"] = function(self.append_last, **given)
            found["session_generate"] = function(self.generate, **given, **OPTIONS)
        return found
