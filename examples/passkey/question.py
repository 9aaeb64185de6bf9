"""Training on carried state with a question after each chunk, which the text does not see."""

import keras
from keras import ops

from keras_fam.training.stateful import StatefulTrainer


class QuestionTrainer(StatefulTrainer):
    """Trains a language model whose rows continue where the last step left them.

    The loss is that of a question, which is read from the state after the chunk; the text continues without it.
    """

    def call(self, inputs, training=None):
        _, state = self.read({"token_ids": inputs["chunk"], "reset": inputs["first"]}, training)
        self.assign_state(keras.tree.map_structure(ops.stop_gradient, state))
        logits, _ = self.wrapped.advance(inputs["question"], state, aligned=True, training=training)
        return logits
