"""Successive chunks with carried state: `fit`, `evaluate`, `train_on_batch` and `predict` over datasets."""

import keras
import numpy as np
import pytest
from keras import ops
from support import call, close, numpy, relative

import keras_fam
from keras_fam.ops.backend import value_and_gradient

V, S, B = 13, 4, 2
TOKENS = np.random.default_rng(0).integers(0, V, (B, 6 * S)).astype("int32")
TARGETS = np.roll(TOKENS, -1, axis=1)
QUICK = {"jit_compile": False} if keras.backend.backend() == "tensorflow" else {}  # XLA takes longer to compile a step
CHUNKS = [slice(first, first + 2 * S) for first in range(0, 6 * S, 2 * S)]


class Chunks(keras.utils.PyDataset):
    """Chunks with targets; row 1 is reset at chunk `reset`."""

    def __init__(self, reset=None):
        super().__init__()
        self.reset = reset

    def __len__(self):
        return len(CHUNKS)

    def __getitem__(self, i):
        tokens, targets = TOKENS[:, CHUNKS[i]], TARGETS[:, CHUNKS[i]]
        if self.reset is None:
            return tokens, targets
        return {"token_ids": tokens, "reset": np.array([False, i == self.reset])}, targets


def make_lm(num_layers=2, **settings):
    keras.utils.set_random_seed(0)
    backbone = keras_fam.TransformerFAMBackbone(
        V, num_layers, 16, 2, 32, block_size=S, memory_segments=1, fam_length=2, **settings
    )
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    return lm


def make_stream(optimizer=None, **compile_options):
    stream = keras_fam.StreamingModel(make_lm(), B)
    stream.compile(optimizer or keras.optimizers.SGD(0.5), **QUICK, **compile_options)
    return stream


def batches():
    """The chunks as a generator: Keras learns how many there are when they end."""
    return ((TOKENS[:, part], TARGETS[:, part]) for part in CHUNKS)


def draws(generator):
    """How many seeds a generator has given."""
    return int(numpy(generator.state)[1])


def cross_entropy(logits, targets):
    logits = logits - logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, targets[..., None], -1).mean()


def test_evaluate_reads_on():
    """The loss of chunks is that of the whole sequence, and the stream stands at its end."""
    stream = make_stream()
    loss = stream.evaluate(Chunks(), verbose=0, return_dict=True)["loss"]
    whole = numpy(call(stream.model, TOKENS))
    assert abs(loss - cross_entropy(whole, TARGETS)) < 1e-5
    _, state = call(stream.model, TOKENS, return_state=True)
    for a, b in zip(keras.tree.flatten(stream.state), keras.tree.flatten(state), strict=True):
        close(a, numpy(b), 1e-5)
    assert stream.position.tolist() == [6 * S] * B


def test_reset_flags():
    stream = make_stream()
    loss = stream.evaluate(Chunks(reset=1), verbose=0, return_dict=True)["loss"]
    rows = [numpy(call(stream.model, TOKENS[:1]))[0], numpy(call(stream.model, TOKENS[1:, 2 * S :]))[0]]
    first = numpy(call(stream.model, TOKENS[1:, : 2 * S]))[0]
    logits = np.stack([rows[0], np.concatenate([first, rows[1]])])
    assert abs(loss - cross_entropy(logits, TARGETS)) < 1e-5
    assert stream.position.tolist() == [6 * S, 4 * S]


def test_a_train_step_starts_from_the_carried_state():
    """The second step of SGD is the gradient step of its own chunk, from the state that the first left behind."""
    stream, twin = make_stream(), make_lm()
    stream.train_on_batch(TOKENS[:, CHUNKS[0]], TARGETS[:, CHUNKS[0]])
    held = stream.state
    twin.set_weights(stream.model.get_weights())
    variable = twin.backbone.blocks[0].up.kernel
    targets = TARGETS[:, CHUNKS[1]]

    def loss(value):
        # The weight as an argument, so that each backend differentiates with respect to it.
        with keras.StatelessScope(state_mapping=[(variable, value)]):
            logits, _ = twin.advance(TOKENS[:, CHUNKS[1]], held)
        return ops.mean(keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True))

    _, gradient = value_and_gradient(loss, ops.copy(variable.value))
    before = numpy(variable)
    stream.train_on_batch(TOKENS[:, CHUNKS[1]], targets)
    after = numpy(stream.model.backbone.blocks[0].up.kernel)
    close(after, before - 0.5 * numpy(gradient), 1e-5)
    assert np.abs(numpy(gradient)).max() > 1e-6


