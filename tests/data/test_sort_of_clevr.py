"""Sort-of-CLEVR: answers and drawings equal those of plain loops; the levels without vision are what they claim."""
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import sort_of_clevr as clevr
from data.sort_of_clevr import ANSWERS, COLOURS, SUBTYPES, all_answers, counting, draw, generate, guessing, split

N, Q = 2000, 12


@pytest.fixture(scope="module")
def data():
    """images, objects, questions, answers, subtype: 2,000 scenes with six questions of each kind."""
    return generate(N, seed=3, questions_per_image=Q, kind="both")


@pytest.fixture(scope="module")
def binary():
    return generate(N, seed=4)


# ---- answers ---------------------------------------------------------------------------------------------------------

def slow_answer(scene, question):
    """The answer in words, by the rules, from six [x, y, shape] and the 18 bits, in plain Python."""
    question = [int(bit) for bit in question]
    me = question[:6].index(1)
    kind, subtype = question[12:15].index(1), question[15:18].index(1)
    x, y, shape = scene[me]
    name = {0: "square", 1: "circle"}
    if kind == 0:
        return [name[shape], "yes" if x < 37.5 else "no", "yes" if y < 37.5 else "no"][subtype]
    if subtype == 2:
        return str(sum(other != me and scene[other][2] == shape for other in range(6)))
    best, answer = None, None
    for other in range(6):
        if other == me:
            continue
        distance = (scene[other][0] - x) ** 2 + (scene[other][1] - y) ** 2
        if best is None or (distance < best if subtype == 0 else distance > best):     # a tie: the first stays
            best, answer = distance, name[scene[other][2]]
    return answer


def test_every_answer_equals_that_of_a_plain_loop(data):
    _, objects, questions, answers, _ = data
    for scene, of_scene, given in zip(objects.tolist(), questions, answers):
        assert [ANSWERS[i] for i in given] == [slow_answer(scene, question) for question in of_scene]
    assert answers.dtype == np.int64 and set(answers.flat) == set(range(10))           # each answer occurs


CENTRES = [(37, 37), (37, 17), (37, 57), (17, 37), (57, 37), (50, 50)]                 # four are 20 pixels from red


@pytest.mark.parametrize("first, second", [(0, 1), (1, 0)])
def test_of_objects_at_the_same_distance_the_first_colour_counts(first, second):
    scene = [[*centre, second] for centre in CENTRES]
    scene[1][2] = first                                                # green: the first of four that are furthest
    scene[5] = [37, 48, second]                                        # yellow: nearest to red
    assert ANSWERS[all_answers(np.array([scene]))[0, 0, 4]] == ("square", "circle")[first]
    scene[5] = [69, 69, second]                                        # now green is the first of four that are nearest
    assert ANSWERS[all_answers(np.array([scene]))[0, 0, 3]] == ("square", "circle")[first]


def test_an_object_is_never_its_own_nearest():
    scene = np.array([[5, 5, 0], [45, 45, 1], [60, 45, 1], [45, 60, 1], [60, 60, 1], [69, 20, 1]])    # all others far
    assert ANSWERS[all_answers(scene[None])[0, 0, 3]] == "circle"


# ---- scenes and drawings ---------------------------------------------------------------------------------------------

def test_centres_are_5_to_69_and_at_least_10_pixels_apart(data):
    objects = data[1]
    assert objects.shape == (N, 6, 3) and objects.dtype == np.int64
    places = objects[..., :2]
    assert (places.min((0, 2)) == 5).all() and (places.max((0, 2)) == 69).all()        # of every colour
    d2 = ((places[:, :, None] - places[:, None]) ** 2).sum(-1)
    d2 = d2[:, ~np.eye(6, dtype=bool)]
    assert d2.min() == 100                                             # exactly 10 is allowed, and occurs


def test_places_of_the_first_colour_and_all_shapes_are_uniform_and_shapes_independent(data):
    _, objects, *_ = data
    counts = np.stack([np.bincount(objects[:, 0, axis] - 5, minlength=65) for axis in (0, 1)])
    assert abs(counts - N / 65).max() < 5 * (N / 65) ** 0.5
    scenes_of_each_kind = np.bincount((objects[..., 2] * 2 ** np.arange(6)).sum(1), minlength=64)
    assert abs(scenes_of_each_kind - N / 64).max() < 5 * (N / 64) ** 0.5


def slow_drawing(scene):
    """Pixel by pixel: the last colour that covers it, or white."""
    image = np.full((75, 75, 3), 255, np.uint8)
    for (x, y, shape), rgb in zip(scene, COLOURS.values()):
        for dx, dy in itertools.product(range(-5, 6), repeat=2):
            if shape == 0 or dx * dx + dy * dy <= 25:                  # a square of 11 x 11, or a disc
                image[y + dy, x + dx] = rgb
    return image


