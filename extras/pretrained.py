"""Loads the authors' published checkpoints into our LanguageModel.

    model = load_pretrained("awni00/DAT-sa8-ra8-ns1024-sh8-nkvh4-343M")        # downloads 1.4 GB, once
    model = load_pretrained("folder/with/config.json and model.safetensors")

A checkpoint is two files: config.json, the constructor arguments of a model in their package dual_attention (version
0.0.7: DualAttnTransformerLM, or the baseline TransformerLM), and model.safetensors, named tensors. This file translates
first the arguments, then the names of tensors, then the tensors. Neither file is trusted: anything unknown, missing,
left over or of the wrong shape raises a ValueError of one line before much memory is allocated.

Their layers compute the same functions as ours, with weights that are arranged differently:
  - their rotary positions rotate the features 2m and 2m + 1 of a head, ours m and m + d_h/2: rows of W_q, W_k move
  - they store W_r as (H, d_h, R), we as (H, R, d_h)
  - where only some of their projections in attention have biases, the others get biases of zero in our model
Their "bias": false leaves the biases in LayerNorm and, in a DAT, also those in the MLP.
"""
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data.download import HUB, download
from extras.safetensors import brief, read_header, read_json, some
from model import LanguageModel, TransformerConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_pretrained(name_or_folder, data_dir="data/cache"):
    """The LanguageModel (float32, eval mode) in a folder, or with a Hugging Face name, downloaded into data_dir.

    Raises ValueError, in one line, for files that are damaged or describe a model that ours cannot express, and
    data.download.DownloadError if a download fails.
    """
    folder, name = Path(name_or_folder), str(name_or_folder)
    remote = not folder.is_dir()
    if remote:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
            raise ValueError(f"{brief(name)} is neither a folder nor a Hugging Face name: give a folder with "
                             f"{CONFIG} and {WEIGHTS}, or owner/name such as awni00/DAT-sa8-ra8-ns1024-sh8-nkvh4-343M")
        folder = Path(data_dir) / name.replace("/", "--")
        download(f"{HUB}/{name}/resolve/main/{CONFIG}", folder / CONFIG, check=read_config)
    with in_file(folder / CONFIG):
        cfg, layout = translate(read_config(folder / CONFIG))        # before the large download, which may be useless
    if remote:
        download(f"{HUB}/{name}/resolve/main/{WEIGHTS}", folder / WEIGHTS, check=read_header)
    with in_file(folder / WEIGHTS):
        entries = read_header(folder / WEIGHTS)
        if 8 * cfg.n_layers > len(entries):                          # a layer has 8 or more; n_layers may be huge
            raise ValueError(f"{len(entries)} tensors are too few for the {cfg.n_layers} layers in {CONFIG}")
        with torch.device("meta"):                                   # shapes without memory or random values
            model = build(cfg, layout)
        fill(model, layout, entries, match(model, layout, entries), folder / WEIGHTS)
    return model.eval()


def is_published(name):
    """Whether this is a folder with a published checkpoint, or the Hugging Face name (owner/name) of one."""
    path = Path(name)
    return (path / WEIGHTS).is_file() or len(path.parts) == 2 and not path.parent.exists()


def read_config(path):
    """The arguments in a config.json, unchecked."""
    with open(path, "rb") as file:
        return read_json(file, Path(path).stat().st_size)


def build(cfg, layout):
    """The model with the tensors that are tied in their model tied."""
    model = LanguageModel(cfg)
    for symbols in model.stack.symbols if layout.tied_library else ():
        symbols.library = model.stack.symbols[0].library
    return model


