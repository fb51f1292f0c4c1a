"""The published files of the Mathematics benchmark, and problems as tokens."""
import itertools

import pytest
import torch

from data import mathematics
from data.mathematics import END, LEVELS, MODULES, PAD, START, files, generate, split_of
from data.mathematics import __main__ as command


# ---- tokens ----------------------------------------------------------------------------------------------------------

def test_tokens_and_text_are_inverse():
    pairs = [("Solve 2*x = 4 for x.", "2"), ("".join(map(chr, range(32, 127))), "-3*z**2 + ~"), ("a" * 160, "b" * 30)]
    questions, answers = mathematics.tokens(pairs)
    assert questions.dtype == answers.dtype == torch.uint8
    assert questions.shape == (3, 160) and answers.shape == (3, 32) and answers.max() < mathematics.VOCAB_SIZE
    assert [mathematics.text(row) for row in questions] == [question for question, _ in pairs]
    assert [mathematics.text(row) for row in answers] == [answer for _, answer in pairs]
    assert sorted(set(questions[1].tolist())) == [PAD, *range(3, mathematics.VOCAB_SIZE)]
    q, x, y = mathematics.batch((questions, answers), torch.tensor([1, 0]))
    assert q.dtype == torch.int64 and q.shape == (2, 95) and x.shape == y.shape == (2, 12)
    assert x[:, 0].tolist() == [START] * 2 and x[0, 1:].tolist() == y[0, :-1].tolist() and y[0, -1] == END
    assert y[1].tolist()[:3] == [ord("2") - 29, END, PAD] and q[1, 20:].eq(PAD).all() and q[1, 19] != PAD


# ---- files -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """A folder with the layout of the archive and generated problems."""
    for level in LEVELS:
        write(tmp_path / f"train-{level}/polynomials__expand.txt", generate("polynomials__expand", level, 60, seed=7)
              + generate("polynomials__expand", level, 9, seed=7, split="val"))
    write(tmp_path / "interpolate/polynomials__expand.txt", [("Expand x*x.", "x**2")])
    return tmp_path


def write(path, pairs):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{question}\n{answer}\n" for question, answer in pairs))


def test_a_folder_is_split_by_the_same_rule_and_has_its_own_test_files(folder):
    train, val, facts = mathematics.load(str(folder), "polynomials__expand", "all", 5, 7)
    assert len(train[0]) == 3 * 60 == facts["training_pairs"] and [len(v[0]) for v in val.values()] == [7, 7, 7]
    assert all(split_of(mathematics.text(row)) == "train" for row in train[0])
    assert all(split_of(mathematics.text(row)) == "val" for problems in val.values() for row in problems[0])
    easy, _, other = mathematics.load(str(folder), "polynomials__expand", "easy", 5, 7)
    assert len(easy[0]) == 60 and other["sha256"] != facts["sha256"]
    tests = mathematics.test_files(folder, "polynomials__expand")
    assert list(tests) == ["interpolate"] and mathematics.text(tests["interpolate"][0][0]) == "Expand x*x."
    assert mathematics.test_files(folder, "polynomials__add") == {}
    write(folder / "train-hard/polynomials__expand.txt", generate("polynomials__expand", "hard", 59, seed=7)
          + generate("polynomials__expand", "hard", 10, seed=8, split="val"))      # other validation problems
    assert mathematics.load(str(folder), "polynomials__expand", "all", 6, 7)[2]["sha256"] != facts["sha256"]
    assert {type(value) for value in facts.values()} == {str, int}     # a checkpoint can contain them


def test_problems_of_training_are_left_out_of_the_test_problems(folder):
    train = mathematics.tokens(generate("polynomials__expand", "easy", 10, seed=7))
    found = mathematics.unseen(folder, "polynomials__expand", train)
    assert {name: len(problems[0]) for name, problems in found.items()} == {
        "train-easy": 59, "train-medium": 69, "train-hard": 69, "interpolate": 1}
    found = mathematics.unseen(folder, "polynomials__expand", train, at_most=12)
    assert {name: len(problems[0]) for name, problems in found.items()} == {
        "train-easy": 2, "train-medium": 12, "train-hard": 12, "interpolate": 1}
    write(folder / "interpolate/polynomials__expand.txt", [(mathematics.text(train[0][0]), "0")])
    assert "interpolate" not in mathematics.unseen(folder, "polynomials__expand", train)


def test_windows_line_ends_are_accepted(folder):
    path = folder / "interpolate/polynomials__expand.txt"
    path.write_bytes(b"Expand x*x.\r\nx**2\r\nExpand 2.\r\n2")
    assert mathematics.read_pairs(path) == [("Expand x*x.", "x**2"), ("Expand 2.", "2")]


