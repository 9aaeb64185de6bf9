"""SmolLM2-135M with a memory."""
