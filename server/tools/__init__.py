"""What a model's words mean: reasoning, tool calls, and the text that is neither."""
