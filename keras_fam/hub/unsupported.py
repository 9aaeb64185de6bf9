"""Causal models of KerasHub that `convert` cannot express, each with the reason."""

ALIBI = "it adds ALiBi biases to the attention logits, where this package rotates queries and keys"
POSITIONS = "it adds learned position embeddings of a fixed number of tokens, and a stream has no last token"
LINEAR = "most of its layers are linear attention (gated delta rule), which has a state of another kind"
MEDIA = "it reads images, and a stream reads token ids"

REASONS = {
    "BLIP2Backbone": MEDIA,
    "BloomBackbone": ALIBI,
    "FalconBackbone": ALIBI,
    "GPT2Backbone": POSITIONS,
    "Gemma3nBackbone": "every layer of it keeps several residual streams (AltUp), has a low-rank branch beside "
    "attention (LAuReL) and mixes in embeddings of its own",
    "Gemma4Backbone": "every layer of it norms its values and scales its output; released sizes also share keys and "
    "values between layers, or have heads of another width in global layers",
    "MoonshineBackbone": "it reads audio, and a stream reads token ids",
    "OPTBackbone": POSITIONS,
    "PARSeqBackbone": MEDIA,
    "PaliGemmaBackbone": MEDIA,
    "Qwen3_5Backbone": LINEAR,
    "Qwen3_5MoeBackbone": LINEAR,
    "RWKV7Backbone": "it is a recurrent network without attention",
}
