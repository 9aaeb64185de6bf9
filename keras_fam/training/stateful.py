"""The Keras model that trains with a state carried from batch to batch.

The state is held in non-trainable variables of a small model around the user's, so that Keras' compiled steps carry it
on every backend.
"""

import keras
from keras import ops

from keras_fam.distribution.state_sharding import state_variables
from keras_fam.layers.recurrent import check_padding_mask
from keras_fam.ops.backend import wait_for
from keras_fam.ops.processes import replicas_here
from keras_fam.state import map_specs, where_rows
from keras_fam.training.batches import unpack
from keras_fam.training.callback_model import of_the_model
from keras_fam.training.process_training import ProcessTraining


class StatefulTrainer(ProcessTraining, keras.Model):
    """A Keras model around a TransformerFAM model: each row of a batch continues that row of the batch before.

    Inputs are `[B, T]` chunks (`[B, T, D]` for a layer), or a dict of `"token_ids"`, `"lengths"` int `[B]` or
    `"padding_mask"` bool `[B, T]`, and `"reset"` bool `[B]`: rows whose state is reset before the chunk. Outputs are
    those of the wrapped model. Gradients stop at the start of a chunk (truncated back-propagation through time); a
    model with `remat=True` needs little memory for a long chunk, and one with `backpropagation_steps` truncates within
    it.

    Args:
        model: a built TransformerFAM model or layer.
        batch_size: B.
        block_size: S.
        aligned: whether all chunks consist of whole blocks, which saves work; None: as the first chunk does. A later
            chunk that does not raises ValueError.
    """

    # Callbacks get the user's model, so what they set there is what `fit` reads.
    stop_training = of_the_model("stop_training", False)
    stop_evaluating = of_the_model("stop_evaluating", False)
    _initial_epoch = of_the_model("_initial_epoch", None)

    def __init__(self, model, batch_size, block_size, aligned=None):
        # The policy, so that `compile` scales the loss of a float16 model; the model casts for itself.
        super().__init__(name=f"{model.name}_with_state", dtype=model.dtype_policy, autocast=False)
        vars(self)["user_model"] = model if isinstance(model, keras.Model) else None  # untracked: `wrapped` is tracked
        if replicas_here(self) > 1:
            raise ValueError(
                "On TensorFlow, a state is carried by one device per process; the strategy has "
                f"{replicas_here(self)} in this one. Use MultiWorkerMirroredStrategy "
                "with a process for each device."
            )
        self.wrapped, self.rows, self.block_size, self.aligned = model, batch_size, block_size, aligned
        self._spec = lambda: model.state_spec(batch_size)  # hidden from the tracking of tuples
        self.held = state_variables(self._spec())
        self.built = True
        self.assign_state(model.get_initial_state(batch_size))

    def call(self, inputs, training=None):
        outputs, state = self.read(inputs, training)
        self.assign_state(keras.tree.map_structure(ops.stop_gradient, state))
        return outputs

    def read(self, inputs, training=None):
        """Outputs of a chunk and the state after it, through which gradients pass; the state held is unchanged.

        For subclasses that use the state before they assign it, for example in an auxiliary loss.
        """
        tokens, lengths, padding_mask, reset = unpack(inputs)
        length = tokens.shape[1]
        if self.aligned is None:
            self.aligned = lengths is padding_mask is None and length is not None and length % self.block_size == 0
        self.check(tokens, lengths, padding_mask)
        state = self.state
        # Rows at their start take F_0 from the weights of this step, so that gradients reach the memory prompt.
        starts = ops.logical_and(state.position.block_index == 0, state.position.offset == 0)
        if reset is not None:
            starts = ops.logical_or(starts, ops.cast(reset, "bool"))
        state = where_rows(starts, self.wrapped.get_initial_state(self.rows), state)
        if padding_mask is None:
            aligned = self.aligned and length is not None  # TensorFlow: an unknown length may be any
            outputs, state = self.wrapped.advance(
                tokens, state, lengths=lengths, aligned=aligned, training=bool(training)
            )
        else:
            check_padding_mask(padding_mask, tokens)
            outputs, state = self.wrapped(
                tokens, padding_mask=padding_mask, initial_state=state, return_state=True, training=training
            )
        return outputs, state

    def own_variables(self):
        return self.held

    def train_step(self, *args):
        with wait_for(args):
            return super().train_step(*args)

    def test_step(self, *args):
        with wait_for(args):
            return super().test_step(*args)

    def check(self, tokens, lengths=None, padding_mask=None):
        """Raises ValueError unless a chunk has a row for each stream, and whole blocks if `aligned`."""
        if tokens.shape[0] not in (None, self.rows):
            raise ValueError(
                f"Each batch has a row for each of the {self.rows} streams; received {tokens.shape[0]} rows. Rows "
                "without new tokens have lengths=0."
            )
        length = tokens.shape[1]
        ragged = lengths is not None or padding_mask is not None
        if self.aligned and (ragged or (length is not None and length % self.block_size)):
            raise ValueError(
                f"The first chunk consisted of whole blocks, so all do (block_size {self.block_size}, no lengths, no "
                f"padding); received {length} tokens. Pass aligned=False to `compile` for chunks of any length."
            )

    @property
    def state(self):
        """The `StreamState` held, as copies, since compiled steps may reuse the variables' memory."""
        held = iter(self.held)
        return map_specs(lambda _: ops.copy(next(held).value), self._spec())

    def assign_state(self, state):
        """Replaces the `StreamState` held."""
        for held, new in zip(self.held, keras.tree.flatten(state), strict=True):
            held.assign(new)

    def reset_state(self):
        """Resets all rows."""
        # Copies: fields may share a buffer, which a compiled step of JAX donates once.
        self.assign_state(keras.tree.map_structure(ops.copy, self.wrapped.get_initial_state(self.rows)))


class ResetEveryEpoch(keras.callbacks.Callback):
    """Resets all rows of a `StatefulTrainer` when an epoch begins."""

    def __init__(self, trainer):
        super().__init__()
        self._trainer = trainer

    def on_epoch_begin(self, epoch, logs=None):
        self._trainer.reset_state()


class ValidationState(keras.callbacks.Callback):
    """Lets validation within `fit` read from the initial state, and training continue from its own afterwards."""

    def __init__(self, trainer):
        super().__init__()
        self._trainer, self._kept = trainer, None

    def on_test_begin(self, logs=None):
        self._kept = self._trainer.state
        self._trainer.reset_state()

    def on_test_end(self, logs=None):
        self._trainer.assign_state(self._kept)
        self._kept = None
