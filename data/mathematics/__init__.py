"""Questions and answers of the Mathematics benchmark (Saxton et al., 2019), generated or read from its published files.

    pairs = generate("algebra__linear_1d", "easy", n=1000, seed=1)     # [("Solve 2*x = 4 for x.", "2"), ...]
    train, val, facts = load("generated", "algebra__linear_1d", "easy", train_size=1000, val_size=100)    # as tokens

    python -m data.mathematics                             examples of every module and level
    python -m data.mathematics --compare=FOLDER            generated questions compared with the files in FOLDER

problems.py      generate: the benchmark's rules are in questions.py, expressions.py, dice.py, algebra.py
splits.py        which problems are for validation: a hash of the problem decides
characters.py    characters as tokens; questions have at most 160 of them, answers 30
files.py         the published files; load; stream.py reads them from the archive during the download
"""
from data.mathematics.characters import END, PAD, START, VOCAB_SIZE, batch, digest, text, tokens
from data.mathematics.files import (ARCHIVE, TESTS, fetch, load, need_any, read_pairs, test_files, training_files,
                                    unseen)
from data.mathematics.problems import LEVELS, LONGEST_ANSWER, LONGEST_QUESTION, MODULES, generate
from data.mathematics.splits import canonical, split_of

__all__ = ["ARCHIVE", "END", "LEVELS", "LONGEST_ANSWER", "LONGEST_QUESTION", "MODULES", "PAD", "START", "TESTS",
           "VOCAB_SIZE", "batch", "canonical", "digest", "fetch", "generate", "load", "need_any", "read_pairs",
           "split_of", "test_files", "text", "tokens", "training_files", "unseen"]
