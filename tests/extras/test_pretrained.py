"""load_pretrained on the authors' checkpoints, and on random ones against a reference implementation in this file.

test_safetensors.py tests truncated, damaged and malicious files.
"""
import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_download import server  # noqa: F401 (a fixture)

from data.download import DownloadError
from extras import pretrained
from extras.pretrained import load_pretrained

PARITY = Path(os.environ.get("DAT_TEST_DATA", "/nowhere")) / "parity"
LM = dict(vocab_size=11, d_model=16, n_layers=2, dff=24, dropout_rate=0.1, activation="gelu", norm_first=True,
          max_block_size=12, pos_enc_type="RoPE", bias=False)
SYMBOLIC = dict(d_model=16, n_heads=2, n_symbols=5, trainable_symbols=False)
DAT = LM | dict(n_heads_sa=2, n_heads_ra=2, symbol_retrieval_kwargs=SYMBOLIC)
POSITIONAL = dict(symbol_retrieval="positional_symbols", symbol_retrieval_kwargs=dict(symbol_dim=16, max_length=12))
RELATIVE = dict(symbol_retrieval="position_relative", symbol_retrieval_kwargs=dict(symbol_dim=16, max_rel_pos=3))
REL = dict(use_relative_positional_symbols=True)
OWN, TIED = ({"shared_symbol_retriever": False, "weight_tie_symbol_library": tied} for tied in (False, True))
MQA = dict(n_kv_heads=1)

BOTH = {                                       # options of either model
    "plain": {}, "post-norm": dict(norm_first=False), "rmsnorm": dict(norm_type="rmsnorm"), "bias": dict(bias=True),
    "rmsnorm, bias, post-norm": dict(norm_type="rmsnorm", bias=True, norm_first=False), "relu": dict(activation="relu"),
    "silu": dict(activation="silu"), "swiglu": dict(activation="swiglu"), "dff": dict(dff=None),
    "swiglu, dff": dict(activation="swiglu", dff=None), "learned": dict(pos_enc_type="pos_emb")}
GRID = {f"transformer: {name}": LM | dict(n_heads=4) | options for name, options in BOTH.items()}
GRID |= {f"dat: {name}": DAT | options for name, options in BOTH.items()}
GRID |= {f"transformer: {name}": LM | dict(n_heads=4) | options for name, options in {
    "no flash": dict(use_flash_attention=False), "kwargs": dict(block_kwargs=None), "heads": dict(n_heads=2),
    "narrow": dict(n_heads=16, pos_enc_type="pos_emb"),
    "gqa": dict(block_kwargs=dict(attn_kwargs=dict(n_kv_heads=2))),
    "bias kv": dict(block_kwargs=dict(attn_kwargs=dict(n_kv_heads=1, add_bias_kv=True, key_dim=4)), bias=True)}.items()}
