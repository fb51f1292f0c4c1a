"""How much arithmetic does training a model need, and what share of a GPU's peak is that? (MFU)

Model FLOPs utilisation (Chowdhery et al., 2022, PaLM, Appendix B): the operations that the equations need for one
token, times tokens per second, divided by the peak of the device. Counted are the operations of the equations, here
Eq. 3 with its relations r_ij, not those that a form executes: blocks recomputed in the backward pass, or the
further heads of `RelationalAttention.fast`, are additional work for the same tokens and must not raise the MFU.

Only matrix products count, 2 operations for each multiply-add. The backward pass needs two products for each product
of the forward pass, for the gradients of its two factors: three times the forward pass in total. As in PaLM each token
attends to all T tokens, causal or not, and an embedding lookup is free. Multiply-adds of one of T tokens:

    once         logits of a language model       d V        (an image's: once for all of its tokens)
                 a patch of c numbers             c d
    each layer   MLP: W_1, W_2 (W_3: swiglu)      2 d d_ff   (3 d d_ff)
      sensory    x W_q, x W_k, x W_v              d n d_h + 2 d G d_h           n = n_sa heads, G for keys and values
                 <q_i, k_j>, sum_j alpha_ij v_j   2 n T d_h                 twice that for position=shaw, with a^K, a^V
                 W_o                              (n d_h)^2
      relational the same five                    as above                      n = n_ra; s_j W_s for x W_v
                 x W_q_rel, x W_k_rel             2 d R p  (d R p: symmetric)   R relations of width p
                 r_ij, once for all heads         R T p
                 sum_j alpha_ij r_ij, then W_r    n T R + n R d_h
      symbols    symbolic: x W_q, F_lib, S_lib    d^2 + 2 n_symbols d           in each layer, if shared, too
                 relative, positional             0; but relative symbols, counted for each sequence, need s W_s
                                                  for min(2 max_distance + 1, 2 T - 1) offsets
      workspace  Xi W_k, q k^T                    d S D + S M D                 S heads of width D, M slots
                 Xi Y^T, and what it reads        2 M d
                 (G Xi) W_v, and on the memory    0: once for a whole batch
      decoder    cross-attention to S tokens      2 d^2 + 2 S d, and 2 d^2 for each of the S tokens

Relational cross-attention has no relations: the same five and the symbols. share_qk saves weights, not work: both
groups apply W_q, W_k, and both count. A frozen S_lib and a question to an image count as if they had a gradient,
symbols=none like positional ones. Evaluation needs 2 M d of the workspace alone, since it only reads.
"""
import re


def per_token(cfg):
    """Floating-point operations of one token of a LanguageModel, forward and backward, for its TransformerConfig."""
    return 3 * 2 * (cfg.n_layers * block(cfg, cfg.max_len) / cfg.max_len + cfg.d_model * cfg.vocab_size)


def per_image(model):
    """Floating-point operations of one image of a VisionTransformer, forward and backward."""
    cfg, T = model.cfg, model.cfg.max_len
    patches = T - (model.cls is not None or model.question is not None)
    once = sum(part.weight.numel() for part in (model.head, model.question) if part is not None)
    return 3 * 2 * (cfg.n_layers * block(cfg, T) + patches * model.embedding[1].weight.numel() + once)


def per_problem(model, S, T):
    """The same of a question of S tokens and its answer of T, for a Seq2SeqTransformer."""
    cfg, decoder, d = model.cfg, model.decoder.cfg, model.cfg.d_model
    cross = T * (2 * d ** 2 + 2 * S * d) + S * 2 * d ** 2
    blocks = cfg.n_layers * block(cfg, S) + decoder.n_layers * (block(decoder, T) + cross)
    return 3 * 2 * (blocks + T * d * cfg.vocab_size)


