"""Relational Games (Shanahan et al., 2020): does a relation hold between the objects on a 3 x 3 board?

    images, labels = generate("occurs", "pentos", n=2500, seed=1)      # uint8 (2500, 36, 36, 3), int64 (2500,)
    images, labels = load_npz("mini_between_hexos.npz")                # the same from one of the original files
    python -m data.relational_games --data=mini                        # draws examples, ours beside original ones

36 x 36 pixels, nine cells, at most one object in each: 3 x 3 blocks of 3 x 3 pixels. "The same" means the same blocks
in the same colours; a rotated shape is another one. Two objects that must differ are near misses: they differ in
colour, in shape or in both, a third each (stripes are any two different ones).

Counted: hexos and stripes in the public files of two tasks, between and column patterns. Inferred, from a few images in
the notebooks of papers: the pentos, whose files were not at hand (their colours, how U lies in its cell; for P it is a
guess), and of the other tasks what is said at their functions. The full files want a log-in.
"""
import difflib
import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from toolbox import options
from data import npz
from data.download import download

TASKS = ("same", "occurs", "xoccurs", "between", "match_pattern")
COLUMN_TASKS = ("column_ABA", "column_AAB", "column_ABB")            # tasks 0, 1, 2 of the files of column patterns
SPRITES = ("pentos", "hexos", "stripes")

# the 8 free polyominoes of 5, and of 6, squares that fit into 3 x 3
SHAPES = {"pentos": ".##/##./.#. ##./##./#.. ###/.#./.#. ###/#.#/... #../#../### #../##./.## .#./###/.#. ##./.#./.##",
          "hexos": "###/###/... ###/##./#.. ###/##./.#. ###/#.#/#.. ###/.#./##. ##./###/.#. ##./###/..# ##./.##/##."}
LEVELS = {"pentos": (0, 128, 255), "hexos": (64, 144, 192), "stripes": (64, 144, 192)}       # of red, green and blue

LINES = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]])
LINE_WEIGHTS = np.array([1, 2, 1, 1, 1, 1, 1, 1]) / 9                # the middle row comes twice as often
PATTERNS = {"AAA": (0, 0, 0), "AAB": (0, 0, 1), "ABA": (0, 1, 0), "ABB": (0, 1, 1), "ABC": (0, 1, 2)}


# ---- objects ---------------------------------------------------------------------------------------------------------

