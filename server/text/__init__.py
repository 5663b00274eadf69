"""Everything between characters and token ids: tokenizers, chat templates, stop strings."""
