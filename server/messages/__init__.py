"""Anthropic's Messages: their shapes around the same chats, templates and answers."""
