"""What training alone does: Random State Passing, Random Position Offset, noise; and layers that differ in a model."""

import keras
import numpy as np
import pytest
import reference
from keras import ops
from support import ORACLE, SPLIT, close, numpy, relative
from test_model import TOKENS, L, V, make

import keras_fam

ROWS = np.tile(TOKENS[:1], (8, 1))  # eight rows of the same tokens: what differs between them was drawn


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(1)


def distances(rows, expected):
    """Largest difference of each row of `[B, T, V]` from `[T, V]`, relative."""
    return np.abs(numpy(rows) - numpy(expected)[None]).max(axis=(1, 2)) / np.abs(numpy(expected)).max()


def test_each_row_draws_its_start():
    """After the first step every row starts from the memory that row 0 left, or from the learned one."""
    lm, weights, cfgs = make(random_state_passing=0.5)
    close(lm(ROWS, training=True), lm(ROWS), SPLIT)
    learned, fams, _ = reference.model(ROWS[:1], weights, cfgs)
    passed = reference.model(ROWS[:1], weights, cfgs, passed=[[fam[0] for fam in fams]])[0]
    second = lm(ROWS, training=True)
    from_learned, from_passed = distances(second, learned[0]) <= 1e-5, distances(second, passed[0]) <= 1e-5
    assert (from_learned ^ from_passed).all()
    assert from_learned.any() and from_passed.any()


def test_no_gradient_crosses_steps():
    """Where every row starts from the memory of the step before, the learned one gets no gradient."""
    lm = make(random_state_passing=1.0)[0]
    lm.compile(keras.optimizers.SGD(1e-2))
    targets = np.roll(TOKENS, -1, axis=1)
    prompt = [numpy(lm.backbone.memory_prompt)]
    for _ in range(2):
        lm.train_on_batch(TOKENS, targets)
        prompt.append(numpy(lm.backbone.memory_prompt))
    assert np.abs(prompt[1] - prompt[0]).max() > 0
    np.testing.assert_array_equal(prompt[2], prompt[1])


def test_passing_is_for_training_from_the_start():
    """Neither inference nor a call that is handed a state reads or writes the kept memory."""
    lm = make(random_state_passing=1.0)[0]
    passing = lm.backbone.random_state_passing
    lm(TOKENS)
    lm(TOKENS, training=True, initial_state=lm.get_initial_state(2))
    assert not bool(numpy(passing.filled.value))
    lm(TOKENS, training=True)
    kept = numpy(passing.memory)
    close(lm(TOKENS, training=True, initial_state=lm.get_initial_state(2)), lm(TOKENS), SPLIT)
    np.testing.assert_array_equal(numpy(passing.memory), kept)


@pytest.mark.parametrize("initial_fam", ["summary", "prefix"])
def test_passing_with_other_first_memories(initial_fam):
    lm, weights, cfgs = make(random_state_passing=1.0, initial_fam=initial_fam)
    lm(TOKENS, training=True)
    fams = reference.model(TOKENS, weights, cfgs)[1]
    memory = [fam[0] for fam in fams]
    passed = reference.model(TOKENS, weights, cfgs, passed=[memory, memory])[0]
    close(lm(TOKENS, training=True), passed, ORACLE["float32"])


def test_noise_on_the_memory():
    """In training alone, and read by the blocks after the one that wrote it."""
    lm, plain = make(memory_update=keras_fam.Residual(noise=0.1))[0], make()[0]
    close(lm(TOKENS), plain(TOKENS), 1e-6)
    noisy = [numpy(lm(TOKENS, training=True)) for _ in range(2)]
    expected = numpy(plain(TOKENS))
    for one in noisy:
        close(one[:, :4], expected[:, :4], SPLIT)
        assert 1e-3 < relative(one[:, 4:], expected[:, 4:]) < 1
    assert relative(noisy[0], noisy[1]) > 1e-3
    state = lm.backbone(TOKENS[:, :4], return_state=True, training=True)[1]
    exact = plain.backbone(TOKENS[:, :4], return_state=True)[1]
    for layer, without in zip(state.layers, exact.layers, strict=True):
        fam = numpy(without.fam)
        ratio = np.sqrt(np.mean((numpy(layer.fam) - fam) ** 2, axis=-1) / np.mean(fam**2, axis=-1))
        assert abs(ratio.mean() - 0.1) < 0.03  # of each row's own size


