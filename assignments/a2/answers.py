"""Your answers to assignment a2. README.md beside this file has the definitions; check with
`python -m assignments.grade a2`. Only math and torch may be imported."""
import torch


# 1. Positional symbols

def positional_symbols(library, mask):
    """library (max_len, d), mask (B, n) boolean, True = a token -> symbols (B, n, d), zeros at padding.

    Raises ValueError if a sequence has more than max_len tokens.
    """
    raise NotImplementedError


# 2. Position-relative symbols

def relative_symbols(library, T, n):
    """library (2D + 1, d), row D + o for the offset o -> (T, n, d), s_{j-i} for the last T of n tokens as receivers."""
    raise NotImplementedError


# 3. Their sum in little memory

def relative_sum(alpha, library):
    """sum_j alpha_ij s_{j-i}: alpha (H, T, n), library (2D + 1, d) -> (H, T, d), without a tensor (T, n, d)."""
    raise NotImplementedError


# 4. Symbolic attention

def symbol_weights(x, W_q, templates, n_heads):
    """x (B, n, d), W_q (d, d), templates (N, d) -> p (B, n, n_heads, N)."""
    raise NotImplementedError


def symbolic_symbols(p, library):
    """p (B, n, n_heads, N), library (N, d) -> symbols (B, n, d)."""
    raise NotImplementedError


# 5. Measures

def effective_number(p):
    """exp of the entropy of p (..., N) -> (...)."""
    raise NotImplementedError


def spread(symbols):
    """symbols (n, d) -> sqrt(mean squared distance of two symbols / (2 mean squared length)), a tensor ()."""
    raise NotImplementedError


def measure(weights, d, n_heads, n_symbols, n_tokens, std_x, std_w, seed):
    """-> (effective number, spread), floats, of a function `weights` like symbol_weights on random inputs."""
    raise NotImplementedError


# 6. Why nearly the same symbol?

def predicted(d, n_heads, n_symbols, std_x, std_w):
    """-> (effective number, spread), floats: what `measure` finds for symbol_weights, by a formula."""
    raise NotImplementedError


# 7. A cure

def cured_weights(x, W_q, templates, n_heads):
    """As symbol_weights, but the symbols of different tokens differ before any training."""
    raise NotImplementedError


if __name__ == "__main__":
    shape = dict(d=64, n_heads=4, n_symbols=64, n_tokens=100)
    print("| std_x | std_w | effective number: predicted | measured | cured | spread: predicted | measured | cured |")
    print("|---|---|---|---|---|---|---|---|")
    for std_x, std_w in ((0.02, 0.02), (0.2, 0.02), (1.0, 0.02), (1.0, 0.125)):
        guess = predicted(shape["d"], shape["n_heads"], shape["n_symbols"], std_x, std_w)
        before, after = (measure(f, **shape, std_x=std_x, std_w=std_w, seed=0) for f in (symbol_weights, cured_weights))
        numbers = " | ".join(f"{number:.4f}" for i in (0, 1) for number in (guess[i], before[i], after[i]))
        print(f"| {std_x} | {std_w} | {numbers} |")

# The table, and three sentences: why were all symbols nearly equal? why does the cure work? what may it cost?
