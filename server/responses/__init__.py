"""OpenAI's Responses API: another way to ask for chats, and to go on with those that are kept."""
