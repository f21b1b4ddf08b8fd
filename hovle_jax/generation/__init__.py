"""Answers: prefill and cached decoding, continuous batching, conversations, files of questions."""
