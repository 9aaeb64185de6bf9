"""What `hub.convert` and `hub.to_keras_hub` refuse, and what they say about it."""

import pathlib
import sys

import keras
import pytest
from hub_support import WINDOW, equal, hub_families, models, refused, small, source

import keras_fam
from keras_fam import hub
from keras_fam.hub.families import FAMILIES
from keras_fam.hub.unsupported import REASONS


def test_other_classes_are_refused():
    gpt = models.GPT2Backbone(vocabulary_size=31, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8)
    refused("GPT2Backbone of KerasHub cannot be converted: it adds learned position embeddings", gpt)
    refused("Backbone or a CausalLM of KerasHub; received Dense", keras.layers.Dense(2))

    class Derived(models.LlamaBackbone):
        pass

    refused("A subclass of one of them may compute something else", Derived(**small()))


def test_every_causal_model_is_converted_or_refused_with_a_reason():
    guide = (pathlib.Path(__file__).parents[1] / "examples" / "guides" / "pretrained.md").read_text()
    converted = {name for family in FAMILIES for name in family.backbones}
    for task in {getattr(models, name) for name in dir(models) if isinstance(getattr(models, name), type)}:
        if issubclass(task, models.CausalLM) and task.backbone_cls and not issubclass(task, models.Seq2SeqLM):
            name = task.backbone_cls.__name__
            assert (name in converted) != (name in REASONS), name
            assert f"`{name}`" in guide and REASONS.get(name, "") in guide, name


def test_fields_without_a_place_are_refused_by_name(monkeypatch):
    refused(r"`dropout` .* must be 0", models.LlamaBackbone(**small(dropout=0.1)))
    factors = {"rope_scaling_short_factor": [1.0, 1.0], "rope_scaling_long_factor": [2.0, 2.0]}
    refused("`rope_scaling_.*factor`", models.Phi3Backbone(**small(rope_scaling_type="su", **factors)))
    gemma = small(head_dim=4, image_size=None)
    refused("`use_bidirectional_attention`", models.Gemma3Backbone(**gemma, use_bidirectional_attention=True))
    pooled = models.Gemma3Backbone(**gemma, is_embedding_model=True, pooling_intermediate_dim=4, embedding_dim=4)
    refused("`embedding_dim`", pooled)
    refused("float16", models.Gemma3Backbone(**gemma, dtype="float16"))
    refused("both on or both off", models.Gemma3Backbone(**gemma, use_post_ffw_norm=True))
    refused(
        "`layer_norm_epsilon`=0.1 is the epsilon", models.GemmaBackbone(**small(head_dim=4, layer_norm_epsilon=0.1))
    )
    for name, value in (("partial_rotary_factor", 0.5), ("attention_dropout", 0.1)):
        fields = {name: value, "rope_layer_enabled_list": [False] * 3}
        refused(f"`{name}` .* must be", hub_families.source("SmolLM 3", 0, hidden_dim=16, **fields)[0])
    refused("do not rotate as its fields say", models.LlamaBackbone(**small(rope_position_scaling_factor=4.0)))
    config = models.LlamaBackbone.get_config
    monkeypatch.setattr(models.LlamaBackbone, "get_config", lambda self: {**config(self), "sparse_heads": 3})
    refused("field `sparse_heads` of LlamaBackbone is unknown", models.LlamaBackbone(**small()))


def test_a_vision_model_is_refused():
    encoder = models.Gemma3VisionEncoder(image_size=8, patch_size=4, num_heads=2, hidden_dim=8, num_layers=1,
                                         intermediate_dim=8, output_dim=16, pool_size=2)  # fmt: skip
    refused("`vision_encoder`", models.Gemma3Backbone(**small(head_dim=4, image_size=8), vision_encoder=encoder))


def test_a_quantized_source_is_refused():
    model, _ = hub_families.source("Llama", 0, hidden_dim=16, num_layers=1)
    model.backbone.transformer_layers[0]._feedforward_gate_dense.quantize("int8")
    refused("quantized", model)


