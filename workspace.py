"""The Associative Transformer's global workspace layer (AiT; Sun et al., CVPR 2025, arXiv 2309.12862).

It stands in the place of a block's MLP and contains it. Tokens of the whole batch compete for a place in a small
memory of M slots, and every token is then pulled towards what the memory holds:

    1. squash    Xi = LN(MLP(x))                                    (B, T, E), read as (L, E) with L = B T tokens
    2. compete   q = gamma W_q, k = Xi W_k, v = Xi W_v              S heads of width D
                 A = q k^T / sqrt(D)                                (S, M, L)
                 G = softmax over each slot's `bottleneck` largest scores, 0 elsewhere
    3. collect   h = concat over heads of G v                       (M, S D)
                 new = LN(gamma + Dropout(h W_o))                   (M, D)
    4. write     gamma' = unit rows of decay gamma + (1 - decay) new
    5. read      Y = gamma' W_LT                                    (M, E)
                 output = Xi + softmax(beta Xi Y^T) Y               one step of a Hopfield network, for each token
    6. balance   loss = balance * sum over heads of CV^2(sum over slots of G)
    7. energy    which the read never raises (see `energy`)

The memory is a state and no parameter: training writes it step by step, checkpoints hold it, evaluation only reads it.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from generation import evaluating


class GlobalWorkspace(nn.Module):
    """Equations 1 to 6: (B, T, d_model) -> (B, T, d_model).

    mlp: what each token passes by itself, Eq. 1; it ends in a LayerNorm. slots M, width D and heads S of the memory;
    bottleneck: how many tokens a slot attends to in each head (all, if there are fewer). beta: inverse temperature of
    the read. queries: "memory", as published, or "learned".
    """

    def __init__(self, d_model, mlp, *, slots, width, heads, bottleneck, beta=1.0, decay=0.9, balance=0.01,
                 queries="memory", dropout=0.1):
        super().__init__()
        self.mlp, self.heads, self.bottleneck = mlp, heads, bottleneck
        self.beta, self.decay, self.balance = beta, decay, balance
        self.register_buffer("memory", F.normalize(torch.randn(slots, width), dim=-1))       # gamma
        # paper: the memory itself asks for what is written to it, and its slots become alike; here, with "learned": a
        # parameter asks and the memory stays the moving average, because then the slots keep different contents
        self.queries = nn.Parameter(F.normalize(torch.randn(slots, width), dim=-1)) if queries == "learned" else None
        self.W_q = nn.Linear(width, heads * width, bias=False)
        self.W_k = nn.Linear(d_model, heads * width, bias=False)
        self.W_v = nn.Linear(d_model, heads * width, bias=False)
        self.W_o = nn.Linear(heads * width, width, bias=False)
        self.norm, self.dropout = nn.LayerNorm(width, eps=1e-6), nn.Dropout(dropout)
        self.W_LT = nn.Linear(width, d_model)
        self.balance_loss = None                                     # of the last forward pass in training

    def forward(self, x):
        """x (B, T, d_model) -> (B, T, d_model). In training it writes to the memory first, and reads what is new."""
        xi = self.mlp(x)                                             # Eq. 1: (B, T, E)
        # authors' code: evaluation writes, too; here: it only reads, because an answer must not depend on its batch
        gamma = self.write(xi.flatten(0, 1)) if self.training else self.memory
        return xi + read(xi, self.W_LT(gamma), self.beta)            # Eq. 5

    def write(self, xi):
        """Tokens xi (L, E) -> the new memory (M, D), with its graph. Keeps a copy without it, and the balance loss."""
        # authors' code: the graph ends here, so W_v, W_o and the norm get no gradient; here: the read is differentiated
        # through the write, as in the equations. The old memory is copied, since the backward pass needs its values.
        gamma = self.memory.clone()
        tokens, weights = self.choose(xi)                            # G without its zeros: (S, M, k) both
        # G v = (G Xi) W_v, in this order, because few tokens are chosen; an embedding_bag sums those alone
        sums = F.embedding_bag(tokens.flatten(0, 1), xi.type_as(weights), per_sample_weights=weights.flatten(0, 1),
                               mode="sum").unflatten(0, tokens.shape[:2])                    # G Xi: (S, M, E)
        W_v = self.W_v.weight.unflatten(0, (self.heads, -1))         # (S, D, E)
        h = (sums @ W_v.mT).transpose(0, 1).flatten(1)               # Eq. 3: (M, S D)
        new = self.norm(gamma + self.dropout(self.W_o(h)))           # (M, D)
        gamma = F.normalize(self.decay * gamma + (1 - self.decay) * new, dim=-1)             # Eq. 4
        self.memory.copy_(gamma.detach())
        # paper: also CV^2 of how many slots chose a token; here: not, because that term has no gradient
        shares = weights.new_zeros(self.heads, len(xi)).scatter_add(1, tokens.flatten(1), weights.flatten(1))
        self.balance_loss = self.balance * cv_squared(shares).sum()  # Eq. 6; shares (S, L): sum over slots of G
        return gamma

    def choose(self, xi):
        """Eq. 2: tokens xi (L, E) -> the k best for each head and slot, as indices (S, M, k), and their weights."""
        # a copy: the backward pass needs the values that `write` replaces
        q = self.split(self.W_q(self.memory.clone() if self.queries is None else self.queries))          # (S, M, D)
        k = self.split(self.W_k(xi))                                 # (S, L, D)
        A = q / math.sqrt(k.size(-1)) @ k.mT                         # (S, M, L)
        scores, tokens = A.topk(min(self.bottleneck, A.size(-1)), dim=-1, sorted=False)
        return tokens, scores.softmax(-1)

    def gates(self, xi):
        """Eq. 2: tokens xi (L, E) -> G (S, M, L), 0 but for the chosen tokens."""
        tokens, weights = self.choose(xi)
        return weights.new_zeros(*tokens.shape[:2], len(xi)).scatter(-1, tokens, weights)

    def split(self, x):
        """(n, S D) -> (S, n, D)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(0, 1)

    def take_balance_loss(self):
        """The balance loss of the last forward pass, once: no graph stays behind in the module."""
        loss, self.balance_loss = self.balance_loss, None
        return loss


