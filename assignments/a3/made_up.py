"""ANSWERS to a3, for its grader; students leave this file shut. Right functions, and made-up results.csv files."""
import csv
import math
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

# the columns of a results.csv that train_relgames.py writes, and the values of one of its rows
COLUMNS = """vocab_size d_model n_layers n_heads n_ra d_ff max_len activation norm norm_first final_norm bias norm_bias
    attention_bias dropout position n_kv_heads tie_embeddings symbols n_symbols symbol_heads trainable_symbols
    max_distance shared_symbols n_relations rel_proj_dim symmetric rel_activation ra_type share_qk memory_slots
    memory_width memory_heads bottleneck memory_beta memory_decay balance memory_queries mlp_norm max_steps
    learning_rate min_lr schedule warmup_steps weight_decay beta1 beta2 grad_clip log_every init_from seed compile
    pool task sprites train_size test_size data alternative batch_size epochs accuracy_pentos
    accuracy_hexos accuracy_stripes n_parameters steps seconds train_loss device dtype""".split()
ROW = dict(d_model=128, n_layers=2, n_heads=2, n_ra=2, d_ff=256, symbols="positional", symmetric=True, ra_type="ra",
           task="occurs", sprites="pentos", train_size=1000, test_size=5000, batch_size=512, epochs=50, seconds=17.5,
           learning_rate=0.001, train_loss=0.1, accuracy_hexos=0.5, accuracy_stripes=0.5, device="cpu")


# ---- made-up experiments ---------------------------------------------------------------------------------------------

@contextmanager
def results(*groups):
    """The path of a results.csv. A group: options, {seed: accuracy}, and perhaps the name of another column."""
    rows = [{**ROW, **options, "seed": seed, [*column, "accuracy_pentos"][0]: value}
            for options, values, *column in groups for seed, value in values.items()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.csv"
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, np.random.permutation(COLUMNS).tolist())
            writer.writeheader()
            writer.writerows(rows[i] for i in np.random.permutation(len(rows)))
        yield path


def seeds(n):
    return (1 + np.random.choice(90, n, replace=False)).tolist()


def experiment(differences, names=None):
    """(mine, theirs) of these differences: dicts {seed: accuracy}, each in an order of its own."""
    names = names or seeds(len(differences))
    theirs = {seed: round(0.5 + 0.2 * np.random.rand(), 4) for seed in names}
    mine = {seed: round(theirs[seed] + float(d), 6) for seed, d in zip(names, differences)}
    return mine, {seed: theirs[seed] for seed in reversed(names)}


def with_spread(mean, sd, n):
    """n numbers of exactly this mean and standard deviation."""
    x = np.random.randn(n)
    return mean + sd * (x - x.mean()) / x.std(ddof=1)


# ---- right versions of earlier functions -----------------------------------------------------------------------------

@lru_cache(None)
def cdf(t, df):
    """The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(df))
    odd, cos = df % 2, math.cos(theta)
    term, total = (cos if odd else 1.0), 0.0
    for k in range(2 + odd, df + 1, 2):
        total, term = total + term, term * cos ** 2 * (k - 1) / k
    return 0.5 + ((theta + math.sin(theta) * total) / math.pi if odd else math.sin(theta) * total / 2)


@lru_cache(None)
def quantile(p, df):
    low, high = -math.pi / 2, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(math.sqrt(df) * math.tan(middle), df) < p else (low, middle)
    return math.sqrt(df) * math.tan(low)


@lru_cache(None)
def exact_power(effect, sd, n, alpha, sides):
    d, shift, c = n - 1, effect * math.sqrt(n) / sd, quantile(1 - alpha / sides, n - 1)
    w = (np.arange(2000) + 0.5) / 250
    f = 2 * np.exp(d / 2 * math.log(d / 2) - math.lgamma(d / 2) + (d - 1) * np.log(w) - d * w**2 / 2) / 250
    return sum(a * (math.erfc((c * b - shift) / 2**0.5) + (sides == 2) * math.erfc((c * b + shift) / 2**0.5)) / 2
               for a, b in zip(f, w) if a > 1e-9)


@lru_cache(1)                                                         # each file has a folder of its own
def rows_of(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def refuse(wrong, message):
    if wrong:
        raise ValueError(message)


def statistics(values):
    """(n, mean, standard deviation) of two or more values."""
    refuse(len(values) < 2, f"{len(values)} values, two or more are needed")
    return len(values), float(np.mean(values)), float(np.std(values, ddof=1))


def earlier(variant, *names):
    """{name: right version} of these functions, or of all that later tasks call."""
    sides = 3 - variant

    def read_results(path, where, metric="accuracy_pentos"):
        rows = rows_of(path)
        refuse(not {*where, metric} <= set(rows[0]), f"where = {where}, metric = {metric}: no such column")
        rows = [row for row in rows if row[metric] and all(row[c] == str(value) for c, value in where.items())]
        found = {int(row["seed"]): float(row[metric]) for row in rows}
        refuse(not rows or len(found) < len(rows), f"where = {where}: no row, or two rows with the same seed")
        return found

    def paired_differences(mine, theirs):
        common, alone = sorted(set(mine) & set(theirs)), sorted(set(mine) ^ set(theirs))
        refuse(not common or (alone and variant == 2), f"seeds without a pair: {alone}")
        return np.array([mine[seed] - theirs[seed] for seed in common]), common if variant == 2 else alone

    def mean_interval(values, confidence=0.95):
        n, m, s = statistics(values)
        half = quantile(round(1 - (1 - confidence) / sides, 12), n - 1) * s / math.sqrt(n)
        return m, m - half, m + half if sides == 2 else math.inf

    def p_value(values):
        n, m, s = statistics(values)
        if s == 0:
            return float(m == 0 if sides == 2 else m <= 0)
        t = (abs(m) if sides == 2 else m) * math.sqrt(n) / s
        return sides * cdf(-t, n - 1)

    def power(effect, sd, n, alpha=0.05):
        if n > 1000:
            raise RuntimeError(f"power was called with n = {n}, but here 200 seeds suffice, or none do")
        return exact_power(effect, sd, n, alpha, sides)

    def adjusted(p_values):
        m, p = len(p_values), np.asarray(p_values, float)
        if variant == 1:
            return np.array([min(1, max((p >= q).sum() * q for q in p if q <= one)) for one in p])
        return np.array([min(1, min(m * q / (p <= q).sum() for q in p if q >= one)) for one in p])
    functions = dict(read_results=read_results, paired_differences=paired_differences, t_cdf=cdf, t_quantile=quantile,
                     mean_interval=mean_interval, p_value=p_value, power=power, adjusted=adjusted)
    return {name: functions[name] for name in names or functions}
