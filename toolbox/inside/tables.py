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


def losses_table(rows, unit, over, digits=3):
    """rows: layer, what, how, intact (N,), rise (N,). A line for each layer; the mean and its standard error."""
    columns = list(dict.fromkeys((row["what"], row["how"]) for row in rows))
    if not rows:
        return "nothing was taken out (--knock_out=none)"
    words = {"relations": "relations", "symbols": "symbols", "heads": "sensory heads"}
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        cells = {(row["what"], row["how"]): rise_text(row["rise"], digits) for row in rows if row["layer"] == layer}
        lines.append([layer, *(cells.get(column, "") for column in columns)])
    names = [f"without {words.get(what, what)}" + (", those of another one" if how == "resample" else "")
             for what, how in columns]
    return (f"loss {rows[0]['intact'].mean():.{digits}f} {unit}; it rises by (± standard error over {over}):\n\n"
            + table(["", *names], lines))


def rise_text(values, digits=3):
    """values (N,) -> '+0.123 ± 0.004': their mean and its standard error."""
    error = f" ± {values.std() / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():+.{digits}f}{error}"
