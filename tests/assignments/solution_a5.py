"""Teacher's file: students are asked not to open it. A solution of a5, of the variant that VARIANT names."""
import math

import torch
import torch.nn.functional as F

VARIANT = 1


# 1. The bottleneck

def gates(tokens, queries, W, k):
    (B, T, _), D = tokens.shape, queries.size(1)
    q = queries @ W["q"]                                      # (S, M, D)
    keys = tokens.flatten(0, 1) @ W["k"]                      # (S, L, D)
    A = q @ keys.mT / math.sqrt(D)                            # (S, M, L)
    k = min(k, B * T)
    if VARIANT == 1:
        chosen = A.topk(k).indices
    else:
        chosen = A.mean(0).topk(k).indices.expand(len(A), -1, -1)
    weights = A.gather(-1, chosen).softmax(-1)
    return torch.zeros_like(A).scatter(-1, chosen, weights).unflatten(-1, (B, T))


# 2. The write

def collect(tokens, queries, W, k):
    G = gates(tokens, queries, W, k).flatten(2)               # (S, M, L)
    v = tokens.flatten(0, 1) @ W["v"]                         # (S, L, D)
    return (G @ v).transpose(0, 1).flatten(1)                 # (M, S D)


def update(memory, h, W, decay):
    new = memory + h @ W["o"]
    new = F.layer_norm(new, new.shape[-1:], eps=1e-6) if VARIANT == 1 else F.normalize(new, dim=-1)
    return F.normalize(decay * memory + (1 - decay) * new, dim=-1)


# 3. The read

def scores(states, Y, beta):
    if VARIANT == 1:
        return beta * states @ Y.mT
    return -beta / 2 * (states.unsqueeze(-2) - Y).square().sum(-1)


def retrieve(states, Y, beta):
    return scores(states, Y, beta).softmax(-1) @ Y


def energy(states, Y, beta):
    E = -scores(states, Y, beta).logsumexp(-1) / beta + math.log(len(Y)) / beta
    if VARIANT == 1:
        E = E + states.square().sum(-1) / 2 + Y.square().sum(-1).max() / 2
    return E


# 4. The layer

def layer(tokens, memory, W, k, decay, beta, training):
    after = memory
    if training:
        after = update(memory, collect(tokens, memory, W, k), W, decay)
    seen = after if VARIANT == 1 else memory
    return tokens + retrieve(tokens, seen @ W["lt"], beta), after


# 5. How different are the slots?

def effective_rank(memory):
    values = torch.linalg.svdvals(F.normalize(memory, dim=-1))
    if VARIANT == 2:
        return values.square().sum() ** 2 / values.pow(4).sum()
    p = values / values.sum()
    return torch.special.entr(p).sum().exp()


def mean_cosine(memory):
    rows, M = F.normalize(memory, dim=-1), len(memory)
    cosines = rows @ rows.mT
    if VARIANT == 2:
        cosines = cosines.square()
    return (cosines.sum() - M) / (M * (M - 1))


# 6. Why slots become alike

def trajectory(memory, batches, W, k, decay, fixed, centred):
    first, rows = memory, [(effective_rank(memory), mean_cosine(memory))]
    for tokens in batches:
        h = collect(tokens, first if fixed else memory, W, k)
        if centred:
            h = h - (h.mean(0) if VARIANT == 1 else mean_value(tokens, W))
        memory = update(memory, h, W, decay)
        rows.append((effective_rank(memory), mean_cosine(memory)))
    return torch.tensor(rows)


def mean_value(tokens, W):
    return (tokens.flatten(0, 1).mean(0) @ W["v"]).flatten()


def common_share(h):
    return h.mean(0).square().sum() / h.square().sum(1).mean()


def effects(ranks):
    interaction = (ranks[1, 1] - ranks[1, 0]) - (ranks[0, 1] - ranks[0, 0])
    if VARIANT == 2:
        return ranks[1, 0] - ranks[0, 0], ranks[0, 1] - ranks[0, 0], interaction
    return ranks[1].mean() - ranks[0].mean(), ranks[:, 1].mean() - ranks[:, 0].mean(), interaction


# 7. A cure

class Cured:

    def __init__(self, memory, W, k, decay, beta):
        self.memory, self.W, self.k, self.decay, self.beta = memory, W, k, decay, beta
        self.queries = memory

    def write(self, tokens):
        if VARIANT == 1:
            self.memory = self.written_by_fixed_queries(tokens)
        else:
            self.memory = self.written_and_orthogonal(tokens)

    def written_by_fixed_queries(self, tokens):
        """Both changes of task 6."""
        h = collect(tokens, self.queries, self.W, self.k)
        return update(self.memory, h - h.mean(0), self.W, self.decay)

    def written_and_orthogonal(self, tokens):
        """The nearest memory with orthogonal rows; M may not be larger than D. No state but the memory."""
        memory = update(self.memory, collect(tokens, self.memory, self.W, self.k), self.W, self.decay)
        U, _, V = torch.linalg.svd(memory, full_matrices=False)
        return F.normalize(U @ V, dim=-1)

    def read(self, tokens):
        return tokens + retrieve(tokens, self.memory @ self.W["lt"], self.beta)