def test_loaded_data_are_the_generated_problems():
    train, val, _ = mathematics.load("generated", "algebra__linear_1d", "all", 30, 4)
    assert [mathematics.text(row) for row in train[0]] == [
        q for level in LEVELS for q, _ in generate("algebra__linear_1d", level, 10, seed=0)]
    assert {level: [mathematics.text(row) for row in v[1]] for level, v in val.items()} == {
        level: [a for _, a in generate("algebra__linear_1d", level, 4, seed=0, split="val")] for level in LEVELS}


@pytest.mark.parametrize("content, words", [
    ("Expand x*x.\nx**2\nExpand 2.\n", "3 lines, but questions and answers should alternate"),
    ("", "0 lines"),
    ("Expand x*x.\n\n", "line 2: an answer must have 1 to 30 characters, not 0"),
    ("Expand x.\nx\n" + "Expand " + "x + " * 50 + "x.\n51*x\n", "line 3: a question must have 1 to 160 characters"),
    ("Expand x.\n" + "x" * 31 + "\n", "line 2: an answer must have 1 to 30 characters, not 31"),
    ("Expand x. \nx\n", "line 1: a question must not begin or end with white"),
    ("Expand x.\nx\nExpand\fx.\nx\n", r"line 3: '\\x0c' is not in the vocabulary"),
    (b"Expand \xff.\nx\n", "line 1: '\ufffd' is not in the vocabulary"),
    ("Expand x·x.\nx**2\n", "line 1: '·' is not in the vocabulary"),
    ("Expand x.\n\\tx\n".replace("\\t", "x\t"), r"line 2: '\\t' is not in the vocabulary")])
def test_a_file_of_another_kind_is_an_error_that_names_the_line(folder, content, words):
    path = folder / "train-medium/polynomials__expand.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as error:
        mathematics.load(str(folder), "polynomials__expand", "all", 5, 8)
    assert "train-medium/polynomials__expand.txt" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_the_module_is_an_error(folder):
    with pytest.raises(ValueError, match="no file .*train-easy/polynomials__add.txt"):
        mathematics.load(str(folder), "polynomials__add", "all", 5, 5)
    with pytest.raises(ValueError, match="no polynomials__add.txt"):
        mathematics.unseen(folder, "polynomials__add", mathematics.tokens([("Expand x.", "x")]))
    write(folder / "train-easy/polynomials__expand.txt", generate("polynomials__expand", "easy", 9, seed=1))
    with pytest.raises(ValueError, match="too few easy questions"):
        mathematics.load(str(folder), "polynomials__expand", "easy", 5, 5)


def test_only_the_files_of_the_wanted_modules_are_read_from_the_archive(tmp_path, monkeypatch):
    arguments = {}
    monkeypatch.setattr(files, "stream_members", lambda **given: arguments.update(given))
    top = mathematics.fetch(tmp_path, ["polynomials__expand"])
    assert top == tmp_path / "mathematics_dataset-v1.0"
    names = [f"{name}/polynomials__expand.txt" for name in ("train-easy", "train-medium", "train-hard", "interpolate")]
    assert arguments.pop("wanted") == {f"mathematics_dataset-v1.0/{name}": top / name for name in names}
    assert arguments["size"] == 2333082954 and len(arguments["sha256"]) == 64
    assert arguments["url"].endswith("-v1.0.tar.gz")


def test_the_command_prints_examples_or_compares_lengths_and_sentences(folder, capsys, monkeypatch):
    for module, level in itertools.product(MODULES, LEVELS):
        write(folder / f"train-{level}/{module}.txt", generate(module, level, 40, seed=2))
    write(folder / "train-easy/polynomials__expand.txt", [("Expand x*x now.", "x**2"), ("Expand 2*x.", "2*x")])
    monkeypatch.setattr(command, "generate", lambda module, level, n, seed: generate(module, level, n // 40, seed))
    command.main([f"--compare={folder}"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 15 and all(row.count("|") == 11 for row in rows)
    cells = rows[2 + list(itertools.product(MODULES, LEVELS)).index(("polynomials__expand", "easy"))].split(" | ")
    assert cells[2:4] == ["2", "13.0 ± 2.8"] and cells[5] == "3.5 ± 0.7"
    assert cells[7:] == ["2", "1", "Expand _ now. |"]
    monkeypatch.undo()
    command.main([])
    shown = capsys.readouterr().out
    assert all(f"\n{module}, {level}\n" in shown for module, level in itertools.product(MODULES, LEVELS))
