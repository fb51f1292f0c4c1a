"""The Dual Attention Transformer: sensory and relational heads side by side in every layer. Read it top to bottom.

    TransformerConfig   every choice there is, each with a default
    DualAttention       Algorithm 1: two groups of heads, concatenated
    EncoderBlock        Algorithm 2      DecoderBlock   Algorithm 3 (adds cross-attention)
    Stack               positions, symbols, L blocks and a norm: what stands between the embedding and the head
    LanguageModel       next-token prediction, generation with a KV cache
    VisionTransformer   images, cut into patches, to classes
    Seq2SeqTransformer  a sequence to a sequence: an encoder, and a decoder that attends to its output

n_ra = 0 is the standard Transformer: the same code, without a relational group and without symbols.
"""
import difflib
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import Attention, Cache, as_in_autocast, rope_table, sinusoids
from extras.shaw import ShawAttention
from generation import evaluating, stream
from relational_attention import REL_ACTIVATIONS, RelationalAttention, RelationalCrossAttention
from symbols import make_symbols
from workspace import GlobalWorkspace, workspaces


@dataclass
class TransformerConfig:
    # model
    vocab_size: int = 256                   # number of different tokens
    d_model: int = 128                      # width of the residual stream
    n_layers: int = 4                       # number of blocks
    n_heads: int = 8                        # all heads of a layer, sensory and relational
    n_ra: int = 4                           # how many of them are relational (n_sa = n_heads - n_ra); 0: Transformer
    d_ff: int | None = None                 # width of the MLP; default 4 d_model, or 8/3 d_model for swiglu
    max_len: int = 128                      # longest sequence
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu"] = "gelu"   # of the MLP; see model.MLP
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"                  # kind of normalisation
    norm_first: bool = True                 # pre-norm, as run in most experiments; False: post-norm, Algorithms 2 and 3
    final_norm: bool = True                 # one more norm after the last block
    bias: bool = False                      # biases in the MLP, and elsewhere unless the next two say otherwise
    norm_bias: bool | None = None           # biases in LayerNorm; default: as bias
    attention_bias: Literal["as_bias", "all", "output", "none"] = "as_bias"   # of projections; output: of W_o only
    dropout: float = 0.0                    # on attention, symbol retrieval, branches and embeddings; in training only
    position: Literal["rope", "learned", "sinusoidal", "shaw"] = "rope"  # how tokens know their place; extras/shaw.py
    n_kv_heads: int | None = None           # key/value heads in each group (grouped-query attention); default: all
    tie_embeddings: bool = True             # token embedding = output layer
    recompute: bool = False                 # activation checkpointing of blocks: less memory, a third more work
    # relational heads
    symbols: Literal["symbolic", "relative", "positional", "none"] = "symbolic"   # who is the sender? see symbols.py
    n_symbols: int = 512                    # symbolic: size of the library
    symbol_heads: int = 4                   # symbolic: heads of the retrieval
    trainable_symbols: bool = True          # symbolic: False freezes the library at its random start
    max_distance: int | None = None         # relative: offsets beyond it share a symbol; default max_len (shaw: 16)
    shared_symbols: bool = True             # layers share one symbol module (Remark 1); False: one per layer
    n_relations: int | None = None          # R, relations per layer (the paper's d_r); default n_ra
    rel_proj_dim: int | None = None         # p, features that one relation compares; default n_ra * d_h / R
    symmetric: bool = False                 # W_q_rel = W_k_rel
    rel_activation: Literal[tuple(REL_ACTIVATIONS)] = "identity"         # on r
    ra_type: Literal["ra", "rca"] = "ra"    # relational attention, or relational cross-attention (ablation, App. D)
    share_qk: bool = False                  # both groups attend with the same W_q, W_k (App. B.1); needs n_sa = n_ra
    # global workspace
    memory_slots: int = 0                   # M, slots of the memory beside each MLP: see workspace.py; 0: none
    memory_width: int = 16                  # D, numbers in a slot
    memory_heads: int = 4                   # S, heads in which tokens compete for a slot
    bottleneck: int = 64                    # k, how many tokens of the batch a slot attends to in each head
    memory_beta: float = 1.0                # inverse temperature of the read
    memory_decay: float = 0.9               # share of the old memory in the new one
    balance: float = 0.01                   # weight of the balance loss, in training only
    memory_queries: Literal["memory", "learned"] = "memory"   # what chooses tokens: memory, as published, or parameters
    mlp_norm: bool = False                  # a norm behind the MLP, which a workspace always has: its control

    def __post_init__(self):
        """Raises ValueError, in one line, for what cannot be built."""
        for name, kind in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal and value not in choices:
                near = difflib.get_close_matches(str(value), choices, 1, cutoff=0.4)
                raise ValueError(f"{name}={value!r}: choose from {', '.join(choices)}"
                                 + (f"; did you mean {near[0]}?" if near else ""))
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_len", "n_symbols", "symbol_heads",
                     "max_distance", "n_relations", "rel_proj_dim", "n_kv_heads", "memory_width", "memory_heads",
                     "bottleneck"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        d_h = self.d_model // self.n_heads
        for wrong, message in (
                (not 0 <= self.n_ra <= self.n_heads,
                 f"n_ra={self.n_ra}: must be between 0 and n_heads={self.n_heads}"),
                (self.d_model % self.n_heads, f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}"),
                (self.position == "rope" and d_h % 2,
                 f"rotary positions rotate pairs of features: d_model / n_heads = {d_h} must be even"),
                (self.position == "shaw" and self.n_ra,
                 f"position=shaw is for sensory heads, and n_ra={self.n_ra}: give --n_ra=0, or another --position"),
                (not 0 <= self.dropout < 1, f"dropout={self.dropout} must be at least 0 and below 1"),
                (self.n_kv_heads and (self.n_sa % self.n_kv_heads or self.n_ra % self.n_kv_heads),
                 f"n_kv_heads={self.n_kv_heads} does not divide n_sa={self.n_sa} and n_ra={self.n_ra}"),
                (self.share_qk and self.n_ra and self.n_sa != self.n_ra,
                 f"share_qk needs as many sensory as relational heads, not {self.n_sa}+{self.n_ra}"),
                (self.n_ra and self.symbols == "symbolic" and self.d_model % self.symbol_heads,
                 f"d_model={self.d_model} is not a multiple of symbol_heads={self.symbol_heads}"),
                (self.n_relations and not self.rel_proj_dim and self.n_ra * d_h % self.n_relations,
                 f"n_relations={self.n_relations} does not divide n_ra * d_h = {self.n_ra * d_h}: "
                 f"give --rel_proj_dim too"),
                (self.memory_slots < 0, f"memory_slots={self.memory_slots}: must be at least 0 (no memory)"),
                (not 0 < self.memory_beta < float("inf"), f"memory_beta={self.memory_beta} must be above 0 and finite"),
                (not 0 <= self.memory_decay <= 1, f"memory_decay={self.memory_decay} must be between 0 and 1"),
                (not 0 <= self.balance < float("inf"), f"balance={self.balance} must be at least 0 and finite"),
                (self.memory_slots and self.recompute,
                 "recompute runs a block twice, and a workspace would write twice: give --memory_slots=0, or leave "
                 "--recompute out")):
            if wrong:
                raise ValueError(message)

    @property
    def n_sa(self):
        """Number of sensory (self-attention) heads."""
        return self.n_heads - self.n_ra

    @property
    def attention_biases(self):
        """Arguments of a group of heads: are there biases in its input projections, and in W_o?"""
        kind = ("all" if self.bias else "none") if self.attention_bias == "as_bias" else self.attention_bias
        return dict(bias=kind == "all", output_bias=kind != "none")