class Sprites:
    """A set of objects. An object is a pair (form, colour); pictures[form, colour] are its 3 x 3 blocks in RGB.

    A form is a mask: a free shape, rotated and reflected. In stripes (three columns A|B|A) it is B's colour.
    """

    def __init__(self, name):
        r, g, b = np.meshgrid(*[LEVELS[name]] * 3, indexing="ij")
        colours = np.stack([r, g, b], -1).reshape(27, 3)[1:-1].astype(np.uint8)    # but the darkest and the lightest
        self.n_colours, self.near_misses = len(colours), name != "stripes"
        if name == "stripes":
            inner, outer = np.broadcast_arrays(colours[:, None], colours[None])    # (form, colour, RGB)
            rows = np.stack([outer, inner, outer], 2)                              # (25, 25, 3, RGB)
            self.pictures, self.p_form = np.stack([rows] * 3, 2), np.full(25, 1 / 25)
            return
        # each free shape is equally likely, then each of its 8 rotations and reflections, some of which coincide
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
        """For each object a near miss: another colour, another form, or both, a third each. (n, 2) -> (n, 2).

        Stripes have no near misses: they are drawn anew while they are equal.
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
        """n times k different objects (n, k, 2); if related, each is made by `different` from one before it."""
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
        """Objects (n, k, 2) in the cells (n, k), numbered 0 ... 8 row by row -> images uint8 (n, 36, 36, 3)."""
        blocks = self.pictures[objects[..., 0], objects[..., 1]]                   # (n, k, 3, 3, RGB)
        board = np.zeros((len(objects), 9, 12, 12, 3), np.uint8)                   # a border of 1 pixel, then 9, then 2
        board[np.arange(len(objects))[:, None], cells, 1:10, 1:10] = blocks.repeat(3, axis=2).repeat(3, axis=3)
        return board.reshape(-1, 3, 3, 12, 12, 3).swapaxes(2, 3).reshape(-1, 36, 36, 3)


# ---- tasks: whether the relation shall hold -> objects and their cells -----------------------------------------------

def same(s, rng, holds, alternative):
    """Two objects anywhere: are they the same? (Inferred: if not, they are near misses.)"""
    first = s.draw(rng, len(holds))
    second = np.where(holds[:, None], first, s.different(rng, first))
    return np.stack([first, second], 1), anywhere(rng, len(holds), 2)


def occurs(s, rng, holds, alternative):
    """Is the object on top one of the three at the bottom?

    Inferred: all that is not the same is different, and near misses of something else in the image.
    """
    objects = s.distinct(rng, len(holds), 4)
    top, bottom = objects[:, :1], objects[:, 1:]
    bottom[holds, :1] = top[holds]
    return top_and_bottom(rng, top, bottom)


def xoccurs(s, rng, holds, alternative):
    """Is the object on top one of the three at the bottom, and do the other two differ?

    Not published: how often which condition is broken. Here half of the false images lack the top object, with three
    different ones at the bottom, and half have it beside an equal pair. So an equal pair says "false", as the
    definition wants it, but in half of the false images the bottom row alone says nothing. The top object never stands
    twice at the bottom: "the other two" would mean two things. Alternative: a third each, the last third breaks both.
    """
    objects = s.distinct(rng, len(holds), 4)
    top, bottom = objects[:, :1], objects[:, 1:]
    broken = rng.integers(3 if alternative else 2, size=len(holds))                # 0: absent, 1: a pair, 2: both
    present, pair = holds | (broken == 1), ~holds & (broken > 0)
    bottom[present, :1] = top[present]
    bottom[pair, 1] = bottom[pair, 2]
    return top_and_bottom(rng, top, bottom)


def between(s, rng, holds, alternative):
    """Three in a line (row, column or diagonal), and both ends the same? The middle one is drawn independently.

    A quarter of the false images (of stripes: half) are three random objects anywhere, the others a line with different
    ends.
    """
    n = len(holds)
    objects, cells = s.draw(rng, n, 3), LINES[rng.choice(len(LINES), n, p=LINE_WEIGHTS)]
    scattered = ~holds & (rng.random(n) < (0.25 if s.near_misses else 0.5))
    cells[scattered] = np.sort(anywhere(rng, n, 3), 1)[scattered]
    in_line = (cells[:, None] == LINES).all(-1).any(1)                             # scattered ones may be, too
    by_chance = in_line & (objects[:, 0] == objects[:, 2]).all(1)
    last = np.where((scattered & ~by_chance)[:, None], objects[:, 2], s.different(rng, objects[:, 0]))
    objects[:, 2] = np.where(holds[:, None], objects[:, 0], last)
    return objects, cells


def match_pattern(s, rng, holds, alternative):
    """Do the rows on top and at the bottom have the same pattern of AAA, AAB, ABA, ABB, ABC?

    Not published: how often which pattern; here each equally often, and in false images any two that differ. Objects of
    a row are near misses, as counted in column patterns. Alternative: they are unrelated, which seems easier to learn.
    """
    n, patterns = len(holds), np.array(list(PATTERNS.values()))
    first = rng.integers(len(patterns), size=n)
    second = np.where(holds, first, (first + rng.integers(1, len(patterns), size=n)) % len(patterns))
    rows = [np.take_along_axis(s.distinct(rng, n, 3, related=not alternative), patterns[which][:, :, None], 1)
            for which in (first, second)]                                          # (n, 3, 2) each
    return np.concatenate(rows, 1), np.tile([0, 1, 2, 6, 7, 8], (n, 1))


def anywhere(rng, n, k):
    """k different cells, n times: (n, k)."""
    return rng.permuted(np.tile(np.arange(9), (n, 1)), axis=1)[:, :k]


def top_and_bottom(rng, top, bottom):
    """One object in the middle of the first row, three in the last one in random order."""
    order = rng.permuted(np.tile(np.arange(3), (len(top), 1)), axis=1)
    bottom = np.take_along_axis(bottom, order[:, :, None], 1)
    return np.concatenate([top, bottom], 1), np.tile([1, 6, 7, 8], (len(top), 1))


def column(s, rng, holds, pattern):
    """Three objects in a column: do they have this pattern? False: the other four, equally often (as counted)."""
    n, patterns = len(holds), np.array(list(PATTERNS.values()))
    mine = list(PATTERNS).index(pattern)
    which = np.where(holds, mine, (mine + rng.integers(1, len(patterns), size=n)) % len(patterns))
    objects = np.take_along_axis(s.distinct(rng, n, 3), patterns[which][:, :, None], 1)
    return objects, rng.integers(3, size=(n, 1)) + np.array([0, 3, 6])


def generate(task, sprites, n, seed, alternative=False):
    """n images and whether the task's relation holds in them: uint8 (n, 36, 36, 3), int64 (n,); it does in n // 2.

    alternative: another way to draw what is not published, for xoccurs and match_pattern: see there.
    Raises ValueError for an unknown task or set of sprites. The same arguments give the same images.
    """
    known(task=task, sprites=sprites)
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


def known(*, task, sprites):
    """Raises ValueError unless there is such a task and such a set of sprites."""
    for name, value, choices in (("task", task, TASKS + COLUMN_TASKS), ("sprites", sprites, SPRITES)):
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            raise ValueError(f"{name}={value}: " + (f"did you mean {near[0]}? " if near else "")
                             + f"choose from {', '.join(choices)}")


# ---- the original files ----------------------------------------------------------------------------------------------

# Names without _<sprites>.npz. The public files are samples of two tasks; the full ones have 250,000 images of pentos.
FILES = {"same": "same", "occurs": "occurs", "xoccurs": "xoccurs", "between": "1task_between",
         "match_pattern": "1task_match_patt", **{task: "3task_col_patts" for task in COLUMN_TASKS}}
MINI = {"between": "mini_between", **{task: "mini_3task_col_patts" for task in COLUMN_TASKS}}
MINI_URL = "https://raw.githubusercontent.com/google-deepmind/deepmind-research/master/PrediNet/"
GIT_BLOB = {"mini_between_pentos.npz": "8fa56f989088aa2d0d2b846955df5088c79e35c0",
            "mini_between_hexos.npz": "04d949ae7a50ec5c9a38da0ec4dfe11dd9baff0c",
            "mini_between_stripes.npz": "81d741d61ee1ff2aeb4e848d871979e30086cddc",
            "mini_3task_col_patts_pentos.npz": "4454e863bb7bc843a48836e7edaa0331d6b25f8f",
            "mini_3task_col_patts_hexos.npz": "a4ee505429dc7f2a5ff725a79640dce953a9be8b",
            "mini_3task_col_patts_stripes.npz": "f73195dab121a3167eecf493accac64c2c81a07b"}


def find_file(data, task, sprites, data_dir="data/cache"):
    """Path of a task's file: in the folder `data`, or of the public sample, downloaded, if data is "mini"."""
    known(task=task, sprites=sprites)
    if data == "mini":
        if task not in MINI:
            raise ValueError(f"task={task}: the public samples are of {', '.join(MINI)} only; for the full files see "
                             f"the README, or draw images by the rules with --data=generated")
        name = f"{MINI[task]}_{sprites}.npz"
        return download(MINI_URL + name, Path(data_dir) / name, check=lambda path: check_git_blob(path, GIT_BLOB[name]))
    names = [f"{stem}_{sprites}.npz" for stem in (FILES[task], MINI.get(task)) if stem]
    for name in names:
        if (Path(data) / name).is_file():
            return Path(data) / name
    raise ValueError(f"no {' or '.join(names)} in {data}, the folder for original files "
                     f"(or give generated, or mini)")


