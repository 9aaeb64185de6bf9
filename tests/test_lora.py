"""LoRA and int8 on language models."""

import os

import keras
import numpy as np
import pytest
from keras import ops
from small_model import logits, model, shake, tokens
from support import INT8, close, gradients, numpy

import keras_fam
from keras_fam.layers.fast_call import call_dense
from keras_fam.ops.backend import compiled

VARIANTS = {
    "joined": {},
    "biased": {"use_attention_bias": True, "use_feedforward_bias": True, "query_key_norm": "rms_norm"},
    "static": {"backbone_class": keras_fam.baselines.SummaryFAMBackbone},
    "float": {"fam_position": "float"},
}
ALL = {"query", "key", "value", "output", "gate", "up", "down"}


def read_alone(lm):
    """What every memory row is after three blocks, so that its updates are seen by themselves."""
    run = compiled(lambda x, state: lm.advance(x, state)[1], lambda: lm.variables)
    state = run(ops.convert_to_tensor(tokens(12)), lm.get_initial_state(2))
    return np.stack([ops.convert_to_numpy(layer.fam) for layer in state.layers])


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_act_on_tokens_and_memory_rows_as_merged_kernels_do(variant):
    lm = model(**VARIANTS[variant])
    before, memory, count = logits(lm), read_alone(lm), len(lm.weights)
    lm.enable_lora(2, alpha=3.0)
    close(logits(lm), before, 1e-6)
    shake(lm)
    with_updates, with_memory = logits(lm), read_alone(lm)
    assert np.abs(with_updates - before).max() > 0.05 and np.abs(with_memory - memory).max() > 0.05
    merged = model(**VARIANTS[variant])
    kernels = {name: ops.convert_to_numpy(layer.kernel) for name, layer in lm.lora_layers().items()}
    assert len(kernels) == 2 * len(ALL)
    merged.enable_lora(1)
    for name, layer in merged.lora_layers().items():
        layer._kernel.assign(kernels[name])
    merged.merge_lora()
    assert len(merged.weights) == count
    close(with_updates, logits(merged), 1e-5)
    close(with_memory, read_alone(merged), 1e-5)
    lm.merge_lora()
    assert lm.lora_layers() == {} and len(lm.weights) == len(lm.trainable_weights) == count
    assert np.abs(logits(lm) - with_updates).max() <= 1e-5
    lm.enable_lora(1)  # and again, on top


def test_factors_have_the_gradients_of_keras_own_layers():
    rng = np.random.default_rng(0)
    dense = keras.layers.Dense(5)
    dense.build((None, 6))
    heads = keras.layers.EinsumDense("rnh,nhd->rd", output_shape=(5,), bias_axes="d")
    heads.build((None, 2, 3))
    query = keras.layers.EinsumDense("rd,dnh->rnh", output_shape=(2, 3))
    query.build((None, 6))
    for layer, axes, out in ((dense, 1, (5,)), (heads, 2, (5,)), (query, 1, (2, 3))):
        layer.enable_lora(2, lora_alpha=3.0)
        layer.lora_kernel_b.assign(rng.normal(size=layer.lora_kernel_b.shape))
        x = rng.normal(size=(2, 4, 2, 3) if axes == 2 else (2, 4, 6)).astype("float32")
        flat = x.reshape(8, *x.shape[2:])
        weight = ops.convert_to_tensor(rng.normal(size=(8, *out)).astype("float32"))
        wanted = gradients(
            lambda x, layer=layer, weight=weight: ops.sum(layer.call(x) * weight),
            [flat, layer.lora_kernel_a, layer.lora_kernel_b],
        )
        found = gradients(
            lambda x, layer=layer, weight=weight, axes=axes: ops.sum(
                ops.reshape(call_dense(layer, x, axes), weight.shape) * weight
            ),
            [x, layer.lora_kernel_a, layer.lora_kernel_b],
        )
        for a, b in zip(found, wanted, strict=True):
            close(a.reshape(b.shape), b, 1e-5)


@pytest.mark.parametrize("train_memory", [True, False])
def test_only_updates_and_the_memory_prompt_are_trained(train_memory):
    lm = model()
    base = {v.path: ops.convert_to_numpy(v).copy() for v in lm.weights}
    lm.enable_lora(2, ["attention", "down"], train_memory=train_memory)
    assert {name.partition("/")[2] for name in lm.lora_layers()} == ALL - {"gate", "up"}
    prompt = lm.backbone.memory_prompt
    factors = {id(v) for layer in lm.lora_layers().values() for v in (layer.lora_kernel_a, layer.lora_kernel_b)}
    assert {id(v) for v in lm.trainable_weights} == factors | ({id(prompt)} if train_memory else set())
    if hasattr(lm, "parameters"):
        assert sum(p.numel() for p in lm.parameters() if p.requires_grad) == sum(
            int(np.prod(v.shape)) for v in lm.trainable_weights
        )
    x = tokens(16)
    lm.compile(keras.optimizers.Adam(0.02))
    first = lm.fit(x, np.roll(x, -1, 1), epochs=6, verbose=0).history["loss"]
    assert first[-1] < first[0] - 0.01
    for v in lm.weights:
        if v.path in base:
            moved = np.abs(ops.convert_to_numpy(v) - base[v.path]).max()
            assert (moved > 0) == (v is prompt and train_memory), v.path
    for layer in lm.lora_layers().values():
        assert np.abs(ops.convert_to_numpy(layer.lora_kernel_b)).max() > 0