def model_config(options):
    """The TransformerConfig among a script's options (a dict).

    dat_bias, if given, replaces bias in a DAT, and so on; the baseline keeps bias. (The published pairs differ so.)
    """
    values = {f.name: options[f.name] for f in fields(TransformerConfig)}
    if options["n_ra"]:
        values |= {name.removeprefix("dat_"): value for name, value in options.items()
                   if name.startswith("dat_") and value not in (None, "as_the_other")}
    return TransformerConfig(**values)


class DualAttention(nn.Module):
    """Algorithm 1: sensory heads e and relational heads a attend to the same x; the output is concat(e, a).

    Each group has its own output projection, and the layer has no further one on top that would mix them.
    """

    def __init__(self, cfg):
        super().__init__()
        common = dict(total_heads=cfg.n_heads, n_kv_heads=cfg.n_kv_heads, dropout=cfg.dropout, **cfg.attention_biases)
        self.sensory = self.relational = None
        if cfg.n_sa:
            attention = Attention
            if cfg.position == "shaw":
                attention = partial(ShawAttention, max_distance=cfg.max_distance or 16)
            self.sensory = attention(cfg.d_model, cfg.n_sa, **common)
        if cfg.n_ra and cfg.ra_type == "ra":
            self.relational = RelationalAttention(
                cfg.d_model, cfg.n_ra, n_relations=cfg.n_relations, rel_proj_dim=cfg.rel_proj_dim,
                symmetric=cfg.symmetric, rel_activation=cfg.rel_activation, **common)
        elif cfg.n_ra:
            self.relational = RelationalCrossAttention(cfg.d_model, cfg.n_ra, **common)
        if cfg.share_qk and cfg.n_ra:
            self.relational.W_q, self.relational.W_k = self.sensory.W_q, self.sensory.W_k

    def forward(self, x, symbols=None, *, causal=False, mask=None, rope=None, cache=None):
        """x (B, T, d_model), symbols as in RelationalAttention -> (B, T, d_model)."""
        x, groups = as_in_autocast(x), []
        if self.sensory is not None:                                 # e W_o: (B, T, n_sa * d_h)
            groups.append(self.sensory(x, causal=causal, mask=mask, rope=rope, cache=cache))
        if self.relational is not None:                              # a W_o: (B, T, n_ra * d_h)
            groups.append(self.relational(x, symbols, causal=causal, mask=mask, rope=rope, cache=cache))
        return groups[0] if len(groups) == 1 else torch.cat(groups, -1)


