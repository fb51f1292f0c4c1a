"""The ablation of Relational Games: a panel for each factor, drawn from ablation.csv alone.

ablation.csv has a row for each model and seed: the factor and the variant of it that the model has, its task and its
accuracies. A model that belongs to several factors has a row in each. The first variant of a factor is its reference.
"""
import math

from toolbox.files import write_csv, write_text
from toolbox.figures import drawing
from toolbox.figures.runs import final, read_csv
from toolbox.stats import mean_text, paired_difference

COLUMNS = ("factor", "variant", "task", "train_size", "seed", "accuracy", "hexos", "stripes", "n_parameters", "steps",
           "seconds", "train_loss", "dtype", "code")
NEEDED = set(COLUMNS)


def row(factor, variant, run):
    """A row of ablation.csv from a run, as load_run returns it."""
    o, log = run["options"], run["log"]
    return dict(factor=factor, variant=variant, task=o["task"], train_size=o["train_size"], seed=o["seed"],
                accuracy=run["scores"][o["sprites"]], hexos=run["scores"].get("hexos"),
                stripes=run["scores"].get("stripes"), n_parameters=run["n_parameters"], steps=int(log["step"][-1]),
                seconds=round(log["seconds"][-1], 2), train_loss=final(run, "train_loss"),
                dtype=run["facts"]["dtype"], code=run["code"])


def cells(rows):
    """{factor: {variant: {(task, images): {seed: its row}}}}, in the order of the file."""
    found = {}
    for one in rows:
        by_task = found.setdefault(one["factor"], {}).setdefault(one["variant"], {})
        by_task.setdefault((one["task"], int(one["train_size"])), {})[int(one["seed"])] = one
    return found


def accuracies(by_seed):
    return {seed: float(one["accuracy"]) for seed, one in by_seed.items()}


def draw(found):
    """A panel for each factor, a row in it for each variant -> Figure. Bars are 95% intervals, dots single seeds."""
    keys = list(dict.fromkeys(key for variants in found.values() for tasks in variants.values() for key in tasks))
    columns = 2
    rows = math.ceil(len(found) / columns)
    fig, axes = drawing.panels(rows, columns, 9, 0.6 + 0.32 * max(map(len, found.values())), sharex=True)
    for ax in axes.flat[len(found):]:
        ax.remove()
    for ax, (factor, variants) in zip(axes.flat, found.items()):
        ax.axvline(0.5, color="black", lw=0.5)                        # guessing
        for y, tasks in enumerate(variants.values()):
            for i, key in enumerate(keys):
                if key in tasks:
                    drawing.draw_interval(ax, y + 0.3 * (i - (len(keys) - 1) / 2), [*accuracies(tasks[key]).values()],
                                          drawing.COLORS[i], f"{key[0].replace('_', ' ')}, {key[1]:,} images")
        ax.set(title=factor, ylim=(len(variants) - 0.5, -0.5))
        ax.set_yticks(range(len(variants)), list(variants))
        ax.grid(axis="y", alpha=0)
    for ax in axes[-1]:
        ax.set_xlabel("test accuracy")
        ax.set_xlim(right=1.01)                                       # intervals may reach beyond
    drawing.legend_below(fig)
    return fig


def table(found):
    """Markdown: accuracy of each variant, its spread, and its difference to the factor's first, paired by seed."""
    lines = ["| factor | variant | task | images | accuracy | seeds | parameters | minus the first variant |",
             "|---" * 8 + "|"]
    for factor, variants in found.items():
        reference = next(iter(variants.values()))
        for variant, tasks in variants.items():
            for key, by_seed in tasks.items():
                runs, mine = list(by_seed.values()), accuracies(by_seed)
                difference = "" if tasks is reference else describe(mine, accuracies(reference.get(key, {})))
                lines.append(f"| {factor} | {variant} | {key[0]} | {key[1]} | {mean_text(list(mine.values()), 3)} | "
                             f"{len(mine)} | {int(runs[0]['n_parameters']):,} | {difference} |")
    return "\n".join(lines)


def describe(mine, theirs):
    one = paired_difference(mine, theirs)
    if one is None:
        return ""
    if one.low is None:
        return f"{one.mean:+.3f} ({one.n} seed{'s' * (one.n > 1)})"
    return f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" + ": no difference" * one.within_noise


def report(rows, out_dir):
    """Writes ablation.csv, and what is drawn from it -> the text of the table, and the files."""
    write_csv(out_dir / "ablation.csv", COLUMNS, rows)
    text, files = redraw(read_csv(out_dir / "ablation.csv"), out_dir)
    return text, [*files, out_dir / "ablation.csv"]


def redraw(rows, out_dir, paper=False):
    """Draws ablation.png and writes ablation.md -> the text of the table, and the files."""
    if not rows:
        return "no finished run yet", []
    found = cells(rows)
    drawing.save(draw(found), out_dir / "ablation.png")
    text = table(found)
    write_text(out_dir / "ablation.md", text + "\n")
    return f"{text}\n\n±, [ ]: 95% Student-t intervals over seeds", [out_dir / "ablation.png", out_dir / "ablation.md"]