GRID |= {f"dat: {name}": DAT | options for name, options in {
    "gqa": dict(sa_kwargs=MQA, ra_kwargs=MQA), "1+3, no gqa": dict(n_heads_sa=1, n_heads_ra=3, sa_kwargs=MQA),
    "3+1": dict(n_heads_sa=3, n_heads_ra=1), "gqa 3+1": dict(n_heads_sa=3, n_heads_ra=1, sa_kwargs=MQA),
    "0+4": dict(n_heads_sa=0, n_heads_ra=4, ra_kwargs=dict(n_kv_heads=2)), "4+0": dict(n_heads_sa=4, n_heads_ra=0),
    "nulls": dict(sa_kwargs=None, symbol_retriever_config=None, ra_kwargs=dict.fromkeys(
        ["n_relations", "rel_proj_dim", "n_kv_heads", "key_dim", "symmetric_rels"])),
    "1 relation": dict(ra_kwargs=dict(n_relations=1, key_dim=4)), "4 relations": dict(ra_kwargs=dict(n_relations=4)),
    "8 relations": dict(ra_kwargs=dict(n_relations=8, rel_proj_dim=1)),
    "symmetric": dict(ra_kwargs=dict(symmetric_rels=True)),
    **{f"{f} relations": dict(ra_kwargs=dict(rel_activation=f)) for f in ("relu", "sigmoid", "tanh", "gelu", "silu")},
    "own symbols": dict(symbol_retriever_config=OWN), "tied library": dict(symbol_retriever_config=TIED),
    "scale": dict(symbol_retrieval_kwargs=SYMBOLIC | dict(scale=0.9, dropout=0.0)),
    "trained symbols": dict(symbol_retrieval_kwargs=SYMBOLIC | dict(trainable_symbols=True, n_heads=4)),
    "positional": POSITIONAL, "own positional": POSITIONAL | dict(symbol_retriever_config=OWN),
    "tied positional": POSITIONAL | dict(symbol_retriever_config=TIED, pos_enc_type="pos_emb"),
    "long positional": POSITIONAL | dict(symbol_retrieval_kwargs=dict(symbol_dim=16, max_length=15, sinusoidal=True)),
    "short positional": POSITIONAL | dict(symbol_retrieval_kwargs=dict(symbol_dim=16, max_length=9),
                                          pos_enc_type="pos_emb"),
    "relative": RELATIVE | dict(ra_kwargs=REL), "relative gqa": RELATIVE | dict(ra_kwargs=REL | MQA, sa_kwargs=MQA),
    "own relative": RELATIVE | dict(ra_kwargs=REL, symbol_retriever_config=OWN, pos_enc_type="pos_emb"),
    "shared": dict(share_attn_params=True), "shared gqa, bias kv": dict(
        share_attn_params=True, sa_kwargs=MQA, ra_kwargs=MQA | dict(add_bias_kv=True)),
    "shared, biases of sa": dict(share_attn_params=True, sa_kwargs=dict(add_bias_kv=True)),
    "bias kv": dict(sa_kwargs=dict(add_bias_kv=True), ra_kwargs=dict(add_bias_kv=True)),
    "bias kv of ra": dict(ra_kwargs=dict(add_bias_kv=True)), "bias out of sa": dict(sa_kwargs=dict(add_bias_out=True)),
    "bias out": dict(sa_kwargs=dict(add_bias_out=True), ra_kwargs=dict(add_bias_out=True)),
    "all biases of sa": dict(sa_kwargs=dict(add_bias_kv=True, add_bias_out=True))}.items()}


class Weights(dict):
    """The tensors of a checkpoint: w(name, *shape) draws a random one when it is first used."""

    def __call__(self, name, *shape, near=0.0):
        if name not in self:
            self[name] = near + (0.4 if len(shape) > 1 else 0.2) * torch.randn(*shape)
        assert self[name].shape == shape
        return self[name].double()


