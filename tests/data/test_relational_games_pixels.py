"""Which objects two cells share, from the pixels, agrees with the objects that were drawn."""
import numpy as np
import pytest

from data import relational_games as games
from data.relational_games import rules
from data.relational_games.pixels import KINDS, kinds_of_pairs


@pytest.mark.parametrize("sprites", games.SPRITES)
@pytest.mark.parametrize("task", games.TASKS + games.COLUMN_TASKS)
def test_kinds_of_pairs_are_those_of_the_objects_drawn(task, sprites, monkeypatch):
    drawn, render = [], rules.Sprites.render
    monkeypatch.setattr(rules.Sprites, "render",
                        lambda s, objects, cells: drawn.append((objects, cells)) or render(s, objects, cells))
    images, _ = games.generate(task, sprites, 300, 4)
    kinds, (objects, cells) = kinds_of_pairs(images, sprites), drawn[0]
    expected = np.full((300, 9, 9), -1)
    for n in range(300):
        for a, (form, colour) in zip(cells[n], objects[n]):
            for b, (other_form, other_colour) in zip(cells[n], objects[n]):
                if a != b:
                    shared = colour == other_colour, form == other_form
                    expected[n, a, b] = [(True, True), (True, False), (False, True), (False, False)].index(shared)
    assert KINDS == ("same", "colour", "shape", "neither")
    assert np.array_equal(kinds, expected)
    assert set(np.unique(kinds)) == {-1, 0, 1, 2, 3}
