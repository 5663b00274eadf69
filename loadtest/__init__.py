"""Drives any running OpenAI-compatible server and reports; imports nothing of ours."""
