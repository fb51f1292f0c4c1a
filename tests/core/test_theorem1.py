"""An analogue of Theorem 1: relational attention learns to select an object and to compute a relation with it.

This is a test of what can be learned, not an instance of the theorem. The theorem says what relational attention can
approximate, with W_s = 0, W_r = I and no training; here W_s and W_r are free and everything is trained. The theorem
itself, with weights set by hand, is in extras/theorem1.py; its tests are in tests/extras/test_theorem1_built.py.

Each of n = 8 tokens carries a key and a value. Token i must find the token with the *next* key (the first is next to
the last) and report the inner product of the two values, <value_i, value_succ(i)> / 8. For a relational head this is
one selection and one relation. A self-attention head must copy the 64 numbers of the other value into a stream of width
96 that is already full, and leave their product to an MLP. It fails within these steps and this width, not in
principle: with several times the steps, or a wider stream, it learns the task, too.

The values are long on purpose. Short ones are easy to copy and multiply, and even the attention weights, a softmax of
inner products, then contain something of the product.
"""
import pytest
import torch
from torch import nn

from attention import Attention
from relational_attention import RelationalAttention
from symbols import PositionalSymbols

N, KEY, VALUE, D, STEPS, BATCH = 8, 32, 64, 96, 500, 64


def sample_batch(library, embedding, batch):
    """x (batch, N, D) and targets y (batch, N)."""
    keys = torch.rand(batch, N).argsort(-1)                                # which key each token has: a permutation
    values = torch.randn(batch, N, VALUE)
    x = torch.cat([library[keys], values], -1) @ embedding
    successor = keys.argsort(-1).gather(1, (keys + 1) % N)                         # the place of the next key
    other = values.gather(1, successor[..., None].expand_as(values))
    return x, (values * other).sum(-1) / VALUE ** 0.5


class Relational(nn.Module):
    def __init__(self):
        super().__init__()
        self.symbols, self.attention = PositionalSymbols(D, N), RelationalAttention(D, 2)        # 2 heads, 2 relations
        self.head = nn.Linear(D, 1)

    def forward(self, x):
        return self.head(x + self.attention(x, self.symbols(x))).squeeze(-1)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention(D, 2)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.head = nn.Linear(D, 1)

    def forward(self, x):
        x = x + self.attention(x)
        return self.head(x + self.mlp(x)).squeeze(-1)


def r_squared(Model, seed):
    """1 - error / variance on fresh data after training."""
    torch.manual_seed(seed)
    library = torch.randn(N, KEY)                                                 # the N keys
    embedding = torch.linalg.qr(torch.randn(D, D)).Q                               # fixed: mixes key and value
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        x, y = sample_batch(library, embedding, BATCH)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x, y = sample_batch(library, embedding, 1000)
        return 1 - ((model(x) - y).square().mean() / y.var()).item()


@pytest.mark.parametrize("seed", [1, 2])
def test_relational_heads_learn_to_select_and_relate(seed):
    score = r_squared(Relational, seed)
    print(f"seed {seed}: relational heads reach R^2 = {score:.3f}")                # shown by pytest -s
    assert score > 0.95


@pytest.mark.parametrize("seed", [1, 2])
def test_self_attention_with_more_parameters_does_not_in_as_many_steps(seed):
    relational, sensory = (sum(p.numel() for p in M().parameters()) for M in (Relational, SelfAttention))
    assert sensory >= relational
    score = r_squared(SelfAttention, seed)
    print(f"seed {seed}: self-attention + MLP reaches R^2 = {score:.3f} with {sensory:,} parameters to {relational:,}")
    assert score < 0.3
