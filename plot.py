"""Draws any runs again, from their logs or from recorded CSV files alone: figures, and a table of what came out.

    python plot.py --runs=out/lm                                       all runs in a folder
    python plot.py --runs=out/lm/sa4_ra4_seed1,out/lm/sa8_ra0_seed1    these runs
    python plot.py --runs=out/relgames --paper                         with the published curves, dashed
    python plot.py --runs=results/mathematics/curves.csv --paper --out_dir=out/mathematics        a recorded file
"""
from dataclasses import dataclass
from pathlib import Path

from toolbox import figures
from toolbox.figures.runs import run_folders
from toolbox.options import fail, one_line_errors, parse_options, start


@dataclass
class Options:
    runs: str = ""                          # a folder of runs, single runs, or CSV files; several separated by commas
    paper: bool = False                     # draw the published curves behind ours
    out_dir: str = ""                       # where figures and table go; default: beside the (first) run or file


def main(argv=None):
    options, = parse_options(Options, argv=argv)
    if not options.runs:
        fail("give --runs=FOLDER (a folder of runs, such as out/lm) or --runs=FILE.csv")
    paths = [Path(part) for part in options.runs.split(",")]
    with one_line_errors():
        if any(path.suffix == ".csv" for path in paths):
            figures.redraw(paths, options.out_dir or paths[0].parent, options.paper)
            return
        folders = [folder for path in paths for folder in folders_of(path)]
        figures.report(folders, options.out_dir or folders[0].parent, options.paper)


def folders_of(path):
    """The run in this folder, or the runs in folders below it."""
    folders = [path] if (path / "config.json").exists() else run_folders(path)
    if not folders:
        raise ValueError(f"no runs in {path}: train one first, or give --runs=FOLDER or --runs=FILE.csv")
    return folders


if __name__ == "__main__":
    start(main)
