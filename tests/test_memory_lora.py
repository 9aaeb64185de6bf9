"""LoRA on memory rows alone: tokens pass the weights as they are."""

import keras
import numpy as np
import pytest
import reference
from small_model import logits, model, shake, tokens, with_text
from support import ORACLE, call, close, make, numpy, oracle_inputs, relative

import keras_fam
from keras_fam.models.lora import rows_of

KERNELS = ("query", "key", "value", "output", "gate", "up", "down")
VARIANTS = ("fam", "sinks", "sum_fam", "summary", "hard_gate", "anchored_hard_gate", "layer_norm_biases")


def with_updates(variant):
    """A block whose kernels have an update for memory rows, and the oracle's weights, settings and first memory."""
    block, weights, cfg, fam0 = make(variant)
    memory, rng = dict(weights), np.random.default_rng(7)
    attention = block.attention
    layers = (attention.query, attention.key, attention.value, attention.output_projection, block.gate, block.up)
    for name, layer in zip(KERNELS, (*layers, block.down), strict=True):
        if layer is None:
            continue
        layer.enable_lora(2, lora_alpha=3.0)
        vars(layer)["_lora_rows"] = "memory"
        layer.lora_kernel_b.assign(0.3 * rng.normal(size=layer.lora_kernel_b.shape))
        memory[f"{name}_kernel"] = numpy(layer.kernel)
    assert set(memory) == set(weights)
    return block, weights, memory, cfg, fam0


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_memory_rows_are_updated(variant):
    block, weights, memory, cfg, fam0 = with_updates(variant)
    x = np.random.default_rng(1).normal(size=(2, 14, block.attention.query.kernel.shape[0])).astype("float32")
    y, state = call(block, x, return_state=True)
    inputs = oracle_inputs(cfg, fam0)
    expected, rows, _ = reference.batch_layer(x, None, {**weights, "memory": memory}, cfg, **inputs)
    plain, _, _ = reference.batch_layer(x, None, weights, cfg, **inputs)
    assert relative(y, expected) <= ORACLE["float32"] < 1e-3 < relative(y, plain)
    close(state.layers[0].fam, np.stack([row.memories[-1][1] for row in rows]), ORACLE["float32"])
    parts, state = [], None
    for part in np.split(x, [1, 6, 7], axis=1):
        y, state = call(block, part, initial_state=state, return_state=True)
        parts.append(numpy(y))
    close(np.concatenate(parts, axis=1), expected, ORACLE["float32"])


def adapted(**settings):
    lm = model(**settings)
    lm.enable_lora(2, rows="memory")
    shake(lm)
    return lm


@pytest.mark.parametrize("settings", [{}, {"scan_layers": True}, {"attention_sinks": 2, "fam_query": "layer_inputs"}])
def test_a_closed_gate_gives_the_model_before_to_the_bit(settings):
    lm, opened = model(fam_gate=-np.inf, **settings), model(**settings)
    before, read = logits(lm), logits(opened)
    for changed in (lm, opened):
        changed.enable_lora(2, rows="memory")
        shake(changed)
    np.testing.assert_array_equal(logits(lm), before)
    assert np.abs(logits(opened) - read)[:, 8:].max() > 0.02


def test_updates_are_trained_and_nothing_else_moves():
    lm = adapted(fam_gate=-1.0)
    frozen = {v.path: numpy(v) for v in lm.weights if not v.trainable}
    trained = {v.path: numpy(v) for v in lm.trainable_weights}
    names = {path.rpartition("/")[2] for path in trained}
    assert names == {"lora_kernel_a", "lora_kernel_b", "memory_prompt", "fam_gate"}
    lm.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    lm.fit(tokens(16), np.roll(tokens(16), -1, axis=1), epochs=1, verbose=0)
    assert all(np.array_equal(numpy(v), frozen[v.path]) for v in lm.weights if v.path in frozen)
    moved = [v.path for v in lm.trainable_weights if not np.array_equal(numpy(v), trained[v.path])]
    assert sum("lora" in path for path in moved) >= 12, moved


def test_updates_go_to_files_and_come_back(tmp_path):
    lm = with_text()
    lm.enable_lora(2, rows="memory")
    shake(lm)
    expected = logits(lm)
    lm.save_lora_weights(tmp_path / "x.lora.h5")
    other = model()
    other.load_lora_weights(tmp_path / "x.lora.h5")
    assert {rows_of(layer) for layer in other.lora_layers().values()} == {"memory"}
    close(logits(other), expected, 1e-6)
    lm.save_to_preset(tmp_path / "preset")
    close(logits(keras_fam.TransformerFAMCausalLM.from_preset(tmp_path / "preset")), expected, 1e-6)
    everywhere = model()
    everywhere.enable_lora(2)
    with pytest.raises(ValueError, match=r"rows 'memory'; .* rows 'all' .*without LoRA"):
        everywhere.load_lora_weights(tmp_path / "x.lora.h5")


def test_what_would_act_on_tokens_is_refused(tmp_path):
    lm = adapted()
    before = logits(lm)
    refused = {
        "act on memory rows alone": lm.merge_lora,
        "save_to_preset": lambda: lm.save(tmp_path / "m.keras"),
        "for memory rows alone": lambda: lm.save_weights(tmp_path / "m.weights.h5"),
        "update all rows": lambda: lm.quantize("int8"),
    }
    for message, act in refused.items():
        with pytest.raises(ValueError, match=message):
            act()
    np.testing.assert_array_equal(logits(lm), before)
    with pytest.raises(ValueError, match="`rows` must be"):
        model().enable_lora(2, rows="tokens")
    with pytest.raises(ValueError, match="fam_length=0"):
        model(fam_length=0).enable_lora(2, rows="memory")
    with pytest.raises(ValueError, match="keys of later blocks"):
        feedback = model(backbone_class=keras_fam.baselines.FeedbackMemoryBackbone)
        feedback.enable_lora(2, rows="memory")
    quantized = model()
    quantized.quantize("int8")
    with pytest.raises(ValueError, match=r'int8.*rows="all"'):
        quantized.enable_lora(2, rows="memory")