def test_updates_go_to_a_file_and_come_back(tmp_path):
    settings = {"memory_update": "hard_gate", "fam_gate": -1.0, "fam_query": "anchored"}
    lm, path = model(**settings), tmp_path / "some.lora.h5"
    lm.enable_lora(2, alpha=3)
    shake(lm)
    memory = [v for v in lm.trainable_weights if "lora" not in v.name]
    assert [v.name for v in memory] == ["memory_prompt", *2 * ["fam_gate", "kernel", "bias"]]
    for v in memory:
        v.assign(v + 0.1)
    expected = logits(lm)
    lm.save_lora_weights(path)
    assert os.listdir(tmp_path) == ["some.lora.h5"]
    fresh = model(**settings)
    fresh.load_lora_weights(path)
    close(logits(fresh), expected, 1e-6)
    shake(fresh, seed=9)
    fresh.load_lora_weights(path)  # where LoRA is on already
    close(logits(fresh), expected, 1e-6)


def test_lora_refuses_what_does_not_fit(tmp_path):
    lm, path = model(), tmp_path / "some.lora.h5"
    with pytest.raises(ValueError, match="positive integer; received 0"):
        lm.enable_lora(0)
    with pytest.raises(ValueError, match=r"one or more of .*received \['atention'\]"):
        lm.enable_lora(2, ["atention"])
    with pytest.raises(ValueError, match="No layer has LoRA"):
        lm.merge_lora()
    with pytest.raises(ValueError, match="No layer has LoRA"):
        lm.save_lora_weights(path)
    assert len(lm.trainable_weights) == len(lm.weights), "a refused call has frozen something"
    lm.enable_lora(2, "feed_forward")
    with pytest.raises(ValueError, match="already enabled"):
        lm.enable_lora(2)
    with pytest.raises(ValueError, match=r"must end in `.lora.h5`"):
        lm.save_lora_weights(tmp_path / "some.h5")
    lm.save_lora_weights(path)
    before = {name: numpy(layer.lora_kernel_a) for name, layer in lm.lora_layers().items()}
    other = model()
    other.enable_lora(3, "feed_forward")
    with pytest.raises(ValueError, match=r"has rank 2, alpha 2.0 and rows 'all'; LoRA is enabled with rank 3"):
        other.load_lora_weights(path)
    with pytest.raises(ValueError, match="belongs to another model: its factors of block_0/down"):
        model(intermediate_dim=20).load_lora_weights(path)
    short = model(fam_length=2)
    with pytest.raises(ValueError, match="memory weights of shapes"):
        short.load_lora_weights(path)
    assert short.lora_layers() == {}
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read"):
        lm.load_lora_weights(path)
    for name, layer in lm.lora_layers().items():
        assert np.array_equal(numpy(layer.lora_kernel_a), before[name])


# int8 ----------------------------------------------------------------------------------------------------------------


def test_int8_reads_whole_and_in_chunks_and_takes_lora(tmp_path):
    lm = model(num_layers=1)
    expected = logits(lm)
    lm.quantize("int8")
    found = logits(lm)
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    stream = keras_fam.StreamingModel(lm, 2)
    close(np.concatenate([stream.predict(part) for part in np.split(tokens(), [4, 7], axis=1)], axis=1), found, INT8)
    lm.save_to_preset(tmp_path)
    loaded = keras_fam.TransformerFAMCausalLM.from_preset(tmp_path)
    assert loaded.backbone.blocks[0].up.quantization_mode == "int8"
    close(logits(loaded), found, 1e-6)
    lm.enable_lora(2)
    close(logits(lm), found, 1e-6)
    shake(lm)
    with_updates = logits(lm)
    assert np.abs(with_updates - found).max() > 0.05
    with pytest.raises(ValueError, match="Merge first, then quantize"):
        lm.merge_lora()
    lm.save_to_preset(tmp_path)
    loaded = keras_fam.TransformerFAMCausalLM.from_preset(tmp_path)
    assert loaded.lora_layers().keys() == lm.lora_layers().keys() and loaded.backbone.blocks[0].up.lora_enabled
    close(logits(loaded), with_updates, 1e-6)
    close(logits(lm), with_updates, 1e-6)
    with pytest.raises(ValueError, match=r"round the kernel again.*save_to_preset"):
        lm.save(tmp_path / "lm.keras")


def test_lora_needs_kernels_that_it_can_update():
    lm = model(num_layers=1)
    lm.quantize("float8")
    with pytest.raises(ValueError, match=r"in int8 or int4; received \['float8'\]"):
        lm.enable_lora(2)
    assert lm.lora_layers() == {} and lm.backbone.memory_prompt.trainable
    assert all(v.trainable for v in lm.backbone.token_embedding.trainable_weights) and lm.trainable_weights
