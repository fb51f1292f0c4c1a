"""Examples of every module and level, or generated questions beside published files: see data/mathematics/__init__.py."""
from dataclasses import dataclass
from itertools import product

from data.mathematics import LEVELS, MODULES, comparison, generate
from toolbox.options import one_line_errors, parse_options, start


@dataclass
class Options:
    compare: str = ""                       # a folder of published files: a table of them beside generated problems
    seed: int = 1                           # of the examples


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