@contextmanager
def in_file(path):
    """Turns the ValueError or OSError of its body into a ValueError of one line that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"no file {path}: a checkpoint is a folder with {CONFIG} and {WEIGHTS}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


# ---- arguments: name = its default in their constructors, or its type if it has none, or (type, default) -------------

COMMON = dict(vocab_size=int, d_model=int, n_layers=int, dff=(int, None), dropout_rate=float, activation=str,
              norm_first=bool, norm_type="layernorm", max_block_size=int, pos_enc_type="pos_emb", bias=True)
BASELINE = COMMON | dict(n_heads=int, block_kwargs={},
                         use_flash_attention=True)                   # no effect: the same function by another kernel
# in a DAT `bias` has no effect: their code does not pass it on
DAT = COMMON | dict(n_heads_sa=int, n_heads_ra=int, sa_kwargs={}, ra_kwargs={}, ra_type="relational_attention",
                    share_attn_params=False, symbol_retrieval="symbolic_attention", symbol_retrieval_kwargs=dict,
                    symbol_retriever_config={})
KEYS = dict(key_dim=(int, None), n_kv_heads=(int, None), add_bias_kv=False)
HEADS = KEYS | dict(add_bias_out=False)
RELATIONAL = HEADS | dict(n_relations=(int, None), rel_proj_dim=(int, None), rel_activation="identity",
                          symmetric_rels=False, use_relative_positional_symbols=False)
RETRIEVERS = dict(shared_symbol_retriever=True, weight_tie_symbol_library=False)
SYMBOLS = dict(
    symbolic_attention=dict(d_model=int, n_heads=int, n_symbols=int, scale=(float, None), trainable_symbols=True,
                            dropout=0.0),   # no effect here: ours is dropout_rate; theirs also drops in evaluation
    positional_symbols=dict(symbol_dim=int, max_length=int, sinusoidal=False),     # the last is never read
    position_relative=dict(symbol_dim=int, max_rel_pos=int))
WORDS = {int: "an integer from 0 to 1,000,000", float: "a number from 0 to 1,000,000", bool: "true or false",
         str: "a word", dict: "an object"}


def arguments(given, known, where=""):
    """The arguments with defaults filled in. Raises ValueError for unknown, missing or wrongly typed ones."""
    if unknown := [where + name for name in given if name not in known]:
        raise ValueError(f"unknown: {some(unknown)}; known: {', '.join(where + name for name in known)}")
    values = {}
    for name, default in known.items():
        if type(default) is type:
            default = (default, ...)                                 # no default: required
        kind, default = default if type(default) is tuple else (type(default), default)
        value = given.get(name, default)
        if value is ...:
            raise ValueError(f"{where}{name} is missing")
        if value is None and not default:                            # null: their code treats it as the default
            value = default
        elif type(value) not in ((int, float) if kind is float else (kind,)) or (
                kind in (int, float) and not 0 <= value <= 10 ** 6):
            raise ValueError(f"{where}{name} must be {WORDS[kind]}, not {brief(value)}")
        values[name] = value
    return values


def one_of(name, value, choices, why=""):
    """choices[value]. Raises ValueError if there is none."""
    if value not in choices:
        raise ValueError(f"{name}={brief(value)} cannot be loaded, only {', '.join(map(str, choices))}{why}")
    return choices[value]


@dataclass
class Layout:
    """What determines the tensors in the file besides the TransformerConfig."""
    sensory: str                                                     # their name for the sensory heads
    zeros: tuple                                                     # ends of names of biases that only our model has
    rows: dict                                                       # lengths of tables, which may exceed max_len
    library: str = ""                                                # their name for S_lib
    tied_library: bool = False                                       # a symbol module per layer, but one library
    scale: float = 1.0                                               # of symbolic attention's scores, relative to ours
    unused: str = "$^"                                               # regular expression of tensors that have no effect


def translate(given):
    """Their config.json -> (TransformerConfig, Layout). Raises ValueError for what our model cannot express."""
    is_dat = "n_heads_sa" in given or "n_heads_ra" in given
    a = arguments(given, DAT if is_dat else BASELINE)
    if is_dat:
        n_sa, sa = a["n_heads_sa"], arguments(a["sa_kwargs"], HEADS, "sa_kwargs.")
        n_ra, ra = a["n_heads_ra"], arguments(a["ra_kwargs"], RELATIONAL, "ra_kwargs.")
    else:
        block = arguments(a["block_kwargs"], dict(attn_kwargs={}), "block_kwargs.")
        n_sa, sa = a["n_heads"], arguments(block["attn_kwargs"], KEYS, "attn_kwargs.") | dict(add_bias_out=a["bias"])
        n_ra, ra = 0, arguments({}, RELATIONAL)
    zeros = tuple(f"attention.{name}.{ours}.bias" for name, group in (("sensory", sa), ("relational", ra))
                  for ours, argument in BIASES.items() if not group.get(argument))
    layout = Layout("dual_attn.self_attention" if is_dat else "self_attn", zeros,
                    {"stack.positions": a["max_block_size"]})
    groups = [(group, n) for group, n in ((sa, n_sa), (ra, n_ra)) if n]
    kv, out = (any(group[argument] for group, _ in groups) for argument in ("add_bias_kv", "add_bias_out"))
    fields = dict(
        vocab_size=a["vocab_size"], d_model=a["d_model"], n_layers=a["n_layers"], n_heads=n_sa + n_ra, n_ra=n_ra,
        d_ff=a["dff"], max_len=a["max_block_size"], norm_first=a["norm_first"], dropout=a["dropout_rate"],
        norm=one_of("norm_type", a["norm_type"], dict(layernorm="layernorm", rmsnorm="rmsnorm")),
        activation=one_of("activation", a["activation"],             # their gelu is gelu_tanh
                          dict(relu="relu", gelu="gelu_tanh", silu="silu", swiglu="swiglu")),
        bias=is_dat or a["bias"], norm_bias=True, attention_bias="all" if kv else "output" if out else "none",
        position=one_of("pos_enc_type", a["pos_enc_type"], dict(RoPE="rope", pos_emb="learned")),
        n_kv_heads=key_value_heads(a["d_model"], groups))
    if n_ra:
        fields |= translate_relational(a, ra, layout)
    elif is_dat:
        layout.unused = r"layers\.symbol_retrievers\..*"             # computed even if no head uses them
    return TransformerConfig(**fields), layout


def key_value_heads(d_model, groups):
    """Our n_kv_heads: one number for both groups, or None for as many as each group has heads."""
    for group, _ in groups:
        one_of("key_dim", group["key_dim"], {None: None, d_model // sum(n for _, n in groups): None},
               ": our heads have the width d_model / n_heads")
    if all(group["n_kv_heads"] in (None, n) for group, n in groups):
        return None
    first, *other = (n if group["n_kv_heads"] is None else group["n_kv_heads"] for group, n in groups)
    if other and other != [first]:
        raise ValueError(f"n_kv_heads is {first} in sensory and {other[0]} in relational heads: ours is one for both")
    return first


def translate_relational(a, ra, layout):
    """The fields of TransformerConfig for relations and symbols."""
    one_of("ra_type", a["ra_type"], {"relational_attention": None}, ": others raise NameError in the authors' package")
    kind = a["symbol_retrieval"]
    s = arguments(a["symbol_retrieval_kwargs"], one_of("symbol_retrieval", kind, SYMBOLS), "symbol_retrieval_kwargs.")
    retrievers = arguments(a["symbol_retriever_config"], RETRIEVERS, "symbol_retriever_config.")
    shared = retrievers["shared_symbol_retriever"]
    layout.tied_library = retrievers["weight_tie_symbol_library"] and not shared
    if (width := s.get("d_model", s.get("symbol_dim"))) != a["d_model"]:
        raise ValueError(f"symbols of width {width} but d_model={a['d_model']}: they must be equal")
    relative = kind == "position_relative"
    if ra["use_relative_positional_symbols"] != relative or relative and layout.tied_library:
        raise ValueError("with position_relative symbols, and only then, ra_kwargs.use_relative_positional_symbols "
                         "must be true; they have no weight_tie_symbol_library")
    fields = dict(
        share_qk=a["share_attn_params"], shared_symbols=shared, symmetric=ra["symmetric_rels"],
        n_relations=ra["n_relations"], rel_proj_dim=ra["rel_proj_dim"], rel_activation=one_of(
            "ra_kwargs.rel_activation", ra["rel_activation"],
            dict(identity="identity", relu="relu", sigmoid="sigmoid", tanh="tanh", gelu="gelu_tanh", silu="silu"),
            " (their softmax includes future positions)"))
    if kind == "symbolic_attention":
        layout.library = "symbol_library"
        if s["scale"] is not None:                                   # ours is 1/sqrt(d_h): W_q takes the quotient
            layout.scale = s["scale"] * math.sqrt(a["d_model"] / max(1, s["n_heads"]))
        return fields | dict(symbols="symbolic", n_symbols=s["n_symbols"], symbol_heads=s["n_heads"],
                             trainable_symbols=s["trainable_symbols"])
    if kind == "positional_symbols":
        layout.library, layout.rows["stack.symbols.#.library"] = "symbol_library.weight", s["max_length"]
        return fields | dict(symbols="positional", max_len=min(a["max_block_size"], s["max_length"]))
    layout.library = "rel_pos_enc.rel_pos_embeddings"
    return fields | dict(symbols="relative", max_distance=s["max_rel_pos"])


# ---- names of tensors: ours -> theirs, # is the number of a layer ----------------------------------------------------

ATTN, MLP, RETRIEVER = "stack.blocks.#.attention", "stack.blocks.#.mlp", "layers.symbol_retrievers.#"
BLOCK, SENSORY = "layers.blocks.#", "layers.blocks.#.{sensory}"
RELATION = f"{BLOCK}.dual_attn.relational_attention"
NAMES = {
    "embedding": "layers.token_embedder", "head": "layers.final_out",
    "stack.positions": "layers.positional_embedder", "stack.norm": "layers.norm",
    "stack.symbols.#.W_q": f"{RETRIEVER}.q_proj", "stack.symbols.#.templates": f"{RETRIEVER}.template_features",
    "stack.symbols.#.library": f"{RETRIEVER}.{{library}}",
    "stack.blocks.#.norm_attention": f"{BLOCK}.norm1", "stack.blocks.#.norm_mlp": f"{BLOCK}.norm2",
    f"{MLP}.W_1": f"{BLOCK}.ff_block.linear1", f"{MLP}.W_2": f"{BLOCK}.ff_block.linear2",
    f"{MLP}.W_3": f"{BLOCK}.ff_block.linear3",
    f"{ATTN}.sensory.W_q": f"{SENSORY}.wq", f"{ATTN}.sensory.W_k": f"{SENSORY}.wk",
    f"{ATTN}.sensory.W_v": f"{SENSORY}.wv", f"{ATTN}.sensory.W_o": f"{SENSORY}.wo",
    f"{ATTN}.relational.W_q": f"{RELATION}.wq_attn", f"{ATTN}.relational.W_k": f"{RELATION}.wk_attn",
    f"{ATTN}.relational.W_q_rel": f"{RELATION}.wq_rel", f"{ATTN}.relational.W_k_rel": f"{RELATION}.wk_rel",
    f"{ATTN}.relational.W_r": f"{RELATION}.wr", f"{ATTN}.relational.W_s": f"{RELATION}.wv",
    f"{ATTN}.relational.W_o": f"{RELATION}.wo"}
BIASES = {"W_q": None, "W_q_rel": None, "W_k_rel": None, "W_k": "add_bias_kv", "W_v": "add_bias_kv",
          "W_s": "add_bias_kv", "W_o": "add_bias_out"}               # in attention: the argument that adds theirs


def parts(name):
    """stack.blocks.3.mlp.W_1.bias -> its key in NAMES, its layer "3" and its kind ".bias"; both may be empty."""
    key, layer, rest, kind = re.fullmatch(r"(.*?)(?:\.(\d+)(\..*?))?(\.weight|\.bias)?", name).groups("")
    return f"{key}.#{rest}" if layer else key, layer, kind


def their_names(name, cfg, layout):
    """The names that our tensor can have in the file. Of several tied tensors the file keeps any one."""
    key, layer, kind = parts(name)
    keys = [key, key.replace("W_q_rel", "W_k_rel")] if cfg.symmetric and key.endswith("W_q_rel") else [key]
    layers = range(cfg.n_layers) if cfg.shared_symbols and key.startswith("stack.symbols") else [layer]
    return [NAMES[key].format(sensory=layout.sensory, library=layout.library).replace("#", str(layer)) + kind
            for key in keys for layer in layers]


def match(model, layout, entries):
    """{names of one of our parameters: its names in the file}, where a zero bias has none and a tied tensor several.

    Raises ValueError if a tensor is missing, left over, or of the wrong shape.
    """
    ours, sources, missing = {}, {}, []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        ours.setdefault(parameter, []).append(name)                  # tied ones have several names
    for parameter, names in ours.items():
        if names[-1].endswith(layout.zeros):                         # the last: theirs if both groups share W_k
            sources[tuple(names)] = []
            continue
        candidates = [theirs for name in names for theirs in their_names(name, model.cfg, layout)]
        sources[tuple(names)] = found = [theirs for theirs in candidates if theirs in entries]
        missing += [] if found else [candidates[-1]]
        key, (n, *rest) = parts(names[-1])[0], parameter.shape
        shape = [layout.rows.get(key, n), *(rest[::-1] if key.endswith("W_r") else rest)]
        for theirs in found:
            if entries[theirs].shape != shape:
                raise ValueError(f"{theirs} has shape {entries[theirs].shape}, but by {CONFIG} it must be {shape}")
    used = set().union(*sources.values())
    left = [theirs for theirs in entries if theirs not in used and not re.fullmatch(layout.unused, theirs)]
    if missing or left:
        raise ValueError(f"{len(missing)} tensors are missing: {some(missing) or 'none'}; {len(left)} are not part of "
                         f"the model in {CONFIG}: {some(left) or 'none'}")
    return sources


@torch.no_grad()
def fill(model, layout, entries, sources, path):
    """Gives a model on the meta device its tensors, read from the file one at a time."""
    cfg, d_h, state = model.cfg, model.cfg.d_model // model.cfg.n_heads, {}
    for names, found in sources.items():
        tensor, *others = [entries[theirs].read(path) for theirs in found] or [
            torch.zeros(model.get_parameter(names[-1]).shape)]       # a bias that only our model has
        if not all(torch.equal(tensor, other) for other in others):
            raise ValueError(f"{some(found)} are tied and must be equal, but they differ")
        key = parts(names[-1])[0]
        if key.endswith("W_r"):
            tensor = tensor.mT                                       # (H, d_h, R) -> (H, R, d_h)
        elif cfg.position == "rope" and re.fullmatch(rf"{ATTN}\.\w+\.W_[qk]", key):
            tensor = tensor.unflatten(0, (-1, d_h // 2, 2)).transpose(1, 2).flatten(0, 2)       # pairs -> halves
        elif key == "stack.symbols.#.W_q":
            tensor = tensor * layout.scale
        elif key in layout.rows:
            tensor = tensor[:cfg.max_len].clone()                    # later positions cannot occur
        state |= dict.fromkeys(names, nn.Parameter(tensor.float().contiguous()))                # tied: one parameter
    model.load_state_dict(state, assign=True)                        # strict: raises unless every parameter is given
