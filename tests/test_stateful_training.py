"""Successive chunks with carried state: `fit`, `evaluate`, `train_on_batch` and `predict` over datasets."""

import keras
import numpy as np
import pytest
from keras import ops
from support import close, numpy, quick_compile

import keras_fam
from keras_fam.ops.backend import value_and_gradient

V, S, B = 13, 4, 2
TOKENS = np.random.default_rng(0).integers(0, V, (B, 6 * S)).astype("int32")
TARGETS = np.roll(TOKENS, -1, axis=1)
CHUNKS = [slice(first, first + 2 * S) for first in range(0, 6 * S, 2 * S)]


class Chunks(keras.utils.PyDataset):
    """Chunks with targets; row 1 starts anew at chunk `reset`."""

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
    stream.compile(optimizer or keras.optimizers.SGD(0.5), **compile_options)
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
    whole = numpy(stream.model(TOKENS))
    assert abs(loss - cross_entropy(whole, TARGETS)) < 1e-5
    _, state = stream.model(TOKENS, return_state=True)
    for a, b in zip(keras.tree.flatten(stream.state), keras.tree.flatten(state), strict=True):
        close(a, numpy(b), 1e-5)
    assert stream.position.tolist() == [6 * S] * B


def test_reset_flags():
    stream = make_stream()
    loss = stream.evaluate(Chunks(reset=1), verbose=0, return_dict=True)["loss"]
    rows = [numpy(stream.model(TOKENS[:1]))[0], numpy(stream.model(TOKENS[1:, 2 * S :]))[0]]
    first = numpy(stream.model(TOKENS[1:, : 2 * S]))[0]
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
    """`fit` over a dataset takes the same steps; `aligned` chunks and ragged ones agree."""
    one, other = make_stream(), make_stream(aligned=False)
    one.fit(Chunks(), epochs=2, verbose=0)
    for _ in range(2):
        for part in CHUNKS:
            other.train_on_batch(TOKENS[:, part], TARGETS[:, part])
    for a, b in zip(one.model.trainable_variables, other.model.trainable_variables, strict=True):
        close(a, numpy(b), 1e-4)
    assert one.position.tolist() == other.position.tolist() == [12 * S] * B


def test_reset_every_epoch_and_callbacks():
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(int(numpy(self.model.state.position.block_index).max()))

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
    close(outputs[0], numpy(stream.model(TOKENS[:1]))[0], 1e-5)
    close(outputs[1, 2 * S :], numpy(stream.model(TOKENS[1:, 2 * S :]))[0], 1e-5)
    assert stream.predict((TOKENS[:, part] for part in CHUNKS), steps=2, collect=False) is None
    assert stream.position.tolist() == [10 * S, 8 * S]


def test_the_end_of_the_data_moves_nothing():
    """Position, draws and counters are those of the batches that were there. TensorFlow finds the end within a step,
    which then must not assign anything."""
    stream = keras_fam.StreamingModel(make_lm(1, dropout=0.1), B)
    quick_compile(stream, "sgd")
    stream.fit(batches(), verbose=0)
    assert stream.position.tolist() == [6 * S] * B
    assert draws(stream.model.backbone.seed_generator) == len(CHUNKS)
    assert int(numpy(stream._carried.optimizer.iterations)) == len(CHUNKS)
    stream.evaluate(batches(), verbose=0)
    assert stream.position.tolist() == [12 * S] * B

    lm = make_lm(1, dropout=0.1, random_state_passing=keras_fam.Ramp(0.8, delay=2))
    quick_compile(lm, "sgd")
    lm.fit(batches(), verbose=0)
    passing = lm.backbone.random_state_passing
    assert int(numpy(passing.steps)) == len(CHUNKS)
    assert draws(passing.seed_generator) == draws(lm.backbone.seed_generator) == len(CHUNKS)

    block = keras_fam.TransformerFAMBlock(2, 8, 16, block_size=S, fam_length=2, dropout=0.1, stateful=True)
    tokens = keras.Input(batch_shape=(B, 2 * S), dtype="int32")
    model = keras.Model(tokens, keras.layers.Dense(V)(block(keras.layers.Embedding(V, 16)(tokens))))
    options = {"jit_compile": False} if keras.backend.backend() == "tensorflow" else {}
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    for read, method in enumerate((model.fit, model.evaluate), start=1):
        method(batches(), verbose=0)
        assert numpy(block.state.position.block_index).tolist() == [6 * read] * B
        assert draws(block.seed_generator) == len(CHUNKS)
