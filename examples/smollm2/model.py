"""SmolLM2-135M-Instruct as a KerasHub Llama; see `weights.py` for where its weights come from."""

import keras
import keras_hub
import numpy as np

import keras_fam
from examples.smollm2 import weights

CONTROL = 3  # GGUF's type of control tokens
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def load(sequence_length=512, dtype="float32"):
    """SmolLM2 as a `keras_hub.models.LlamaCausalLM` with tokenizer and preprocessor.

    The 4-bit weights are dequantized: the model is that of the file, not the unquantized original.

    Args:
        sequence_length: int, of the preprocessor.
        dtype: dtype or policy of the backbone.
    """
    field, arrays = weights.read()
    heads, pairs = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=field["llama.vocab_size"],
        num_layers=field["llama.block_count"],
        num_query_heads=heads,
        num_key_value_heads=pairs,
        hidden_dim=field["llama.embedding_length"],
        intermediate_dim=field["llama.feed_forward_length"],
        rope_max_wavelength=field["llama.rope.freq_base"],
        layer_norm_epsilon=float(np.float32(field["llama.attention.layer_norm_rms_epsilon"])),
        tie_word_embeddings=True,
        dtype=dtype,
    )
    backbone.token_embedding.embeddings.assign(arrays["embeddings"])
    backbone.layer_norm.scale.assign(arrays["norm"])
    for i, layer in enumerate(backbone.transformer_layers):
        attention = layer._self_attention_layer
        variables = {
            "attention_norm": layer._self_attention_layernorm.scale,
            "feedforward_norm": layer._feedforward_layernorm.scale,
            "query": attention._query_dense.kernel,
            "key": attention._key_dense.kernel,
            "value": attention._value_dense.kernel,
            "output": attention._output_dense.kernel,
            "gate": layer._feedforward_gate_dense.kernel,
            "up": layer._feedforward_intermediate_dense.kernel,
            "down": layer._feedforward_output_dense.kernel,
        }
        for name, variable in variables.items():
            variable.assign(arrays[f"{i}/{name}"])
    return keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=preprocessor(field, sequence_length))


def with_memory(source, args, fam=None, **changes):
    """SmolLM2 with blocks and a memory, sharing the source's weights.

    With `--sink`, all rows of the first memory start as the embedding of `<|endoftext|>`. Equal rows pass the layers as
    the first token of a text does: as the attention sink that such models rely on, and that a sliding window loses.
    """
    settings = {
        "block_size": args.block,
        "memory_segments": args.segments,
        "fam_length": args.fam if fam is None else fam,
        "fam_query": "feedback",  # the paper's form, as trained and recorded
        "memory_update": args.memory_update,
        "initial_fam": args.initial,
        "attention_sinks": args.attention_sinks,
        **changes,
    }
    lm = keras_fam.hub.convert(source, weights="share", seed=args.seed, **settings)
    prompt = lm.backbone.memory_prompt
    if prompt is not None and args.sink:
        row = source.backbone.token_embedding.embeddings[source.preprocessor.tokenizer.token_to_id(END_OF_TEXT)]
        prompt.assign(keras.ops.broadcast_to(row, prompt.shape))
    return lm


def preprocessor(field, sequence_length):
    """KerasHub's byte-pair preprocessor with the vocabulary of the file; like SmolLM2's, Qwen's has no start token."""
    tokens = field["tokenizer.ggml.tokens"]
    control = [t for t, kind in zip(tokens, field["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    tokenizer = keras_hub.models.QwenTokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)},
        merges=field["tokenizer.ggml.merges"],
        unsplittable_tokens=control,
    )
    return keras_hub.models.QwenCausalLMPreprocessor(tokenizer, sequence_length=sequence_length, add_end_token=False)


def chat(question, system=SYSTEM):
    """A question in the model's chat template."""
    return f"{START}system\n{system}{END}\n{START}user\n{question}{END}\n{START}assistant\n"


def stop_tokens(tokenizer):
    return [tokenizer.token_to_id(token) for token in (END_OF_TEXT, END)]