def test_images_equal_those_of_a_plain_loop(data):
    images, objects, *_ = data
    assert images.shape == (N, 75, 75, 3) and images.dtype == np.uint8
    for image, scene in zip(images[:200], objects.tolist()):
        assert np.array_equal(image, slow_drawing(scene))


def test_one_object_of_each_exact_colour_and_neighbours_hide_little_of_it(data):
    images, objects, *_ = data
    seen = 0
    for i, rgb in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 156, 0), (128, 128, 128), (255, 255, 0)]):
        pixels = (images == np.array(rgb, np.uint8)).all(-1)           # (N, 75, 75)
        area = np.where(objects[:, i, 2] == 0, 121, 81)
        assert (pixels.sum((1, 2)) <= area).all() and (pixels.sum((1, 2)) > area / 2).all()
        assert pixels[np.arange(N), objects[:, i, 1], objects[:, i, 0]].all()          # row y, column x
        seen = seen + pixels
    assert np.array_equal(seen == 0, (images == 255).all(-1))          # and nothing else on white
    assert (pixels.sum((1, 2)) == area).all()                          # yellow, the last, is on top of all


def test_same_seed_same_arrays_and_other_seeds_differ():
    one, again, other = generate(50, 1), generate(50, 1), generate(50, 2)
    for a, b, c in zip(one, again, other):
        assert np.array_equal(a, b) and not np.array_equal(a, c)
    for questions in (dict(kind="nonrelational"), dict(questions_per_image=3)):        # the scenes stay the same
        assert all(np.array_equal(a, b) for a, b in zip(generate(50, 1, **questions)[:2], one))


def test_the_two_parts_of_a_split_have_all_images_and_none_in_common(data):
    first, second = split(data, 1500)
    for whole, a, b in zip(data, first, second):
        assert len(a) == 1500 and np.array_equal(np.concatenate([a, b]), whole)
    assert len({image.tobytes() for image in data[0]}) == N            # no scene is drawn twice by chance
    for n in (0, N):
        with pytest.raises(ValueError, match=f"n={n}: of 2000 images give 1 to 1999"):
            split(data, n)


def test_object_tokens_contain_the_objects(data):
    objects = data[1]
    tokens = clevr.object_tokens(objects)
    assert tokens.shape == (N, 6, 10) and tokens.dtype == np.float32
    assert (tokens[..., :6] == np.eye(6)).all() and (tokens[..., 8:].argmax(-1) == objects[..., 2]).all()
    assert (tokens[..., 8:].sum(-1) == 1).all() and tokens[..., 6:8].min() == -1 and tokens[..., 6:8].max() == 1
    assert (np.rint(tokens[..., 6:8] * 32 + 37) == objects[..., :2]).all()


# ---- questions -------------------------------------------------------------------------------------------------------

def test_a_question_has_one_colour_one_kind_and_one_subtype(data):
    _, _, questions, _, subtype = data
    assert questions.shape == (N, Q, clevr.QUESTION_BITS) and questions.dtype == np.uint8 and questions.max() == 1
    for bits in (questions[..., :6], questions[..., 12:15], questions[..., 15:]):
        assert (bits.sum(-1) == 1).all()
    assert not questions[..., 6:12].any() and not questions[..., 14].any()             # of ternary questions
    assert (3 * questions[..., 12:15].argmax(-1) + questions[..., 15:].argmax(-1) == subtype).all()


def test_colours_and_subtypes_are_uniform_and_independent(data):
    _, _, questions, _, subtype = data
    counts = np.zeros((6, 6))
    np.add.at(counts, (questions[..., :6].argmax(-1), subtype), 1)
    assert abs(counts - N * Q / 36).max() < 4.5 * (N * Q / 36) ** 0.5


@pytest.mark.parametrize("kind, values", [("nonrelational", {0, 1, 2}), ("binary", {3, 4, 5})])
def test_questions_are_of_the_kind_that_was_chosen(kind, values):
    _, _, questions, answers, subtype = generate(100, 1, 7, kind)
    assert set(subtype.flat) == values and questions.shape == (100, 7, 18) and answers.shape == (100, 7)


def test_both_kinds_take_turns(data):
    assert (data[4][:, ::2] < 3).all() and (data[4][:, 1::2] >= 3).all()