def test_noise_ramp():
    """The share of the noise in force, epoch by epoch; a whole share where no ramp is used."""
    lm = make(memory_update=keras_fam.Normalized(noise=0.5))[0]
    scales = [block.attention.memory_update.noise_scale for block in lm.backbone.blocks]
    assert [float(numpy(scale)) for scale in scales] == [1.0] * L
    seen = []
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(float(numpy(scales[-1]))))
    lm.compile()
    lm.fit(TOKENS, TOKENS, epochs=4, verbose=0, callbacks=[keras_fam.training.NoiseRamp(1, 3), look])
    assert seen == [0.0, 0.0, 0.5, 1.0]
    lm.backbone.blocks[0].attention.memory_update.noise_scale.assign(0.0)
    silent = [numpy(lm.backbone(TOKENS[:, :4], return_state=True, training=True)[1].layers[0].fam) for _ in range(2)]
    np.testing.assert_array_equal(*silent)
    for start, stop in ((-1, 2), (2, 2)):
        with pytest.raises(ValueError, match=f"received {start} and {stop}"):
            keras_fam.training.NoiseRamp(start, stop)
    plain = make()[0]
    plain.compile()
    with pytest.raises(ValueError, match="noise"):
        plain.fit(TOKENS, TOKENS, verbose=0, callbacks=[keras_fam.training.NoiseRamp(0, 1)])


def test_noise_grows_as_the_loss_permits():
    """`NoiseScale` is one number of a model, which `Curriculum` sets when a name in the logs gets there."""
    lm = make(memory_update=keras_fam.Residual(noise=0.5))[0]
    scale = keras_fam.training.NoiseScale(lm)
    assert scale.share == 1.0
    scale.share = 0.1
    assert scale.share == 0.1
    seen = []
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(scale.share))
    lm.compile(keras.optimizers.SGD(0.0))
    for threshold, expected in ((1e9, [0.1, 0.3, 0.7, 0.7]), (-1.0, [0.7, 0.7])):
        climb = keras_fam.training.Curriculum(
            scale, (0.1, 0.3, 0.7), attribute="share", monitor="loss", threshold=threshold
        )
        lm.fit(TOKENS, TOKENS, epochs=len(expected), verbose=0, callbacks=[climb, look])
        assert seen == expected
        seen.clear()
    with pytest.raises(ValueError, match=r"received 1\.5"):
        scale.share = 1.5
    with pytest.raises(ValueError, match="noise"):
        keras_fam.training.NoiseScale(make()[0])


def test_layers_with_settings_of_their_own():
    """As in Gemma 3: layer 0 sees 3 keys and has another wavelength."""
    own = {"attention_window": 3, "rope_wavelength": 100.0}
    lm, weights, cfgs = make(layer_settings=[own] + [{}] * (L - 1))
    cfgs = [{**cfgs[0], **own}, *cfgs[1:]]
    close(lm(TOKENS), reference.model(TOKENS, weights, cfgs)[0], ORACLE["float32"])
    clone = type(lm).from_config(lm.get_config())
    assert clone.backbone.blocks[0].attention.attention_window == 3
    assert clone.backbone.blocks[1].attention.attention_window is None


def test_embedding_scale_and_softcap():
    lm, weights, cfgs = make(embedding_scale=4.0, logit_softcap=2.0, tie_weights=False)
    scaled = {**weights, "embedding": weights["embedding"] * 4.0}
    expected = 2.0 * np.tanh(reference.model(TOKENS, scaled, cfgs)[0] / 2.0)
    close(lm(TOKENS), expected, ORACLE["float32"])


def test_loss_weights():
    """Tokens of weight 0 do not count, whatever their targets are."""
    lm = make()[0]
    lm.compile()
    targets, weights = np.roll(TOKENS, -1, axis=1), np.ones(TOKENS.shape, "float32")
    weights[:, 10:] = 0
    other = np.where(weights > 0, targets, (targets + 1) % V)
    loss = lm.test_on_batch(TOKENS, targets, sample_weight=weights)
    np.testing.assert_allclose(lm.test_on_batch(TOKENS, other, sample_weight=weights), loss, rtol=1e-6)
    logits = ops.log_softmax(lm(TOKENS), axis=-1)
    picked = np.take_along_axis(numpy(logits), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss[0], -(picked * weights).sum() / weights.size, rtol=1e-5)


def test_a_loaded_model_goes_on_training(tmp_path):
    """Optimizer, loss and metrics come back with the model: the next step is the one it would have taken."""
    lm = make(random_state_passing=1.0)[0]
    lm.compile(keras.optimizers.Adam(1e-2))
    targets = np.roll(TOKENS, -1, axis=1)
    lm.train_on_batch(TOKENS, targets)
    lm.save(tmp_path / "lm.keras")
    loaded = keras.models.load_model(tmp_path / "lm.keras")
    assert loaded.compiled
    for model in (lm, loaded):
        model.train_on_batch(TOKENS, targets)
    for variable, expected in zip(loaded.trainable_variables, lm.trainable_variables, strict=True):
        close(variable, numpy(expected), SPLIT)
