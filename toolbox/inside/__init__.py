"""Looking inside a model: what it computes as it runs, and what it does without a part of it.

    with watch(model) as layers:                       # hooks that look on: outputs stay the same, bit for bit
        model(x)
    layers[0].alpha, layers[0].r                       # (B, H, T, S), (B, R, T, S)

    with without(layers[:1], "relations", 2):          # W_r's row of relation 2 is zero; restored bit for bit
        model(x)

Rows are receivers i, columns senders j. The model is in evaluation mode and reads whole sequences, without a cache.

relational_games.py, language.py, mathematics.py, images.py       what look.py prints and draws of each kind of run
statistics.py                                                     the numbers that they use
"""
import re
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from attention import attention_weights, split_heads

LARGEST = 2 * 10 ** 9                          # bytes of attention weights and relations that are kept at a time


@dataclass
class Layer:
    """A group of heads of one block. `watch` fills in what it computed for the last sequences that it has seen."""
    stack: str                                 # "stack", "encoder" or "decoder"
    number: int                                # of the block, from 1 on
    group: str                                 # "sensory", "relational" or "cross"
    module: nn.Module
    alpha: torch.Tensor = None                 # (B, H, T, S)
    r: torch.Tensor = None                     # (B, R, T, S); None where a group has no relations
    heads: torch.Tensor = None                 # (B, T, H d_h): the sums over j, side by side, before W_o

    @property
    def n_relations(self):
        """R; 0 for sensory heads and for relational cross-attention, whose only relation is alpha."""
        return getattr(self.module, "n_relations", 0)


def layers_of(model, number=None, stack=None):
    """The groups of heads of a model as Layers, in the order of its blocks; only those of block `number`, of `stack`.

    Raises ValueError if there is no such block.
    """
    found = []
    for name, m in model.named_modules():
        if place := re.fullmatch(r"(\w+)\.blocks\.(\d+)\.(?:attention\.)?(sensory|relational|cross)", name):
            found.append(Layer(place[1], int(place[2]) + 1, place[3], m))
    last = max((layer.number for layer in found), default=0)
    if number is not None and not 1 <= number <= last:
        raise ValueError(f"layer={number}: this model has layers 1 to {last}")
    return [one for one in found if number in (None, one.number) and stack in (None, one.stack)]


# ---- what it computes ------------------------------------------------------------------------------------------------

@contextmanager
def watch(model, number=None, stack=None):
    """Context in which the Layers (see layers_of) that it yields record what they compute. Afterwards no hook is left.

    Raises ValueError if attention weights and relations of all these layers would take more than LARGEST bytes.
    """
    layers = layers_of(model, number, stack)
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.module.W_o.register_forward_pre_hook(partial(note_heads, layer)).remove)
            hook = layer.module.register_forward_hook(partial(note, layer, layers), with_kwargs=True)
            hooks.callback(hook.remove)
        yield layers


def note_heads(layer, W_o, args):
    layer.heads = args[0].detach()


@torch.no_grad()
def note(layer, layers, m, args, kwargs, output):
    """Hook: computes the layer once more, from the same arguments, by the form that returns its weights."""
    x, context, cache = args[0], kwargs.get("context"), kwargs.get("cache")
    if cache is not None:
        raise ValueError("only whole sequences can be watched, without a cache")
    y = x if context is None else context
    kept = sum(one.module.n_heads + one.n_relations for one in layers)
    needed = kept * len(x) * x.size(1) * y.size(1) * x.element_size()
    if needed > LARGEST:
        raise ValueError(f"{len(x)} x {x.size(1)} tokens: their {kept} tables of attention weights and relations take "
                         f"{needed / 1e9:.1f} GB, more than {LARGEST / 1e9:.1f}: give a prompt of at most "
                         f"{int(x.size(1) * (LARGEST / needed) ** 0.5)} tokens, or one layer, as --layer=1")
    if layer.n_relations:
        heads = layer.heads                            # of the form that the model really took
        _, layer.alpha, layer.r = m.forward(*args, **{**kwargs, "need_weights": True})
        layer.heads = heads
    else:                                              # sensory heads, cross-attention, relational cross-attention
        rope = kwargs.get("rope")
        q, k = split_heads(m.W_q(x), m.n_heads, rope), split_heads(m.W_k(y), m.n_kv_heads, rope)
        weights = getattr(m, "weights", attention_weights)             # extras/shaw.py has its own
        layer.alpha = weights(q, k, causal=kwargs.get("causal", False), mask=kwargs.get("mask"))


