"""The models, and the shapes of attention, that extras/bench.py measures: those of the train scripts' presets."""
from contextlib import nullcontext
from dataclasses import replace

import torch

from attention import Attention
from model import LanguageModel, TransformerConfig, VisionTransformer
from relational_attention import RelationalAttention
from symbols import PositionRelativeSymbols
from toolbox import training

STORIES = dict(max_len=512, n_symbols=512, activation="swiglu", vocab_size=32_000)  # as in the paper, without dropout
# name: (options of both models, further ones of the DAT, further ones of the Transformer,
#        sequences or images in a batch on a CPU, and on a GPU; None: not measured there)
MODELS = {
    "tiny: train_lm.py's default": (dict(vocab_size=256, n_symbols=128), {}, {}, 16, 16),
    "tinystories d64 L4": (dict(STORIES, d_model=64, n_layers=4), {}, {}, 8, 32),
    "tinystories d64 L4, 256 tokens": (dict(STORIES, d_model=64, n_layers=4, vocab_size=256), {}, {}, 8, None),
    "tinystories d128 L6": (dict(STORIES, d_model=128, n_layers=6), {}, {}, 8, None),
    "tinystories d128 L6, 256 tokens": (dict(STORIES, d_model=128, n_layers=6, vocab_size=256), {}, {}, 8, None),
    "shakespeare": (dict(vocab_size=256, d_model=384, n_layers=6, n_heads=6, n_ra=3, symbol_heads=6, max_len=256,
                         n_symbols=256), {}, {}, 4, 64),
    "cifar10": (dict(d_model=384, n_layers=8, n_heads=12, n_ra=6, d_ff=384, max_len=65, position="learned",
                     symbols="relative", symmetric=True, bias=True), dict(n_kv_heads=3, attention_bias="none"),
                dict(attention_bias="output"), 32, 128),
    "relgames": (dict(d_model=128, n_layers=2, n_heads=2, n_ra=2, d_ff=256, max_len=10, activation="swiglu",
                      position="learned", final_norm=False, symbols="positional", symmetric=True), {}, {}, 512, 512),
    "fineweb_350m": (dict(vocab_size=50_304, d_model=1024, n_layers=24, n_heads=16, n_ra=8, max_len=1024,
                          n_symbols=1024, symbol_heads=8, n_relations=64, activation="gelu_tanh", norm_bias=True,
                          attention_bias="none", trainable_symbols=False), dict(n_kv_heads=4, bias=True), {}, 1, 8),
}
IMAGES = {"cifar10": dict(image_size=32, patch_size=4, n_classes=10, pool="mean_cls"),
          "relgames": dict(image_size=36, patch_size=12, n_classes=2, pool="mean_cls")}


def config(name, kind="DAT"):
    """The TransformerConfig of the DAT, or if `kind` begins with Transformer, of that."""
    options, dat, transformer, *_ = MODELS[name]
    return TransformerConfig(**options | (dict(transformer, n_ra=0) if kind.startswith("Transformer") else dat))


def batch_size(name, device):
    """Sequences or images; None if the model is not measured on this device."""
    return MODELS[name][3 if device.type == "cpu" else 4]


def step_case(name, kind, device, dtype):
    """A function that takes one training step: forward, backward, AdamW. kind: as in the first column of the table."""
    torch.manual_seed(0)
    cfg, B = config(name, kind), batch_size(name, device)
    with device if device.type == "cuda" else nullcontext():           # large models start faster there
        if name in IMAGES:
            model = VisionTransformer(cfg, **IMAGES[name])
            batch = torch.randn(B, *model.shape), torch.randint(IMAGES[name]["n_classes"], (B,))
        else:
            model = their_model(cfg) if kind == "authors' DAT" else LanguageModel(cfg)
            batch = torch.randint(cfg.vocab_size, (2, B, cfg.max_len)).unbind()
    model, batch = model.to(device), [x.to(device) for x in batch]
    for block in model.stack.blocks if "compiled" in kind else ():
        block.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=device.type != "mps")

    def run():
        with training.autocast(device, dtype):
            _, loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return run


def their_model(cfg):
    """The authors' language model of the same shape."""
    from dual_attention.language_models import DualAttnTransformerLM
    return DualAttnTransformerLM(
        cfg.vocab_size, cfg.d_model, cfg.n_layers, cfg.n_sa, cfg.n_ra, dropout_rate=0.0,
        activation=cfg.activation.removesuffix("_tanh"), sa_kwargs=dict(n_kv_heads=cfg.n_kv_heads),
        ra_kwargs=dict(n_kv_heads=cfg.n_kv_heads, n_relations=cfg.n_relations),
        symbol_retrieval_kwargs=dict(d_model=cfg.d_model, n_heads=cfg.symbol_heads, n_symbols=cfg.n_symbols),
        dff=8 * cfg.d_model // 3 if cfg.activation == "swiglu" else 4 * cfg.d_model, norm_first=True,
        max_block_size=cfg.max_len, pos_enc_type="RoPE", bias=cfg.bias)


def attention_case(case, cfg, n, B, causal, device, dtype):
    """A function that runs the n_ra heads of cfg on (B, n, d_model) once, forward and backward.

    case: "self-attention" (as many sensory heads), a form of relational attention, or "authors".
    """
    torch.manual_seed(0)
    x, symbols = (torch.randn(B, n, cfg.d_model, device=device).requires_grad_() for _ in range(2))
    common = dict(total_heads=cfg.n_heads, n_kv_heads=cfg.n_kv_heads)
    relations = dict(n_relations=cfg.n_relations, rel_proj_dim=cfg.rel_proj_dim)
    if case == "authors":
        from dual_attention.relational_attention import RelationalAttention as Theirs
        m = Theirs(cfg.d_model, cfg.n_ra, total_n_heads=cfg.n_heads, n_kv_heads=cfg.n_kv_heads,
                   symmetric_rels=cfg.symmetric, **relations)
    elif case == "self-attention":
        m = Attention(cfg.d_model, cfg.n_ra, **common)
    else:
        m = RelationalAttention(cfg.d_model, cfg.n_ra, symmetric=cfg.symmetric, **relations, **common)
        m.choose_form = lambda *shapes: getattr(m, case)
        if cfg.symbols == "relative":
            symbols = PositionRelativeSymbols(cfg.d_model, n).to(device)
    m = m.to(device)
    leaves = [x, *m.parameters(), *([symbols] if torch.is_tensor(symbols) else symbols.parameters())]
    inputs = (x,) if case == "self-attention" else (x, symbols)
    options = {"is_causal" if case == "authors" else "causal": causal}

    def run():
        with training.autocast(device, dtype):
            out = m(*inputs, **options)
        out = out[0] if isinstance(out, tuple) else out
        for leaf in leaves:
            leaf.grad = None
        out.float().sum().backward()
    return run


def chosen(cfg, n, B, device):
    """The name of the form that RelationalAttention chooses for n tokens."""
    m = RelationalAttention(cfg.d_model, cfg.n_ra, total_heads=cfg.n_heads, n_relations=cfg.n_relations)
    q = torch.empty(B, cfg.n_ra, n, cfg.d_model // cfg.n_heads, device=device)
    return m.choose_form(q, q).__name__
