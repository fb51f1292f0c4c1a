"""The Dual Attention Transformer: sensory and relational heads side by side in every layer. Read it top to bottom.

    DualAttention       Algorithm 1: two groups of heads, concatenated
    EncoderBlock        Algorithm 2      DecoderBlock   Algorithm 3 (adds cross-attention)
    Stack               positions, symbols, L blocks and a norm: what stands between the embedding and the head
    LanguageModel       next-token prediction, generation with a KV cache
    VisionTransformer   images, cut into patches, to classes
    Seq2SeqTransformer  a sequence to a sequence: encoder, and a decoder that looks at it

n_ra = 0 is the standard Transformer: the same code, without a relational group and without symbols.
"""
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import Attention, Cache, rope_table, sinusoids
from config import TransformerConfig                                 # noqa: F401  (scripts find it here, too)
from generation import stream
from relational_attention import RelationalAttention, RelationalCrossAttention
from symbols import make_symbols


class DualAttention(nn.Module):
    """Algorithm 1: sensory heads e and relational heads a look at the same x; the output is concat(e, a).

    Each group has its own output projection, and the layer has no further one on top that would mix them.
    """

    def __init__(self, cfg):
        super().__init__()
        common = dict(total_heads=cfg.n_heads, n_kv_heads=cfg.n_kv_heads, dropout=cfg.dropout, **cfg.attention_biases)
        self.sensory = self.relational = None
        if cfg.n_sa:
            self.sensory = Attention(cfg.d_model, cfg.n_sa, **common)
        if cfg.n_ra and cfg.ra_type == "ra":
            self.relational = RelationalAttention(
                cfg.d_model, cfg.n_ra, n_relations=cfg.n_relations, rel_proj_dim=cfg.rel_proj_dim,
                symmetric=cfg.symmetric, rel_activation=cfg.rel_activation, **common)
        elif cfg.n_ra:
            self.relational = RelationalCrossAttention(cfg.d_model, cfg.n_ra, **common)
        if cfg.share_qk and cfg.n_ra:
            self.relational.W_q, self.relational.W_k = self.sensory.W_q, self.sensory.W_k

    def forward(self, x, symbols=None, **how):
        """x (B, T, d_model), symbols as in RelationalAttention -> (B, T, d_model). how: causal, mask, rope, cache."""
        groups = []
        if self.sensory is not None:
            groups.append(self.sensory(x, **how))                    # e: (B, T, n_sa * d_h)
        if self.relational is not None:
            groups.append(self.relational(x, symbols, **how))        # a: (B, T, n_ra * d_h)
        return groups[0] if len(groups) == 1 else torch.cat(groups, -1)


class MLP(nn.Module):
    """W_2 f(W_1 x), or with SwiGLU (Shazeer, 2020): W_2 (silu(W_1 x) * W_3 x).

    gelu_tanh is the approximation that GPT-2 and the authors' checkpoints use; on a CPU it is slower than gelu itself.
    """

    def __init__(self, cfg):
        super().__init__()
        # paper: 4 d_model; here: 8/3 for SwiGLU, as the authors' code ran it: all kinds have equally many weights
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


class Residual(nn.Module):
    """A branch f with its norm: x + f(Norm(x)) if norm_first, else Norm(x + f(x)), the form of Algorithms 2 and 3."""

    def __init__(self, cfg):
        super().__init__()
        self.norm, self.norm_first, self.dropout = make_norm(cfg), cfg.norm_first, nn.Dropout(cfg.dropout)

    def forward(self, x, f):
        if self.norm_first:
            return x + self.dropout(f(self.norm(x)))
        return self.norm(x + self.dropout(f(x)))


class EncoderBlock(nn.Module):
    """Algorithm 2: dual attention, then MLP. With causal=True it is the block of a language model.

    **how (causal, mask, rope, cache) goes down to the heads as it is: see RelationalAttention.forward.
    """

    def __init__(self, cfg):
        super().__init__()
        self.residual_attention, self.attention = Residual(cfg), DualAttention(cfg)
        self.residual_mlp, self.mlp = Residual(cfg), MLP(cfg)

    def forward(self, x, symbols=None, **how):
        """x (B, T, d_model), symbols as in RelationalAttention or None -> (B, T, d_model)."""
        x = self.residual_attention(x, lambda x: self.attention(x, symbols, **how))
        return self.residual_mlp(x, self.mlp)