def check_git_blob(path, blob):
    """Raises ValueError unless the file at `path` is the one that git calls `blob`."""
    content = Path(path).read_bytes()
    found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if found != blob:
        raise ValueError(f"git would call it {found}, not {blob}")


def load_npz(path, task=None):
    """An original file -> images uint8 (n, 36, 36, 3), labels int64 (n,).

    Files of column patterns hold three tasks: `task`, one of COLUMN_TASKS, picks its images.
    Raises ValueError in one line if the file is missing, damaged or of another kind.
    """
    images, labels, ids, also = npz.read(path, "images", "labels", "tasks", "task_ids").values()
    ids = also if ids is None else ids                                 # both names occur
    for name, array in (("images", images), ("labels", labels)):
        if array is None:
            raise ValueError(f"{path} is not a file of Relational Games: no {name} in it")
    shapes = [array.shape for array in (images, labels, ids) if array is not None]
    if images.shape[1:] != (36, 36, 3) or not len(images) == labels.size == (labels if ids is None else ids).size:
        raise ValueError(f"{path}: images, labels (and tasks) of shapes {shapes}, not (n, 36, 36, 3) and (n, 1)")
    if labels.max() > 1:
        raise ValueError(f"{path}: labels up to {labels.max()}, not 0 and 1")
    labels = labels.ravel().astype(np.int64)
    if ids is None or len(np.unique(ids)) == 1:
        return images, labels
    if task not in COLUMN_TASKS:
        raise ValueError(f"{path} holds several tasks: choose one of {', '.join(COLUMN_TASKS)}")
    mine = ids.ravel() == COLUMN_TASKS.index(task)
    return images[mine], labels[mine]


