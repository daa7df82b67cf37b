"""One file a foreign format: bytes <-> (GPTConfig, state dict in `GPT`'s names). None of them builds a model."""