class MLP(nn.Module):
    """W_2 f(W_1 x), or with SwiGLU (Shazeer, 2020): W_2 (silu(W_1 x) * W_3 x).

    gelu_tanh is the approximation that GPT-2 and the authors' checkpoints use; on a CPU it is slower than gelu itself.
    """

    def __init__(self, cfg):
        super().__init__()
        # paper: 4 d_model; here: 8/3 for SwiGLU, as the authors' code since July 2024: the same number of parameters
        d_ff = cfg.d_ff or (8 * cfg.d_model // 3 if cfg.activation == "swiglu" else 4 * cfg.d_model)
        self.f = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu,
                  "swiglu": F.silu}[cfg.activation]
        self.W_1 = nn.Linear(cfg.d_model, d_ff, bias=cfg.bias)
        self.W_2 = nn.Linear(d_ff, cfg.d_model, bias=cfg.bias)
        self.W_3 = nn.Linear(cfg.d_model, d_ff, bias=cfg.bias) if cfg.activation == "swiglu" else None

    def forward(self, x):
        """(B, T, d_model) -> (B, T, d_model), each token by itself."""
        h = self.f(self.W_1(x))                                      # (B, T, d_ff)
        return self.W_2(h if self.W_3 is None else h * self.W_3(x))


def make_norm(cfg):
    """(B, T, d_model) -> the same shape."""
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.d_model, eps=1e-5)
    return nn.LayerNorm(cfg.d_model, bias=cfg.bias if cfg.norm_bias is None else cfg.norm_bias)


def make_mlp(cfg):
    """(B, T, d_model) -> the same shape: the MLP, with a norm behind it, or the workspace that contains both."""
    if not cfg.memory_slots and not cfg.mlp_norm:
        return MLP(cfg)
    mlp = nn.Sequential(MLP(cfg), make_norm(cfg))
    if not cfg.memory_slots:
        return mlp
    return GlobalWorkspace(cfg.d_model, mlp, slots=cfg.memory_slots, width=cfg.memory_width, heads=cfg.memory_heads,
                           bottleneck=cfg.bottleneck, beta=cfg.memory_beta, decay=cfg.memory_decay,
                           balance=cfg.balance, queries=cfg.memory_queries)


def refuse_memory(cfg):
    """Raises ValueError for a memory in a model that reads text."""
    if cfg.memory_slots:
        raise ValueError(f"memory_slots={cfg.memory_slots}: a workspace mixes the tokens of a whole batch, so that "
                         f"tokens would see the future: give --memory_slots=0; it is for images")


