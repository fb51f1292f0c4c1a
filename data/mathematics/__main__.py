"""Examples of the questions, or a comparison of generated questions with the published ones.

    python -m data.mathematics --seed=2
    python -m data.mathematics --compare=FOLDER            FOLDER/train-easy/algebra__linear_1d.txt etc.
"""
import re
import statistics
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from data.mathematics import LEVELS, MODULES, generate, read_pairs
from toolbox.options import one_line_errors, parse_options, start


@dataclass
class Options:
    compare: str = ""                       # a folder of published files to compare with; default: print examples
    seed: int = 1                           # of the examples


def comparison(folder, n=4000):
    """A Markdown table: lengths (mean ± standard deviation) and sentences of the files and of n generated problems."""
    lines = ["| module | level | problems | question length: files | generated | answer length: files | generated | "
             "sentences: files | generated | in one only |", "|---" * 10 + "|"]
    for module, level in product(MODULES, LEVELS):
        real = read_pairs(Path(folder) / f"train-{level}" / f"{module}.txt")
        generated = generate(module, level, n, seed=1)
        cells = [module, level, f"{len(real):,}"]
        for column in (0, 1):
            for pairs in (real, generated):
                lengths = [len(pair[column]) for pair in pairs]
                cells.append(f"{statistics.mean(lengths):.1f} ± {statistics.stdev(lengths):.1f}")
        kinds = [{kind for question, _ in pairs for kind in sentences(question)} for pairs in (real, generated)]
        cells += [len(kinds[0]), len(kinds[1]), ", ".join(sorted(kinds[0] ^ kinds[1])) or "none"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def sentences(question):
    """Yields its sentences with "_" in the place of the mathematics: "Let _ be _.", "Calculate _."."""
    for sentence in re.split(r"(?<=[.?]) ", question):
        words = [word if re.fullmatch("[A-Za-z]{2,}:?|=", word) else "_" for word in sentence[:-1].split()]
        yield re.sub("_( _)+", "_", " ".join(words)) + sentence[-1]


def main(argv=None):
    options, = parse_options(Options, argv=argv)
    with one_line_errors():
        if options.compare:
            print(comparison(options.compare))
            return
    for module, level in product(MODULES, LEVELS):
        print(f"\n{module}, {level}")
        for question, answer in generate(module, level, 4, options.seed):
            print(f"  {question}   {answer}")


if __name__ == "__main__":
    start(main)
