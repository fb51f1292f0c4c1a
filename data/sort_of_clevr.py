"""Sort-of-CLEVR (Santoro et al. 2017): six objects of six colours, and questions about them. Nothing to download.

    python -m data.sort_of_clevr                                   examples, in out/vit/sort_of_clevr.png
    images, objects, questions, answers, subtype = generate(10_000, seed=1)

Binary questions need two objects, non-relational ones a single object. The rules are those of the generator in common
use, github.com/kimhc6028/relational-networks. `guessing` and `counting` are accuracies that need no vision: a model
that is no better than `counting` on binary questions has shown no use of places.
"""
import difflib
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from toolbox import options

SIZE, RADIUS = 75, 5                                     # of an image and of an object, in pixels
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
           "orange": (255, 156, 0), "grey": (128, 128, 128), "yellow": (255, 255, 0)}
SHAPES = ("square", "circle")
# authors' generator: ternary questions, too; here: none, and the bits of their kind and second colour stay 0, because
# there yellow is in none of them, and the width of "the band between two objects" depends on the slope of their line
KINDS = ("nonrelational", "binary", "ternary")
SUBTYPES = {"shape": "What shape is the {} object?",                   # nonrelational: 0, 1, 2
            "left": "Is the {} object in the left half?",
            "top": "Is the {} object in the upper half?",
            "nearest": "What shape is nearest to the {} object?",      # binary: 3, 4, 5
            "furthest": "What shape is furthest from the {} object?",
            "count": "How many others have the {} object's shape?"}
ANSWERS = ("yes", "no", *SHAPES, "0", "1", "2", "3", "4", "5")
QUESTION_BITS = 18                                       # colour 0:6, second colour 6:12, kind 12:15, subtype 15:18


@dataclass
class Options:
    out: str = "out/vit/sort_of_clevr.png"  # file to write
    seed: int = 1                           # of the examples


def generate(n_images, seed, questions_per_image=10, kind="binary"):
    """-> images, objects, questions, answers, subtype of N images with Q = questions_per_image questions each.

    images: uint8 (N, 75, 75, 3), RGB. objects: int64 (N, 6, 3): x from the left and y from the top, in pixels, and the
    index of the shape, one row per colour. questions: uint8 (N, Q, 18), bits. answers: int64 (N, Q), indices of
    ANSWERS. subtype: int64 (N, Q), indices of SUBTYPES, 0 ... 5. kind: "nonrelational", "binary", or "both" in turns.
    The colour and the subtype of a question are uniform; all are independent, so a question may occur twice.
    The same seed and n_images give the same images whatever the questions. Raises ValueError for impossible arguments.
    """
    kinds = {"nonrelational": [0], "binary": [1], "both": [0, 1]}
    for name, value, low in (("n_images", n_images, 1), ("seed", seed, 0),
                             ("questions_per_image", questions_per_image, 1)):
        if value < low:
            raise ValueError(f"{name}={value}: must be at least {low}")
    if kind not in kinds:
        near = difflib.get_close_matches(str(kind), kinds, 1)
        raise ValueError(f"kind={kind}: " + (f"did you mean {near[0]}? " if near else "")
                         + f"choose from {', '.join(kinds)}")
    rng, shape = np.random.default_rng(seed), (n_images, questions_per_image)
    objects = scenes(n_images, rng)
    colour = rng.integers(6, size=shape)
    subtype = 3 * np.resize(kinds[kind], questions_per_image) + rng.integers(3, size=shape)
    answers = all_answers(objects)[np.arange(n_images)[:, None], colour, subtype]
    return draw(objects), objects, encode(colour, subtype), answers, subtype


def scenes(n, rng):
    """n times six objects (n, 6, 3). A centre that is less than 10 pixels from an earlier one is drawn again."""
    objects = np.empty((n, 6, 3), np.int64)
    objects[..., 2] = rng.integers(2, size=(n, 6))
    for i in range(6):
        todo = np.arange(n)
        while len(todo):
            objects[todo, i, :2] = rng.integers(RADIUS, SIZE - RADIUS, size=(len(todo), 2))            # 5 ... 69
            apart = objects[todo, i, None, :2] - objects[todo, :i, :2]                                 # (todo, i, 2)
            todo = todo[((apart ** 2).sum(-1) < (2 * RADIUS) ** 2).any(1)]
    return objects


def draw(objects):
    """Objects (n, 6, 3) -> images uint8 (n, 75, 75, 3).

    In the order of COLOURS: a neighbour of a later colour hides up to 3 x 5 pixels of an object.
    """
    offsets = np.arange(-RADIUS, RADIUS + 1)
    disc = offsets[:, None] ** 2 + offsets ** 2 <= RADIUS ** 2
    stamps = np.stack([np.ones_like(disc), disc])                                                      # (2, 11, 11)
    images = np.full((len(objects), SIZE, SIZE, 3), 255, np.uint8)
    for (x, y, shape), colour in zip(objects.transpose(1, 2, 0), COLOURS.values()):                    # (n,) each
        n, row, column = np.nonzero(stamps[shape])
        images[n, y[n] + row - RADIUS, x[n] + column - RADIUS] = colour
    return images


