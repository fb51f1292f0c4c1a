"""The rules by which images of Relational Games are drawn: the objects, and the true and false images of each task.

36 x 36 pixels, nine cells, at most one object per cell. An object has 3 x 3 blocks of 3 x 3 pixels. Two objects are the
same if their blocks are, colours included; a rotated shape is another shape. Objects that must differ are near misses:
they differ in colour, in shape or in both, with equal probability. (Stripes differ in any way.)

Measured in the public files of two tasks, between and column patterns: hexos and stripes. Inferred from a few images in
notebooks of papers, because the files were not available: pentos (their colours and the position of U in its cell; that
of P is a guess), and for the other tasks what their docstrings say.
"""
import difflib

import numpy as np

TASKS = ("same", "occurs", "xoccurs", "between", "match_pattern")
COLUMN_TASKS = ("column_ABA", "column_AAB", "column_ABB")            # tasks 0, 1, 2 in the files of column patterns
SPRITES = ("pentos", "hexos", "stripes")

# the 8 free polyominoes of 5 squares, and of 6, that fit into 3 x 3
SHAPES = {"pentos": ".##/##./.#. ##./##./#.. ###/.#./.#. ###/#.#/... #../#../### #../##./.## .#./###/.#. ##./.#./.##",
          "hexos": "###/###/... ###/##./#.. ###/##./.#. ###/#.#/#.. ###/.#./##. ##./###/.#. ##./###/..# ##./.##/##."}
LEVELS = {"pentos": (0, 128, 255), "hexos": (64, 144, 192), "stripes": (64, 144, 192)}       # of red, green and blue

LINES = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]])
LINE_WEIGHTS = np.array([1, 2, 1, 1, 1, 1, 1, 1]) / 9                # the middle row is twice as frequent
PATTERNS = {"AAA": (0, 0, 0), "AAB": (0, 0, 1), "ABA": (0, 1, 0), "ABB": (0, 1, 1), "ABC": (0, 1, 2)}


# ---- objects ---------------------------------------------------------------------------------------------------------

class Sprites:
    """A set of objects. An object is a pair of indices (form, colour); pictures[form, colour]: its 3 x 3 blocks in RGB.

    A form is a mask: a free shape in one rotation and reflection. For stripes (columns A|B|A) it is the colour of B.
    """

    def __init__(self, name):
        r, g, b = np.meshgrid(*[LEVELS[name]] * 3, indexing="ij")
        colours = np.stack([r, g, b], -1).reshape(27, 3)[1:-1].astype(np.uint8)    # without the darkest and lightest
        self.n_colours, self.near_misses = len(colours), name != "stripes"
        if name == "stripes":
            inner, outer = np.broadcast_arrays(colours[:, None], colours[None])    # (form, colour, RGB)
            rows = np.stack([outer, inner, outer], 2)                              # (25, 25, 3, RGB)
            self.pictures, self.p_form = np.stack([rows] * 3, 2), np.full(25, 1 / 25)
            return
        # free shapes are equally likely, and so are the 8 rotations and reflections of each, some of which coincide
        free = [np.array([[c == "#" for c in row] for row in shape.split("/")]) for shape in SHAPES[name].split()]
        turned = [np.rot90(mask, k) for one in free for mask in (one, one.T) for k in range(4)]
        masks, counts = np.unique(turned, axis=0, return_counts=True)              # (forms, 3, 3)
        self.pictures = masks[:, None, :, :, None] * colours[:, None, None]        # (forms, 25, 3, 3, RGB)
        self.p_form = counts / counts.sum()

    def draw(self, rng, *shape):
        """Independent objects: int64 (*shape, 2)."""
        return np.stack([rng.choice(len(self.p_form), shape, p=self.p_form), rng.integers(self.n_colours, size=shape)],
                        -1)

    def different(self, rng, objects):
        """A near miss of each object: another colour, another form, or both, a third each. (n, 2) -> (n, 2).

        For stripes, any other object.
        """
        kind = rng.integers(3, size=len(objects))
        redraw = np.stack([kind != 0, kind != 1], -1) if self.near_misses else np.ones((len(objects), 2), bool)
        result, todo = objects.copy(), np.arange(len(objects))
        while len(todo):
            result[todo] = np.where(redraw[todo], self.draw(rng, len(todo)), objects[todo])
            equal = result[todo] == objects[todo]
            todo = todo[(equal & redraw[todo]).any(1) if self.near_misses else equal.all(1)]
        return result

    def distinct(self, rng, n, k, related=True):
        """n times k different objects (n, k, 2). related: each is a near miss of one of those before it."""
        objects = self.draw(rng, n, 1)
        for i in range(1, k):
            new, todo = np.empty((n, 1, 2), int), np.arange(n)
            while len(todo):
                like = objects[todo, rng.integers(i, size=len(todo))]
                new[todo, 0] = self.different(rng, like) if related else self.draw(rng, len(todo))
                todo = todo[(new[todo] == objects[todo]).all(-1).any(1)]
            objects = np.concatenate([objects, new], 1)
        return objects

    def render(self, objects, cells):
        """Objects (n, k, 2) in the cells (n, k), which are numbered 0 ... 8 row by row -> uint8 (n, 36, 36, 3)."""
        blocks = self.pictures[objects[..., 0], objects[..., 1]]                   # (n, k, 3, 3, RGB)
        board = np.zeros((len(objects), 9, 12, 12, 3), np.uint8)                   # 1 pixel of border, 9 of object, 2
        board[np.arange(len(objects))[:, None], cells, 1:10, 1:10] = blocks.repeat(3, axis=2).repeat(3, axis=3)
        return board.reshape(-1, 3, 3, 12, 12, 3).swapaxes(2, 3).reshape(-1, 36, 36, 3)


