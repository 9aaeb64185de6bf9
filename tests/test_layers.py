"""TransformerFAMBlock and FeedbackAttention as Keras layers: configuration, models, files, precision, state."""

import inspect
import json

import keras
import numpy as np
import pytest
import support
from keras import ops
from support import HIDDEN_DIM, SMALL, SPLIT, UPDATES, VARIANTS, close, make, numpy, states_close

from keras_fam import FeedbackAttention, MixtureOfExperts, StreamState, TransformerFAMBlock
from keras_fam.layers import feed_forward as feed_forwards
from keras_fam.layers import memory_update as memory_updates

ATTENTION_ONLY = {name: value for name, value in SMALL.items() if name != "intermediate_dim"}


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def data(batch=2, tokens=14, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, tokens, HIDDEN_DIM)).astype("float32")


def block(**settings):
    layer = TransformerFAMBlock(**{**SMALL, **settings})
    layer.build((2, None, HIDDEN_DIM))
    return layer


def attention(**settings):
    layer = FeedbackAttention(**{**ATTENTION_ONLY, **settings})
    layer.build((2, None, HIDDEN_DIM))
    return layer


def two_blocks():
    """A functional model of two blocks."""
    x = keras.Input((None, HIDDEN_DIM))
    y = TransformerFAMBlock(**SMALL)(x)
    y = TransformerFAMBlock(**SMALL, initial_fam="summary")(y)
    return keras.Model(x, y)


# Configuration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_holds_every_setting(variant):
    changes = dict(VARIANTS[variant])
    if changes.get("fam_query") == "static":  # a class of its own
        changes.pop("fam_query")
    if changes.get("memory_update") in UPDATES:
        changes["memory_update"] = memory_updates.serialize(UPDATES[changes["memory_update"]])
    if changes.get("feed_forward"):
        experts = MixtureOfExperts(**changes["feed_forward"], name="experts", dtype="mixed_bfloat16")
        changes["feed_forward"] = feed_forwards.serialize(experts, experts.dtype_policy)
    layer = TransformerFAMBlock(**{**SMALL, **changes}, name="some_block", dtype="mixed_bfloat16")
    config = json.loads(json.dumps(layer.get_config()))
    clone = TransformerFAMBlock.from_config(config)
    assert clone.get_config() == layer.get_config()
    assert {name: config[name] for name in changes} == changes


@pytest.mark.parametrize("kind", [TransformerFAMBlock, FeedbackAttention])
def test_config_mirrors_the_signature(kind):
    settings = SMALL if kind is TransformerFAMBlock else ATTENTION_ONLY
    parameters = set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
    parameters |= set(inspect.signature(FeedbackAttention.__init__).parameters) - {"self", "kwargs"}
    assert parameters <= set(kind(**settings).get_config())


@pytest.mark.parametrize(
    "layer",
    [
        lambda: block(norm="layer_norm", use_attention_bias=True, use_output_bias=True, use_feedforward_bias=True),
        lambda: block(initial_fam="summary", query_key_norm="rms_norm", gated=False),
        lambda: attention(num_visible_memories=2, memory_update="normalized"),
    ],
)
def test_config_round_trip_gives_equal_outputs(layer):
    layer, x = layer(), data()
    clone = type(layer).from_config(layer.get_config())
    clone.build((None, None, HIDDEN_DIM))
    before = numpy(clone(x))
    clone.set_weights(layer.get_weights())
    y = numpy(layer(x))
    assert np.abs(before - y).max() > 1e-3
    np.testing.assert_array_equal(numpy(clone(x)), y)


# Models -------------------------------------------------------------------------------------------------------------


def test_functional_model(tmp_path):
    """Fits, predicts any number of rows and tokens, and comes back from one file as it was."""
    model, x = two_blocks(), data()
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    weights = [w.copy() for w in model.get_weights()]
    history = model.fit(x, np.zeros_like(x), epochs=2, verbose=0).history["loss"]
    assert history[1] < history[0]
    changed = [np.abs(a - b).max() > 0 for a, b in zip(weights, model.get_weights(), strict=True)]
    assert all(changed), [w.path for w, c in zip(model.weights, changed, strict=True) if not c]
    y = model.predict(x, verbose=0)
    close(y, model.layers[2](model.layers[1](x)), SPLIT)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    close(loaded.predict(x, verbose=0), y, 1e-6)
    for tokens in (9, 2):  # other lengths, and no look ahead
        close(loaded.predict(x[:1, :tokens], verbose=0), y[:1, :tokens], SPLIT)


