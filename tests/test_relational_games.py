"""Relational Games: every label follows from the pixels alone, and the images are like the original ones."""
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import relational_games as games

TEST_DATA = os.environ.get("DAT_TEST_DATA")
LINES = [{(r, c) for c in range(3)} for r in range(3)] + [{(r, c) for r in range(3)} for c in range(3)]
LINES += [{(i, i) for i in range(3)}, {(i, 2 - i) for i in range(3)}]


# ---- a reader of pixels that knows nothing of the generator ----------------------------------------------------------

def parse(image):
    """Image -> {(row, column): (mask, colours)} of the cells that are not empty; fails on anything out of place."""
    objects = {}
    for r in range(3):
        for c in range(3):
            cell = image[12 * r:12 * r + 12, 12 * c:12 * c + 12]
            inside = cell[1:10, 1:10]
            assert cell.sum(dtype=int) == inside.sum(dtype=int), "paint outside the 9 x 9 pixels of an object"
            blocks = inside[::3, ::3]
            assert np.array_equal(inside, np.kron(blocks, np.ones((3, 3, 1), np.uint8))), "not blocks of 3 x 3 pixels"
            if blocks.any():
                objects[r, c] = (tuple(blocks.any(-1).ravel().tolist()), tuple(map(tuple, blocks.reshape(9, 3).tolist())))
    return objects


def pattern(three):
    """ABA and the like."""
    names = {}
    return "".join(names.setdefault(one, "ABC"[len(names)]) for one in three)


def holds(task, o):
    """The task's definition, on parsed objects; also asserts that they stand where the task has them."""
    if task == "same":
        first, second = o.values()
        return first == second
    if task in ("occurs", "xoccurs"):
        assert set(o) == {(0, 1), (2, 0), (2, 1), (2, 2)}
        top, bottom = o[0, 1], [o[2, c] for c in range(3)]
        if task == "occurs":
            return top in bottom
        assert bottom.count(top) <= 1                                   # else "the other two" could mean two things
        others = [one for one in bottom if one != top]
        return len(others) == 2 and others[0] != others[1]
    if task == "between":
        assert len(o) == 3
        first, _, last = (o[cell] for cell in sorted(o))
        return set(o) in LINES and first == last
    if task == "match_pattern":
        assert set(o) == {(r, c) for r in (0, 2) for c in range(3)}
        return pattern([o[0, c] for c in range(3)]) == pattern([o[2, c] for c in range(3)])
    column, = {c for _, c in o}
    return pattern([o[r, column] for r in range(3)]) == task.removeprefix("column_")


@pytest.mark.parametrize("sprites", games.SPRITES)
@pytest.mark.parametrize("task", [*games.TASKS, *games.COLUMN_TASKS, "xoccurs, alternative", "match_pattern, alternative"])
def test_every_label_follows_from_the_pixels(task, sprites):
    task, _, alternative = task.partition(", ")
    images, labels = games.generate(task, sprites, 2000, 3, bool(alternative))
    assert images.dtype == np.uint8 and images.shape == (2000, 36, 36, 3) and labels.shape == (2000,)
    assert abs(labels.mean() - 0.5) < 0.02
    wrong = [i for i, image in enumerate(images) if holds(task, parse(image)) != labels[i]]
    assert wrong == []
