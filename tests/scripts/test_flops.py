"""Operations per token, image and problem: the formulas equal PyTorch's own count of the literal form."""
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import LanguageModel, Seq2SeqTransformer, TransformerConfig, VisionTransformer
from relational_attention import RelationalAttention
from toolbox.flops import PEAK, describe, per_image, per_problem, per_token, utilisation

# The sizes are all different, so that no term can be mistaken for another; d_h is 6.
SMALL = dict(vocab_size=13, d_model=36, n_layers=3, n_heads=6, n_ra=2, d_ff=80, max_len=8, n_symbols=7, symbol_heads=3)

OPTIONS = {
    "DAT": {},
    "Transformer": dict(n_ra=0),
    "relative positions of Shaw et al.": dict(n_ra=0, position="shaw"),
    "relational heads only": dict(n_ra=6),
    "default MLP": dict(d_ff=None),
    "swiglu": dict(activation="swiglu"),
    "swiglu, default MLP": dict(activation="swiglu", d_ff=None),
    "GQA": dict(n_kv_heads=1),
    "GQA, Transformer": dict(n_ra=0, n_kv_heads=3),
    "n_relations": dict(n_relations=4),
    "rel_proj_dim": dict(n_relations=3, rel_proj_dim=5),
    "symmetric": dict(symmetric=True, n_ra=4),
    # relations of width 1 would be an elementwise product, which PyTorch does not count
    "relation activation": dict(rel_activation="softmax", n_relations=6),
    "rca": dict(ra_type="rca"),
    "rca, GQA": dict(ra_type="rca", n_kv_heads=2, n_ra=4),
    "share_qk": dict(share_qk=True, n_ra=3),
    "positional": dict(symbols="positional"),
    "rca, positional": dict(ra_type="rca", symbols="positional"),
    "symbols per layer": dict(shared_symbols=False),
    "learned positions, untied, biases": dict(position="learned", tie_embeddings=False, bias=True),
    "relative": dict(symbols="relative"),
    "relative, GQA": dict(symbols="relative", n_kv_heads=2, n_ra=4),
    "relative, rca": dict(symbols="relative", ra_type="rca"),
    "relative, symbols per layer": dict(symbols="relative", shared_symbols=False),
}


def config(**options):
    return TransformerConfig(**{**SMALL, **options})


def tokens(n, of=0):
    """One sequence, because positional and relative symbols are projected once for a whole batch."""
    return torch.full((1, n), of)


def count(backward, model, *inputs):
    """PyTorch's count of the forward pass, or of forward and backward."""
    # PyTorch does not count the fused CPU kernel: MATH executes the same products one by one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, loss = model(*inputs)
        if backward:
            loss.backward()
    return counter.get_total_flops()


def counted(cfg, backward=False):
    return count(backward, LanguageModel(cfg), tokens(cfg.max_len), tokens(cfg.max_len))


@pytest.fixture
def literal_form(monkeypatch):
    """Whatever the number of tokens."""
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *shapes: self.literal)


def needed(cfg):
    """By the formula: operations of one sequence's forward pass."""
    return per_token(cfg) * cfg.max_len / 3


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_formula_equals_pytorchs_count_of_the_literal_form(options, literal_form):
    cfg = config(**options)
    assert counted(cfg) == needed(cfg)


MODELS = {name: OPTIONS[name] for name in ("DAT", "Transformer", "relative positions of Shaw et al.", "swiglu", "GQA",
                                           "symmetric", "rca", "positional", "relative", "symbols per layer")}