def read(xi, Y, beta):
    """One step of a continuous Hopfield network, Eq. 5: states xi (..., E), stored patterns Y (M, E) -> (..., E)."""
    return (xi @ (beta * Y).mT).softmax(-1) @ Y


def energy(xi, Y, beta):
    """Eq. 7 (Ramsauer et al., 2021): states xi (..., E), patterns Y (M, E) -> (...).

    E(xi) = -1/beta lse(beta Y xi) + 1/beta ln M + 1/2 |xi|^2 + 1/2 max |Y_m|^2. The read never raises it.
    """
    lse = (beta * xi @ Y.mT).logsumexp(-1) / beta
    return -lse + math.log(len(Y)) / beta + xi.square().sum(-1) / 2 + Y.square().sum(-1).max() / 2


def cv_squared(x):
    """Squared coefficient of variation over the last dimension, var / mean^2 (population variance): (..., L) -> (...).

    0 where all shares are equal; (1 - p) / p where a fraction p of the tokens has everything in equal parts.
    """
    return x.var(-1, correction=0) / x.mean(-1).square()


def workspaces(model):
    """The workspaces of a model, layer by layer."""
    return [m for m in model.modules() if isinstance(m, GlobalWorkspace)]


def slot_columns(cfg):
    """The names in `slot_statistics` of a model with this TransformerConfig."""
    return [f"{what}_{i + 1}" for i in range(cfg.n_layers if cfg.memory_slots else 0) for what in ("rank", "cosine")]


@torch.no_grad()
def slot_statistics(model):
    """{"rank_1": ..., "cosine_1": ..., "rank_2": ...}: how different the slots are, by layer.

    rank: effective rank of the memory, exp of the entropy of p, its singular values divided by their sum (Roy &
    Vetterli, 2007): 1 if all slots are equal up to a factor, at most min(M, D). cosine: the mean over all pairs of
    slots; 1 if all are equal.
    """
    statistics = {}
    for i, layer in enumerate(workspaces(model), 1):
        gamma, M = F.normalize(layer.memory.double(), dim=-1).cpu(), len(layer.memory)
        # svdvals raises an error for a memory of NaN; then both numbers are NaN
        share = torch.linalg.svdvals(gamma) if gamma.isfinite().all() else gamma.sum(1)
        statistics[f"rank_{i}"] = torch.special.entr(share / share.sum()).sum().exp().item()
        statistics[f"cosine_{i}"] = ((gamma @ gamma.mT).sum().item() - M) / max(1, M * (M - 1))
    return statistics


@torch.no_grad()
def slot_attention(model, *inputs):
    """What each slot would attend to in this batch, mean over its heads: a tensor (M, B, T) for each layer."""
    shares = []

    def note(module, args, xi, layer):
        G = layer.gates(xi.flatten(0, 1))                              # (S, M, L)
        shares.append(G.mean(0).unflatten(-1, xi.shape[:2]))
    hooks = [layer.mlp.register_forward_hook(partial(note, layer=layer)) for layer in workspaces(model)]
    try:
        with evaluating(model):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return shares
