"""Sampling through an OpenAI-compatible completions server."""