def test_shapes_without_values():
    x = keras.Input((None, HIDDEN_DIM))
    layer = TransformerFAMBlock(**SMALL)
    y, state = layer(x, return_state=True)
    assert isinstance(state, StreamState)
    assert y.shape == layer(x).shape == (None, None, HIDDEN_DIM)
    assert layer.compute_output_shape((2, 5, HIDDEN_DIM)) == (2, 5, HIDDEN_DIM)
    spec = layer.compute_output_spec(keras.KerasTensor((2, 5, HIDDEN_DIM)), return_state=True)
    found = layer(data(tokens=5), return_state=True)
    for expected, actual in zip(keras.tree.flatten(spec), keras.tree.flatten(found), strict=True):
        assert tuple(expected.shape) == tuple(actual.shape)
        assert expected.dtype == keras.backend.standardize_dtype(actual.dtype)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow compiles without knowing sizes")
@pytest.mark.parametrize("variant", ["fam", "bswa_m2", "summary_memories_3", "static_memories_2", "fam_window"])
def test_unknown_batch_and_time(variant):
    import tensorflow as tf

    layer = make(variant)[0]
    program = tf.function(layer, input_signature=[tf.TensorSpec([None, None, HIDDEN_DIM])])
    for batch, tokens in ((2, 10), (1, 1), (3, 8)):
        x = data(batch, tokens)
        close(program(tf.constant(x)), layer(x), SPLIT)


def test_rnn_convention():
    """`return_state` and `initial_state` go on exactly; a layer that is not stateful forgets between calls."""
    layer, x = make()[0], data()
    y, last = layer(x, return_state=True)
    first, state = layer(x[:, :7], return_state=True)
    second, state = layer(x[:, 7:], initial_state=state, return_state=True)
    close(ops.concatenate([first, second], axis=1), y, SPLIT)
    states_close(state, last, SPLIT)
    close(layer(x[:, 7:], initial_state=layer.get_initial_state(2)), layer(x[:, 7:]), SPLIT)
    assert support.relative(layer(x[:, 7:]), second) > 0.05


# Padding ------------------------------------------------------------------------------------------------------------


def test_padding_does_not_exist():
    """In front of, between and behind the tokens: outputs are 0 there, and all else is as without it."""
    layer, x = make(num_visible_memories=2)[0], data()
    mask = np.ones((2, 20), bool)
    mask[0, [0, 1, 2, 3, 4, 12]] = mask[1, [3, 9, 10, 11, 18, 19]] = False
    padded = np.full((2, 20, HIDDEN_DIM), np.nan, "float32")
    padded[mask] = x.reshape(-1, HIDDEN_DIM)
    y, state = layer(padded, padding_mask=mask, return_state=True)
    expected, expected_state = layer(x, return_state=True)
    y = numpy(y)
    assert (y[~mask] == 0).all()
    close(y[mask].reshape(x.shape), expected, SPLIT)
    states_close(state, expected_state, SPLIT)


def test_implicit_mask():
    """`Embedding(mask_zero=True)` reaches every block of a model."""
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(9, HIDDEN_DIM, embeddings_initializer="normal", mask_zero=True)(ids)
    blocks = [TransformerFAMBlock(**SMALL) for _ in range(2)]
    model = keras.Model(ids, blocks[1](blocks[0](x)))
    tokens = np.random.default_rng(0).integers(1, 9, (2, 20))
    tokens[0, [0, 1, 5, 6, 7, 8]] = tokens[1, [2, 4, 16, 17, 18, 19]] = 0
    y = model.predict(tokens, verbose=0)
    assert (y[tokens == 0] == 0).all()
    squeezed = numpy(model.layers[1](tokens))[tokens > 0].reshape(2, 14, HIDDEN_DIM)
    close(y[tokens > 0].reshape(squeezed.shape), blocks[1](blocks[0](squeezed)), SPLIT)


# Precision and weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [block, attention])
def test_mixed_bfloat16(kind):
    keras.utils.set_random_seed(4)  # how much the weights amplify a rounding error: 0.4 to 4 % among those drawn
    exact, x = kind(), data()
    mixed = kind(dtype="mixed_bfloat16")
    mixed.set_weights(exact.get_weights())
    y, state = mixed(x, return_state=True)
    expected, expected_state = exact(x, return_state=True)
    memory = state.layers[0]
    dtypes = [keras.backend.standardize_dtype(t.dtype) for t in (y, memory.key, memory.fam_value, memory.fam)]
    assert dtypes == ["bfloat16", "bfloat16", "bfloat16", "float32"]
    assert {w.dtype for w in mixed.weights} == {"float32"}
    close(ops.cast(y, "float32"), expected, 3e-2)
    close(memory.fam, expected_state.layers[0].fam, 3e-2)
    assert support.relative(ops.cast(y, "float32"), expected) > 1e-4  # it did compute in bfloat16