# ---- a look at them --------------------------------------------------------------------------------------------------

@dataclass
class Options:
    data: str = "generated"                 # what to draw beside ours: mini, or a folder of original files
    data_dir: str = "data/cache"            # where downloads are kept
    out: str = "out/relgames/examples.png"  # where to draw
    seed: int = 1                           # of ours, and of the choice among the originals
    alternative: bool = False               # the other sampling of xoccurs and match_pattern


def contact_sheet(o):
    """One row of images a task and set of sprites: four that are true and four false; the originals further right."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def eight(images, labels):
        pick = [i for value in (1, 0) for i in np.flatnonzero(labels == value)[:4]]
        return np.concatenate([np.pad(image, ((2,), (2,), (0,)), constant_values=255) for image in images[pick]], 1)

    rows, missing = [], {}
    for task in TASKS + (COLUMN_TASKS if o.data != "generated" else ()):
        for sprites in SPRITES:
            ours = generate(task, sprites, 100, o.seed, o.alternative and task in ("xoccurs", "match_pattern"))
            rows.append((f"{task}, {sprites}", [eight(*ours)]))
            if o.data != "generated":
                try:
                    images, labels = load_npz(find_file(o.data, task, sprites, o.data_dir), task)
                except ValueError as error:
                    missing.setdefault(task, error)
                    continue
                order = np.random.default_rng(o.seed).permutation(len(images))
                rows[-1][1].append(eight(images[order], labels[order]))
    if missing and not any(len(sheets) > 1 for _, sheets in rows):
        raise ValueError(f"--data={o.data}: {missing[TASKS[0]]}")
    width = 1 if o.data == "generated" else 2
    fig, axes = plt.subplots(len(rows), width, figsize=(6 * width, 0.85 * len(rows)), squeeze=False,
                             layout="constrained")
    for (title, sheets), row in zip(rows, axes):
        for ax, sheet in zip(row, sheets):
            ax.imshow(sheet, interpolation="nearest")
        row[0].set_title(f"{title}: four true, four false" + (", ours | original" if len(sheets) > 1 else ""),
                         fontsize=7, loc="left", pad=2)
        for ax in row:
            ax.axis("off")
    Path(o.out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(o.out, dpi=130)
    for task, error in missing.items():
        print(f"{task}: {error}")
    print(f"examples: {o.out}")


def main(argv=None):
    configs = options.parse_options(Options, argv=argv)
    with options.one_line_errors():
        contact_sheet(options.agreed(configs, [f.name for f in fields(Options)]))


if __name__ == "__main__":
    options.start(main)
