"""Any Keras layer as the feed-forward part: copies, files, LoRA and int8, and what is refused. Numbers: the oracle."""

import keras
import numpy as np
import pytest
from support import HIDDEN_DIM, SMALL, SPLIT, close, numpy, quick_compile, tiny

import keras_fam
from keras_fam import MixtureOfExperts, TransformerFAMBlock
from keras_fam.models.configs import count_weights

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 10)).astype("int32")


def two_layers(**options):
    return keras.Sequential([keras.layers.Dense(24, activation="silu"), keras.layers.Dense(HIDDEN_DIM)], **options)


def weights_of(model):
    return [numpy(v) for v in model.weights]


def test_a_layer_that_does_the_same_is_the_same():
    """For tokens and for memory rows, which both pass it."""
    plain = TransformerFAMBlock(**SMALL, gated=False, use_feedforward_bias=True)
    block = TransformerFAMBlock(**{**SMALL, "intermediate_dim": None}, feed_forward=two_layers())
    for layer in (plain, block):
        layer.build((None, None, HIDDEN_DIM))
    assert block.gate is block.up is block.down is None
    ours = {v.path.partition("/")[2]: v for v in plain.weights}
    for v in block.weights:
        name = v.path.partition("/")[2]
        if name not in ours:
            first = v.shape[-1] == 24
            name = f"{'up' if first else 'down'}/{v.name}"
        v.assign(ours[name])
    x = np.random.default_rng(1).normal(size=(2, 14, HIDDEN_DIM)).astype("float32")
    y, state = block(x, return_state=True)
    expected, other = plain(x, return_state=True)
    close(y, expected, SPLIT)
    close(state.layers[0].fam, other.layers[0].fam, SPLIT)


@pytest.mark.parametrize("scanned", [False, True])
def test_each_layer_of_a_backbone_gets_a_copy_of_its_own(scanned):
    experts = MixtureOfExperts(3, 6, name="mine")
    lm = tiny(2, feed_forward=experts, scan_layers=scanned)
    first, second = (block.feed_forward for block in lm.backbone.blocks)
    assert first is not experts and first.name == "feed_forward" and not experts.built
    assert np.abs(numpy(first.up_kernel) - numpy(second.up_kernel)).max() > 0.01
    settings = {**lm.backbone.get_config(), "random_state_passing": 0.0}
    assert count_weights(settings) == lm.count_params()
    assert np.isfinite(numpy(lm(TOKENS))).all()


def test_layers_may_differ_and_come_back_from_files(tmp_path):
    own = [{"feed_forward": MixtureOfExperts(3, 6)}, {"feed_forward": keras.layers.Dense(8)}, {}]
    lm = tiny(3, layer_settings=own)
    assert [type(block.feed_forward).__name__ for block in lm.backbone.blocks] == [
        "MixtureOfExperts", "Dense", "NoneType",
    ]  # fmt: skip
    expected = numpy(lm(TOKENS))
    lm.save(tmp_path / "lm.keras")
    np.testing.assert_array_equal(numpy(keras.saving.load_model(tmp_path / "lm.keras")(TOKENS)), expected)
    lm.save_to_preset(tmp_path / "preset")
    np.testing.assert_array_equal(numpy(type(lm).from_preset(tmp_path / "preset")(TOKENS)), expected)
    short = type(lm).from_preset(tmp_path / "preset", dtype="bfloat16")
    assert {v.dtype for v in short.weights} == {"bfloat16"}, "copies follow the dtype of the model"


def test_experts_train_beside_a_memory():
    lm = tiny(2, feed_forward=MixtureOfExperts(3, 6, top_k=1, normalize=False), fam_query="layer_inputs")
    before = weights_of(lm)
    quick_compile(lm, keras.optimizers.SGD(0.5))
    lm.fit(TOKENS, np.roll(TOKENS, -1, 1), verbose=0)
    for v, b in zip(lm.weights, before, strict=True):
        assert np.abs(numpy(v) - b).max() > 0 or "random_state" in v.path, v.path


def test_lora_reaches_attention_and_says_so():
    lm = tiny(2, layer_settings=[{}, {"feed_forward": MixtureOfExperts(3, 6)}])
    for targets in (["attention", "feed_forward"], ["down"]):
        with pytest.raises(ValueError, match=r'block_1 is a layer of its own \(MixtureOfExperts\).*\["attention"\]'):
            lm.enable_lora(2, targets)
    assert lm.lora_layers() == {} and len(lm.trainable_weights) == len(lm.weights)
    lm.enable_lora(2, ["attention"])
    assert len(lm.lora_layers()) == 8
    assert not any(v.trainable for v in lm.backbone.blocks[1].feed_forward.weights)


def test_experts_are_not_quantized_and_the_model_is_left_alone():
    lm = tiny(1, feed_forward=MixtureOfExperts(3, 6))
    before = weights_of(lm)
    with pytest.raises(ValueError, match=r"is a mixture of experts, whose kernels are not quantized.*received 'int8'"):
        lm.quantize("int8")
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(lm), before, strict=True))
    dense = tiny(1, feed_forward=keras.layers.Dense(8))
    dense.quantize("int8")
    assert dense.backbone.blocks[0].feed_forward.quantization_mode == "int8"


def refused(message, **settings):
    with pytest.raises(ValueError, match=message):
        TransformerFAMBlock(**{**SMALL, **settings}).build((None, None, HIDDEN_DIM))


def test_what_cannot_be_a_feed_forward_part():
    refused("`feed_forward` must be None, a Keras layer .* received 'experts'", feed_forward="experts")
    refused(
        r"its input's shape, \[batch, rows, 12\]; of \(2, 3, 12\), wide makes \(2, 3, 13\)",
        feed_forward=keras.layers.Dense(13, name="wide"),
    )
    for layer in (keras.layers.Dropout(0.1), keras.layers.BatchNormalization()):
        refused(f"{layer.name} .* in whole draws", feed_forward=keras.Sequential([layer], name="whole"))
    refused("`intermediate_dim` must be a positive integer; received None", intermediate_dim=None)
    for settings, message in (
        ({"top_k": 4}, "`top_k` must be at most `num_experts`.* received 4 of 3"),
        ({"num_experts": 0}, "`num_experts` must be a positive"),
        ({"swiglu_limit": -1}, "`swiglu_limit` must be a positive"),
        ({"shared_intermediate_dim": 0}, "`shared_intermediate_dim` must be a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureOfExperts(**{"num_experts": 3, "intermediate_dim": 4, **settings})


def test_a_feed_forward_part_that_mixes_rows_is_found():
    class Mean(keras.layers.Layer):
        def call(self, x):
            return x + keras.ops.mean(x, axis=1, keepdims=True)

    block = TransformerFAMBlock(**SMALL, feed_forward=Mean())
    block.build((None, None, HIDDEN_DIM))
    with pytest.raises(AssertionError, match=r"`(chunks|future)`"):
        keras_fam.check_streaming(block)