def reference(c, w, idx):
    """Logits (T, vocab_size) of one sequence idx (T,) in float64, head by head, as the authors' code defines them.

    The tensors have the authors' names; of tied tensors it uses the one in their file. w is filled with them.
    """
    T, d, dat = len(idx), c["d_model"], "n_heads" not in c
    heads = [("dual_attn.self_attention.", c["n_heads_sa"], c.get("sa_kwargs") or {}),
             ("dual_attn.relational_attention.", c["n_heads_ra"], c.get("ra_kwargs") or {})] if dat else [
        ("self_attn.", c["n_heads"], (c.get("block_kwargs") or {"attn_kwargs": {}})["attn_kwargs"] | dict(
            add_bias_out=c["bias"]))]
    d_h, shares = d // sum(n for _, n, _ in heads), c.get("share_attn_params")
    own = c.get("symbol_retriever_config") in (OWN, TIED)
    act = dict(gelu=lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3))),
               silu=lambda x: x * x.sigmoid(), swiglu=lambda x: x * x.sigmoid(), relu=lambda x: x.clamp(min=0),
               tanh=torch.tanh, sigmoid=torch.sigmoid, identity=lambda x: x)

    def linear(x, name, n_out, bias=False):
        return x @ w(f"{name}.weight", n_out, x.size(-1)).T + (w(f"{name}.bias", n_out) if bias else 0)

    def norm(x, name):
        rms = c.get("norm_type") == "rmsnorm"
        x = x if rms else x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w(f"{name}.weight", d, near=1.0)
        return x if rms else x + w(f"{name}.bias", d)

    def rotated(x):                            # (T, d_h): features 2m and 2m + 1 are one complex number
        if c["pos_enc_type"] == "pos_emb":
            return x
        angle = torch.arange(T).double()[:, None] * 10000.0 ** (-torch.arange(0, d_h, 2).double() / d_h)
        z = torch.complex(x[:, 0::2], x[:, 1::2]) * torch.polar(torch.ones_like(angle), angle)
        return torch.stack([z.real, z.imag], -1).flatten(1)

    def symbols(x, i):                         # (T, T, d): of sender j for receiver i
        s, k, kind = f"layers.symbol_retrievers.{i * own}.", c["symbol_retrieval_kwargs"], c.get("symbol_retrieval")
        library = f"layers.symbol_retrievers.{i * (c.get('symbol_retriever_config') == OWN)}.symbol_library"
        if kind == "positional_symbols":
            return w(library + ".weight", k["max_length"], d)[:T].expand(T, T, d)
        if kind == "position_relative":
            m, offset = k["max_rel_pos"], torch.arange(T)[None] - torch.arange(T)[:, None]
            return w(s + "rel_pos_enc.rel_pos_embeddings", 2 * m + 1, d)[offset.clamp(-m, m) + m]
        q, n, width = linear(x, s + "q_proj", d, True), k["n_symbols"], d // k["n_heads"]
        slices = zip(*(t.split(width, -1) for t in (q, w(s + "template_features", n, d), w(library, n, d))))
        found = [(q @ f.T * k.get("scale", width ** -0.5)).softmax(-1) @ v for q, f, v in slices]
        return torch.cat(found, -1).expand(T, T, d)

    def group(x, s, b, name, n, k):            # one group of heads
        ra, bias, G = "relational" in name, k.get("add_bias_kv"), k.get("n_kv_heads") or n
        wq, wk = (f"{b}dual_attn.relational_attention.{x}_attn" if ra or shares else b + name + x for x in ("wq", "wk"))
        q = linear(x, wq, n * d_h).split(d_h, -1)
        k_bias = heads[1][2].get("add_bias_kv") if shares else bias
        k_ = linear(x, wk, G * d_h, k_bias).split(d_h, -1)
        v = linear(s if ra else x.expand(T, T, d), b + name + "wv", G * d_h, bias).split(d_h, -1)          # (T, T, d_h)
        if ra:
            R = k.get("n_relations") or n
            k_rel = linear(x, b + name + "wk_rel", n * d_h).unflatten(1, (R, -1))
            q_rel = k_rel if k.get("symmetric_rels") else linear(x, b + name + "wq_rel", n * d_h).unflatten(1, (R, -1))
            r = torch.einsum("irp,jrp->ijr", q_rel, k_rel) / k_rel.size(-1) ** 0.5
            r, wr = act[k.get("rel_activation", "identity")](r), w(b + name + "wr", n, d_h, R)
        out = []
        for h in range(n):
            g = h // (n // G)
            scores = rotated(q[h]) @ rotated(k_[g]).T / d_h ** 0.5
            alpha = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
            out.append(torch.einsum("ij,ijd->id", alpha, v[g] + r @ wr[h].T if ra else v[g]))
        return linear(torch.cat(out, -1), b + name + "wo", n * d_h, k.get("add_bias_out"))

    def mlp(x, b):
        swiglu, bias = c["activation"] == "swiglu", dat or c["bias"]
        d_ff = c["dff"] or (int(2 / 3 * 4 * d) if swiglu else 4 * d)
        h = act[c["activation"]](linear(x, b + "linear1", d_ff, bias))
        return linear(h * linear(x, b + "linear3", d_ff, bias) if swiglu else h, b + "linear2", d, bias)

    x = w("layers.final_out.weight", c["vocab_size"], d)[idx]
    if c["pos_enc_type"] == "pos_emb":
        x = x + w("layers.positional_embedder.weight", c["max_block_size"], d)[:T]
    for i in range(c["n_layers"]):
        b, s = f"layers.blocks.{i}.", symbols(x, i) if dat else None

        def attention(x):
            return torch.cat([group(x, s, b, *g) for g in heads if g[1]], -1)

        if c["norm_first"]:
            x = x + attention(norm(x, b + "norm1"))
            x = x + mlp(norm(x, b + "norm2"), b + "ff_block.")
        else:
            x = norm(x + attention(x), b + "norm1")
            x = norm(x + mlp(x, b + "ff_block."), b + "norm2")
    return norm(x, "layers.norm") @ w("layers.final_out.weight", c["vocab_size"], d).T


