"""Tables of look.py, in Markdown."""
import numpy as np

from toolbox.stats import mean_text


def table(columns, rows):
    """rows: lists of texts or numbers, one for each column."""
    lines = [f"| {' | '.join(map(str, columns))} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def each(values, digits=2):
    """The values of up to five seeds side by side, of more their mean and its interval."""
    if len(values) > 5:
        return mean_text(values, digits)
    return " ".join(f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"
                    for value in np.asarray(values, float))


def say_if_fewer(o, n, what):
    """Says on the screen, before long work begins, that there is less data than --n."""
    if o.n and o.n > n:
        print(f"--n={o.n}: there are only {n:,} {what}; all are taken", flush=True)
