"""Text, token by token: predict the next token, choose one, append it, repeat.

    for token in stream(model, idx, max_new_tokens=500, temperature=0.8, top_p=0.95):        # (B, 1) each
        ...

With a cache, keys and values (of relational heads also relation keys and symbols) of earlier tokens are kept, so that a
new token costs one position instead of the whole context (and for relative symbols the projection of their table).
When the context is full, its oldest half is dropped and the rest is processed again, with or without a cache: both see
the same tokens at the same positions, compute equal logits, and keep at most max_len tokens however long the text is.
"""
import torch


@torch.no_grad()
def stream(model, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, use_cache=True, vocab_size=None):
    """Yields the tokens that continue idx (B, T >= 1), one (B, 1) at a time; `choose` says how they are chosen.

    The LanguageModel is in evaluation mode while the generator is open; its previous mode is restored at the end.
    vocab_size: choose among the first so many only, where the model's is rounded up (GPT-2's 50257 to 50304).
    """
    was_training, max_len = model.training, model.cfg.max_len
    model.eval()
    try:
        unread = context = idx[:, -max_len:]                           # (B, T <= max_len)
        caches = model.new_caches() if use_cache else None
        for _ in range(max_new_tokens):
            token = choose(next_logits(model, unread, caches)[:, :vocab_size], temperature, top_k, top_p)
            yield token
            context = torch.cat([context, token], dim=1)
            unread = token if use_cache else context
            if context.size(1) > max_len:
                unread = context = context[:, -max(1, max_len // 2):]
                caches = model.new_caches() if use_cache else None
    finally:
        model.train(was_training)


@torch.inference_mode()                       # cheaper than no_grad; `stream` yields ordinary tensors
def next_logits(model, unread, caches):
    """Logits of the token that follows those in the caches and then `unread` (B, T): (B, vocab_size)."""
    x = model.stack(model.embedding(unread), causal=True, caches=caches)             # (B, T, d_model)
    return model.head(x[:, -1])


def choose(logits, temperature=1.0, top_k=None, top_p=None):
    """One token from each row of logits (B, vocab_size): (B, 1). Temperature 0 takes the likeliest.

    top_k: among the k likeliest (and those as likely as the k-th). top_p: then among the nucleus (Holtzman et al.,
    2020), the smallest set of likeliest tokens whose probability reaches p.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
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
