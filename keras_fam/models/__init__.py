"""Models: `TransformerFAMBackbone`, `TransformerFAMCausalLM`, presets."""
