"""Theorem 1 built by hand: no weight is trained. docs/theorem1.md explains it.

    python -m extras.theorem1                                  the figure and its numbers: half a minute

A preorder for each query x says which of two objects is preferred. A continuous one has a continuous utility: y' is
preferred to y exactly if u(x, y') > u(x, y) (Debreu, 1954). If the best of y_1 ... y_n leads by a gap > eta, a
relational head with W_r = I and W_s = 0, behind a multi-layer perceptron phi, comes as close as we like to
R(x, best y), R any continuous relation: softmax(beta u) selects, and r_ij is the relation.

Here x and y are numbers in [-1, 1], and phi has w ReLUs: phi_k is the hat function of knot g_k, so sum_k f(g_k) phi_k
interpolates f linearly between knots. The weights of the head are tables of u and R (R without beta):

    <W_q phi(x), W_k phi(y)> / sqrt(d_h)  =  beta sum_kl phi_k(x) u(g_k, g_l) phi_l(y)  ~  beta u(x, y)
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from relational_attention import RelationalAttention
from toolbox.figures.drawing import COLORS, house_style, panels, save
from toolbox.options import make_out_dir, one_line_errors, parse_options, start

N, GAP, SAMPLES = 8, 0.05, 1000             # objects, eta, and inputs of which the worst counts
BETAS, WIDTHS = range(0, 401, 25), (5, 9, 17, 33, 65, 129, 257, 513)


@dataclass
class Options:
    out_dir: str = "docs"                   # where theorem1.png goes


def utility(x, y):
    """x and y are angles in half turns; x prefers what is nearest to the point 60 degrees ahead of it."""
    return torch.cos(math.pi * (y - x - 1 / 3))


RELATIONS = (lambda x, y: torch.sin(math.pi * (y - x)), lambda x, y: torch.exp(x * y))         # R, with d_r = 2
CURVATURE = math.pi ** 2                    # no second derivative in x or in y of these three functions is larger
RANGE = math.e - 1 / math.e                 # no two values of a relation, or of its interpolant, are further apart


class Construction(nn.Module):
    """phi and the relational head: x (B,), y (B, n) -> (B, d_r), in float64."""

    def __init__(self, width, beta, utility=utility, relations=RELATIONS):
        super().__init__()
        self.d_r, w, h = len(relations), width, 2 / (width - 1)
        self.phi = nn.Sequential(nn.Linear(1, w), nn.ReLU(), nn.Linear(w, w, bias=False)).double()
        self.head = head = RelationalAttention(w, n_heads=1, n_relations=self.d_r, rel_proj_dim=w).double()
        g, I = torch.linspace(-1, 1, w, dtype=torch.float64), torch.eye(w, dtype=torch.float64)      # knots g_k
        for parameter, value in {
                # phi_k(t) = ( relu(t - g_{k-1}) - 2 relu(t - g_k) + relu(t - g_{k+1}) ) / h
                self.phi[0].weight: torch.ones(w, 1), self.phi[0].bias: h - g,
                self.phi[2].weight: (I - 2 * I.roll(1, 1).triu() + I.roll(2, 1).triu()) / h,
                head.W_q.weight: beta * w ** 0.5 * I, head.W_k.weight: utility(g[:, None], g),   # scores: / sqrt(w)
                head.W_q_rel.weight: w ** 0.5 * I.repeat(self.d_r, 1),                           # relations, too
                head.W_k_rel.weight: torch.cat([relation(g[:, None], g) for relation in relations]),
                # paper: d_out = d_r; here: w, 0 beyond d_r, because a head's output is as wide as its keys
                head.W_r: I[None, :self.d_r], head.W_s.weight: 0 * I, head.W_o.weight: I}.items():
            parameter.data.copy_(value)

    def forward(self, x, y):
        features = self.phi(torch.cat([x[:, None], y], 1)[..., None])  # (B, 1 + n, w)
        mask = torch.arange(1 + y.size(1)) > 0                         # token 0 is the query, and no object
        return self.head(features, symbols=features, mask=mask[None, None, None])[:, 0, :self.d_r]     # W_s = 0


def sample(gap, n_samples=SAMPLES, seed=0):
    """x (n_samples,), y (n_samples, N), uniform where the best object leads by more than gap; and how often it does."""
    z = 2 * torch.rand(20 * n_samples, 1 + N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1
    lead = -utility(z[:, :1], z[:, 1:]).topk(2).values.diff()[:, 0]    # of the best object over the second, (20 n,)
    z = z[lead > gap]
    return z[:n_samples, 0], z[:n_samples, 1:], len(z) / (20 * n_samples)


@torch.no_grad()
def worst_error(model, x, y, utility=utility, relations=RELATIONS):
    """The largest |RA(x, y) - R(x, Select(x, y))| of all inputs and relations."""
    selected = y.gather(1, utility(x[:, None], y).argmax(1, keepdim=True))[:, 0]
    return (model(x, y) - torch.stack([relation(x, selected) for relation in relations], 1)).abs().max().item()


def bound(width, beta, n=N, gap=GAP):
    """(1 - eps_1) eps_2 + eps_1 max |r - R|, as in the paper's proof; for width >= 5, where eps_2 < max |r - R|."""
    eps_2 = 2 * CURVATURE * (2 / (width - 1)) ** 2 / 8                 # of interpolation, in x and y; for u and R
    eps_1 = 1 / (1 + math.exp(beta * (gap - 2 * eps_2)) / (n - 1))     # weight on the others; u is off by eps_2 twice
    return (1 - eps_1) * eps_2 + eps_1 * RANGE


def main(argv=None):
    o, = parse_options(Options, argv=argv)
    (x, y, share), anything = sample(GAP), sample(0)[:2]
    print(f"the worst of {SAMPLES} inputs with {N} objects and a gap > {GAP} ({share:.0%} of uniform inputs have it)")
    with one_line_errors(), house_style():
        make_out_dir(o.out_dir)
        fig, ((left, right),) = panels(1, 2, 9, 3.8, sharey=True)
        left.plot(BETAS, [worst_error(Construction(257, b), *anything) for b in BETAS], ":k", label="w = 257, any gap")
        for ax, what, values, lines, scale, limit in (
                (left, "beta", BETAS, {f"w = {w}": [(w, b) for b in BETAS] for w in (33, 65, 257)}, float, -GAP),
                (right, "w", WIDTHS, {f"beta = {b}": [(w, b) for w in WIDTHS] for b in (100, 200, 400)}, math.log, -2)):
            for color, (label, settings) in zip(COLORS, lines.items()):
                errors, bounds = zip(*[(worst_error(Construction(*s), x, y), bound(*s)) for s in settings])
                print(f"\n{label}\n{what:>4}  error    bound")
                print(*map("{:4}  {:.1e}  {:.1e}".format, values, errors, bounds), sep="\n")
                ax.plot(values, errors, "o-", ms=3, color=color, label=label)
                ax.plot(values, bounds, "--", lw=1, color=color)
            slope = math.log(errors[6] / errors[3]) / (scale(values[6]) - scale(values[3]))          # of the last line
            ax.set(title=f"{label}: ln(error) slope {slope:.3f}, {what} {values[3]} to {values[6]} (bound {limit})")
            print(ax.get_title())
            ax.legend()
        left.set(xlabel="sharpness of the softmax, beta", ylabel="worst error (dashed: bound)")
        right.set(xlabel="width of the maps, w", xscale="log", yscale="log")
        save(fig, Path(o.out_dir) / "theorem1.png", dpi=140)


if __name__ == "__main__":
    start(main)
