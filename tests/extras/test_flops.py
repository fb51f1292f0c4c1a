"""Operations per token: the formula equals what PyTorch's own counter sees when Eq. 3 runs as it is written."""
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import TransformerConfig
from extras.flops import PEAK, describe, per_token, utilisation
from model import LanguageModel
from relational_attention import RelationalAttention

# Sizes that differ from each other, so that no term can stand in for another one; d_h is 6.
SMALL = dict(vocab_size=13, d_model=36, n_layers=3, n_heads=6, n_ra=2, d_ff=80, max_len=8, n_symbols=7, symbol_heads=3)

OPTIONS = {
    "DAT": {},
    "Transformer": dict(n_ra=0),
    "relational heads only": dict(n_ra=6),
    "default MLP": dict(d_ff=None),
    "swiglu": dict(activation="swiglu"),
    "swiglu, default MLP": dict(activation="swiglu", d_ff=None),
    "GQA": dict(n_kv_heads=1),
    "GQA, Transformer": dict(n_ra=0, n_kv_heads=3),
    "n_relations": dict(n_relations=4),
    "rel_proj_dim": dict(n_relations=3, rel_proj_dim=5),
    "symmetric": dict(symmetric=True, n_ra=4),
    # (relations of width 1 would run as a plain multiplication, which the counter does not see)
    "relation activation": dict(rel_activation="softmax", n_relations=6),
    "rca": dict(ra_type="rca"),
    "rca, GQA": dict(ra_type="rca", n_kv_heads=2, n_ra=4),
    "share_qk": dict(share_qk=True, n_ra=3),
    "positional": dict(symbols="positional"),
    "rca, positional": dict(ra_type="rca", symbols="positional"),
    "symbols per layer": dict(shared_symbols=False),
    "learned positions, untied, biases": dict(position="learned", tie_embeddings=False, bias=True),
}

RELATIVE = {
    "relative": {},
    "max_distance": dict(max_distance=3),
    "GQA": dict(n_kv_heads=2, n_ra=4),
    "rca": dict(ra_type="rca"),
    "symbols per layer": dict(shared_symbols=False),
}


def config(**options):
    return TransformerConfig(**{**SMALL, **options})


def counted(cfg, backward=False):
    """Operations that PyTorch sees in one sequence of max_len tokens: the forward pass, or forward and backward.

    One sequence, because positional symbols and the relative table are projected once for a whole batch.
    """
    idx = torch.zeros(1, cfg.max_len, dtype=torch.long)
    m = LanguageModel(cfg)
    # the counter has no formula for the fused CPU kernel: MATH runs the same products one by one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, loss = m(idx, idx)
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.fixture
def literal_form(monkeypatch):
    """The form whose operations are to be counted, however few tokens there are."""
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *shapes: self.literal)


def needed(cfg):
    """By the formula: operations of one sequence's forward pass."""
    return per_token(cfg) * cfg.max_len / 3


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_formula_equals_the_counter(options, literal_form):
    cfg = config(**options)
    assert counted(cfg) == needed(cfg)