class EncoderBlock(nn.Module):
    """Algorithm 2: dual attention, then MLP. With causal=True it is the block of a language model."""

    def __init__(self, cfg):
        super().__init__()
        self.norm_first, self.dropout = cfg.norm_first, nn.Dropout(cfg.dropout)
        self.norm_attention, self.attention = make_norm(cfg), DualAttention(cfg)
        self.norm_mlp, self.mlp = make_norm(cfg), make_mlp(cfg)

    def forward(self, x, symbols=None, *, causal=False, mask=None, rope=None, cache=None):
        """x (B, T, d_model), symbols as in RelationalAttention or None -> (B, T, d_model)."""
        attention = partial(self.attention, symbols=symbols, causal=causal, mask=mask, rope=rope, cache=cache)
        if self.norm_first:
            x = x + self.dropout(attention(self.norm_attention(x)))
            return x + self.dropout(self.mlp(self.norm_mlp(x)))
        x = self.norm_attention(x + self.dropout(attention(x)))      # post-norm, the form of Algorithms 2 and 3
        return self.norm_mlp(x + self.dropout(self.mlp(x)))


class DecoderBlock(EncoderBlock):
    """Algorithm 3: between attention and MLP, standard cross-attention to a context y, all n_heads of it sensory."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.norm_cross = make_norm(cfg)
        self.cross = Attention(cfg.d_model, cfg.n_heads, dropout=cfg.dropout, **cfg.attention_biases)

    def forward(self, x, symbols=None, *, context, context_mask=None, causal=False, mask=None, rope=None, cache=None):
        """x (B, T, d_model), context (B, S, d_model), context_mask (B, S) -> (B, T, d_model)."""
        attention = partial(self.attention, symbols=symbols, causal=causal, mask=mask, rope=rope, cache=cache)
        cross = partial(self.cross, context=context, mask=context_mask, cache=cache)
        if self.norm_first:
            x = x + self.dropout(attention(self.norm_attention(x)))
            x = x + self.dropout(cross(self.norm_cross(x)))
            return x + self.dropout(self.mlp(self.norm_mlp(x)))
        x = self.norm_attention(x + self.dropout(attention(x)))
        x = self.norm_cross(x + self.dropout(cross(x)))
        return self.norm_mlp(x + self.dropout(self.mlp(x)))


class Stack(nn.Module):
    """From embedded tokens to contextual ones: positions, L blocks that share one symbol module, a last norm."""

    def __init__(self, cfg, block=EncoderBlock):
        super().__init__()
        self.cfg, self.dropout = cfg, nn.Dropout(cfg.dropout)
        if cfg.position == "learned":
            self.positions = nn.Embedding(cfg.max_len, cfg.d_model)
        n_modules = 0 if cfg.n_ra == 0 else 1 if cfg.shared_symbols else cfg.n_layers
        self.symbols = nn.ModuleList(make_symbols(cfg) for _ in range(n_modules))
        self.blocks = nn.ModuleList(block(cfg) for _ in range(cfg.n_layers))
        # kept with post-norm, too, as in the authors' language models
        self.norm = make_norm(cfg) if cfg.final_norm else nn.Identity()

    def forward(self, x, *, causal=False, mask=None, caches=None, padding=None, **cross):
        """x (B, T, d_model) -> (B, T, d_model); with `caches` (one per layer) x continues the tokens in them.

        padding: (B,), in place of a mask, how many of the first positions of each sequence are padding on its left.
        cross: `context` and `context_mask` of decoder blocks. Raises ValueError beyond max_len.
        """
        if x.dim() != 3:
            raise ValueError(f"a batch of sequences is needed, (B, T), not {tuple(x.shape[:-1])}")
        cfg, T, start = self.cfg, x.size(1), len(caches[0]) if caches else 0
        if start + T > cfg.max_len:
            raise ValueError(f"{start + T} tokens, but max_len={cfg.max_len}")
        same_symbols = cfg.shared_symbols and cfg.symbols != "symbolic"            # in all layers
        positions, rope, S = torch.arange(start, start + T, device=x.device), None, start + T      # (T,)
        if padding is not None:
            mask = (torch.arange(S, device=x.device) >= padding[:, None])[:, None, None]       # (B, 1, 1, S)
            positions, start = (positions - padding[:, None]).clamp(min=0), start - padding            # (B, T), (B,)
        if cfg.position == "rope":
            rope = rope_table(positions, cfg.d_model // cfg.n_heads)
        elif cfg.position == "learned":
            x = x + self.positions(positions)
        elif cfg.position == "sinusoidal":                           # scaled as in Vaswani et al., Section 3.4
            x = x * cfg.d_model ** 0.5 + sinusoids(positions, cfg.d_model).type_as(x)
        x, symbols = self.dropout(x), None
        for i, module in enumerate(self.blocks):
            if cfg.n_ra and (i == 0 or not same_symbols):            # read off the residual stream, before the norm
                symbols = self.symbols[0 if cfg.shared_symbols else i](x, start)
                if cfg.symbols == "relative":
                    symbols = symbols.by_offset(T, S)
            block = partial(module, causal=causal, mask=mask, rope=rope, **cross)
            if cfg.recompute and self.training:                      # keep a block's input only
                x = checkpoint(block, x, symbols, use_reentrant=False)
            else:
                x = block(x, symbols, cache=caches[i] if caches else None)
        return self.norm(x)


def init_weights(model, n_layers):
    """GPT-2's: biases 0, standard deviation 0.02, divided by sqrt(2 L) where the output joins the residual stream.

    S_lib and F_lib keep their start. (authors' code today, SwiGLU: W_3 is scaled instead of the output W_2)
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RelationalAttention):
            nn.init.normal_(module.W_r, std=0.02)
    for name, p in model.named_parameters():
        if name.endswith(("W_o.weight", "W_2.weight")):
            nn.init.normal_(p, std=0.02 / (2 * n_layers) ** 0.5)


