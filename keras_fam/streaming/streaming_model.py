"""StreamingModel: a model that remembers between calls.

The state lives here, the arithmetic in the model's pure `advance`. Chunks of any length are cut into pieces of a few
sizes, so that each program is compiled once and never once per length.
"""

import contextlib
import functools
import threading

import keras
import numpy as np
from keras import ops

from keras_fam.ops.backend import compiled, in_order, runs_eagerly
from keras_fam.ops.processes import whole_value
from keras_fam.ops.programs import programs_of
from keras_fam.ops.token_ids import check_ids_of
from keras_fam.state import check_finite, check_structure, replace_rows, select_rows
from keras_fam.streaming import session
from keras_fam.streaming.copies import StreamCopies
from keras_fam.streaming.generation import StreamGeneration
from keras_fam.training.batches import predict_chunks
from keras_fam.training.checked_inputs import CheckedTraining
from keras_fam.training.stream_fit import StreamTraining

COMPILE_RESET_AFTER = 4  # so many initial states are made eagerly before the program that makes them is compiled


def _exclusive(method):
    """A method that holds the stream's lock: threads take turns. Within `fit`, the state belongs to the training."""

    @functools.wraps(method)
    def locked(self, *args, **kwargs):
        with self._lock:
            self._refuse_while_training()
            return method(self, *args, **kwargs)

    return locked


def _last(outputs, before, lengths):
    """Outputs after the last token of each row, float32 `[B, V]`; `before` in rows without tokens."""
    if lengths is None:
        return ops.cast(outputs[:, -1], "float32")
    place = ops.maximum(lengths - 1, 0)[:, None, None]
    last = ops.cast(ops.take_along_axis(outputs, place, axis=1)[:, 0], "float32")
    return ops.where(lengths[:, None] > 0, last, before)


def _step(model, aligned):
    """The function that is compiled: a piece, state and logits in; outputs, state and logits out."""

    def step(piece, state, lengths=None):
        state, logits = state
        outputs, state = model.advance(piece, state, lengths=lengths, aligned=aligned)
        return outputs, (state, logits if isinstance(logits, tuple) else _last(outputs, logits, lengths))

    return step


