"""Hugging Face directories: names, reading, writing."""
