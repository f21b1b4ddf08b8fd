"""Benchmarks: their files and prompts, what an answer says, and what it scores."""