# ---- tasks: whether the relation holds (n,) -> objects (n, k, 2) and their cells (n, k) ------------------------------

def same(s, rng, holds, alternative):
    """Two objects in any cells: are they the same? (Inferred: if not, they are near misses.)"""
    first = s.draw(rng, len(holds))
    second = np.where(holds[:, None], first, s.different(rng, first))
    return np.stack([first, second], 1), random_cells(rng, len(holds), 2)


def occurs(s, rng, holds, alternative):
    """Is the object in the top row equal to one of the three in the bottom row?

    Inferred: objects that are not equal are near misses of another one in the image.
    """
    objects = s.distinct(rng, len(holds), 4)
    top, bottom = objects[:, :1], objects[:, 1:]
    bottom[holds, :1] = top[holds]
    return top_and_bottom(rng, top, bottom)


def xoccurs(s, rng, holds, alternative):
    """Is the object in the top row equal to one of the three in the bottom row, and do the other two differ?

    Not published: how often each condition is violated. Here, half of the false images have three different objects at
    the bottom, none equal to the top one; the other half have the top object and an equal pair. So an equal pair always
    means "false", as the definition requires, but half of the false images need the top row, too. The top object never
    occurs twice at the bottom, because "the other two" would be ambiguous.
    alternative: a third of the false images each, the last third violates both conditions.
    """
    objects = s.distinct(rng, len(holds), 4)
    top, bottom = objects[:, :1], objects[:, 1:]
    violated = rng.integers(3 if alternative else 2, size=len(holds))              # 0: absent, 1: pair, 2: both
    present, pair = holds | (violated == 1), ~holds & (violated > 0)
    bottom[present, :1] = top[present]
    bottom[pair, 1] = bottom[pair, 2]
    return top_and_bottom(rng, top, bottom)


def between(s, rng, holds, alternative):
    """Are three objects in a line (row, column or diagonal), with equal ends? The middle one is independent of them.

    A quarter of the false images (stripes: half) are three random objects in random cells, the others a line with
    different ends.
    """
    n = len(holds)
    objects, cells = s.draw(rng, n, 3), LINES[rng.choice(len(LINES), n, p=LINE_WEIGHTS)]
    scattered = ~holds & (rng.random(n) < (0.25 if s.near_misses else 0.5))
    cells[scattered] = np.sort(random_cells(rng, n, 3), 1)[scattered]
    in_line = (cells[:, None] == LINES).all(-1).any(1)                             # also by chance
    by_chance = in_line & (objects[:, 0] == objects[:, 2]).all(1)
    last = np.where((scattered & ~by_chance)[:, None], objects[:, 2], s.different(rng, objects[:, 0]))
    objects[:, 2] = np.where(holds[:, None], objects[:, 0], last)
    return objects, cells