def random_weights(c):
    torch.manual_seed(0)
    weights = Weights()
    reference(c, weights, torch.arange(9))
    return dict(weights)


NAMES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}


def layout(weights):
    """The header of a safetensors file, and the bytes of its tensors."""
    header, body = {}, b""
    for name, tensor in weights.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets, body = [len(body), len(body) + len(raw)], body + raw
        header[name] = dict(dtype=NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=offsets)
    return header, body


def packed(header, body):
    """The bytes of a safetensors file."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + body


def write(folder, config, weights):
    """Writes a checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, body = layout(weights)
    (folder / "model.safetensors").write_bytes(packed({"__metadata__": {"a": "b"}} | header, body))
    return folder


@pytest.fixture
def folder(tmp_path):
    """A folder with a valid checkpoint of a DAT."""
    return write(tmp_path / "checkpoint", DAT, random_weights(DAT))


def assert_rejected(folder, *words):
    """load_pretrained raises a ValueError of one short line that contains all the words."""
    with pytest.raises(ValueError) as error:
        load_pretrained(folder)
    line = str(error.value).replace(f"{folder}/", "")              # the path contains the test's name
    assert "\n" not in line and len(line) < 900 and all(word in line for word in words), line


def close(got, expected, tolerance=1e-5):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


# ---- the same function -----------------------------------------------------------------------------------------------

@pytest.mark.skipif(not PARITY.exists(), reason="DAT_TEST_DATA/parity")
@pytest.mark.parametrize("name", ["transformer", "dat_fineweb_style", "dat_more_relations", "dat_symmetric_positional"])
def test_checkpoints_written_by_the_authors_code_give_their_logits_and_loss(name):
    expected = {k: torch.from_numpy(v) for k, v in np.load(PARITY / name / "expected.npz").items()}
    with torch.no_grad():
        logits, loss = load_pretrained(PARITY / name)(expected["idx"].long(), expected["targets"].long())
    close(logits, expected["logits"], 1e-6)
    close(loss, expected["loss"], 1e-6)


@pytest.mark.parametrize("name", GRID)
def test_every_option_gives_the_logits_of_the_reference_implementation(name, tmp_path):
    weights, idx = random_weights(GRID[name]), torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    model = load_pretrained(write(tmp_path / "x", GRID[name], weights))
    assert torch.equal(torch.get_rng_state(), before)                              # loading draws no random numbers
    with torch.no_grad():
        logits, _ = model(idx)
    close(logits, torch.stack([reference(GRID[name], Weights(weights), row) for row in idx]).float(), 3e-6)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    # in the others our model has additional zero biases, or their file has unused or longer tensors
    if not any(word in name for word in ("bias kv", "of sa", "4+0", "long", "short")):
        assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in weights.values())
    assert model.head.weight is model.embedding.weight and model.cfg.dropout == 0.1
    libraries = {symbols.library for symbols in model.stack.symbols}
    assert len(libraries) == (0 if not model.cfg.n_ra else 1 + ("own" in name))
    frozen = GRID[name].get("symbol_retrieval_kwargs", {}).get("trainable_symbols") is False
    assert not any(library.requires_grad is frozen for library in libraries)