def test_questions_in_words_name_the_colour_and_the_subtype(data):
    _, _, questions, _, subtype = data
    for question, s in zip(questions[:20].reshape(-1, 18), subtype[:20].flat):
        colour = list(COLOURS)[question.tolist().index(1)]
        assert clevr.in_words(question) == list(SUBTYPES.values())[s].replace("{}", colour)
    bits = [0, 0, 0, 0, 1, 0] + [0] * 6 + [0, 1, 0] + [0, 1, 0]
    assert clevr.in_words(np.array(bits)) == "What shape is furthest from the grey object?"


# ---- levels without vision -------------------------------------------------------------------------------------------

def test_counting_shapes_without_places_reaches_792_on_binary_questions(binary):
    _, objects, questions, answers, subtype = binary
    level = counting(objects, questions, answers, subtype)
    assert list(level) == ["all", "nearest", "furthest", "count"]
    assert level["all"] == pytest.approx(0.792, abs=0.01) and level["count"] == 1
    for name in ("nearest", "furthest"):                               # the more frequent shape among five: 22 / 32
        assert level[name] == pytest.approx(22 / 32, abs=0.02)


def test_guessing_is_the_most_frequent_answer_to_each_subtype(binary, data):
    for _, _, _, answers, subtype in (binary, data):
        level, right = guessing(answers, subtype), 0
        for s, name in enumerate(SUBTYPES):
            of_one = answers[subtype == s].tolist()
            if of_one:
                most = max(of_one.count(answer) for answer in range(10))
                assert level.pop(name) == pytest.approx(most / len(of_one), abs=1e-12)
                right += most
        assert level == {"all": pytest.approx(right / answers.size, abs=1e-12)}
    assert guessing(*binary[3:])["all"] == pytest.approx((1 / 2 + 1 / 2 + 10 / 32) / 3, abs=0.015)


def test_counting_knows_no_places(data):
    """It cannot tell left from right, and shuffling the places of all scenes changes nothing."""
    _, objects, questions, answers, subtype = data
    level = counting(objects, questions, answers, subtype)
    assert level["shape"] == level["count"] == 1
    assert level["left"] < 0.55 and level["top"] < 0.55
    elsewhere = np.concatenate([np.roll(objects[..., :2], 1, 0), objects[..., 2:]], -1)
    assert counting(elsewhere, questions, answers, subtype) == level


def test_who_also_knows_the_colour_of_each_shape_is_no_better_than_counting():
    """The best answer to each (six shapes, colour), found in 40,000 scenes and applied to 40,000 others."""
    objects = clevr.scenes(80_000, np.random.default_rng(0))
    answers = all_answers(objects)                                     # (scenes, 6 colours, 6 subtypes)
    case = (objects[..., 2] * 2 ** np.arange(6)).sum(1)[:, None] * 6 + np.arange(6)
    for subtype in (3, 4):
        counts = np.zeros((384, 10))
        np.add.at(counts, (case[:40_000], answers[:40_000, :, subtype]), 1)
        right = counts.argmax(1)[case[40_000:]] == answers[40_000:, :, subtype]
        assert right.mean() == pytest.approx(22 / 32, abs=0.006)


def test_accuracy_per_subtype():
    correct, subtype = np.array([[True, False, True], [True, True, False]]), np.array([[3, 3, 5], [5, 3, 5]])
    assert clevr.per_subtype(correct, subtype) == {"all": 4 / 6, "nearest": 2 / 3, "count": 2 / 3}


# ---- bad input, and the command --------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, words", [
    (dict(n_images=0), "n_images=0: must be at least 1"),
    (dict(questions_per_image=0), "questions_per_image=0: must be at least 1"),
    (dict(seed=-1), "seed=-1: must be at least 0"), (dict(kind="binery"), "kind=binery: did you mean binary?"),
    (dict(kind="ternary"), "kind=ternary: .*choose from nonrelational, binary, both")])
def test_impossible_arguments_are_errors_of_one_line(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        generate(**{**dict(n_images=1, seed=0), **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.figures
def test_the_command_draws_examples_without_a_warning(tmp_path):
    out = tmp_path / "new" / "examples.png"
    command = [sys.executable, "-W", "error", "-m", "data.sort_of_clevr", f"--out={out}"]
    shown = subprocess.run(command, cwd=Path(clevr.__file__).parents[1], check=True, capture_output=True, text=True)
    assert str(out) in shown.stdout
    pixels = np.array(Image.open(out).convert("RGB")).reshape(-1, 3)
    for rgb in COLOURS.values():
        assert (pixels == rgb).all(1).sum() > 1000


@pytest.mark.parametrize("option, words", [("--seed=-1", "seed=-1: must be"), ("--seed=1,2", "give one value"),
                                           ("--sed=1", "did you mean --seed")])
def test_errors_of_the_command_are_one_line(option, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        clevr.main([option, f"--out={tmp_path / 'examples.png'}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
