"""The published files of the Mathematics benchmark, and the data of one module: generated, or read from such files.

The archive has the folders train-easy, train-medium, train-hard and interpolate, and in each one file per module, in
which questions and answers are alternate lines.
"""
import math
import re
from functools import lru_cache
from pathlib import Path

from data.mathematics.characters import digest, text, tokens
from data.mathematics.problems import LEVELS, LONGEST_ANSWER, LONGEST_QUESTION, MODULES, generate
from data.mathematics.splits import canonical, split_of
from data.mathematics.stream import stream_members

ARCHIVE = dict(url="https://storage.googleapis.com/mathematics-dataset/mathematics_dataset-v1.0.tar.gz",
               size=2_333_082_954, sha256="def638343403cb9ed60437d6b684c859dd23b72779f5cc5661b0a31e67c58576")
TESTS = ("interpolate", "extrapolate")     # folders of test files; the paper's five modules have no "extrapolate" file


def fetch(data_dir, modules):
    """-> the folder with the published files of these modules, downloaded if necessary. Raises DownloadError."""
    top = Path(data_dir) / "mathematics_dataset-v1.0"
    names = [f"{folder}/{module}.txt" for module in modules
             for folder in (*(f"train-{level}" for level in LEVELS), "interpolate")]
    stream_members(wanted={f"{top.name}/{name}": top / name for name in names}, **ARCHIVE)
    return top


@lru_cache(maxsize=1)                      # consecutive runs use the same module
def load(data, module, level, train_size, val_size):
    """-> training problems, {level: validation problems}, and facts about them; problems are what tokens() returns.

    data: "generated", or a folder with the layout of the archive, from whose training files both sets are taken.
    level: one of LEVELS, or "all". train_size: number of generated training problems; of files all are used.
    val_size: number of validation problems of each level. Raises ValueError if a file is missing or wrong.
    """
    print(f"\n{module}, {level}: {'generating' if data == 'generated' else 'reading'} problems")
    train, val = [], {}
    for one in LEVELS if level == "all" else (level,):
        if data == "generated":
            train += generate(module, one, math.ceil(train_size / (len(LEVELS) if level == "all" else 1)), seed=0)
            val[one] = generate(module, one, val_size, seed=0, split="val")
        else:
            pairs = read_pairs(*training_files(data, module, one))
            train += [pair for pair in pairs if split_of(pair[0]) == "train"]
            val[one] = [pair for pair in pairs if split_of(pair[0]) == "val"][:val_size]
        if not (train and val[one]):
            raise ValueError(f"{data}: too few {one} questions of {module} to use a tenth of them for validation")
    train, val = tokens(train), {one: tokens(pairs) for one, pairs in val.items()}
    n = sum(len(problems[0]) for problems in val.values())
    print(f"{len(train[0]):,} training problems, {n:,} for validation")
    return train, val, {"data": data if data == "generated" else Path(data).name,
                        "sha256": digest(train, *val.values()), "training_pairs": len(train[0])}


def training_files(folder, module, level):
    """Paths of a module's training files of one level, or of "all". Raises ValueError if one is missing."""
    return [need(Path(folder) / f"train-{one}" / f"{module}.txt") for one in (LEVELS if level == "all" else (level,))]


def test_files(folder, module):
    """-> {name: problems} of a module's test files, as far as they exist."""
    paths = {name: Path(folder) / name / f"{module}.txt" for name in TESTS}
    return {name: tokens(read_pairs(path)) for name, path in paths.items() if path.exists()}


def need_any(folder, module):
    """-> {name: path} of all files of a module, training and test. Raises ValueError if there is none."""
    names = [*(f"train-{level}" for level in LEVELS), *TESTS]
    paths = {name: path for name in names if (path := Path(folder) / name / f"{module}.txt").exists()}
    if not paths:
        raise ValueError(f"no {module}.txt in {', '.join(names)} of {folder}")
    return paths


def unseen(folder, module, train, at_most=2000):
    """-> {name: problems} of all files of a module, training and test, without the problems that occur in `train`.

    For a model trained on generated problems, the published training problems are test problems, too. But there are few
    easy problems, and some occur in both. at_most: use only the first ones of each training file.
    """
    seen = {canonical(text(row)) for row in train[0]}
    found = {}
    for name, path in need_any(folder, module).items():
        pairs = read_pairs(path)[:None if name in TESTS else at_most]
        new = [pair for pair in pairs if canonical(pair[0]) not in seen]
        print(f"{path}: {len(pairs) - len(new):,} of {len(pairs):,} problems occur in training and are left out")
        if new:
            found[name] = tokens(new)
    return found


def need(path):
    """Returns the path of an existing file. Raises ValueError if there is none."""
    if not path.exists():
        raise ValueError(f"no file {path}: give a folder with the layout of the archive: train-easy/{MODULES[0]}.txt "
                         f"etc.")
    return path


def read_pairs(path):
    """-> pairs (question, answer) of strings from one published file. Raises ValueError, one line, for a bad file."""
    lines = need(path).read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    if lines[-1] == "":                                              # after the last line break
        lines.pop()
    if not lines or len(lines) % 2:
        raise ValueError(f"{path}: {len(lines)} lines, but questions and answers should alternate")
    for number, line in enumerate(lines, 1):
        kind, longest = ("an answer", LONGEST_ANSWER) if number % 2 == 0 else ("a question", LONGEST_QUESTION)
        if not 0 < len(line) <= longest:
            raise ValueError(f"{path}, line {number}: {kind} must have 1 to {longest} characters, not {len(line)}")
        if line != line.strip():
            raise ValueError(f"{path}, line {number}: {kind} must not begin or end with white space")
        if foreign := re.search("[^ -~]", line):
            raise ValueError(f"{path}, line {number}: {foreign[0]!r} is not in the vocabulary of printable ASCII")
    return list(zip(lines[0::2], lines[1::2]))