def all_answers(objects):
    """The answer to each question about each scene: (n, 6, 3) -> int64 (n, 6 colours, 6 subtypes).

    Of several objects at the same distance the first in the order of COLOURS counts, as in the authors' generator.
    """
    x, y, shape = objects.transpose(2, 0, 1)                                                           # (n, 6) each
    d2 = (x[:, :, None] - x[:, None]) ** 2 + (y[:, :, None] - y[:, None]) ** 2                         # (n, 6, 6)
    # authors' generator: an object is at d2 = 999 from itself, and its own nearest if no other is within 31.6 pixels;
    # here: infinitely far, because the question is about another object
    nearest, furthest = np.where(np.eye(6, dtype=bool), np.inf, d2).argmin(-1), d2.argmax(-1)          # (n, 6)
    same = (shape[:, :, None] == shape[:, None]).sum(-1) - 1                                           # without itself
    square, zero = ANSWERS.index("square"), ANSWERS.index("0")
    return np.stack([square + shape, x >= SIZE / 2, y >= SIZE / 2,                                     # 0: yes, 1: no
                     square + np.take_along_axis(shape, nearest, 1),
                     square + np.take_along_axis(shape, furthest, 1), zero + same], -1)


def encode(colour, subtype):
    """Indices (n, Q) of COLOURS and SUBTYPES -> the bits of the questions, uint8 (n, Q, 18)."""
    one_of_6, one_of_3 = np.eye(6, dtype=np.uint8), np.eye(3, dtype=np.uint8)
    first = one_of_6[colour]
    return np.concatenate([first, np.zeros_like(first), one_of_3[subtype // 3], one_of_3[subtype % 3]], -1)


def in_words(question):
    """The bits of one question (18,) -> its sentence."""
    subtype = 3 * question[12:15].argmax() + question[15:18].argmax()
    return list(SUBTYPES.values())[subtype].format(list(COLOURS)[question[:6].argmax()])


def object_tokens(objects):
    """Objects (N, 6, 3) -> float32 (N, 6, 10): colour one-hot, x and y from -1 to 1, shape one-hot."""
    colour = np.broadcast_to(np.eye(6), (len(objects), 6, 6))
    centre = (objects[..., :2] - SIZE // 2) / (SIZE // 2 - RADIUS)
    return np.concatenate([colour, centre, np.eye(2)[objects[..., 2]]], -1).astype(np.float32)


def split(arrays, n):
    """What `generate` returned -> the same of the first n images and of the others. No image is in both."""
    if not 0 < n < len(arrays[0]):
        raise ValueError(f"n={n}: of {len(arrays[0])} images give 1 to {len(arrays[0]) - 1} to the first part")
    return tuple(array[:n] for array in arrays), tuple(array[n:] for array in arrays)


# ---- accuracies, of a model and without vision -----------------------------------------------------------------------

def per_subtype(correct, subtype):
    """Whether each answer is correct (N, Q) -> {"all": accuracy, name of a subtype: its accuracy, ...}.

    Subtypes without a question are left out.
    """
    names = list(SUBTYPES)
    return {"all": float(correct.mean()), **{names[s]: float(correct[subtype == s].mean()) for s in np.unique(subtype)}}


def guessing(answers, subtype):
    """The accuracy of the most frequent answer to each subtype, as in per_subtype: about .44 on binary questions."""
    return per_subtype(most_frequent(subtype, answers) == answers, subtype)


def counting(objects, questions, answers, subtype):
    """The best accuracy of shapes and question without places, as in per_subtype: about .792 on binary questions.

    All that then matters is the subtype, the shape of the object in question, and how many of the others are squares,
    because each of these is nearest, or furthest, about equally often. The best answer to each of these cases, 12 per
    subtype, is found in the answers given here: give thousands of them, or the accuracy is too high.
    """
    square = objects[..., 2] == SHAPES.index("square")                                                 # (N, 6)
    own = np.take_along_axis(square, questions[..., :6].argmax(-1), 1)                                 # (N, Q)
    others = square.sum(1, keepdims=True) - own                                                        # 0 ... 5
    return per_subtype(most_frequent((subtype * 2 + own) * 6 + others, answers) == answers, subtype)


def most_frequent(case, answers):
    """For each question the most frequent answer among all with the same case: (N, Q), (N, Q) -> (N, Q)."""
    counts = np.zeros((case.max() + 1, len(ANSWERS)), int)
    np.add.at(counts, (case, answers), 1)
    return counts.argmax(1)[case]


def main(argv=None):
    configs = options.parse_options(Options, argv=argv)
    with options.one_line_errors():
        o = options.agreed(configs, ("seed",))
        images, _, questions, answers, subtype = generate(8, o.seed, 6, "both")
        draw_examples(o.out, images, questions, answers, subtype)
    print(f"examples: {o.out}: eight images; below each, questions and answers, the lower three binary")


def draw_examples(path, images, questions, answers, subtype):
    """Eight images; below each its questions in words, sorted by subtype, and the answers."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 4, figsize=(14, 9), layout="constrained")
    for i, ax in enumerate(axes.flat):
        ax.imshow(images[i], interpolation="nearest")
        ax.set_xticks([0, 37, 74])
        ax.set_yticks([0, 37, 74])
        ax.set_xlabel("\n".join(f"{in_words(questions[i, q])} {ANSWERS[answers[i, q]]}"
                                for q in subtype[i].argsort(kind="stable")), fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)


if __name__ == "__main__":
    options.start(main)
