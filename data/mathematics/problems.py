"""Generated problems of the Mathematics benchmark: pairs (question, answer) of a module and a level."""
from data.mathematics.dice import Dice
from data.mathematics.questions import QUESTIONS
from data.mathematics.splits import split_of

MODULES = tuple(QUESTIONS)
LEVELS = ("easy", "medium", "hard")
LONGEST_QUESTION, LONGEST_ANSWER = 160, 30  # characters


def generate(module, level, n, seed, split="train"):
    """-> n pairs (question, answer) of strings. The same arguments always give the same pairs.

    module: one of MODULES; level: one of LEVELS; split: "train" or "val". Raises ValueError for anything else.
    The benchmark draws the entropy of a problem from 3 to 10; each level is a third of that range.
    """
    choices = {"module": MODULES, "level": LEVELS, "split": ("train", "val")}
    for (name, allowed), value in zip(choices.items(), (module, level, split)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: choose from {', '.join(allowed)}")
    dice = Dice(f"{module} {level} {split} {seed}")
    lowest = 3 + 7 / 3 * LEVELS.index(level)
    pairs = []
    while len(pairs) < n:
        question, answer = QUESTIONS[module](dice, dice.uniform(lowest, lowest + 7 / 3))
        if len(question) <= LONGEST_QUESTION and len(answer) <= LONGEST_ANSWER and split_of(question) == split:
            pairs.append((question, answer))
    return pairs