# ---- checkpoints that do not fit -------------------------------------------------------------------------------------

def test_missing_superfluous_and_wrongly_shaped_tensors_are_named(folder):
    weights = random_weights(DAT)
    blocks = [name for name in weights if "blocks.1." in name]
    write(folder, DAT, {name: w for name, w in weights.items() if name not in blocks})
    n = len(blocks)
    assert_rejected(folder, f"{n} tensors are missing: ", "layers.blocks.1.norm1.weight", f"and {n - 4} more",
                    "0 are not part of")
    odd = {f"layers.odd{i}\n": torch.zeros(1) for i in range(7)} | {"embedding.weight": torch.zeros(11, 16)}
    assert_rejected(write(folder, DAT, weights | odd), "0 tensors are missing: none; 8 are not part of", "odd0\\n",
                    "and 4 more")
    for extra in ("blocks.0.dual_attn.self_attention.wq.bias", "blocks.0.ff_block.linear3.weight",
                  "blocks.2.norm1.weight", "symbol_retrievers.2.q_proj.bias", "positional_embedder.weight"):
        assert_rejected(write(folder, DAT, weights | {f"layers.{extra}": torch.zeros(16)}), "1 are not part of", extra)
    odd = {"layers.norm.bias": torch.zeros(17)}
    assert_rejected(write(folder, DAT, weights | odd), "layers.norm.bias", "[17]", "[16]")
    wr = "layers.blocks.0.dual_attn.relational_attention.wr"
    assert_rejected(write(folder, DAT, weights | {wr: weights[wr].mT.contiguous()}), wr, "[2, 2, 4]", "[2, 4, 2]")
    assert_rejected(write(folder, DAT | dict(n_layers=999_999), weights), "999999 layers")


def test_tied_tensors_may_both_be_in_the_file_if_they_are_equal(folder):
    config = DAT | dict(share_attn_params=True, ra_kwargs=dict(symmetric_rels=True))
    weights, b = random_weights(config), "layers.blocks.1.dual_attn."
    for one, other in (("layers.final_out.weight", "layers.token_embedder.weight"),
                       (f"{b}relational_attention.wk_rel.weight", f"{b}relational_attention.wq_rel.weight"),
                       (f"{b}relational_attention.wk_attn.weight", f"{b}self_attention.wk.weight"),
                       ("layers.symbol_retrievers.0.q_proj.bias", "layers.symbol_retrievers.1.q_proj.bias")):
        load_pretrained(write(folder, config, weights | {other: weights[one]}))
        load_pretrained(write(folder, config, {other if name == one else name: w for name, w in weights.items()}))
        assert_rejected(write(folder, config, weights | {other: weights[one] + 1}), one, other, "differ")


