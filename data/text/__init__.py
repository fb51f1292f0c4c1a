"""Texts: where they come from, their tokens on disk, tokenizers."""