def match_pattern(s, rng, holds, alternative):
    """Do the top row and the bottom row have the same pattern: AAA, AAB, ABA, ABB or ABC?

    Not published: the frequency of the patterns. Here all are equally frequent, and so are, in false images, all pairs
    of different ones. The different objects of a row are near misses, as measured in column patterns.
    alternative: they are unrelated, which seems easier to learn.
    """
    n, patterns = len(holds), np.array(list(PATTERNS.values()))
    first = rng.integers(len(patterns), size=n)
    second = np.where(holds, first, (first + rng.integers(1, len(patterns), size=n)) % len(patterns))
    rows = [np.take_along_axis(s.distinct(rng, n, 3, related=not alternative), patterns[which][:, :, None], 1)
            for which in (first, second)]                                          # (n, 3, 2) each
    return np.concatenate(rows, 1), np.tile([0, 1, 2, 6, 7, 8], (n, 1))


def random_cells(rng, n, k):
    """n times k different random cells: (n, k)."""
    return rng.permuted(np.tile(np.arange(9), (n, 1)), axis=1)[:, :k]


def top_and_bottom(rng, top, bottom):
    """One object in the middle of the top row, three in the bottom row in random order."""
    order = rng.permuted(np.tile(np.arange(3), (len(top), 1)), axis=1)
    bottom = np.take_along_axis(bottom, order[:, :, None], 1)
    return np.concatenate([top, bottom], 1), np.tile([1, 6, 7, 8], (len(top), 1))


def column(s, rng, holds, pattern):
    """Do three objects in a column have this pattern? If not, one of the other four, equally often (as measured)."""
    n, patterns = len(holds), np.array(list(PATTERNS.values()))
    true = list(PATTERNS).index(pattern)
    which = np.where(holds, true, (true + rng.integers(1, len(patterns), size=n)) % len(patterns))
    objects = np.take_along_axis(s.distinct(rng, n, 3), patterns[which][:, :, None], 1)
    return objects, rng.integers(3, size=(n, 1)) + np.array([0, 3, 6])


def generate(task, sprites, n, seed, alternative=False):
    """-> images uint8 (n, 36, 36, 3), labels int64 (n,): 1 where the task's relation holds, which is in n // 2 images.

    task: one of TASKS or COLUMN_TASKS; sprites: one of SPRITES. The same arguments always give the same images.
    alternative: another choice of what is not published, for xoccurs and match_pattern: see there.
    Raises ValueError for an unknown task or set of sprites.
    """
    check_names(task=task, sprites=sprites)
    if alternative and task not in ("xoccurs", "match_pattern"):
        raise ValueError(f"task={task} has no alternative sampling: only xoccurs and match_pattern have")
    rng = np.random.default_rng([seed, (TASKS + COLUMN_TASKS).index(task), SPRITES.index(sprites), alternative])
    labels = rng.permutation(np.arange(n) % 2)
    s, holds = Sprites(sprites), labels == 1
    if task in COLUMN_TASKS:
        objects, cells = column(s, rng, holds, task.removeprefix("column_"))
    else:
        rule = dict(same=same, occurs=occurs, xoccurs=xoccurs, between=between, match_pattern=match_pattern)[task]
        objects, cells = rule(s, rng, holds, alternative)
    return s.render(objects, cells), labels


def check_names(*, task, sprites):
    """Raises ValueError if there is no such task or set of sprites."""
    for name, value, choices in (("task", task, TASKS + COLUMN_TASKS), ("sprites", sprites, SPRITES)):
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            raise ValueError(f"{name}={value}: " + (f"did you mean {near[0]}? " if near else "")
                             + f"choose from {', '.join(choices)}")
