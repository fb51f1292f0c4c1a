"""Relational Games (Shanahan et al., 2020): does a relation hold between the objects on a 3 x 3 board?

    images, labels = generate("occurs", "pentos", n=2500, seed=1)      # uint8 (2500, 36, 36, 3), int64 (2500,)
    images, labels = load_npz("mini_between_hexos.npz")                # the same from one of the original files
    (images, labels), tests = split("occurs", "pentos", train_size=500, test_size=5000, seed=1)

    python -m data.relational_games --data=mini                        draws examples, generated beside original ones

rules.py      how images are drawn: generate
files.py      the original files: find_file, load_npz
splits.py     training and test images of an experiment: split
pixels.py     which objects are on a board, and what two of them share: kinds_of_pairs
"""
from data.relational_games.files import GIT_BLOB, MINI_URL, check_git_blob, find_file, load_npz
from data.relational_games.pixels import KINDS, kinds_of_pairs, objects
from data.relational_games.rules import COLUMN_TASKS, PATTERNS, SPRITES, TASKS, generate
from data.relational_games.splits import fingerprints, split, test_images, tested_sprites, training_images

__all__ = ["COLUMN_TASKS", "GIT_BLOB", "KINDS", "MINI_URL", "PATTERNS", "SPRITES", "TASKS", "check_git_blob",
           "find_file", "fingerprints", "generate", "kinds_of_pairs", "load_npz", "objects", "split",
           "test_images", "tested_sprites", "training_images"]
