"""What the tests of the core share: small models, exact positions, and copies of weights in PyTorch's own modules."""
import math
from itertools import product

import torch
from torch import nn

from model import LanguageModel, TransformerConfig
from relational_attention import RelationalAttention
from symbols import PositionalSymbols, PositionRelativeSymbols, RelativeSymbols, SymbolicAttention

SYMBOLS, POSITIONS = ["symbolic", "relative", "positional"], ["rope", "learned", "sinusoidal"]
FORMS = ["literal", "fast", "blocked"]
FORMS_AND_SYMBOLS = [(form, kind) for form in FORMS for kind in SYMBOLS]
SMALL = dict(vocab_size=13, d_model=16, n_layers=2, n_heads=4, n_ra=2, max_len=12, n_symbols=6, symbol_heads=2)
VARIANTS = [dict(symbols=s, position=p) for s, p in product(SYMBOLS, POSITIONS)] + [
    dict(n_ra=0), dict(n_ra=0, position="shaw"), dict(n_ra=4), dict(symmetric=True), dict(n_kv_heads=1),
    dict(n_relations=4, rel_proj_dim=3),
    dict(ra_type="rca"), dict(ra_type="rca", symbols="relative"), dict(rel_activation="softmax"), dict(share_qk=True),
    dict(rel_activation="tanh", symbols="relative"), dict(shared_symbols=False), dict(norm_first=False, norm="rmsnorm"),
    dict(activation="swiglu", bias=True), dict(symbols="relative", max_distance=3, n_kv_heads=1)]
ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU()}


@torch.no_grad()
def randomise(model):
    """float64, evaluation mode, and weights so large that every part of the model changes its output."""
    model.double().eval()
    for p in model.parameters():
        p.normal_(std=0.4) if p.dim() > 1 else p.add_(torch.randn_like(p), alpha=0.1)
    return model


def language_model(**options):
    """SMALL, changed by options, with random weights."""
    torch.manual_seed(0)
    return randomise(LanguageModel(TransformerConfig(**{**SMALL, **options})))


def use(form, model):
    """Makes every relational head of the model take this form: "literal", "fast" or "blocked"."""
    for m in model.modules():
        if isinstance(m, RelationalAttention):
            m.choose_form = lambda *shapes, m=m: getattr(m, form)


def symbols_of(kind, d_model, max_len):
    """A symbol module in float64."""
    if kind == "symbolic":
        return SymbolicAttention(d_model, n_symbols=7, n_heads=2).double()
    if kind == "positional":
        return PositionalSymbols(d_model, max_len).double()
    return PositionRelativeSymbols(d_model, max_distance=2).double()


def symbol(symbols, b, i, j):
    """The symbol of sender j for receiver i in sequence b, from any of the kinds of `symbols`."""
    if isinstance(symbols, RelativeSymbols):                           # by offset, of as many receivers as senders
        return symbols.table[len(symbols.table) // 2 + j - i]
    if isinstance(symbols, PositionRelativeSymbols):
        nearest = max(-symbols.max_distance, min(j - i, symbols.max_distance))
        return symbols.library[nearest + symbols.max_distance]
    return symbols[j] if symbols.dim() == 2 else symbols[b, j]


def rotated(vector, position):
    """RoPE by its definition: the features c and c + d_h/2 are rotated by the angle position * 10000^(-2c/d_h)."""
    out, half = vector.clone(), len(vector) // 2
    for c in range(half):
        angle = position * 10000.0 ** (-c / half)
        out[c] = vector[c] * math.cos(angle) - vector[c + half] * math.sin(angle)
        out[c + half] = vector[c + half] * math.cos(angle) + vector[c] * math.sin(angle)
    return out


def exact_rope(n, d_h):
    """The table of positions 0 ... n - 1 that `rope_table` computes in float32, here in float64: 2 x (n, 1, d_h)."""
    angle = torch.tensor([[position * 10000.0 ** (-2 * c / d_h) for c in range(d_h // 2)] for position in range(n)],
                         dtype=torch.float64)[:, None]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def exact_sinusoids(n, d_model):
    """Vaswani et al. (2017), Section 3.5, by its formula: (n, d_model) in float64."""
    return torch.tensor([[(math.cos if c % 2 else math.sin)(position / 10000 ** (c // 2 * 2 / d_model))
                          for c in range(d_model)] for position in range(n)], dtype=torch.float64)


def copy_attention(theirs, ours, names):
    """Weights of our Attention into nn.MultiheadAttention; returns how many."""
    numel = 0
    for name in names:
        qkv = torch.cat([getattr(W, name) for W in (ours.W_q, ours.W_k, ours.W_v)])
        getattr(theirs, "in_proj_" + name).copy_(qkv)
        getattr(theirs.out_proj, name).copy_(getattr(ours.W_o, name))
        numel += qkv.numel() + getattr(ours.W_o, name).numel()
    return numel


def copy_all(pairs, names):
    """The named parameters of each pair (theirs, ours) from ours into theirs; returns how many numbers."""
    for theirs, ours in pairs:
        for name in names:
            getattr(theirs, name).copy_(getattr(ours, name))
    return sum(getattr(ours, name).numel() for _, ours in pairs for name in names)


def copy_block(theirs, ours, names):
    """All weights of a block without relational heads into PyTorch's encoder or decoder layer; returns how many."""
    norms = [(theirs.norm1, ours.norm_attention), (theirs.norm2, ours.norm_mlp)]
    numel = copy_attention(theirs.self_attn, ours.attention.sensory, names)
    if hasattr(ours, "cross"):
        norms = [norms[0], (theirs.norm2, ours.norm_cross), (theirs.norm3, ours.norm_mlp)]
        numel += copy_attention(theirs.multihead_attn, ours.cross, names)
    return numel + copy_all([(theirs.linear1, ours.mlp.W_1), (theirs.linear2, ours.mlp.W_2), *norms], names)
