"""By how much a loss rises without relations, symbols or heads: the same for language, mathematics and images."""
from toolbox.inside import without
from toolbox.inside.tables import table


def ways(run, o, what):
    """How --knock_out takes this part out. Nothing is taken from another sequence that is the same in all of them."""
    varies = what == "relations" or what == "symbols" and run.options["symbols"] == "symbolic"
    return [how for how in ("zero", "resample") if o.knock_out in (how, "both") and (varies or how == "zero")]


def knocked_out(run, o, groups, losses):
    """Rows: by how much losses(), a tensor (N,), rise without the relations, symbols or heads of each group of Layers.

    groups: {name: Layers}. Nothing can be resampled if N is 1.
    """
    intact, rows = losses(), []
    for name, layers in groups.items():
        for what in ("relations", "symbols", "sensory heads", "cross heads"):
            parts = [layer for layer in layers if has(layer, what)]
            for how in ways(run, o, what) if parts else ():
                if how == "zero" or len(intact) > 1:
                    with without(parts, what.split()[-1], how=how, seed=o.seed):
                        rows.append({"layer": name, "what": what, "how": how, "intact": intact,
                                     "rise": losses() - intact})
    return rows


def has(layer, what):
    if what == "relations":
        return layer.n_relations > 0
    return layer.group == ("relational" if what == "symbols" else what.split()[0])


def by_layer(layers):
    """{"all layers": Layers, "layer 1": ...}"""
    numbers = sorted({layer.number for layer in layers})
    return {"all layers": layers, **{f"layer {n}": [layer for layer in layers if layer.number == n] for n in numbers}}


def losses_table(rows, unit, over, digits=3):
    """rows of knocked_out. A line for each layer; the mean and its standard error."""
    if not rows:
        return "nothing was taken out (--knock_out=none)"
    columns = list(dict.fromkeys((row["what"], row["how"]) for row in rows))
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        cells = {(row["what"], row["how"]): rise_text(row["rise"], digits) for row in rows if row["layer"] == layer}
        lines.append([layer, *(cells.get(column, "") for column in columns)])
    names = [f"without {what}" + (", those of another one" if how == "resample" else "") for what, how in columns]
    return (f"loss {rows[0]['intact'].mean():.{digits}f} {unit}; it rises by (± standard error over {over}):\n\n"
            + table(["", *names], lines))


def rise_text(values, digits=3):
    """values (N,) -> '+0.123 ± 0.004': their mean and its standard error."""
    error = f" ± {values.std() / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():+.{digits}f}{error}"
