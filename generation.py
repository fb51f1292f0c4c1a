"""Text, token by token: predict the next token, choose one, append it, repeat.

    for token in stream(model, idx, max_new_tokens=500, temperature=0.8, top_p=0.95):        # (B, 1) each
        ...

With a cache, keys and values (of relational heads also relation keys and symbols) of earlier tokens are kept, so that a
new token costs one position instead of the whole context (and for relative symbols the projection of their table).
When the context is full, its oldest half is dropped and the rest is processed again, with or without a cache: both see
the same tokens at the same positions, compute equal logits, and keep at most max_len tokens however long the text is.
"""
from contextlib import contextmanager

import torch


@torch.no_grad()
def stream(model, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, use_cache=True, vocab_size=None,
           mask=None):
    """Yields the tokens that continue idx (B, T >= 1), one (B, 1) at a time; `choose` says how they are chosen.

    The LanguageModel is in evaluation mode while the generator is open; when it is closed, each module is back in the
    mode it had.
    vocab_size: choose among the first so many only, where the model's is rounded up (GPT-2's 50257 to 50304).
    mask: boolean (B, T), False at padding, which stands on the left: see `pad_left`. Each text is continued as if it
    were alone, as long as the longest with its continuation fits into max_len. Then all drop their oldest half.
    Raises ValueError for what cannot be done, before anything is computed.
    """
    check(idx, max_new_tokens, temperature, top_k, top_p, mask)
    max_len, padding = model.cfg.max_len, None if mask is None else (~mask).sum(1)      # (B,): how much of it
    with evaluating(model):
        unread = context = idx[:, -max_len:]                           # (B, T <= max_len)
        padding = drop(padding, idx.size(1) - context.size(1))
        caches = model.new_caches() if use_cache else None
        for _ in range(max_new_tokens):
            token = choose(next_logits(model, unread, caches, padding)[:, :vocab_size], temperature, top_k, top_p)
            yield token
            context = torch.cat([context, token], dim=1)
            unread = token if use_cache else context
            if context.size(1) > max_len:
                unread = context[:, -max(1, max_len // 2):]
                padding, context = drop(padding, context.size(1) - unread.size(1)), unread
                caches = model.new_caches() if use_cache else None


def check(idx, max_new_tokens, temperature, top_k, top_p, mask):
    """Raises ValueError, in one line, for a request that cannot be met."""
    for wrong, message in (
            (idx.dim() != 2, f"idx must be of shape (B, T), not {tuple(idx.shape)}"),
            (idx.dim() == 2 and not idx.size(1), "the prompt is empty: give at least one token"),
            (max_new_tokens < 0, f"max_new_tokens={max_new_tokens}: must be at least 0"),
            (not temperature >= 0, f"temperature={temperature}: must be at least 0"),
            (top_k is not None and top_k < 1, f"top_k={top_k}: must be at least 1"),
            (top_p is not None and not 0 < top_p <= 1, f"top_p={top_p}: must be above 0 and at most 1"),
            (mask is not None and (mask.dtype != torch.bool or mask.shape != idx.shape),
             f"the mask must be boolean and of the shape of idx, {tuple(idx.shape)}: False at padding")):
        if wrong:
            raise ValueError(message)
    if mask is not None and not (mask[:, -1].all() and (mask[:, 1:] >= mask[:, :-1]).all()):
        raise ValueError("padding must stand on the left of each prompt, which has at least one token: see pad_left")


def drop(padding, n):
    """The padding (B,) that is left when the first n positions are dropped."""
    return None if padding is None else (padding - n).clamp(min=0)


def pad_left(prompts, value=0):
    """Prompts of different lengths as one batch for `stream`: each at the end of its row, behind `value`.

    prompts: B lists of tokens, at least one; T is the length of the longest -> idx, integers (B, T), and the boolean
    mask (B, T), False at padding. Raises ValueError if there is no prompt.
    """
    if len(prompts) == 0:
        raise ValueError("no prompts to pad: give at least one list of tokens, as pad_left([[1, 2, 3]])")
    T = max(map(len, prompts))
    rows = [[value] * (T - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[t >= T - len(prompt) for t in range(T)] for prompt in prompts]
    return torch.tensor(rows, dtype=torch.long), torch.tensor(mask, dtype=torch.bool)


@contextmanager
def evaluating(model):
    """The model in evaluation mode; then each of its modules in the mode in which it was, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.inference_mode()                       # cheaper than no_grad; `stream` yields ordinary tensors
def next_logits(model, unread, caches, padding=None):
    """Logits of the token that follows those in the caches and then `unread` (B, T): (B, vocab_size)."""
    x = model.stack(model.embedding(unread), causal=True, caches=caches, padding=padding)       # (B, T, d_model)
    return model.head(x[:, -1])


def choose(logits, temperature=1.0, top_k=None, top_p=None):
    """One token from each row of logits (B, vocab_size): (B, 1). Temperature 0 takes the likeliest.

    top_k: among the k likeliest (and those as likely as the k-th). top_p: then among the nucleus (Holtzman et al.,
    2020), the smallest set of likeliest tokens whose probability reaches p.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if temperature < 0.01:                                             # the quotient must stay finite
        logits, temperature = logits - logits.amax(-1, keepdim=True), max(temperature, 1e-30)
    logits = logits / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < smallest, -float("inf"))
    p = logits.softmax(-1)                                             # (B, vocab_size)
    if top_p is not None and top_p < 1:                                # 1: all of them, in spite of rounding
        sorted_p, order = p.sort(dim=-1, descending=True)
        before = sorted_p.cumsum(-1) - sorted_p                        # probability of all likelier tokens
        p = p.scatter(-1, order, sorted_p.masked_fill((before >= top_p) & (before > 0), 0.0))    # the likeliest is kept
    return torch.multinomial(p, 1)                                     # in proportion to p: it need not sum to 1