@pytest.mark.parametrize("change, words", [
    (dict(dropout=0.1, n_head=3), ["unknown", "'dropout', 'n_head'"]), (dict(n_heads=4), ["'n_heads'"]),
    (dict(activation="tanh"), ["activation='tanh'", "swiglu"]), (dict(norm_type="none"), ["'none'", "rmsnorm"]),
    (dict(pos_enc_type="sinusoidal"), ["'sinusoidal'", "RoPE"]), (dict(ra_type="rca"), ["'rca'", "NameError"]),
    (dict(ra_kwargs=dict(rel_activation="softmax")), ["'softmax'", "future"]), (dict(n_layers=0), ["n_layers=0"]),
    (dict(ra_kwargs=dict(rel_activation="gelu_tanh")), ["'gelu_tanh'"]), (dict(ra_kwargs=REL), ["must be true"]),
    (RELATIVE, ["use_relative_positional_symbols"]), (dict(sa_kwargs=MQA), ["n_kv_heads is 1 in sensory and 2"]),
    (dict(sa_kwargs=dict(key_dim=8)), ["key_dim=8", "4"]), (dict(sa_kwargs=dict(x=8)), ["'sa_kwargs.x'"]),
    (dict(ra_kwargs=dict(n_relations=3)), ["n_relations=3"]), (dict(symbol_retrieval="rel_sym_attn"), ["rel_sym_attn"]),
    (dict(symbol_retrieval_kwargs=SYMBOLIC | dict(d_model=8)), ["width 8"]), (dict(d_model="16"), ["d_model", "'16'"]),
    (RELATIVE | dict(ra_kwargs=REL, symbol_retriever_config=TIED), ["weight_tie_symbol_library"]),
    (dict(vocab_size=10 ** 12), ["vocab_size"]), (dict(d_model=-16), ["d_model"]), (dict(norm_first=None), ["None"]),
    (dict(dropout_rate=math.nan), ["dropout_rate", "nan"]), (dict(sa_kwargs=[]), ["sa_kwargs", "object"]),
    (dict(symbol_retriever_config=dict(shared=True)), ["'symbol_retriever_config.shared'"]), (dict(bias=1), ["bias"]),
    (dict(n_heads_sa=0, n_heads_ra=0), ["n_heads"]), (dict(symbol_retrieval_kwargs={}), ["d_model is missing"])])
def test_a_config_that_our_model_cannot_express_is_rejected_with_a_reason(folder, change, words):
    write(folder, DAT | change, random_weights(DAT))
    assert_rejected(folder, "config.json: ", *words)


def test_neither_a_folder_nor_a_valid_name(folder, monkeypatch):
    (folder / "config.json").unlink()
    assert_rejected(folder, "no file", "config.json", "model.safetensors")
    monkeypatch.chdir(folder)
    for name in ("nowhere", "a/b/c", "../no", "awni00/", "https://x/y", "/etc/no", "a/..", "a b/c", "\u00e9/c"):
        assert_rejected(name, name, "awni00/DAT")


# ---- downloads (test_safetensors.py has one more test) ---------------------------------------------------------------

@pytest.fixture
def hub(server, folder, tmp_path, monkeypatch):  # noqa: F811
    """A server that has the checkpoint, in place of Hugging Face; .paths lists its requests."""
    handler = server.RequestHandlerClass

    class Hub(handler):
        def do_GET(self):
            server.paths.append(self.path)
            server.body = (folder / self.path.rpartition("/")[2]).read_bytes()
            super().do_GET()

    server.RequestHandlerClass, server.paths, server.data = Hub, [], tmp_path / "data"
    monkeypatch.setattr(pretrained, "HUB", server.url.removesuffix("/file.bin"))
    monkeypatch.setattr(pretrained, "download", partial(pretrained.download, retries=1, backoff=0.01))
    return server


NAME = "awni00/DAT-x_1.0"
REQUESTS = [f"/{NAME}/resolve/main/{file}" for file in ("config.json", "model.safetensors")]


def test_a_checkpoint_is_downloaded_once(hub, folder):
    model = load_pretrained(NAME, data_dir=hub.data)
    assert hub.paths == REQUESTS and torch.equal(model.embedding.weight, load_pretrained(folder).embedding.weight)
    load_pretrained(NAME, data_dir=str(hub.data))
    assert hub.paths == REQUESTS
    files = {path.name for path in (hub.data / "awni00--DAT-x_1.0").iterdir()}
    assert files == {"config.json", "model.safetensors", ".lock"}


def test_weights_are_not_downloaded_if_the_config_cannot_be_used(hub, folder):
    write(folder, DAT | dict(activation="tanh"), random_weights(DAT))
    with pytest.raises(ValueError, match="activation='tanh'"):
        load_pretrained(NAME, data_dir=hub.data)
    assert hub.paths == REQUESTS[:1]
    (folder / "config.json").write_text("Not Found")
    with pytest.raises(DownloadError, match="awni00/other/resolve/main/config.json"):
        load_pretrained("awni00/other", data_dir=hub.data)
