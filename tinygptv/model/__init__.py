"""The model: vision encoder, Q-Former, projector, language model, LoRA, generation."""