def test_lora():
    layer, x = block(), data()
    before = numpy(layer(x))
    parts = layer.attention
    dense = [parts.query, parts.key, parts.value, parts.output_projection, layer.gate, layer.up, layer.down]
    count = len(layer.trainable_weights)
    for part in dense:
        part.enable_lora(2)
    assert len(layer.trainable_weights) == count + len(dense)  # each: kernel out, two factors in
    close(layer(x), before, 1e-6)
    for part in dense:
        part.lora_kernel_b.assign(np.full(part.lora_kernel_b.shape, 0.1))
    assert support.relative(layer(x), before) > 1e-2


def test_int8():
    layer, x = block(), data()
    before = numpy(layer(x))
    parts = layer.attention
    for part in (parts.query, parts.key, parts.value, parts.output_projection, layer.gate, layer.up, layer.down):
        part.quantize("int8")
    assert parts.query.kernel.dtype == layer.down.kernel.dtype == "int8"
    close(layer(x), before, 0.1)


def test_dropout_in_training_only():
    layer, x = block(dropout=0.5), data()
    plain = block()
    for weight, source in zip(plain.weights, layer.weights, strict=True):  # the seed is no weight
        weight.assign(source)
    y, state = layer(x, return_state=True)
    close(y, plain(x), 1e-6)
    trained = [layer(x, training=True, return_state=True) for _ in range(2)]
    assert support.relative(trained[0][0], y) > 0.1
    assert support.relative(trained[1][0], trained[0][0]) > 0.1
    assert support.relative(trained[0][1].layers[0].fam, state.layers[0].fam) > 0.1
    changed = np.abs(numpy(trained[0][0]) - x) > 0
    assert 0.65 < changed.mean() < 0.85  # attention and feed-forward each drop half: a quarter of x passes unchanged


# A memory of length 0 is a plain Transformer ------------------------------------------------------------------------


def plain_attention(weights, wavelength):
    """Causal grouped-query attention `[B, T, D]` of stock Keras operations, with rotary positions."""

    def rotated(x):
        if wavelength is None:
            return x
        half = x.shape[-1] // 2
        angle = np.arange(x.shape[1])[:, None] * wavelength ** (-np.arange(half) / half)
        cos, sin = (ops.convert_to_tensor(f(angle)[None, :, None], "float32") for f in (np.cos, np.sin))
        first, second = x[..., :half], x[..., half:]
        return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def call(x):
        query, key, value = (
            ops.einsum("btd,dnh->btnh", x, ops.convert_to_tensor(weights[f"{name}_kernel"], "float32"))
            for name in ("query", "key", "value")
        )
        group = query.shape[2] // key.shape[2]
        key, value = (ops.repeat(part, group, axis=2) for part in (rotated(key), value))
        attended = ops.dot_product_attention(rotated(query), key, value, is_causal=True)
        return ops.einsum("btnh,nhd->btd", attended, ops.convert_to_tensor(weights["output_kernel"], "float32"))

    return call


@pytest.mark.parametrize("wavelength", [None, 10_000.0])
@pytest.mark.parametrize("block_size", [14, 16])
def test_without_memory_a_plain_transformer(wavelength, block_size):
    """Inputs of at most a block."""
    layer, weights, _, _ = make(fam_length=0, block_size=block_size, memory_segments=2, rope_wavelength=wavelength)
    x = data()
    norms = [keras.layers.RMSNormalization(epsilon=1e-6) for _ in range(2)]
    for part in norms:
        part.build(x.shape)
    dense = {}
    for name in ("gate", "up", "down"):
        kernel = weights[f"{name}_kernel"]
        dense[name] = keras.layers.Dense(kernel.shape[1], use_bias=False)
        dense[name].build((None, kernel.shape[0]))
        dense[name].set_weights([kernel])
    norms[0].set_weights([weights["attention_norm_scale"]])
    norms[1].set_weights([weights["feedforward_norm_scale"]])
    y = plain_attention(weights, wavelength)(norms[0](x)) + ops.convert_to_tensor(x)
    z = norms[1](y)
    y = y + dense["down"](ops.silu(dense["gate"](z)) * dense["up"](z))
    close(layer(x), y, 1e-5)
