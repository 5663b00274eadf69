"""Drafters of speculation: guesses at the next tokens, made from tokens alone."""