def test_options_are_checked():
    backbone = source("Llama", 0)[0].backbone
    refused(r"The source decides \['hidden_dim', 'rope_wavelength'\]", backbone, hidden_dim=3, rope_wavelength=2.0)
    refused(r"knows no setting \['fam_lenght'\]", backbone, fam_lenght=3)
    refused("'copy' or 'share'", backbone, weights="lend")
    refused("`fam_length` must be at most `block_size`", backbone, fam_length=17)


def test_a_memory_is_not_dropped_by_accident():
    lm = hub.convert(source("Llama", 0)[0], **WINDOW, fam_length=2)
    with pytest.raises(ValueError, match="drop_memory=True"):
        hub.to_keras_hub(lm, models.LlamaCausalLM)


def test_a_class_that_cannot_compute_the_model_is_refused():
    lm = hub.convert(source("SmolLM (tied)", 0)[0].backbone, **WINDOW, fam_length=0)
    with pytest.raises(ValueError, match="tie_weights"):
        hub.to_keras_hub(lm, models.Phi3CausalLM)
    with pytest.raises(ValueError, match=r"layer_norm_epsilon|activation"):
        hub.to_keras_hub(lm, models.GemmaBackbone)
    with pytest.raises(ValueError, match="GPT2Backbone of KerasHub cannot be converted"):
        hub.to_keras_hub(lm, models.GPT2CausalLM)
    with pytest.raises(ValueError, match="no field"):
        hub.to_keras_hub(lm, models.LlamaBackbone, sliding_window=3)
    plain = {"attention_bias": False, "mlp_bias": False, "hidden_dim": 16}
    for rotated, message in (([True, False, True], "rope_wavelength=.* in layer 1"), ([False] * 3, "rotate queries")):
        smollm3, _ = hub_families.source("SmolLM 3", 0, **plain, rope_layer_enabled_list=rotated)
        lm = hub.convert(smollm3, **WINDOW, fam_length=0)
        with pytest.raises(ValueError, match=message):
            hub.to_keras_hub(lm, models.LlamaBackbone, tie_word_embeddings=True)


def test_experts_need_a_class_that_has_them():
    plain = hub.convert(source("Llama", 0)[0], **WINDOW, fam_length=0)
    experts = hub.convert(source("Mixtral", 0)[0], **WINDOW, fam_length=0)
    with pytest.raises(ValueError, match="layer 0 of the model has a MixtureOfExperts as its `feed_forward`"):
        hub.to_keras_hub(experts, models.LlamaCausalLM)
    with pytest.raises(ValueError, match=r"has a mixture of experts in its layers .*; the model has None"):
        hub.to_keras_hub(plain, models.MixtralCausalLM)
    with pytest.raises(
        ValueError, match=r"feed_forward=MixtureOfExperts\(.* use_bias=True.* has MixtureOfExperts\(.*=False"
    ):
        hub.to_keras_hub(experts, models.GptOssCausalLM)
    with pytest.raises(ValueError, match="`router_jitter_noise` of MixtralBackbone must be 0"):
        hub.convert(hub_families.source("Mixtral", 0, router_jitter_noise=0.1)[0], **WINDOW, fam_length=2)
    with pytest.raises(ValueError, match="is a layer of its own"):
        experts.enable_lora(2)


def test_a_model_of_this_package_goes_to_keras_hub():
    backbone = keras_fam.TransformerFAMBackbone(
        vocabulary_size=31, num_layers=2, hidden_dim=16, num_query_heads=4, num_key_value_heads=2, intermediate_dim=24,
        fam_length=0, tie_weights=True, **WINDOW,
    )  # fmt: skip
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    llama = hub.to_keras_hub(lm, models.LlamaCausalLM)
    x = hub_families.tokens()
    equal(hub_families.logits(llama, x), hub_families.logits(lm, x))
    mistral = hub_families.source("Mistral", 0, sliding_window=64)[0]
    lm = hub.convert(mistral, **WINDOW, fam_length=0)  # 64 keys never narrow the blocks' 32
    back = hub.to_keras_hub(lm, models.MistralBackbone, sliding_window=64)
    assert back.sliding_window == 64


def test_without_keras_hub_the_extra_is_named(monkeypatch):
    model = source("Llama", 0)[0]
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(ImportError, match=r"keras-fam\[hub\]"):
        hub.convert(model, **WINDOW, fam_length=2)