def test_the_memory_prompt_learns():
    """F_0 of rows that start in a chunk is made by the step that reads it; rows that read on do not move it."""
    stream = make_stream()
    prompt = stream.model.backbone.memory_prompt
    moved = []
    for part in CHUNKS[:2]:
        before = numpy(prompt)
        stream.train_on_batch(TOKENS[:, part], TARGETS[:, part])
        moved.append(float(np.abs(numpy(prompt) - before).max()))
    assert moved[0] > 1e-5 and moved[1] == 0


def test_fit_is_train_on_batch():
    """`fit` over a dataset takes the same steps; `aligned` chunks and ragged ones agree.

    Six steps, at a rate at which they hardly amplify the rounding of the two programs.
    """
    one, other = make_stream(keras.optimizers.SGD(0.02)), make_stream(keras.optimizers.SGD(0.02), aligned=False)
    before = [numpy(v).copy() for v in one.model.trainable_variables]
    one.fit(Chunks(), epochs=2, verbose=0)
    for _ in range(2):
        for part in CHUNKS:
            other.train_on_batch(TOKENS[:, part], TARGETS[:, part])
    for a, b, first in zip(one.model.trainable_variables, other.model.trainable_variables, before, strict=True):
        close(a, numpy(b), 1e-5)
        assert relative(a, first) > 1e-4  # far more than the tolerance
    assert one.position.tolist() == other.position.tolist() == [12 * S] * B


def test_reset_every_epoch_and_callbacks():
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(int(numpy(stream.state.position.block_index).max()))

    stream = make_stream()
    history = stream.fit(Chunks(), epochs=2, verbose=0, reset_every_epoch=True, callbacks=[Watch()])
    assert seen == [0, 0] and len(history.history["loss"]) == 2
    assert stream.position.tolist() == [6 * S] * B


def test_padding_and_lengths_train_alike():
    lengths, mask = np.array([2 * S, 3]), np.arange(2 * S) < np.array([[2 * S], [3]])
    weights = mask.astype("float32")
    streams = [make_stream(weighted_metrics=[]) for _ in range(2)]
    for stream, given in zip(streams, ({"lengths": lengths}, {"padding_mask": mask}), strict=True):
        stream.train_on_batch({"token_ids": TOKENS[:, : 2 * S], **given}, TARGETS[:, : 2 * S], weights)
        assert stream.position.tolist() == lengths.tolist()
    for a, b in zip(*(s.model.trainable_variables for s in streams), strict=True):
        close(a, numpy(b), 1e-5)


def test_the_models_own_optimizer():
    lm = make_lm()
    lm.compile(keras.optimizers.Adam(1e-3))
    stream = keras_fam.StreamingModel(lm, B)
    stream.fit(Chunks(), verbose=0)
    assert int(numpy(lm.optimizer.iterations)) == len(CHUNKS)


def test_wrong_chunks_leave_the_streams():
    stream = make_stream()
    stream.train_on_batch(TOKENS[:, : 2 * S], TARGETS[:, : 2 * S])
    before = [numpy(x) for x in keras.tree.flatten(stream.state)]
    with pytest.raises(ValueError, match="aligned=False"):
        stream.train_on_batch(TOKENS[:, :3], TARGETS[:, :3])
    with pytest.raises(ValueError, match="a row for each"):
        stream.train_on_batch(np.tile(TOKENS, (2, 1)), np.tile(TARGETS, (2, 1)))
    with pytest.raises(ValueError, match="received the keys"):
        stream.train_on_batch({"ids": TOKENS}, TARGETS)
    for a, b in zip(keras.tree.flatten(stream.state), before, strict=True):
        np.testing.assert_array_equal(numpy(a), b)
    assert stream.position.tolist() == [2 * S] * B


def test_predict_over_a_dataset():
    """Callbacks see every chunk; resets are followed; outputs are those of the whole."""
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            seen.append((batch, logs["outputs"].shape))

    stream = keras_fam.StreamingModel(make_lm(), B)
    outputs = stream.predict(Chunks(reset=1), callbacks=[Watch()])
    assert seen == [(i, (B, 2 * S, V)) for i in range(len(CHUNKS))]
    close(outputs[0], numpy(call(stream.model, TOKENS[:1]))[0], 1e-5)
    close(outputs[1, 2 * S :], numpy(call(stream.model, TOKENS[1:, 2 * S :]))[0], 1e-5)
    assert stream.predict((TOKENS[:, part] for part in CHUNKS), steps=2, collect=False) is None
    assert stream.position.tolist() == [10 * S, 8 * S]