class StreamingModel(StreamGeneration, StreamCopies, CheckedTraining, StreamTraining):
    """Streams through a TransformerFAM model, at constant memory.

    Reading and generating, call after call:

    ```python
    backbone = keras_fam.TransformerFAMBackbone(100, 1, 32, 4, 64, block_size=8, fam_length=4)
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    stream = keras_fam.StreamingModel(lm, batch_size=2)
    logits = stream.predict(np.ones((2, 50), "int32"))     # [2, 50, 100]; the next call continues from there
    tokens = stream.generate(max_new_tokens=20)             # two lists of 20 ids
    stream.position                                         # [70, 70]
    ```

    Rows are independent. They are reset, copied, and saved, each by its number:

    ```python
    stream.reset_state(rows=[1])
    stream.predict([[5, 3, 8], [2, 0, 0]], lengths=[3, 1])    # row 1 reads one token; the rest is padding
    stream.fork(0, to=[1])
    stream.save_state("session.safetensors", rows=[0])        # loads under any backend
    ```

    Training on documents longer than memory: every batch continues the one before.

    ```python
    stream.compile("adam")
    stream.fit(((x, np.roll(x, -1, 1)) for x in np.ones((5, 2, 16), "int32")), verbose=0)
    ```

    Threads: a stream has a lock, so threads that share it take turns, call by call (`generate_stream`: token by token).
    Streams of different threads over one model run at the same time and give the answers given alone. The model's
    weights must not change meanwhile: train in one thread.

    Copies: `copy.copy(stream)` makes streams of their own over the same model, `copy.deepcopy` and `pickle` over a copy
    of the model; all go on from where the streams stand. A stream that is compiled for training is refused.

    Args:
        model: a `TransformerFAMCausalLM`, a `TransformerFAMBackbone`, or any layer with their interface.
        batch_size: B, number of streams.
        blocks_per_step: how many blocks are advanced at once where a chunk is long; no result changes.

    Attributes:
        position: int64 NumPy `[B]`, tokens read by each row since its last reset.
        next_logits: float32 tensor `[B, V]`, a language model's logits after the last token of each row; NaN in rows
            where nothing was read since a reset or `set_state`; `()` for models without logits.
    """

    def __init__(self, model, batch_size: int, *, blocks_per_step: int = 4):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(
                f"`batch_size` must be a positive integer, the number of streams; received {batch_size!r}."
            )
        if not isinstance(blocks_per_step, int) or blocks_per_step < 1:
            raise ValueError(f"`blocks_per_step` must be a positive integer; received {blocks_per_step!r}.")
        if not model.built:
            model.build()
        self.model, self.batch_size = model, batch_size
        self.block_size = model.block_size
        self.step_size = blocks_per_step * self.block_size
        self._lock = threading.RLock()
        self._reset_all()

    # Reading ----------------------------------------------------------------------------------------------------

    def predict(self, chunk, lengths=None, *, steps=None, verbose=0, callbacks=None, collect=True):
        """Outputs for the next tokens of every row.

        Args:
            chunk: int `[B, T]` token ids (or `[B, T, D]` for a layer), T ≥ 1; or a `PyDataset`, `tf.data.Dataset` or
                iterator of successive chunks: arrays, or dicts of `"token_ids"` and perhaps `"lengths"` and `"reset"`
                (bool `[B]`: rows that are reset before the chunk). Targets beside them are left out.
            lengths: None, or int `[B]`: how many of the T tokens exist in each row; the rest is padding and its
                outputs are 0.
            steps: None, or how many chunks of a dataset are read.
            verbose: 0, or 1 for Keras' progress bar over a dataset.
            callbacks: Keras callbacks, called for each chunk of a dataset.
            collect: False drops the outputs of a dataset once the callbacks have seen them (`logs["outputs"]`).

        Returns:
            NumPy `[B, T, …]`, over a dataset with all its tokens; None if they were not collected.

        Raises:
            ValueError: for a chunk or lengths that do not fit. The streams are then as they were, as after any
                exception.
        """
        if not isinstance(chunk, (list, tuple)) and not hasattr(chunk, "shape"):
            return predict_chunks(self, chunk, steps=steps, verbose=verbose, callbacks=callbacks, collect=collect)
        outputs = self._read(chunk, lengths)
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=1)

    @_exclusive
    def _read(self, chunk, lengths=None, keep=True):
        """`predict` with the outputs as a list of pieces; none are fetched unless `keep`."""
        chunk = np.asarray(chunk)
        if chunk.ndim < 2 or chunk.shape[0] != self.batch_size or chunk.shape[1] == 0:
            raise ValueError(
                f"A chunk must be [batch_size, T, …] with {self.batch_size} rows, T ≥ 1; received shape {chunk.shape}. "
                "Rows without new tokens take part with lengths=0."
            )
        total = chunk.shape[1]
        if lengths is not None:
            lengths = np.asarray(lengths)
            fits = lengths.shape == (self.batch_size,) and lengths.dtype.kind in "iu"
            if not fits or lengths.min() < 0 or lengths.max() > total:
                raise ValueError(
                    f"`lengths` must be {self.batch_size} integers from 0 to T = {total}; received {lengths!r}."
                )
            if (lengths == total).all():
                lengths = None
        check_ids_of(self.model, chunk, lengths)
        if chunk.dtype.kind in "iu":
            chunk = chunk.astype("int32")  # one program, whatever the width of the ids
        state, position, outputs, first = (self._state, self.next_logits), self.position, [], 0
        while first < total:
            size, aligned = self._next_piece(total - first, position, lengths)
            piece = chunk[:, first : first + size]
            taken = None if lengths is None else np.clip(lengths - first, 0, size).astype("int32")
            output, state = self._run(piece, state, taken, aligned)
            if keep:
                outputs.append(ops.convert_to_numpy(output)[:, :size])
            position = position + (size if taken is None else taken)
            first += size
        (self._state, self.next_logits), self.position = state, position
        return outputs

    def _next_piece(self, left, position, lengths):
        """`(size, aligned)` of the next piece: whole steps or blocks where all rows stand at a boundary."""
        offset = position % self.block_size
        if lengths is None and not offset.any():
            for size in (self.step_size, self.block_size):
                if left >= size:
                    return size, True
        room = self.block_size - (offset[0] if (offset == offset[0]).all() else 0)
        return int(min(left, room)), False

    def _run(self, piece, state, lengths, aligned):
        """One compiled step; short pieces are padded to the next power of two."""
        size = piece.shape[1]
        if not aligned and size > 1:
            padded = min(1 << (size - 1).bit_length(), self.block_size)
            if lengths is None and padded != size:
                lengths = np.full(self.batch_size, size, "int32")
            piece = np.pad(piece, [(0, 0), (0, padded - size)] + [(0, 0)] * (piece.ndim - 2))
        model, record = self.model, "gpu" if aligned else "anywhere"  # programs outlive the stream
        run = programs_of(model).get(
            "read",
            aligned,
            lengths is not None,
            make=lambda: compiled(_step(model, aligned), lambda: model.variables, record=record),
        )
        given = () if lengths is None else (ops.convert_to_tensor(lengths),)
        return run(ops.convert_to_tensor(piece), in_order(state), *given)

    def _refuse_while_training(self):
        """RuntimeError in a callback of `fit` or `evaluate`, which hold the state until they end."""
        if self._trains:
            raise RuntimeError(
                "A stream is not read, moved or saved within its own `fit` or `evaluate`. In a callback, take another "
                "stream: `other = StreamingModel(model, batch_size)`, and `other.set_state(stream.state)` to start "
                "from where the training stands."
            )

    @contextlib.contextmanager
    def _borrow_state(self):
        with self._lock, super()._borrow_state() as trainer:
            yield trainer

    # State ------------------------------------------------------------------------------------------------------

    @property
    def state(self):
        """The `StreamState` of all rows; in a callback of `fit`, after the last batch."""
        return self._trained_state() if self._trains else self._state

    @_exclusive
    def reset_state(self, rows=None):
        """Resets rows to the state of streams that have read nothing.

        Args:
            rows: None (all) or a sequence of row numbers.
        """
        if rows is None:
            self._reset_all()
            return
        rows = self._check_rows(rows)
        self._replace(rows, self._initial_state(len(rows)), self._initial_logits(len(rows)))
        self.position = self.position.copy()
        self.position[rows] = 0

    def get_state(self, rows=None):
        """A `StreamState` of some rows (all if None), to be kept or handed to `set_state`."""
        return self.state if rows is None else select_rows(self.state, self._check_rows(rows))

    @_exclusive
    def set_state(self, state, rows=None, next_logits=None):
        """Puts streams in place of the ones in `rows` (all if None).

        Args:
            state: `StreamState` of as many rows, of the same model.
            rows: None or a sequence of row numbers.
            next_logits: None (not known: these rows have to read a token before they generate), or `[rows, V]`.

        Raises:
            ValueError: if the state or the logits do not fit, or holds NaN; the streams are then as they were.
        """
        rows = np.arange(self.batch_size) if rows is None else self._check_rows(rows)
        check_structure(state, self.model.state_spec(len(rows)), self.model.name)
        check_finite(state, self.model.name)
        logits = self._initial_logits(len(rows))
        if next_logits is not None:
            expected = tuple(getattr(logits, "shape", ()))
            if tuple(np.shape(next_logits)) != expected:
                raise ValueError(f"`next_logits` has shape {expected}; received {tuple(np.shape(next_logits))}.")
            logits = ops.cast(next_logits, "float32") if expected else ()
        blocks = whole_value(state.position.block_index).astype("int64")
        position = self.position.copy()
        position[rows] = blocks * self.block_size + whole_value(state.position.offset)
        self._replace(rows, state, logits)
        self.position = position

    @_exclusive
    def save_state(self, path, rows=None):
        """Saves streams to one safetensors file, atomically, in the place of what is there.

        Args:
            path: the file, `*.safetensors` by convention.
            rows: None (all) or a sequence of row numbers.

        Raises:
            ValueError: for rows that do not exist, or a state that holds NaN.
            OSError: if the file cannot be written; an existing file is left unchanged.
        """
        rows = np.arange(self.batch_size) if rows is None else self._check_rows(rows)
        extras = {"position": self.position[rows]}
        if not isinstance(self.next_logits, tuple):
            extras["next_logits"] = ops.convert_to_numpy(self.next_logits)[rows]
        session.save(path, self.model, self.get_state(rows), extras)

    @_exclusive
    def load_state(self, path, rows=None, *, check_weights=True):
        """Puts the streams of a file, saved under any backend, in place of the ones in `rows`.

        Args:
            path: a file that `save_state` wrote.
            rows: None (all), or the row numbers that the file's streams go to, in order.
            check_weights: whether the weights have to be those that wrote the file.

        Raises:
            ValueError: if the file is damaged, of another model or other weights, or has another number of rows; the
                streams are then as they were.
        """
        rows = np.arange(self.batch_size) if rows is None else self._check_rows(rows)
        state, extras = session.load(path, self.model, check_weights=check_weights)
        found = int(state.position.offset.shape[0])
        if found != len(rows):
            raise ValueError(
                f"A file's streams go to as many rows; {path} has {found}, received {len(rows)}. Name {found} rows."
            )
        self.set_state(state, rows, next_logits=extras.get("next_logits"))
        self.position[rows] = extras["position"]

    @_exclusive
    def fork(self, row: int, to):
        """Copies stream `row` to the rows `to` (a row number or a sequence), which go on from there on their own."""
        to = self._check_rows([to] if isinstance(to, int) else to)
        source = self._check_rows([row])
        self._replace(to, *select_rows((self._state, self.next_logits), np.repeat(source, len(to))))
        self.position = self.position.copy()
        self.position[to] = self.position[source[0]]

    def _reset_all(self):
        self._state, self.next_logits = self._initial_state(self.batch_size), self._initial_logits(self.batch_size)
        self.position = np.zeros(self.batch_size, "int64")

    def _initial_state(self, count):
        """The state of new streams. Eagerly it takes long, since the first memories pass all layers."""
        model = self.model

        def initial_state():
            return model.get_initial_state(count)

        state = programs_of(model).get_after(
            COMPILE_RESET_AFTER,
            "initial_state",
            count,
            make=lambda: compiled(initial_state, lambda: model.variables),
            until=initial_state,
        )()
        if runs_eagerly():  # not as a view of weights, which training changes in place
            state = keras.tree.map_structure(lambda x: ops.copy(ops.stop_gradient(x)), state)
        return state

    def _initial_logits(self, count):
        """Logits of rows that have read nothing."""
        if not hasattr(self.model, "backbone"):
            return ()
        return ops.full((count, self.model.output_width), float("nan"), "float32")

    def _replace(self, rows, state, logits):
        held = self._state, self.next_logits
        self._state, self.next_logits = replace_rows(held, rows, (state, logits))

    def _check_rows(self, rows):
        array = np.asarray(rows).reshape(-1)
        if not array.size or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= self.batch_size:
            raise ValueError(f"Rows must be numbers from 0 to {self.batch_size - 1}, at least one; received {rows!r}.")
        if len(set(array.tolist())) != len(array):
            raise ValueError(f"Each row is named once; received {rows!r}.")
        return array

    def __repr__(self):
        backend = keras.backend.backend()
        return f"<StreamingModel of {self.model.name}: {self.batch_size} streams, backend {backend}>"
