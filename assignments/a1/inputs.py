"""The grader's random inputs. Sizes as in README.md."""
import torch

SMALLEST = dict(B=1, n=2, d=2, H=1, R=1, p=4, d_h=4)
SMALL = dict(B=2, n=5, d=6, H=4, R=3, p=7, d_h=8, dtype=torch.float32)    # all differ, or two axes may be confused
LONG = dict(B=1, d=8, H=2, R=3, p=4, d_h=4)


def make(B, n, d, H, R, p, d_h, dtype=torch.float64):
    """-> x, s, the weights, and `tokens` without padding."""
    shapes = dict(W_q=(H, d, d_h), W_k=(H, d, d_h), W_q_rel=(R, d, p), W_k_rel=(R, d, p), W_r=(H, R, d_h),
                  W_s=(H, d, d_h), W_o=(H * d_h, d))
    x, s = (torch.randn(B, n, d, dtype=dtype) for _ in range(2))
    w = {name: torch.randn(shape, dtype=dtype) / d ** 0.5 for name, shape in shapes.items()}
    return x, s, w, no_padding(B, n)


def text(sizes):
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def no_padding(B, n):
    return torch.ones(B, n, dtype=torch.bool)


def some_padding(B, n):
    """Random, but the first sequence has padding at both ends, and the last of several is all padding."""
    tokens = torch.rand(B, n) < 0.6
    tokens[:, n // 2], tokens[0, [0, -1]] = True, False
    if B > 1:
        tokens[-1] = False
    return tokens


def make_messages(B, n, d, H, R, p, d_h, dtype=torch.float64):
    """Inputs of `messages`, in the order of its arguments."""
    _, s, w, _ = make(B, n, d, H, R, p, d_h, dtype)
    alpha, r = torch.rand(B, H, n, n, dtype=dtype), torch.randn(B, n, n, R, dtype=dtype)
    return dict(alpha=alpha, r=r, s=s, W_r=w["W_r"], W_s=w["W_s"])
