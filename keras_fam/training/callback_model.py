"""Callbacks of `StreamingModel.fit` get the user's model, although Keras trains a model around it."""

import contextlib

import keras

# What `compile` and `fit` of the trainer set, and what Keras' callbacks and `save` read from the model.
COMPILED = (
    *("compiled", "optimizer", "loss", "steps_per_execution", "_run_eagerly", "_jit_compile"),
    *("_compile_loss", "_compile_metrics", "_compile_config", "_loss_tracker"),
)
_MISSING = object()


@contextlib.contextmanager
def callbacks_see(model, trainer, callbacks):
    """Within it, Keras gives `callbacks` the user's model, compiled as the `trainer` around it is.

    So checkpoints hold the model alone, with the optimizer that trains it, and learning rate schedules, early stopping
    and `evaluate` within a callback act on what is being trained. Afterwards the model is compiled as before. A layer
    is no Keras model: there, callbacks get the trainer.
    """
    if not isinstance(model, keras.Model):
        yield
        return
    shown = {name: vars(trainer)[name] for name in COMPILED if name in vars(trainer)}
    # Programs of another compilation; and where `BackupAndRestore` says which epoch comes first.
    shown |= {"train_function": None, "test_function": None, "predict_function": None, "_initial_epoch": None}
    if hasattr(model, "jax_state_sync"):

        def sync():  # JAX: while `fit` runs, the trainer has the weights
            trainer.jax_state_sync()
            type(model).jax_state_sync(model)

        shown["jax_state_sync"] = sync
    attributes = vars(model)  # past Keras' tracking: the model does not own these
    before = {name: attributes.get(name, _MISSING) for name in shown}
    attributes.update(shown)
    for callback in callbacks:
        _set_model_of(callback, model)
    try:
        yield
    finally:
        for callback in callbacks:
            vars(callback).pop("set_model", None)
        for name, value in before.items():
            if value is _MISSING:
                attributes.pop(name, None)
            else:
                attributes[name] = value


def _set_model_of(callback, model):
    """Lets `callback.set_model` pass on `model`, whichever one Keras gives it."""
    callback.set_model = lambda _: type(callback).set_model(callback, model)


def of_the_model(name, default):
    """A property of the trainer that callbacks set on the user's model."""

    def owner(trainer):
        wrapped = vars(trainer).get("user_model")
        return vars(trainer if wrapped is None else wrapped)

    return property(
        lambda trainer: owner(trainer).get(name, default), lambda trainer, value: owner(trainer).update({name: value})
    )
