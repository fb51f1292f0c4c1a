"""Texts for language models, as tokens.

    corpus = load("tinystories", "gpt2", "data/cache")                 # or torch, shakespeare, fineweb, a path
    starts = random_starts(len(corpus.train), length, n)               # first tokens of n random windows
    x, y = corpus.train.windows(starts, length)                        # inputs and next tokens, (n, length) each

sources.py      the texts: where they come from, read in pieces, document by document
tokenizers.py   bytes, characters, or tiktoken's byte pairs
tokens.py       a text's tokens, made once and stored on disk; windows of them
fineweb.py      FineWeb-Edu, which is published as tokens
"""
from data.text.tokenizers import load_tokenizer
from data.text.tokens import Corpus, Tokens, fixed_starts, load, random_starts

__all__ = ["Corpus", "Tokens", "fixed_starts", "load", "load_tokenizer", "random_starts"]