@torch.no_grad()
def message_parts(layer):
    """Of a watched relational layer: sum_j alpha_ij r_ij W_r and sum_j alpha_ij s_j W_s, (B, H, T, d_h) each."""
    W_r = layer.module.W_r
    relations = torch.einsum("bhij,brij->bhir", layer.alpha.to(W_r), layer.r.to(W_r)) @ W_r
    return relations, split_heads(layer.heads, layer.module.n_heads) - relations


@contextmanager
def watch_symbols(model):
    """Context whose list gets, for each layer in order, how much of each symbol tokens take: (heads, B T, n_symbols).

    Of symbolic attention; other symbols depend on the position alone, and the list stays empty.
    """
    taken = []

    @torch.no_grad()
    def note(m, args, output):
        q = split_heads(m.W_q(args[0]).flatten(0, 1)[None], m.n_heads)             # (1, heads, B T, d_h)
        taken.append(attention_weights(q, split_heads(m.templates[None], m.n_heads))[0])
    with ExitStack() as hooks:
        for m in model.modules():
            if hasattr(m, "templates"):
                hooks.callback(m.register_forward_hook(note).remove)
        yield taken


# ---- what it does without a part -------------------------------------------------------------------------------------

@contextmanager
def without(layers, what, index=None, how="zero", seed=0):
    """Context in which layers lack their "relations" (all, or the one at `index`), "symbols" or "heads" (as above).

    zero: the weights that bring them in are zero (a bias, which says nothing about the sender, stays).
    resample: they are those of another sequence of the batch, the same one for all parts with the same seed.
    """
    with ExitStack() as parts:
        for m in (layer.module for layer in layers):
            W_s = m.W_s if hasattr(m, "W_s") else m.W_v                # the latter in relational cross-attention
            if what == "relations" and how == "zero":
                part = zeroed(m.W_r, (slice(None), features(index, 1)))
            elif what == "relations":
                W_rel = [m.W_q_rel] if m.symmetric else [m.W_q_rel, m.W_k_rel]
                part = resampled(W_rel, features(index, m.rel_proj_dim), seed)
            elif what == "symbols":
                part = zeroed(W_s.weight, ...) if how == "zero" else resampled([W_s], slice(None), seed)
            else:
                part = zeroed(m.W_o.weight, (slice(None), features(index, m.W_o.in_features // m.n_heads)))
            parts.enter_context(part)
        yield


def features(index, width):
    """Those of one relation or head; of all if index is None."""
    return slice(None) if index is None else slice(index * width, (index + 1) * width)


@contextmanager
def zeroed(parameter, part):
    """Context in which parameter[part] is 0; then it has its values again, bit for bit."""
    kept = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter[part] = 0
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


@contextmanager
def resampled(linears, columns, seed):
    """Context in which these columns of the outputs (B, T, features) of `linears` are those of another sequence."""
    def swap(m, args, output):
        others, swapped = output[derangement(len(output), seed).to(output.device)], output.clone()
        swapped[..., columns] = others[..., columns]
        return swapped
    with ExitStack() as hooks:
        for m in linears:
            hooks.callback(m.register_forward_hook(swap).remove)
        yield


def derangement(n, seed):
    """A random permutation of n that leaves nothing in its place: one cycle. Raises ValueError for fewer than two."""
    if n < 2:
        raise ValueError(f"n={n}: to take something from another sequence there must be two of them")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    taken = torch.empty_like(order)
    taken[order] = order.roll(1)
    return taken
