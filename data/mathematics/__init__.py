"""Questions and answers of the Mathematics benchmark (Saxton et al., 2019): generated, or read from its own files.

    python -m data.mathematics                             examples of every module and level
    python -m data.mathematics --compare=FOLDER            generated questions beside the files in FOLDER

generate() makes them by the benchmark's rules (questions.py). A question belongs to validation if and only if a hash of
its canonical form says so: training and validation are disjoint by construction, whatever words and letters are used.
Tokens are characters; questions have at most 160 of them, answers 30.
"""
import hashlib
import math
import re
import statistics
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby, permutations, product
from pathlib import Path

import torch

from data.mathematics.algebra import Dice
from data.mathematics.questions import QUESTIONS
from data.mathematics.stream import stream_members

MODULES = tuple(QUESTIONS)
LEVELS = ("easy", "medium", "hard")
LONGEST_QUESTION, LONGEST_ANSWER = 160, 30

# ---- generating ------------------------------------------------------------------------------------------------------


def generate(module, level, n, seed, split="train"):
    """n (question, answer) strings, a function of the arguments alone (and of Python's `random`). split: train or val.

    Levels cut the benchmark's range of entropies, 3 to 10, in three: numbers are chosen among 10^3 ... 10^10.
    """
    allowed = {"module": MODULES, "level": LEVELS, "split": ("train", "val")}
    for (name, allowed), value in zip(allowed.items(), (module, level, split)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: choose from {', '.join(allowed)}")
    dice = Dice(f"{module} {level} {split} {seed}")
    low = 3 + 7 / 3 * LEVELS.index(level)
    pairs = []
    while len(pairs) < n:
        question, answer = QUESTIONS[module](dice, dice.uniform(low, low + 7 / 3))
        if len(question) <= LONGEST_QUESTION and len(answer) <= LONGEST_ANSWER and split_of(question) == split:
            pairs.append((question, answer))
    return pairs


def split_of(question):
    """"val" for a tenth of all problems, chosen by a hash; "train" for the others."""
    return "train" if int.from_bytes(hashlib.sha256(canonical(question).encode()).digest()[:8], "big") % 10 else "val"


SEQUENCE = re.compile(r"[^\d-]*(-?\d+(?:, -?\d+)*)\?")
EQUATION = re.compile(r"Solve (.+) = (.+) for \w\.")
DERIVATIVE = re.compile(r"(?:(?:Find|What is) the (?:(\w+) )?derivative of|Differentiate) "
                        r"(.+?)(?: (?:wrt|with respect to) (\w))?[.?]")
TERM = r"(?:(?:[a-z]|\d+)\*)?[a-z]\([a-z]\)"
COMBINATION = re.compile(rf"(.* )(-?)({TERM}) ([+-]) ({TERM}[.?])")     # 3*f(x) - g(x): its order hangs on the letters
WORDING = re.compile(r"What is|Calculate|Give|Determine|[?.]")


def canonical(question):
    """The problem itself: one string for all wordings, names of letters, and orders of sentences.

    Also for all orders of the terms, where they are sorted by letters; for an equation with its terms moved; and for a
    sequence with more or fewer terms, in which another's answer may stand.
    """
    if sequence := SEQUENCE.fullmatch(question):
        return str(differences([int(n) for n in sequence[1].split(", ")]))
    if equation := EQUATION.fullmatch(question):
        return canonical_equation(*equation.groups())
    if derivative := DERIVATIVE.fullmatch(question):
        return canonical_derivative(*derivative.groups())
    sentences = re.split(r"(?<=[.?]) ", question)
    return min(canonical_story(version) for version in product(*map(both_orders, sentences)))


def differences(terms):
    """What determines a polynomial: the first term, the first difference, and so on until they are constant."""
    heads = [terms[0]]
    while any(term != terms[0] for term in terms):
        terms = [right - left for left, right in zip(terms, terms[1:])]
        heads.append(terms[0])
    return heads


def canonical_equation(left, right):
    """All terms on one side, sorted; of the two ways to do that, which differ in all signs, the smaller."""
    terms = [re.sub("[a-z]", "x", side).replace("- ", "-").replace("+ ", "").split() for side in (left, right)]

    def negated(side):
        return [term[1:] if term[0] == "-" else "-" + term for term in side]
    ways = [[*terms[0], *negated(terms[1])], [*negated(terms[0]), *terms[1]]]
    return " ".join(min(sorted(term for term in way if term not in ("0", "-0")) for way in ways))


def canonical_derivative(order, function, x):
    """The smallest of all ways to name the letters, in any order of the terms and factors."""
    letters = sorted(set(re.findall("[a-z]", function)))
    terms = [re.split(r"(?<!\*)\*(?!\*)", term) for term in function.replace("- ", "-").replace("+ ", "").split()]

    def renamed(names):
        new = dict(zip(letters, names))
        return (new.get(x or letters[0], "") if letters else "", *sorted(
            "*".join(sorted(re.sub("[a-z]", lambda m: new[m[0]], factor) for factor in term)) for term in terms))
    return f"{order or 'first'} {min(renamed(names) for names in permutations('abcd'[:len(letters)]))}"


def both_orders(sentence):
    """[f + g, g + f] for a sentence that ends in such a combination; else the sentence alone."""
    if not (found := COMBINATION.fullmatch(sentence)):
        return [sentence]
    start, minus, first, sign, second = found.groups()
    return [sentence, f"{start}{sign.strip('+')}{second[:-1]} {minus or '+'} {first}{second[-1]}"]


def canonical_story(sentences):
    """Sentences sorted, then letters named as they come; those alike but for their letters are tried in every order."""
    *story, ask = sentences

    def nameless(sentence):
        return re.sub(r"\b[a-z]\b", "x", sentence)

    def renamed(order):
        new = {}
        text = " ".join([*chain(*order), WORDING.sub("", ask)])
        return " ".join(re.sub(r"\b[a-z]\b", lambda m: new.setdefault(m[0], f"{len(new)}'"), text).split())
    groups = groupby(sorted(story, key=nameless), key=nameless)
    return min(renamed(order) for order in product(*(list(permutations(group)) for _, group in groups)))


# ---- the published files ---------------------------------------------------------------------------------------------

ARCHIVE = dict(url="https://storage.googleapis.com/mathematics-dataset/mathematics_dataset-v1.0.tar.gz",
               size=2_333_082_954, sha256="def638343403cb9ed60437d6b684c859dd23b72779f5cc5661b0a31e67c58576")
TESTS = ("interpolate", "extrapolate")             # of the paper's five modules, none has a file in the second


def fetch(data_dir, modules):
    """The folder with the published files of these modules, which are picked out of the archive as it arrives."""
    top = Path(data_dir) / "mathematics_dataset-v1.0"
    names = [f"{folder}/{module}.txt" for module in modules
             for folder in (*(f"train-{level}" for level in LEVELS), "interpolate")]
    stream_members(wanted={f"{top.name}/{name}": top / name for name in names}, **ARCHIVE)
    return top


def need(path):
    """The path, of a file that is there; else ValueError."""
    if not path.exists():
        raise ValueError(f"no file {path}: give a folder laid out as the archive: train-easy/{MODULES[0]}.txt etc.")
    return path


def read_pairs(path):
    """(question, answer) strings of one published file, which alternate in its lines. ValueError says what is wrong."""
    lines = need(path).read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    if lines[-1] == "":                                              # the last line ends, too
        lines.pop()
    if not lines or len(lines) % 2:
        raise ValueError(f"{path}: {len(lines)} lines, but questions and answers should alternate")
    for number, text in enumerate(lines, 1):
        kind, longest = ("an answer", LONGEST_ANSWER) if number % 2 == 0 else ("a question", LONGEST_QUESTION)
        if not 0 < len(text) <= longest:
            raise ValueError(f"{path}, line {number}: {kind} has 1 to {longest} characters, not {len(text)}")
        if text != text.strip():
            raise ValueError(f"{path}, line {number}: blanks around {kind}")
        if foreign := re.search("[^ -~]", text):
            raise ValueError(f"{path}, line {number}: {foreign[0]!r} is not in the vocabulary of printable ASCII")
    return list(zip(lines[0::2], lines[1::2]))


# ---- characters as tokens --------------------------------------------------------------------------------------------

PAD, START, END = 0, 1, 2
VOCAB_SIZE = 3 + 95                         # and the printable characters of ASCII: " " is token 3, "~" is 97
TO_TOKENS = bytes(max(0, code - 29) for code in range(256))


def tokens(pairs):
    """-> questions (n, 160) and answers (n, 32), uint8: an answer stands between START and END; padding comes last."""
    def table(rows, width):
        return torch.frombuffer(bytearray(b"".join(row.ljust(width, b"\0") for row in rows)),
                                dtype=torch.uint8).view(-1, width)

    coded = [[text.encode("ascii").translate(TO_TOKENS) for text in column] for column in zip(*pairs)]
    answers = [bytes([START]) + answer + bytes([END]) for answer in coded[1]]
    return table(coded[0], LONGEST_QUESTION), table(answers, LONGEST_ANSWER + 2)


def text(row):
    """What a row of tokens says: its characters up to END."""
    row = row.tolist()
    row = row[:row.index(END)] if END in row else row
    return "".join(chr(token + 29) for token in row if token > END)


def batch(problems, rows):
    """Questions (B, S), inputs (B, T), targets (B, T), the inputs moved by one; as long as the longest of the rows."""
    questions, answers = (table[rows].long() for table in problems)
    questions, answers = (table[:, :(table != PAD).sum(1).max()] for table in (questions, answers))
    return questions, answers[:, :-1], answers[:, 1:]


# ---- a module's data -------------------------------------------------------------------------------------------------

@lru_cache(maxsize=1)                       # one module at a time, for the runs that follow each other on it
def load(data, module, level, train_size, val_size):
    """-> training problems, {level: validation problems}, and facts about them; problems are what tokens() returns.

    data: "generated", or a folder laid out as the archive. There, too, the hash says which are for validation.
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
            raise ValueError(f"{data}: too few {one} questions of {module} to hold a tenth out for validation")
    train, val = tokens(train), {one: tokens(pairs) for one, pairs in val.items()}
    n = sum(len(problems[0]) for problems in val.values())
    print(f"{len(train[0]):,} training problems, {n:,} for validation")
    return train, val, {"data": data if data == "generated" else Path(data).name,
                        "sha256": digest(train, *val.values()), "training_pairs": len(train[0])}


def digest(*sets):
    """SHA-256 of some problems, in hex."""
    return hashlib.sha256(b"".join(table.numpy().tobytes() for problems in sets for table in problems)).hexdigest()


def training_files(folder, module, level):
    """Paths of the training files of a module in a folder laid out as the archive. ValueError if one is missing."""
    return [need(Path(folder) / f"train-{one}" / f"{module}.txt") for one in (LEVELS if level == "all" else (level,))]


def test_files(folder, module):
    """{name: problems} of a module's test files in a folder laid out as the archive."""
    paths = {name: Path(folder) / name / f"{module}.txt" for name in TESTS}
    return {name: tokens(read_pairs(path)) for name, path in paths.items() if path.exists()}


def need_any(folder, module):
    """{name: path} of all of a module's files in a folder laid out as the archive. ValueError if there are none."""
    names = [*(f"train-{level}" for level in LEVELS), *TESTS]
    paths = {name: path for name in names if (path := Path(folder) / name / f"{module}.txt").exists()}
    if not paths:
        raise ValueError(f"no {module}.txt in {', '.join(names)} of {folder}")
    return paths


def unseen(folder, module, train, at_most=2000):
    """{name: problems} of all of a module's files there, without those that occur in training.

    For a model that learned from generated problems, the benchmark's training problems are as new as its others; but
    there are not many easy problems, and some stand in both. at_most: so many of a training file, its first ones.
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


# ---- beside the real ones --------------------------------------------------------------------------------------------

def sentences(question):
    """Its sentences with their mathematics cut out: "Let _ be _.", "Calculate _."."""
    for sentence in re.split(r"(?<=[.?]) ", question):
        words = [word if re.fullmatch("[A-Za-z]{2,}:?|=", word) else "_" for word in sentence[:-1].split()]
        yield re.sub("_( _)+", "_", " ".join(words)) + sentence[-1]


def comparison(folder, n=4000):
    """Markdown: lengths (mean, standard deviation) and sentences of the files in `folder` and of n generated each."""
    lines = ["| module | level | problems | question length: files | generated | answer length: files | generated | "
             "sentences: files | generated | in one only |", "|---" * 10 + "|"]
    for module, level in product(MODULES, LEVELS):
        real, ours = read_pairs(Path(folder) / f"train-{level}" / f"{module}.txt"), generate(module, level, n, seed=1)
        cells = [module, level, f"{len(real):,}"]
        for column in (0, 1):
            for pairs in (real, ours):
                lengths = [len(pair[column]) for pair in pairs]
                cells.append(f"{statistics.mean(lengths):.1f} ± {statistics.stdev(lengths):.1f}")
        kinds = [{kind for question, _ in pairs for kind in sentences(question)} for pairs in (real, ours)]
        cells += [len(kinds[0]), len(kinds[1]), ", ".join(sorted(kinds[0] ^ kinds[1])) or "none"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
