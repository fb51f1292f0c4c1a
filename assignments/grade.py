"""Grades an assignment: points for each task, and for what is missing the line that says why.

    python -m assignments.grade a1                             # assignments/a1/answers.py
    python -m assignments.grade a1 --answers=submissions       # a folder: one line for each file in it
    python -m assignments.grade a1 --variant=2 --seed=7        # another year: docs/teaching.md
"""
import argparse
import textwrap
from pathlib import Path

from assignments.grading import HERE, grade, grader
from toolbox.options import fail, start

ASSIGNMENTS = sorted(path.name for path in HERE.iterdir() if (path / f"test_{path.name}.py").exists())


def parse(argv):
    """-> the options, and the files to grade."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, prog="python -m assignments.grade",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("assignment", choices=ASSIGNMENTS)
    parser.add_argument("--answers", help="a file, or a folder of files [the assignment's own answers.py]")
    parser.add_argument("--variant", type=int, default=1, help="of the tasks, for another year [1]")
    parser.add_argument("--seed", type=int, default=0, help="of the grader's random inputs [0]")
    args = parser.parse_args(argv)
    path = Path(args.answers or HERE / args.assignment / "answers.py")
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        fail(f"{path}: no such file, or a folder without one that ends in .py; give --answers=FILE or FOLDER")
    variants = grader(args.assignment).VARIANTS
    if args.variant not in variants:
        fail(f"--variant={args.variant}: {args.assignment} has {', '.join(map(str, variants))}")
    return args, files


def describe(results, path):
    """The table of one student, with what is wrong under each task; above all tasks, if it is the same for all."""
    alike = results[0][3] if all(result[3] == results[0][3] for result in results) else []
    lines = [str(path), *indented(alike)]
    for name, points, earned, messages in results:
        lines += [f"  {name:<52} {earned:>3} / {points}", *indented([] if alike else messages)]
    points, earned = (sum(result[i] for result in results) for i in (1, 2))
    return "\n".join([*lines, f"  {'total':<52} {earned:>3} / {points}"])


def indented(messages):
    return [line for message in messages
            for line in textwrap.wrap(message, 110, initial_indent="      ", subsequent_indent="      ")]


def main(argv=None):
    args, files = parse(argv)
    for path in files:
        results = grade(args.assignment, path, args.variant, args.seed)
        if len(files) == 1:
            print(describe(results, path))
        else:
            earned = [result[2] for result in results]
            print(f"{path.name:<30} {sum(earned):>4} = {' + '.join(map(str, earned))}", flush=True)


if __name__ == "__main__":
    start(main)