def block(cfg, T):
    """Multiply-adds of one block for T tokens, each of which attends to all T; the forward pass."""
    d, d_h = cfg.d_model, cfg.d_model // cfg.n_heads
    swiglu = cfg.activation == "swiglu"
    d_ff = cfg.d_ff or (8 * d // 3 if swiglu else 4 * d)               # as in model.MLP

    def heads(n, value_rows=T):
        """A group of n heads; W_v, or W_s, is applied to value_rows rows of each sequence."""
        G = cfg.n_kv_heads or n
        projections = d * n * d_h + d * G * d_h + d * G * d_h * value_rows / T
        return projections + (4 if cfg.position == "shaw" else 2) * n * T * d_h + (n * d_h) ** 2

    layer = (3 if swiglu else 2) * d * d_ff
    if cfg.n_sa:
        layer += heads(cfg.n_sa)
    if cfg.n_ra:
        relative = cfg.symbols == "relative"
        layer += heads(cfg.n_ra, min(2 * (cfg.max_distance or cfg.max_len) + 1, 2 * T - 1) if relative else T)
    if cfg.n_ra and cfg.ra_type == "ra":
        R = cfg.n_relations or cfg.n_ra
        p = cfg.rel_proj_dim or cfg.n_ra * d_h // R
        layer += (1 if cfg.symmetric else 2) * d * R * p               # x W_q_rel, x W_k_rel
        layer += R * T * p + cfg.n_ra * T * R + cfg.n_ra * R * d_h     # r_ij, sum_j alpha_ij r_ij, then W_r
    if cfg.n_ra and cfg.symbols == "symbolic":
        layer += d ** 2 + 2 * cfg.n_symbols * d
    S, M, D = cfg.memory_heads, cfg.memory_slots, cfg.memory_width
    if M:
        layer += d * S * D + S * M * D + 2 * M * d
    return T * layer


# Peak TFLOP/s, dense (data sheets often give twice as much, "with sparsity"); float32 without TF32, PyTorch's default.
# The key is a pattern that matches the whole of torch.cuda.get_device_name(): a laptop's 4090, a 3090 Ti or a slice of
# an A100 (MIG) are other devices, and no number is better than a wrong one. Sources: NVIDIA's data sheets; for GeForce
# NVIDIA's white papers (GA102, Ada), bfloat16 with float32 sums; for the A10G the data sheet of AWS.
PEAK = {
    r"NVIDIA H200|NVIDIA H100 80GB HBM3": dict(bfloat16=989, float32=67),          # SXM modules
    r"NVIDIA H100 NVL": dict(bfloat16=835, float32=60),
    r"NVIDIA H100 PCIe": dict(bfloat16=756, float32=51),
    r"(NVIDIA )?A100(-SXM4|-PCIE)?[- ](40|80)GB( PCIe)?": dict(bfloat16=312, float32=19.5),
    r"NVIDIA L40S": dict(bfloat16=362, float32=91.6),
    r"NVIDIA L4": dict(bfloat16=121, float32=30.3),
    r"NVIDIA A10": dict(bfloat16=125, float32=31.2),
    r"NVIDIA A10G": dict(bfloat16=70, float32=35),
    r"NVIDIA GeForce RTX 4090": dict(bfloat16=165.2, float32=82.6),
    r"(NVIDIA )?GeForce RTX 3090": dict(bfloat16=71, float32=35.6),
    r"Tesla T4": dict(float32=8.1),                                    # no bfloat16 before Ampere
    r"Tesla V100-SXM2-(16|32)GB": dict(float32=15.7),
    r"Tesla V100-PCIE-(16|32)GB": dict(float32=14),
}


def utilisation(cfg, tokens_per_s, device_name, dtype):
    """-> (TFLOP/s, share of the device's peak, or None if that is not known).

    device_name: as torch.cuda.get_device_name() returns it, or any other text; dtype: of the matrix products, such as
    torch.bfloat16 or "bfloat16"; tokens_per_s: in training, on this one device.
    """
    tflops = per_token(cfg) * tokens_per_s / 1e12
    peaks = next((peaks for pattern, peaks in PEAK.items() if re.fullmatch(pattern, device_name)), {})
    peak = peaks.get(str(dtype).removeprefix("torch."))
    return tflops, tflops / peak if peak else None


def describe(cfg, tokens_per_s, device_name, dtype):
    """One line for a train script: "12.3 TFLOP/s, 41% of the peak of <device> in <dtype>", or the first part alone."""
    tflops, share = utilisation(cfg, tokens_per_s, device_name, dtype)
    speed = f"{tflops:.1f} TFLOP/s" if tflops >= 1 else f"{1000 * tflops:.1f} GFLOP/s"
    if share is None:
        return speed
    return f"{speed}, {100 * share:.3g}% of the peak of {device_name} in {str(dtype).removeprefix('torch.')}"