def init_xavier(model, d_model):
    """Uniform of variance 2 / (fan in + fan out) (Glorot & Bengio, 2010), biases 0;
    embeddings with variance 1 / d_model. W_r, S_lib and F_lib keep their start.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=d_model ** -0.5)


class LanguageModel(nn.Module):
    """Predicts each next token from those before it: a causal Stack between embedding and output layer."""

    def __init__(self, cfg):
        super().__init__()
        refuse_memory(cfg)
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.stack = Stack(cfg)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        init_weights(self, cfg.n_layers)
        if cfg.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, idx, targets=None, caches=None):
        """idx (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), their mean cross-entropy in nats.

        Targets of -1 do not count. With caches (`new_caches`), idx continues the tokens that are in them.
        """
        x = self.stack(self.embedding(idx), causal=True, caches=caches)            # (B, T, d_model)
        logits = self.head(x)                                                      # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def new_caches(self):
        return [Cache(self.cfg.max_len) for _ in range(self.cfg.n_layers)]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True, top_p=None, mask=None):
        """Continues idx (B, T >= 1) by max_new_tokens: (B, T + max_new_tokens); see generation.py."""
        return torch.cat([idx, *stream(self, idx, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                                       use_cache=use_cache, mask=mask)], dim=1)


def patchify(images, patch_size):
    """(B, C, H, W) -> (B, patches, patch_size^2 C): row by row, and within a patch row by row, channels last."""
    p = patch_size
    return images.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class VisionTransformer(nn.Module):
    """Images to classes (Dosovitskiy et al., 2021): the tokens are patches, and each attends to all of them.

    pool: "cls" reads the class token alone, "mean" averages the patches and has no class token, "mean_cls" averages
    the class token in with them, as the authors' code does. image_size: height and width, or a pair of them.
    question_size: if given, each image comes with a question of so many numbers, a token in the class token's place
    whatever `pool` is. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, cfg, *, image_size, patch_size, n_classes, pool="mean", channels=3, question_size=0):
        super().__init__()
        height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        if height % patch_size or width % patch_size:
            raise ValueError(f"image_size={image_size} is not a multiple of patch_size={patch_size}")
        if pool not in ("cls", "mean", "mean_cls"):
            raise ValueError(f"pool={pool!r}: choose from cls, mean, mean_cls")
        self.patch_size, self.pool, self.shape = patch_size, pool, (channels, height, width)
        has_cls = pool != "mean" and not question_size
        n_tokens = (height // patch_size) * (width // patch_size) + (has_cls or question_size > 0)
        self.cfg = cfg = replace(cfg, max_len=n_tokens)
        size = patch_size ** 2 * channels
        self.embedding = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, cfg.d_model), nn.LayerNorm(cfg.d_model))
        self.cls = nn.Parameter(torch.randn(cfg.d_model)) if has_cls else None
        self.question = nn.Linear(question_size, cfg.d_model) if question_size else None
        self.stack = Stack(replace(cfg, final_norm=False))                         # applied after pooling, below
        self.norm = make_norm(cfg) if cfg.final_norm else nn.Identity()
        self.head = nn.Linear(cfg.d_model, n_classes)

    def forward(self, images, targets=None, questions=None):
        """images (B, C, H, W) -> logits (B, n_classes) and, given targets, their mean cross-entropy in nats.

        targets: classes (B,), or probabilities (B, n_classes) where labels are mixed or smoothed. In training the
        balance loss of the memories, if there are any, is added. questions: (B, question_size).
        """
        if images.shape[1:] != self.shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}, but the model was made for {self.shape}")
        if (questions is None) != (self.question is None):
            raise ValueError("questions: give them if the model has a question_size, and only then")
        x = self.embedding(patchify(images, self.patch_size))                      # (B, patches, d_model)
        if self.question is not None:
            x = torch.cat([self.question(questions)[:, None], x], dim=1)           # (B, 1 + patches, d_model)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.size(0), 1, -1), x], dim=1)              # (B, 1 + patches, d_model)
        x = self.stack(x)
        x = x[:, 0] if self.pool == "cls" else x.mean(1)                           # (B, d_model)
        logits = self.head(self.norm(x))                                           # (B, n_classes)
        balance_losses = [m.take_balance_loss() for m in workspaces(self)] if self.training else []
        return logits, None if targets is None else sum(balance_losses, F.cross_entropy(logits, targets))