def test_the_end_of_the_data_moves_nothing():
    """Position, draws and counters are those of the batches that were there. TensorFlow finds the end within a step,
    which then must not assign anything."""
    stream = keras_fam.StreamingModel(make_lm(1, dropout=0.1), B)
    stream.compile("sgd", **QUICK)
    stream.fit(batches(), verbose=0)
    assert stream.position.tolist() == [6 * S] * B
    assert draws(stream.model.backbone.seed_generator) == len(CHUNKS)
    assert int(numpy(stream._trainer.optimizer.iterations)) == len(CHUNKS)
    stream.evaluate(batches(), verbose=0)
    assert stream.position.tolist() == [12 * S] * B

    lm = make_lm(1, dropout=0.1, random_state_passing=keras_fam.training.Ramp(0.8, delay=2))
    lm.compile("sgd", **QUICK)
    lm.fit(batches(), verbose=0)
    passing = lm.backbone.random_state_passing
    assert int(numpy(passing.steps)) == len(CHUNKS)
    assert draws(passing.seed_generator) == draws(lm.backbone.seed_generator) == len(CHUNKS)

    block = keras_fam.TransformerFAMBlock(2, 8, 16, block_size=S, fam_length=2, dropout=0.1, stateful=True)
    tokens = keras.Input(batch_shape=(B, 2 * S), dtype="int32")
    model = keras.Model(tokens, keras.layers.Dense(V)(block(keras.layers.Embedding(V, 16)(tokens))))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **QUICK)
    for read, method in enumerate((model.fit, model.evaluate), start=1):
        method(batches(), verbose=0)
        assert numpy(block.state.position.block_index).tolist() == [6 * read] * B
        assert draws(block.seed_generator) == len(CHUNKS)


def test_validation_changes_nothing():
    """Losses with and without validation are equal to the bit; each validation reads from the initial state."""
    stream = keras_fam.StreamingModel(make_lm(1), B)
    stream.compile(keras.optimizers.SGD(0.5), **QUICK)
    weights, reads = stream.model.get_weights(), []
    plain = stream.fit(Chunks(), epochs=2, verbose=0).history["loss"]
    state = [numpy(x) for x in keras.tree.flatten(stream.state)]
    stream.model.set_weights(weights)
    stream.reset_state()
    note = keras.callbacks.LambdaCallback(
        on_test_batch_end=lambda batch, logs: reads.append(numpy(stream.state.position.block_index).tolist())
    )
    given = [(np.flip(TOKENS[:, part], 1), TARGETS[:, part]) for part in CHUNKS[:2]]
    history = stream.fit(Chunks(), epochs=2, validation_data=given, callbacks=[note], verbose=0).history
    assert history["loss"] == plain
    for value, expected in zip(keras.tree.flatten(stream.state), state, strict=True):
        np.testing.assert_array_equal(numpy(value), expected)
    assert reads == 2 * [[2] * B, [4] * B] and stream.position.tolist() == [12 * S] * B
    stream.reset_state()
    assert stream.evaluate(given, verbose=0, return_dict=True)["loss"] == history["val_loss"][1]
    with pytest.raises(ValueError, match="`validation_data` as a list or a dataset"):
        stream.fit(Chunks(), epochs=2, validation_data=iter(given), verbose=0)