class DecoderBlock(EncoderBlock):
    """Algorithm 3: between the two, standard cross-attention to a context y, all n_heads of it sensory."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.residual_cross = Residual(cfg)
        self.cross = Attention(cfg.d_model, cfg.n_heads, dropout=cfg.dropout, **cfg.attention_biases)

    def forward(self, x, symbols=None, *, context, context_mask=None, cache=None, **how):
        """x (B, T, d_model), context (B, S, d_model), context_mask (B, S) -> (B, T, d_model)."""
        x = self.residual_attention(x, lambda x: self.attention(x, symbols, cache=cache, **how))
        x = self.residual_cross(x, lambda x: self.cross(x, context, mask=context_mask, cache=cache))
        return self.residual_mlp(x, self.mlp)


class Stack(nn.Module):
    """From embedded tokens to contextual ones: positions, L blocks that share one source of symbols, a last norm."""

    def __init__(self, cfg, block=EncoderBlock):
        super().__init__()
        self.cfg, self.dropout = cfg, nn.Dropout(cfg.dropout)
        if cfg.position == "learned":
            self.positions = nn.Embedding(cfg.max_len, cfg.d_model)
        elif cfg.position == "sinusoidal":
            self.register_buffer("positions", sinusoids(cfg.max_len, cfg.d_model), persistent=False)
        else:
            self.register_buffer("rope", rope_table(cfg.max_len, cfg.d_model // cfg.n_heads), persistent=False)
        n_retrievers = 0 if cfg.n_ra == 0 else 1 if cfg.shared_symbols else cfg.n_layers
        self.symbols = nn.ModuleList(make_symbols(cfg) for _ in range(n_retrievers))
        self.blocks = nn.ModuleList(block(cfg) for _ in range(cfg.n_layers))
        # after post-norm too, as in the authors' language models
        self.norm = make_norm(cfg) if cfg.final_norm else nn.Identity()

    def forward(self, x, *, caches=None, **how):
        """x (B, T, d_model) -> (B, T, d_model); with `caches` (one per layer) x continues what they remember.

        how: causal, mask, and for decoder blocks context, context_mask. Raises ValueError beyond max_len.
        """
        T, start = x.size(1), len(caches[0]) if caches else 0        # x stands at the positions start ... start + T - 1
        if start + T > self.cfg.max_len:
            raise ValueError(f"{start + T} tokens, but max_len={self.cfg.max_len}")
        if self.cfg.position == "rope":
            how["rope"] = self.rope[:, start:start + T]
        elif self.cfg.position == "learned":
            x = x + self.positions.weight[start:start + T]
        else:
            x = x * self.cfg.d_model ** 0.5 + self.positions[start:start + T]      # Vaswani et al., Section 3.4
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            # symbols are read off the residual stream, before the block's norm (Remark 1: by one module for all layers)
            symbols = self.symbols[i % len(self.symbols)](x, start) if len(self.symbols) else None
            if self.cfg.recompute and self.training:
                x = checkpoint(block, x, symbols, use_reentrant=False, **how)    # forgets what is inside, makes it anew
            else:
                x = block(x, symbols, cache=caches[i] if caches else None, **how)
        return self.norm(x)


def init_weights(model, n_layers):
    """GPT-2's: N(0, 0.02), biases 0, projections that write to the residual stream smaller by sqrt(2 L).

    Symbols keep their start. (authors' code: with SwiGLU the linear branch W_3 is scaled instead of the output W_2)
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
    """Vaswani et al.'s: uniform of variance 2 / (fan in + fan out), biases 0; embeddings N(0, 1/d_model).

    W_r and symbols keep their start.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=d_model ** -0.5)


class LanguageModel(nn.Module):
    """Predicts each next token from those before it: a causal Stack between an embedding and its transpose."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.stack = Stack(cfg)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        init_weights(self, cfg.n_layers)
        if cfg.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, idx, targets=None, caches=None):
        """idx (B, T) -> logits (B, T, vocab_size) and, given targets (B, T), their mean cross-entropy in nats.

        Targets of -1 do not count. With caches (`new_caches`), idx continues the tokens that they remember.
        """
        x = self.stack(self.embedding(idx), causal=True, caches=caches)            # (B, T, d_model)
        logits = self.head(x)                                                      # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def new_caches(self):
        return [Cache(self.cfg.max_len) for _ in range(self.cfg.n_layers)]

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True, top_p=None):
        """Continues idx (B, T >= 1) by max_new_tokens: (B, T + max_new_tokens); see generation.py."""
        return torch.cat([idx, *stream(self, idx, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                                       use_cache=use_cache)], dim=1)


