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
    "GPTNeoXBackbone": "its attention and feed-forward part work in parallel, and it rotates a part of each head only",
    "Gemma3nBackbone": "it keeps several residual streams (AltUp) and mixes in embeddings of each layer",
    "Gemma4Backbone": "its layers share keys and values, its global layers have heads of another width",
    "GptOssBackbone": "its softmax has learned sinks, and its feed-forward part is a mixture of experts",
    "MoonshineBackbone": "it reads audio, and a stream reads token ids",
    "OPTBackbone": POSITIONS,
    "PARSeqBackbone": MEDIA,
    "PaliGemmaBackbone": MEDIA,
    "Qwen3_5Backbone": LINEAR,
    "Qwen3_5MoeBackbone": LINEAR,
    "RWKV7Backbone": "it is a recurrent network without attention",
}
