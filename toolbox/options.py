"""The command line: one dataclass is the list of options. Fields give names, types and defaults, comments the help.

Default < preset < command line. Comma lists make sweeps: --seed=1,2,3 --n_ra=0,4 is six runs.
"""
import argparse
import difflib
import inspect
import itertools
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints


def fail(message):
    """One line for the reader, exit status 2."""
    if int(os.environ.get("RANK", 0)):         # set by torchrun, which ends us meanwhile if process 0 says the same
        time.sleep(2)
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def one_line_errors():
    """Around whatever depends on the user's input: its ValueError or OSError becomes one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


def start(main):
    """Runs a script; Ctrl-C ends it in one line, wherever it is."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None


def parse_options(Config, presets=None, argv=None, grid=None):
    """Command line -> list of Config, one for each combination of the comma lists (--seed=1,2,3 --n_ra=0,4).

    Config is a dataclass; its fields are the options, their comments the help. Order: default < preset < command line.
    grid: {option: the values that make up the sweep where neither preset nor command line names it}.
    """
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[Config.__module__]), allow_abbrev=False,
                                     usage="%(prog)s [--option=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    if presets:
        parser.add_argument("--preset", choices=presets, default=argparse.SUPPRESS,
                            help="a named set of options; further options override it")
    kinds, comments = get_type_hints(Config), option_comments(Config)
    for f in fields(Config):
        kind = kinds[f.name]
        flag = dict(nargs="?", const="True") if kind is bool else {}                 # --compile means --compile=True
        choices = get_args(kind) if get_origin(kind) is Literal else ("True", "False") if kind is bool else ()
        parser.add_argument("--" + f.name.rstrip("_"), dest=f.name, default=argparse.SUPPRESS, **flag,
                            metavar="|".join(choices),
                            help=f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%"))
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0].lstrip("-"), [name.rstrip("_") for name in kinds], 1)
        fail(f"unknown option {word}" + (f": did you mean --{near[0]}?" if near else ": see -h"))
    given = vars(given)
    preset = presets[given.pop("preset")] if "preset" in given else {}
    with one_line_errors():
        values = {**(grid or {}), **{name: [value] for name, value in preset.items()},
                  **{name: option_values(name, kinds[name], text) for name, text in given.items()}}
        return [Config(**dict(zip(values, one))) for one in itertools.product(*values.values())]


def agreed(configs, names):
    """The first of configs. Raises ValueError if they differ in one of `names`, which take one value only."""
    for name in names:
        if len({getattr(cfg, name) for cfg in configs}) > 1:
            raise ValueError(f"--{name}: give one value, not a list")
    return configs[0]


def option_comments(Config):
    """{field: the comment behind it}, read from the source of the dataclass and its bases."""
    lines = [line for cls in reversed(Config.__mro__[:-1]) for line in inspect.getsource(cls).splitlines()]
    return dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", line)[0] for line in lines if re.match(r"    \w+:.*#", line))


def option_values(name, kind, text):
    """The values that `text` gives to a field of type `kind`: a list, longer than one where commas separate them."""
    if kind is str:                                                    # a path or name: may contain a comma
        return [text]
    kinds = get_args(kind) if get_origin(kind) is not Literal else (str,)          # int | None -> (int, NoneType)
    kinds = kinds or (kind,)

    def value(word):
        if type(None) in kinds and word == "None":
            return None
        if kinds[0] is bool:
            if word not in ("True", "False"):
                raise ValueError(f"--{name}={word}: give True or False")
            return word == "True"
        try:
            return kinds[0](word)
        except ValueError:
            expected = "an integer" if kinds[0] is int else "a number"
            raise ValueError(f"--{name}={word}: give {expected}, or several separated by commas") from None
    return [value(word) for word in text.split(",")]