def test_callbacks_get_the_model(tmp_path):
    """Checkpoints hold the model and its optimizer; schedules and early stopping act on the training."""
    stream = keras_fam.StreamingModel(make_lm(1), B)
    stream.compile(keras.optimizers.Adam(1e-2), **QUICK)
    lm, seen = stream.model, []

    class Watch(keras.callbacks.Callback):
        def set_model(self, model):
            super().set_model(model)
            seen.append(model)

        def on_train_batch_end(self, batch, logs=None):
            seen.append(numpy(self.model.backbone.blocks[0].up.kernel))

    checkpoints = [
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
    ]
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 1e-2 if epoch == 0 else 0.0)
    stops = keras.callbacks.EarlyStopping("sparse_categorical_accuracy", min_delta=2.0, patience=1, verbose=0)
    history = stream.fit(Chunks(), epochs=5, verbose=0, callbacks=[Watch(), *checkpoints, rates, stops])
    assert seen[0] is lm and (seen[1] != seen[2]).any() and len(history.epoch) == 2
    assert history.history["learning_rate"] == [float(np.float32(1e-2)), 0.0]
    np.testing.assert_array_equal(seen[4], seen[-1])  # at rate 0
    assert not lm.compiled and "set_model" not in vars(stops) and "jax_state_sync" not in vars(lm)

    other = make_lm(1)
    for variable in other.trainable_variables:
        variable.assign(ops.zeros_like(variable.value))
    other.load_weights(tmp_path / "2.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "2.keras")
    for variable, *found in zip(lm.variables, other.variables, loaded.variables, strict=True):
        for value in found:
            np.testing.assert_array_equal(numpy(value), numpy(variable))
    again = keras_fam.StreamingModel(loaded, B)
    again.compile(**QUICK)
    again.set_state(stream.state)
    for one in (stream, again):
        one._trainer.optimizer.learning_rate = 1e-2
        one.train_on_batch(TOKENS[:, CHUNKS[0]], TARGETS[:, CHUNKS[0]])
    assert int(numpy(loaded.optimizer.iterations)) == 2 * len(CHUNKS) + 1
    for variable, other in zip(lm.trainable_variables, loaded.trainable_variables, strict=True):
        close(other, numpy(variable), 1e-5)


def test_batches_as_lists_and_iterators():
    """What `fit` promises to take; what it cannot read in order is refused, and nothing has moved then."""
    stream = make_stream(keras.optimizers.SGD(0.5, use_ema=True))
    lists = [(TOKENS[:, part].tolist(), TARGETS[:, part].tolist()) for part in CHUNKS]
    weights, expected = stream.model.get_weights(), stream.fit(Chunks(), verbose=0).history["loss"]
    whole = [np.concatenate([x[:, part] for part in CHUNKS]) for x in (TOKENS, TARGETS)]
    for given in ((lists,), (tuple(lists),), (iter(lists),), whole, [x.tolist() for x in whole]):
        stream.model.set_weights(weights)
        stream.reset_state()
        assert stream.fit(*given, verbose=0).history["loss"] == expected
        assert stream.position.tolist() == [6 * S] * B
    stream.fit((batch for batch in 2 * lists), epochs=2, steps_per_epoch=3, verbose=0)
    assert stream.position.tolist() == [18 * S] * B

    class Workers(Chunks):
        workers = 2

    wrong = {
        "is read once": iter(lists),
        "workers=1": Workers(),
        "at least one batch": [],
        "received a ndarray": [TOKENS, TARGETS],
        "received a tuple of 4": [(TOKENS,) * 4],
        "received object": object(),
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            stream.fit(given, epochs=2, verbose=0)
    with pytest.raises(ValueError, match="Pass its callbacks"):
        stream.fit(lists, callbacks=keras.callbacks.CallbackList([]))
    for method in (stream.fit, stream.evaluate):  # at the first batch, and after some
        for broken in ([TOKENS, TARGETS], iter([*lists, "no batch"])):
            with pytest.raises(Exception, match="Each batch of `x`"):  # TensorFlow wraps it
                method(broken, verbose=0)
    assert stream.position.tolist() == [18 * S] * B
    stream.predict(TOKENS)  # the weights are there


def test_the_loss_of_a_float16_model_is_scaled():
    """Gradients too small for float16 reach the weights, whatever the global policy is."""
    lm = make_lm(1, dtype="mixed_float16")
    stream = keras_fam.StreamingModel(lm, B)
    stream.compile(keras.optimizers.SGD(1.0), weighted_metrics=[], **QUICK)
    assert isinstance(stream._trainer.optimizer, keras.optimizers.LossScaleOptimizer)
    before = numpy(lm.backbone.blocks[0].up.kernel)
    tokens, targets = TOKENS[:, CHUNKS[0]], TARGETS[:, CHUNKS[0]]
    stream.train_on_batch(tokens, targets, np.full(tokens.shape, 1e-7, "float32"))
    moved = numpy(lm.backbone.blocks[0].up.kernel) - before
    assert 0 < np.abs(moved).max() < 1e-7


def test_new_streams_do_not_share_memory_with_the_weights():
    """torch: a state that was a view of the memory prompt followed its training, or could no longer be read."""
    stream = make_stream()
    for _ in range(6):  # eagerly, then compiled
        stream.reset_state()
        held = numpy(stream.state.layers[0].fam).copy()
        prompt = stream.model.backbone.memory_prompt
        prompt.assign(prompt.value + 1.0)
        np.testing.assert_array_equal(numpy(stream.state.layers[0].fam), held)
        stream.set_state(stream.get_state())
