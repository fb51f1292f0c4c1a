"""Train longer: with --resume and more --max_steps, a run goes on from the checkpoint of a shorter one."""
import json
import shutil
from dataclasses import replace

from toolbox.checkpoints import load_checkpoint
from toolbox.files import write_atomically
from toolbox.training import learning_rate


def copy_shorter_run(run, same):
    """Copies the run that differs from `run` in max_steps only into its folder -> its config.json, or None.

    Of several, the one whose last checkpoint is furthest, but before run.max_steps. It stays where it is.
    same(record): whether a config.json describes `run` but for max_steps.
    """
    found = []
    for last in run.folder.parent.glob("*/last.pt"):
        record = read_record(last.parent)
        if record and last.parent.suffix != ".old" and same(record):
            step = load_checkpoint(last)["step"]
            found += [(step, last.parent, record)] if step < run.max_steps else []
    if not found:
        return None
    step, folder, record = max(found, key=lambda one: one[0])
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in ("log.csv", "best.pt", "last.pt"):                     # the last one last: it makes the copy complete
        if (folder / name).exists():
            write_atomically(run.folder / name, lambda path: shutil.copyfile(folder / name, path),
                             needed=(folder / name).stat().st_size)
    then = replace(run.cfg, max_steps=record["options"]["max_steps"])
    print(f"{run.folder}: going on from {folder.name}, which stays as it is")
    if any(learning_rate(i, then) != learning_rate(i, run.cfg) for i in range(1, step + 1)):
        record["continued"] = {"from": folder.name, "step": step, "max_steps": then.max_steps}
        print(f"the schedule now ends at step {run.max_steps}, not {then.max_steps}: the learning rate was "
              f"{learning_rate(step, then):.3g} at step {step} and is {learning_rate(step + 1, run.cfg):.3g} at step "
              f"{step + 1}. A run of {run.max_steps} steps from the start has another schedule; this one is reused "
              f"with --resume only")
    else:
        print("the schedule of its steps is that of the longer run, too: nothing changes")
    return record


def read_record(folder):
    """The folder's config.json; None if there is none or it is damaged."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