class Seq2SeqTransformer(nn.Module):
    """From a question to its answer: an encoder, and a causal decoder with cross-attention to the encoder's output.

    cfg describes both; the decoder may have its own number of blocks and of relational heads. Where both have
    relational heads they share one symbol module, unless shared_symbols=False. Token 0 is padding, at the end of
    questions and answers, and masked in attention.
    """

    def __init__(self, cfg, *, n_layers_decoder=None, n_ra_decoder=None):
        super().__init__()
        refuse_memory(cfg)
        self.cfg = cfg
        n_ra = cfg.n_ra if n_ra_decoder is None else n_ra_decoder
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.encoder = Stack(cfg)
        self.decoder = Stack(replace(cfg, n_layers=n_layers_decoder or cfg.n_layers, n_ra=n_ra), DecoderBlock)
        if cfg.n_ra and n_ra and cfg.shared_symbols:
            self.decoder.symbols = self.encoder.symbols
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size)
        init_xavier(self, cfg.d_model)
        if cfg.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, questions, answers, targets=None):
        """questions (B, S), answers (B, T) -> logits (B, T, vocab_size) of each answer's next token.

        Given targets (B, T), also their mean cross-entropy in nats; those of 0 do not count.
        """
        logits = self.decode(answers, *self.encode(questions))                     # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)

    def encode(self, questions):
        """(B, S) -> the context (B, S, d_model) and its mask (B, S), False at padding."""
        mask = questions != 0
        return self.encoder(self.embedding(questions), mask=mask[:, None, None]), mask

    def decode(self, answers, context, mask, caches=None):
        """(B, T) -> logits (B, T, vocab_size). Padding comes after an answer: the causal mask hides it."""
        y = self.decoder(self.embedding(answers), causal=True, context=context, context_mask=mask[:, None, None],
                         caches=caches)
        return self.head(y)

    @torch.no_grad()
    def generate(self, questions, max_new_tokens, *, start, end, use_cache=True):
        """Greedy decoding from `start` to `end`: (B, at most max_new_tokens), padded by 0.

        Raises ValueError for more new tokens than max_len, or a start outside the vocabulary.
        """
        longest = self.cfg.max_len
        if max_new_tokens > longest:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must be at most max_len={longest}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
        if not 0 <= start < self.cfg.vocab_size:
            raise ValueError(f"start={start}: must be among the {self.cfg.vocab_size} tokens")
        with evaluating(self):
            context, mask = self.encode(questions)
            caches = [Cache(max_new_tokens) for _ in self.decoder.blocks] if use_cache else None
            answers = questions.new_full((len(questions), 1), start)
            ended = torch.zeros(len(questions), 1, dtype=torch.bool, device=questions.device)
            for _ in range(max_new_tokens):
                logits = self.decode(answers[:, -1:] if use_cache else answers, context, mask, caches)
                token = logits[:, -1].argmax(-1, keepdim=True).masked_fill(ended, 0)              # (B, 1)
                answers, ended = torch.cat([answers, token], dim=1), ended | (token == end)
                if ended.all():
                    break
        return answers[:, 1:]