def patchify(images, patch_size):
    """(B, C, H, W) -> (B, patches, patch_size^2 C): row by row, and within a patch row by row, colours last."""
    p = patch_size
    return images.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class VisionTransformer(nn.Module):
    """Images to classes (Dosovitskiy et al., 2021): patches are the tokens, and everybody may look at everybody.

    pool: "cls" reads the class token alone, "mean" averages the patches and has no class token, "mean_cls" averages
    the class token in with them, as the authors' code does. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, cfg, *, image_size, patch_size, n_classes, pool="mean", channels=3):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size} is not a multiple of patch_size={patch_size}")
        if pool not in ("cls", "mean", "mean_cls"):
            raise ValueError(f"pool={pool!r}: choose from cls, mean, mean_cls")
        self.patch_size, self.pool, self.shape = patch_size, pool, (channels, image_size, image_size)
        n_tokens = (image_size // patch_size) ** 2 + (pool != "mean")
        self.cfg = cfg = replace(cfg, max_len=n_tokens)
        width = patch_size ** 2 * channels
        self.embedding = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, cfg.d_model), nn.LayerNorm(cfg.d_model))
        self.cls = nn.Parameter(torch.randn(cfg.d_model)) if pool != "mean" else None
        self.stack = Stack(replace(cfg, final_norm=False))                         # the norm is of what was pooled
        self.norm = make_norm(cfg) if cfg.final_norm else nn.Identity()
        self.head = nn.Linear(cfg.d_model, n_classes)

    def forward(self, images, targets=None):
        """images (B, C, H, W) -> logits (B, n_classes) and, given targets, their mean cross-entropy in nats.

        targets: classes (B,), or probabilities (B, n_classes) where labels are mixed or smoothed.
        """
        if images.shape[1:] != self.shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}, but the model was made for {self.shape}")
        x = self.embedding(patchify(images, self.patch_size))                      # (B, patches, d_model)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)              # (B, 1 + patches, d_model)
        x = self.stack(x)
        x = x[:, 0] if self.pool == "cls" else x.mean(1)                           # (B, d_model)
        logits = self.head(self.norm(x))                                           # (B, n_classes)
        return logits, None if targets is None else F.cross_entropy(logits, targets)


class Seq2SeqTransformer(nn.Module):
    """Reads a question, writes its answer: an encoder, and a causal decoder that looks at what the encoder made of it.

    cfg describes both; the decoder may have its own number of blocks and of relational heads. Both name senders out of
    one library of symbols. Token 0 is padding, at the end of questions and answers: nobody attends to it.
    """

    def __init__(self, cfg, *, n_layers_decoder=None, n_ra_decoder=None):
        super().__init__()
        self.cfg = cfg
        n_ra = cfg.n_ra if n_ra_decoder is None else n_ra_decoder
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.encoder = Stack(cfg)
        self.decoder = Stack(replace(cfg, n_layers=n_layers_decoder or cfg.n_layers, n_ra=n_ra), DecoderBlock)
        if cfg.n_ra and n_ra:
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
        """(B, S) -> the context (B, S, d_model), and where it is not padding (B, S)."""
        mask = questions != 0
        return self.encoder(self.embedding(questions), mask=mask), mask

    def decode(self, answers, context, mask, caches=None):
        """(B, T) -> logits (B, T, vocab_size). Padding comes after an answer, so causality alone hides it."""
        y = self.decoder(self.embedding(answers), causal=True, context=context, context_mask=mask, caches=caches)
        return self.head(y)

    @torch.no_grad()
    def generate(self, questions, max_new_tokens, *, start, end, use_cache=True):
        """The likeliest token after `start`, then after that, up to `end`: (B, at most max_new_tokens), padded by 0."""
        was_training = self.training
        self.eval()
        context, mask = self.encode(questions)
        caches = [Cache(max_new_tokens) for _ in self.decoder.blocks] if use_cache else None
        answers = questions.new_full((len(questions), 1), start)
        ended = torch.zeros(len(questions), 1, dtype=torch.bool, device=questions.device)
        for _ in range(max_new_tokens):
            logits = self.decode(answers[:, -1:] if use_cache else answers, context, mask, caches)
            token = logits[:, -1].argmax(-1, keepdim=True).masked_fill(ended, 0)                  # (B, 1)
            answers, ended = torch.cat([answers, token], dim=1), ended | (token == end)
            if ended.all():
                break
        self.train(was_training)
        return answers[:, 1:]
