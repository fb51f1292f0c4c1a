"""The command line: one dataclass is the list of options. Fields give names, types and defaults, comments the help.

Default < preset < command line. Comma lists make sweeps: --seed=1,2,3 --n_ra=0,4 is six runs. So do tuples in a preset.
"""
import argparse
import difflib
import errno
import inspect
import itertools
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from toolbox.output import discard, prepare_streams, unfailing_output


def options(**defaults):
    """Class decorator: makes a dataclass in which inherited fields have these defaults.

        @options(n_layers=2, symbols="relative")
        class Config(TransformerConfig):
            further: int = 1                # the option's help
    """
    def decorate(cls):
        kinds = get_type_hints(cls)
        for name, value in defaults.items():
            cls.__annotations__[name] = kinds[name]
            setattr(cls, name, value)
        return dataclass(cls)
    return decorate


def at_least(config, **lowest):
    """Raises ValueError if a field of the dataclass is below its lowest value (None passes: it means the default)."""
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and not value >= low:                   # so that nan fails as well
            raise ValueError(f"{name}={value}: must be at least {low}")


def fail(message):
    """One line for the reader, exit status 2."""
    if int(os.environ.get("RANK", 0)):         # under torchrun process 0 says the same, and ends this one meanwhile
        time.sleep(2)
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_out_dir(folder):
    """Creates the folder of --out_dir, or ends the script with one line."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        fail(f"--out_dir={folder}: nothing can be written there ({error.strerror}): give a folder that you can "
             "write to, as --out_dir=out/again")


@contextmanager
def one_line_errors():
    """Around whatever depends on the user's input: its ValueError or OSError becomes one line and exit status 2."""
    try:
        yield
    except BrokenPipeError:                    # the reader of our output has gone: no fault of the input
        raise
    except (ValueError, OSError) as error:
        fail(error)


@contextmanager
def terminated_as_by_ctrl_c():
    """SIGTERM and SIGHUP (a closed terminal) raise KeyboardInterrupt, too, unless they are ignored, as by nohup."""
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]     # Windows has no SIGHUP
    changed = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def start(main):
    """Runs a script. Ctrl-C, SIGTERM and SIGHUP end it in one line, anywhere; a closed pipe (`| head`) quietly."""
    prepare_streams()
    try:
        try:
            with terminated_as_by_ctrl_c():
                main()
        finally:
            sys.stdout.flush()                 # here, where a closed pipe is handled, and not at exit
    except KeyboardInterrupt:
        with unfailing_output():
            print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        discard(sys.stdout)
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        discard(sys.stdout)
        fail(f"{error.filename or 'its output'} could not be written: {error.strerror}")


def parse_options(Config, presets=None, argv=None, grid=None):
    """Command line -> list of Config, one for each combination of the comma lists (--seed=1,2,3 --n_ra=0,4).

    Config is a dataclass; its fields are the options, their comments the help. Order: default < preset < command line.
    A line of its own such as `# data` in the class starts a group of options in the help.
    grid: {option: the values of a sweep, where neither preset nor command line names the option}.
    """
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[Config.__module__]), allow_abbrev=False,
                                     usage="%(prog)s [--option=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    if presets:
        parser.add_argument("--preset", choices=presets, default=argparse.SUPPRESS,
                            help="a named set of options; further options override it")
    kinds, comments, groups = get_type_hints(Config), *comments_and_groups(Config)
    names = sorted(dict.fromkeys(groups.values()), key=lambda name: name in ("training", "running"))   # these come last
    shown = {name: parser.add_argument_group(name) if name else parser for name in names}
    for f in fields(Config):
        kind = kinds[f.name]
        flag = dict(nargs="?", const="True") if kind is bool else {}                 # --compile means --compile=True
        choices = get_args(kind) if get_origin(kind) is Literal else ("True", "False") if kind is bool else ()
        shown[groups[f.name]].add_argument(
            "--" + f.name.rstrip("_"), dest=f.name, default=argparse.SUPPRESS, **flag, metavar="|".join(choices),
            help=f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%"))
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0].lstrip("-"), [name.rstrip("_") for name in kinds], 1)
        fail(f"unknown option {word}" + (f": did you mean --{near[0]}?" if near else ": see -h"))
    given = vars(given)
    preset = presets[given.pop("preset")] if "preset" in given else {}
    with one_line_errors():
        values = {**(grid or {}), **{name: one if type(one) is tuple else (one,) for name, one in preset.items()},
                  **{name: option_values(name, kinds[name], text) for name, text in given.items()}}
        return [Config(**dict(zip(values, one))) for one in itertools.product(*values.values())]


def agreed(configs, names):
    """The first of configs. Raises ValueError if they differ in one of `names`, which take one value only."""
    for name in names:
        if len({getattr(cfg, name) for cfg in configs}) > 1:
            raise ValueError(f"--{name}: give one value, not a list")
    return configs[0]


@cache
def comments_and_groups(Config):
    """{field: the comment behind it}, {field: the comment line above its group}, from the source of all its classes.

    A class that redefines a field overrides its comment; the field stays in its group. What a script adds before
    its first comment line belongs to the model's options.
    """
    comments, groups = {}, {}
    for cls in reversed(Config.__mro__[:-1]):
        group = "model" if "model" in groups.values() else ""
        for line in inspect.getsource(cls).splitlines():
            if heading := re.fullmatch(r"    # (.*)", line):
                group = heading[1]
            if found := re.match(r"    (\w+): [^#]*(?:#\s*(.*))?$", line):
                comments[found[1]] = found[2] or comments.get(found[1], "")
                groups.setdefault(found[1], group)
    return comments, groups


def with_home(path):
    """~ and ~/x in full; ~x, which is more likely a file than a user, as it is."""
    return os.path.expanduser(path) if re.match(r"~($|[/\\])", path) else path


def option_values(name, kind, text):
    """The values that `text` gives to a field of type `kind`: a list, longer than one where commas separate them."""
    if kind is str:                                                    # a path or name: may contain a comma
        # the shell leaves --out_dir=~/runs as it is, and the second of --runs=~/one,~/two
        return [text if name == "prompt" else ",".join(map(with_home, text.split(",")))]
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