@pytest.mark.parametrize("pool", ["mean", "cls", "mean_cls"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_an_image_takes_what_pytorch_counts(options, pool, literal_form):
    m = VisionTransformer(config(**options), image_size=6, patch_size=2, n_classes=5, pool=pool)
    assert count(True, m, torch.rand(1, 3, 6, 6), torch.tensor([0])) == per_image(m)


def test_a_question_to_an_image_is_one_token_more(literal_form):
    m = VisionTransformer(config(), image_size=6, patch_size=2, n_classes=5, question_size=11)
    gradient_of_the_question = 2 * 11 * m.cfg.d_model                  # which nobody needs, see toolbox/flops.py
    assert count(True, m, torch.rand(1, 3, 6, 6), torch.tensor([0]),
                 torch.rand(1, 11)) == per_image(m) - gradient_of_the_question


@pytest.mark.parametrize("decoder", [{}, dict(n_layers_decoder=2), dict(n_ra_decoder=0)], ids=str)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_problem_takes_what_pytorch_counts(options, decoder, literal_form):
    m = Seq2SeqTransformer(config(**options, vocab_size=9), **decoder)
    assert count(True, m, tokens(7, of=1), tokens(4), tokens(4, of=1)) == per_problem(m, 7, 4)


def test_each_different_relative_symbol_is_projected_once(literal_form):
    """With max_distance 3 there are 7 of them; the literal form projects one for each of the 15 offsets."""
    cfg = config(symbols="relative", max_distance=3)
    repeated = 2 * cfg.n_layers * (15 - 7) * cfg.d_model * cfg.n_ra * cfg.d_model // cfg.n_heads
    assert counted(cfg) == needed(cfg) + repeated


@pytest.mark.parametrize("options", [dict(n_ra=0), {}, dict(n_kv_heads=1), dict(symbols="positional")], ids=str)
def test_the_backward_pass_takes_twice_the_forward_pass(options, literal_form):
    cfg = config(**options)
    assert counted(cfg, backward=True) == 3 * counted(cfg) == per_token(cfg) * cfg.max_len


def test_a_frozen_library_is_counted_as_if_it_were_trained(literal_form):
    cfg = config(trainable_symbols=False)
    its_gradient = 2 * cfg.n_layers * cfg.max_len * cfg.n_symbols * cfg.d_model
    assert counted(cfg, backward=True) == per_token(cfg) * cfg.max_len - its_gradient


@pytest.mark.parametrize("queries", ["memory", "learned"])
def test_a_workspace_takes_what_pytorch_counts_for_each_further_image(queries):
    """Of what it adds to a vision Transformer; the operations on the memory itself are the same for any batch."""
    def added(n):
        counts = []
        for slots in (0, 11):
            m = VisionTransformer(config(n_ra=0, position="learned", memory_slots=slots, memory_width=5, memory_heads=3,
                                         bottleneck=4, memory_queries=queries), image_size=6, patch_size=3, n_classes=2)
            with FlopCounterMode(display=False) as counter:
                m(torch.rand(n, 3, 6, 6), torch.zeros(n, dtype=torch.long))[1].backward()
            counts.append(counter.get_total_flops())
        return counts[1] - counts[0]
    shape = dict(n_ra=0, memory_width=5, memory_heads=3)
    assert added(3) - added(2) == 4 * (per_token(config(memory_slots=11, **shape)) - per_token(config(**shape)))


def test_a_transformer_takes_6_operations_per_weight_and_12_L_T_d_for_attention():
    cfg = config(n_ra=0)
    # the output layer is tied to the embedding and counted once; norms have no matrices
    matrices = sum(p.numel() for p in LanguageModel(cfg).parameters() if p.dim() > 1)
    assert per_token(cfg) == 6 * matrices + 12 * cfg.n_layers * cfg.max_len * cfg.d_model


@pytest.mark.parametrize("options", [{}, dict(n_relations=4), dict(n_relations=8, rel_proj_dim=1)], ids=str)
def test_the_additional_products_of_the_other_forms_do_not_count(options, plain_blocks, monkeypatch):
    """Fast: each head once for each d_h of its values, no relations. Blocked: scores and relations are recomputed."""
    cfg = config(**options)
    d_h, n = cfg.d_model // cfg.n_heads, cfg.n_ra
    R = cfg.n_relations or n
    p = cfg.rel_proj_dim or n * d_h // R
    pieces = -(-(d_h + R * p) // d_h)
    fast = n * (pieces - 1) * 2 * d_h - (R * p + n * R)                # multiply-adds for each pair of tokens
    blocked = n * d_h + R * p
    for form, backward, additional in (("fast", False, fast), ("blocked", True, blocked)):
        monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *shapes: getattr(self, form))
        needed_here = (3 if backward else 1) * needed(cfg)
        assert counted(cfg, backward) == needed_here + 2 * cfg.n_layers * cfg.max_len ** 2 * additional


@pytest.mark.parametrize("name, dtype, peak", [
    ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989), ("NVIDIA H100 80GB HBM3", torch.float32, 67),
    ("NVIDIA H100 PCIe", torch.bfloat16, 756), ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
    ("A100-SXM4-40GB", "bfloat16", 312), ("NVIDIA A100-PCIE-40GB", "float32", 19.5),
    ("NVIDIA A100 80GB PCIe", torch.bfloat16, 312), ("NVIDIA A10G", "bfloat16", 70), ("NVIDIA A10", "bfloat16", 125),
    ("NVIDIA L40S", "bfloat16", 362), ("NVIDIA L4", "bfloat16", 121), ("Tesla V100-SXM2-16GB", "float32", 15.7)])
def test_the_peak_is_found_by_the_name_of_the_device(name, dtype, peak):
    cfg = config()
    tflops, share = utilisation(cfg, 1e9, name, dtype)
    assert tflops == pytest.approx(per_token(cfg) * 1e9 / 1e12)
    assert share == pytest.approx(tflops / peak)


@pytest.mark.parametrize("name, dtype", [
    ("cpu", "float32"), ("Tesla T4", "bfloat16"), ("NVIDIA H100 80GB HBM3", "float16"),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"), ("NVIDIA GH200 480GB", "bfloat16"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"), ("NVIDIA GeForce RTX 3090 Ti", "bfloat16")])
def test_an_unknown_device_with_a_similar_name_has_no_peak(name, dtype):
    tflops, share = utilisation(config(), 1e9, name, dtype)
    assert tflops > 0 and share is None
    assert "peak" not in describe(config(), 1e9, name, dtype)


def test_bfloat16_is_faster_than_float32_on_every_device():
    for peaks in PEAK.values():
        assert peaks.get("bfloat16", float("inf")) > peaks["float32"] > 1


def test_the_line_that_a_train_script_prints():
    cfg, h100 = config(), "NVIDIA H100 80GB HBM3"
    assert describe(cfg, 0.41 * 989e12 / per_token(cfg), h100, torch.bfloat16) == (
        "405.5 TFLOP/s, 41% of the peak of NVIDIA H100 80GB HBM3 in bfloat16")
    assert describe(cfg, 12.34e9 / per_token(cfg), "cpu", torch.float32) == "12.3 GFLOP/s"
