"""OpenAI's Responses API: items in place of messages, and conversations stored by the server."""
