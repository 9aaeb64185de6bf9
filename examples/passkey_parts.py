"""What the PassKey examples share: training on carried state with a question on the side, and knocked-out memories."""

import keras
from keras import ops

from keras_fam.carried import CarriedState

KNOCK_OUTS = ("zeroed", "frozen", "shuffled")


class ReadingOn(CarriedState):
    """Trains a language model with carried state: rows go on where the last step left them.

    The loss is that of the question, which is asked on the side: the text goes on as if it had not been.
    """

    def call(self, inputs, training=None):
        _, state = self.read({"token_ids": inputs["chunk"], "reset": inputs["first"]}, training)
        self.hold(keras.tree.map_structure(ops.stop_gradient, state))
        logits, _ = self.wrapped.advance(inputs["question"], state, aligned=True, training=training)
        return logits


def knock_out(model, state, how, rng):
    """The state with a useless memory: `zeroed`, `frozen` at F_0, or `shuffled` between rows."""
    rows = int(state.cursor.offset.shape[0])
    fresh = model.get_initial_state(rows)
    order = rng.permutation(rows)

    def spoil(memory, first):
        if how == "shuffled":
            return ops.take(memory, order, axis=0)
        return {"zeroed": ops.zeros_like(memory), "frozen": first}[how]

    fields = ("fam", "fam_key", "fam_value")
    layers = [
        layer._replace(**{name: spoil(getattr(layer, name), getattr(start, name)) for name in fields})
        for layer, start in zip(state.layers, fresh.layers, strict=True)
    ]
    return state._replace(layers=tuple(layers))
