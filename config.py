"""Every choice that a model of this repository offers, each with a default; n_ra = 0 is the standard Transformer."""
import difflib
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints


def at_least(config, **lowest):
    """Raises ValueError if a field of the dataclass is below its lowest value (None passes: it means the default)."""
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and not value >= low:                   # so that nan fails as well
            raise ValueError(f"{name}={value}: must be at least {low}")


@dataclass
class TransformerConfig:
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
    bias: bool = False                      # biases in the MLP; in LayerNorm and attention as the next two say
    norm_bias: bool | None = None           # biases in LayerNorm; default: as bias
    attention_bias: Literal["as_bias", "all", "output", "none"] = "as_bias"   # of projections; output: W_o's
    dropout: float = 0.0                    # on attention, symbol retrieval, branches and embeddings; in training only
    position: Literal["rope", "learned", "sinusoidal"] = "rope"          # how tokens know their place
    symbols: Literal["symbolic", "relative", "positional"] = "symbolic"  # who is the sender? see symbols.py
    n_symbols: int = 512                    # symbolic: size of the library
    symbol_heads: int = 4                   # symbolic: heads of the retrieval
    trainable_symbols: bool = True          # symbolic: False freezes the library at its random start
    max_distance: int | None = None         # relative: offsets beyond it share a symbol; default max_len
    shared_symbols: bool = True             # one symbol module for all layers (Remark 1); False: one per layer
    n_relations: int | None = None          # R, relations per layer (d_r); default n_ra
    rel_proj_dim: int | None = None         # width of one relation's comparison; default n_ra * d_head / R
    symmetric: bool = False                 # W_q_rel = W_k_rel
    rel_activation: Literal[                # on r
        "identity", "relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "softmax"] = "identity"
    ra_type: Literal["ra", "rca"] = "ra"    # relational attention, or relational cross-attention (ablation, App. D)
    share_qk: bool = False                  # both groups attend with the same W_q, W_k (App. B.1); needs n_sa = n_ra
    n_kv_heads: int | None = None           # key/value heads in each group (grouped-query attention); default: all
    tie_embeddings: bool = True             # token embedding = output layer
    recompute: bool = False                 # blocks run again in the backward pass: less memory, a third more work

    def __post_init__(self):
        """Raises ValueError, in one line for the reader, for what cannot be built."""
        for name, kind in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal and value not in choices:
                near = difflib.get_close_matches(str(value), choices, 1, cutoff=0.4)
                raise ValueError(f"{name}={value!r}: choose from {', '.join(choices)}"
                                 + (f"; did you mean {near[0]}?" if near else ""))
        at_least(self, n_ra=0, **{name: 1 for name in (
            "vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_len", "n_symbols", "symbol_heads",
            "max_distance", "n_relations", "rel_proj_dim", "n_kv_heads")})
        if self.n_ra > self.n_heads:
            raise ValueError(f"n_ra={self.n_ra}: only n_heads={self.n_heads} heads to choose from; "
                             f"give 0 to {self.n_heads}, or raise --n_heads")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")
        if self.position == "rope" and self.d_model // self.n_heads % 2:
            raise ValueError(f"rotary positions turn pairs of features: d_model / n_heads = "
                             f"{self.d_model // self.n_heads} must be even")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        for group, n in (("n_sa", self.n_sa), ("n_ra", self.n_ra)):
            if self.n_kv_heads and n % self.n_kv_heads:
                raise ValueError(f"n_kv_heads={self.n_kv_heads} does not divide {group}={n}")
        if self.share_qk and self.n_ra and self.n_sa != self.n_ra:
            raise ValueError(f"share_qk needs as many sensory as relational heads, not {self.n_sa}+{self.n_ra}")
        if self.n_ra and self.symbols == "symbolic" and self.d_model % self.symbol_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of symbol_heads={self.symbol_heads}")
        relational_width = self.n_ra * (self.d_model // self.n_heads)
        if self.n_relations and self.rel_proj_dim is None and relational_width % self.n_relations:
            raise ValueError(f"n_relations={self.n_relations} does not divide n_ra * d_head = {relational_width}: "
                             f"give --rel_proj_dim too")

    @property
    def n_sa(self):
        """Number of sensory (self-attention) heads."""
        return self.n_heads - self.n_ra

    @property
    def attention_biases(self):
        """Of a group of heads, as arguments: biases in the projections that it reads with, and in W_o."""
        kind = self.attention_bias
        if kind == "as_bias":
            kind = "all" if self.bias else "none"
        return dict(bias=kind == "all", output_bias=kind != "none")


def model_config(options):
    """The TransformerConfig among a script's options (a dict).

    An option dat_x replaces x where there are relational heads: the published DATs and Transformers differ in more.
    """
    values = {f.name: options[f.name] for f in fields(TransformerConfig)}
    if options["n_ra"]:
        values |= {name.removeprefix("dat_"): value for name, value in options.items()
                   if name.startswith("dat_") and value not in (None, "as_the_other")}
    return TransformerConfig(**values)