def unfolded(cfg):
    """What relative symbols run beyond sum_j alpha_ij s_{j-i}: alpha by offset has 2 T columns, in blocks 2 T - 1."""
    spare = cfg.max_len - (cfg.ra_type == "rca")
    return 2 * cfg.n_layers * cfg.n_ra * cfg.max_len * spare * (cfg.d_model // cfg.n_heads)


@pytest.mark.parametrize("options", RELATIVE.values(), ids=RELATIVE)
def test_relative_symbols_need_one_symbol_for_each_pair(options, literal_form):
    cfg = config(symbols="relative", **options)
    assert counted(cfg) == needed(cfg) + unfolded(cfg)


@pytest.mark.parametrize("options", [dict(n_ra=0), {}, dict(n_kv_heads=1), dict(symbols="positional")], ids=str)
def test_backward_takes_twice_the_forward_pass(options, literal_form):
    cfg = config(**options)
    assert counted(cfg, backward=True) == 3 * counted(cfg) == per_token(cfg) * cfg.max_len


def test_a_frozen_library_is_counted_as_if_it_were_trained(literal_form):
    cfg = config(trainable_symbols=False)
    its_gradient = 2 * cfg.n_layers * cfg.max_len * cfg.n_symbols * cfg.d_model
    assert counted(cfg, backward=True) == per_token(cfg) * cfg.max_len - its_gradient


def test_by_hand_a_transformer_takes_6_for_each_weight_and_12_L_T_d():
    cfg = config(n_ra=0)
    # tied, so that the output head is there once; the norms have no matrices
    matrices = sum(p.numel() for p in LanguageModel(cfg).parameters() if p.dim() > 1)
    assert per_token(cfg) == 6 * matrices + 12 * cfg.n_layers * cfg.max_len * cfg.d_model


@pytest.mark.parametrize("options", [{}, dict(n_relations=4), dict(n_relations=8, rel_proj_dim=1), dict(n_ra=1)],
                         ids=str)
def test_the_fast_form_runs_other_products_than_it_is_credited_with(options, fast_form):
    """Values of R p + d_h and W_r with p copies of each row, but neither relations nor sums over them."""
    cfg = config(**options)
    T, d_h, n = cfg.max_len, cfg.d_model // cfg.n_heads, cfg.n_ra
    R = cfg.n_relations or n
    p = cfg.rel_proj_dim or n * d_h // R
    extra = T * T * (n * R * p - R * p - n * R) + T * n * R * (p - 1) * d_h
    assert counted(cfg) == needed(cfg) + 2 * cfg.n_layers * extra


@pytest.mark.parametrize("name, dtype, peak", [
    ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989), ("NVIDIA H100 80GB HBM3", torch.float32, 67),
    ("NVIDIA H100 PCIe", torch.bfloat16, 756), ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
    ("A100-SXM4-40GB", "bfloat16", 312), ("NVIDIA A100-PCIE-40GB", "float32", 19.5),
    ("NVIDIA A100 80GB PCIe", torch.bfloat16, 312), ("NVIDIA A10G", "bfloat16", 70), ("NVIDIA A10", "bfloat16", 125),
    ("NVIDIA L40S", "bfloat16", 362), ("NVIDIA L4", "bfloat16", 121), ("Tesla V100-SXM2-16GB", "float32", 15.7)])
def test_the_peak_is_found_by_the_drivers_name_for_the_device(name, dtype, peak):
    cfg = config()
    tflops, share = utilisation(cfg, 1e9, name, dtype)
    assert tflops == pytest.approx(per_token(cfg) * 1e9 / 1e12)
    assert share == pytest.approx(tflops / peak)


@pytest.mark.parametrize("name, dtype", [
    ("cpu", "float32"), ("Tesla T4", "bfloat16"), ("NVIDIA H100 80GB HBM3", "float16"),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"), ("NVIDIA GH200 480GB", "bfloat16"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"), ("NVIDIA GeForce RTX 3090 Ti", "bfloat16")])
def test_a_device_that_only_sounds_like_a_known_one_gets_no_share(name, dtype):
    tflops, share = utilisation(config(), 1e9, name, dtype)
    assert tflops > 0 and share is None
    assert "peak" not in describe(config(), 1e9, name, dtype)


def test_tensor_cores_are_faster_than_the_rest():
    for peaks in PEAK.values():
        assert peaks.get("bfloat16", float("inf")) > peaks["float32"] > 1


def test_the_line_that_a_train_script_prints():
    cfg, h100 = config(), "NVIDIA H100 80GB HBM3"
    assert describe(cfg, 0.41 * 989e12 / per_token(cfg), h100, torch.bfloat16) == (
        "405.5 TFLOP/s, 41% of the peak of NVIDIA H100 80GB HBM3 in bfloat16")
    assert describe(cfg, 12.34e9 / per_token(cfg), "cpu", torch.float32) == "12.3 GFLOP/s"
