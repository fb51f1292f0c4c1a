"""Teacher's file: students are asked not to open it. The reference solution of a3, with its two variants."""
import csv
import math
from pathlib import Path

import numpy as np

VARIANT = 1


def read_results(path, where, metric="accuracy_pentos"):
    reader = csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines())
    columns = reader.fieldnames or []
    for name in (*where, metric):
        if name not in columns:
            raise ValueError(f"{path} has no column {name}")
    found = {}
    for row in reader:
        if row[metric] == "" or any(row[name] != str(value) for name, value in where.items()):
            continue
        seed = int(row["seed"])
        if seed in found:
            raise ValueError(f"two runs have seed {seed}: {where} selects more than one model, task or size")
        found[seed] = float(row[metric])
    if not found:
        raise ValueError(f"no run with {where} and {metric}")
    return found


def paired_differences(mine, theirs):
    both = sorted(mine.keys() & theirs.keys())
    dropped = sorted(mine.keys() ^ theirs.keys())
    if not both or (VARIANT == 2 and dropped):
        raise ValueError(f"unpaired seeds: {dropped}")
    differences = np.array([mine[seed] - theirs[seed] for seed in both])
    return differences, both if VARIANT == 2 else dropped


def t_cdf(t, df):
    angle = math.atan(t / math.sqrt(df))
    phi = np.linspace(0, angle, 2001)
    f = np.cos(phi) ** (df - 1)
    integral = angle / 2000 / 3 * (f[0] + 4 * f[1::2].sum() + 2 * f[2:-1:2].sum() + f[-1])      # Simpson's rule
    return 0.5 + integral * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)


def t_quantile(p, df):
    low, high = -math.pi / 2, math.pi / 2                             # angles: the quantile itself has no bounds
    for _ in range(60):
        middle = (low + high) / 2
        if t_cdf(math.sqrt(df) * math.tan(middle), df) < p:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan((low + high) / 2)


def mean_interval(values, confidence=0.95):
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values: an interval needs two or more")
    mean = np.mean(values)
    tail = (1 - confidence) / (1 if VARIANT == 2 else 2)
    half = t_quantile(1 - tail, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return mean, mean - half, math.inf if VARIANT == 2 else mean + half


def p_value(values):
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values: a test needs two or more")
    mean, s = np.mean(values), np.std(values, ddof=1)
    if s == 0:
        return float(mean <= 0) if VARIANT == 2 else float(mean == 0)
    t = mean / (s / math.sqrt(n))
    return 1 - t_cdf(t, n - 1) if VARIANT == 2 else 2 * (1 - t_cdf(abs(t), n - 1))


def verdict(differences, confidence):
    _, low, high = mean_interval(differences, confidence)
    return "better" if low > 0 else "worse" if high < 0 else "no difference"


def influential_seeds(mine, theirs, confidence=0.95):
    differences, _ = paired_differences(mine, theirs)
    seeds = sorted(mine.keys() & theirs.keys())
    if len(seeds) < 3:
        raise ValueError("needs three pairs or more")
    whole = verdict(differences, confidence)
    return [seed for k, seed in enumerate(seeds) if verdict(np.delete(differences, k), confidence) != whole]


def normal_cdf(x):
    return 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in x]))


def power(effect, sd, n, alpha=0.05):
    df = n - 1
    shift = effect / sd * math.sqrt(n)
    critical = t_quantile(1 - alpha / (1 if VARIANT == 2 else 2), df)
    w = (np.arange(8000) + 0.5) / 1000                                # midpoints of the cells of 0 ... 8
    log_density = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2) + (df - 1) * np.log(w) - df * w**2 / 2
    upper, lower = normal_cdf(shift - critical * w), normal_cdf(-shift - critical * w)
    return float(np.sum(np.exp(log_density) * (upper if VARIANT == 2 else upper + lower)) / 1000)


def seeds_needed(effect, sd, target=0.8, alpha=0.05):
    if effect == 0 or (VARIANT == 2 and effect < 0):
        raise ValueError("no number of seeds finds an effect of 0")
    n = 2
    while power(effect, sd, n, alpha) < target:
        n += 1
    return n


def adjusted(p_values):
    p = np.asarray(p_values, dtype=float)
    m, order = len(p), np.argsort(p)
    result = np.empty(m)
    if VARIANT == 2:                                                  # Benjamini-Hochberg
        scaled = p[order] * m / np.arange(1, m + 1)
        result[order] = np.minimum(1, np.minimum.accumulate(scaled[::-1])[::-1])
        return result
    scaled = p[order] * np.arange(m, 0, -1)
    result[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return result


def analyse(path, questions, metric="accuracy_pentos", alpha=0.05):
    table, p_values = {}, {}
    for name, (mine, theirs) in questions.items():
        runs = read_results(path, mine, metric), read_results(path, theirs, metric)
        if VARIANT == 2 and runs[0].keys() != runs[1].keys():
            table[name] = {"n": 0, "verdict": "unpaired"}
            continue
        differences, dropped = paired_differences(*runs)
        mean, low, high = mean_interval(differences, 1 - alpha)
        p_values[name] = p_value(differences)
        table[name] = {"n": len(differences), "dropped": dropped, "mean": mean, "low": low, "high": high,
                       "p": p_values[name]}
    for name, p in zip(p_values, adjusted(list(p_values.values()))):
        row = table[name]
        row["adjusted"] = p
        row["verdict"] = "no difference" if p > alpha else "better" if row["mean"] > 0 else "worse"
    return table
