"""The original files of Relational Games.

The public ones, "mini", are samples of two tasks with 5,000 images each. The full ones, for example with 250,000 images
of pentos, require a log-in.
"""
import hashlib
from pathlib import Path

import numpy as np

from data import npz
from data.download import download
from data.relational_games.rules import COLUMN_TASKS, check_names

# file names without _<sprites>.npz
FILES = {"same": "same", "occurs": "occurs", "xoccurs": "xoccurs", "between": "1task_between",
         "match_pattern": "1task_match_patt", **{task: "3task_col_patts" for task in COLUMN_TASKS}}
MINI = {"between": "mini_between", **{task: "mini_3task_col_patts" for task in COLUMN_TASKS}}
MINI_URL = "https://raw.githubusercontent.com/google-deepmind/deepmind-research/master/PrediNet/"
# SHA-1 of git, as GitHub shows it
GIT_BLOB = {"mini_between_pentos.npz": "8fa56f989088aa2d0d2b846955df5088c79e35c0",
            "mini_between_hexos.npz": "04d949ae7a50ec5c9a38da0ec4dfe11dd9baff0c",
            "mini_between_stripes.npz": "81d741d61ee1ff2aeb4e848d871979e30086cddc",
            "mini_3task_col_patts_pentos.npz": "4454e863bb7bc843a48836e7edaa0331d6b25f8f",
            "mini_3task_col_patts_hexos.npz": "a4ee505429dc7f2a5ff725a79640dce953a9be8b",
            "mini_3task_col_patts_stripes.npz": "f73195dab121a3167eecf493accac64c2c81a07b"}


def find_file(data, task, sprites, data_dir="data/cache"):
    """The path of a task's file. data: the folder with the files, or "mini": the public sample, which is downloaded.

    Raises ValueError if there is no such file, DownloadError if it cannot be downloaded.
    """
    check_names(task=task, sprites=sprites)
    if data == "mini":
        if task not in MINI:
            raise ValueError(f"task={task}: there are public samples of {', '.join(MINI)} only; use the full files "
                             f"with --data=FOLDER, or generated images with --data=generated")
        name = f"{MINI[task]}_{sprites}.npz"
        return download(MINI_URL + name, Path(data_dir) / name, check=lambda path: check_git_blob(path, GIT_BLOB[name]))
    names = [f"{stem}_{sprites}.npz" for stem in (FILES[task], MINI.get(task)) if stem]
    for name in names:
        if (Path(data) / name).is_file():
            return Path(data) / name
    raise ValueError(f"no {' or '.join(names)} in {data}: give the folder of the original files, generated, or mini")


def check_git_blob(path, blob):
    """Raises ValueError if the file at `path` does not have the git hash `blob`."""
    content = Path(path).read_bytes()
    found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if found != blob:
        raise ValueError(f"its git hash is {found}, not {blob}")


def load_npz(path, task=None):
    """An original file -> images uint8 (n, 36, 36, 3), labels int64 (n,).

    Files of column patterns contain three tasks: `task`, one of COLUMN_TASKS, selects its images.
    Raises ValueError, one line, if the file is missing, damaged or of another kind.
    """
    images, labels, tasks, task_ids = npz.read(path, "images", "labels", "tasks", "task_ids").values()
    ids = task_ids if tasks is None else tasks                         # both names occur
    for name, array in (("images", images), ("labels", labels)):
        if array is None:
            raise ValueError(f"{path} is not a file of Relational Games: it has no array {name}")
    shapes = [array.shape for array in (images, labels, ids) if array is not None]
    if images.shape[1:] != (36, 36, 3) or not len(images) == labels.size == (labels if ids is None else ids).size:
        raise ValueError(f"{path}: images, labels (and tasks) of shapes {shapes}, not (n, 36, 36, 3) and (n, 1)")
    if labels.max() > 1:
        raise ValueError(f"{path}: labels up to {labels.max()}, expected 0 and 1")
    labels = labels.ravel().astype(np.int64)
    if ids is None or len(np.unique(ids)) == 1:
        return images, labels
    if task not in COLUMN_TASKS:
        raise ValueError(f"{path} contains several tasks: choose one of {', '.join(COLUMN_TASKS)}")
    chosen = ids.ravel() == COLUMN_TASKS.index(task)
    return images[chosen], labels[chosen]
