"""What the PassKey examples share: training on carried state with a question on the side."""

import keras
from keras import ops

from keras_fam.training.stateful import StatefulTrainer


class ReadingOn(StatefulTrainer):
    """Trains a language model with carried state: rows go on where the last step left them.

    The loss is that of the question, which is asked on the side: the text goes on as if it had not been.
    """

    def call(self, inputs, training=None):
        _, state = self.read({"token_ids": inputs["chunk"], "reset": inputs["first"]}, training)
        self.assign_state(keras.tree.map_structure(ops.stop_gradient, state))
        logits, _ = self.wrapped.advance(inputs["question"], state, aligned=True, training=training)
        return logits
