"""On a GPU, launching kernels takes most of a small model's time. So the number of operations in a step counts,
and it can be counted on a CPU: those below the autograd level, where each is about one kernel.
"""
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_lm
import train_vit
from model import LanguageModel, VisionTransformer, model_config
from relational_attention import RelationalAttention
from toolbox import training

# These launch nothing: views, allocations, marks of the profiler, and a function of two dtypes.
FREE = {"view", "_unsafe_view", "_reshape_alias", "transpose", "t", "permute", "expand", "slice", "select", "split",
        "split_with_sizes", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "narrow", "empty",
        "empty_like", "new_empty", "empty_strided", "promote_types", "_record_function_enter_new",
        "_record_function_exit"}


class Operations(TorchDispatchMode):
    """Counts operations on tensors, forward and backward."""
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.overloadpacket.__name__ not in FREE
        return func(*args, **(kwargs or {}))


def launches(model, batch, cfg, dtype):
    """Of one training step, after a first one, in which the optimizer allocates its moments."""
    optimizer = training.make_optimizer(model, cfg)
    for step in (1, 2):
        with Operations() as operations:
            with training.autocast(torch.device("cpu"), dtype):
                _, loss = model(*batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return operations.n


def fineweb_350m(cfg):
    """Two of the 24 layers, short texts and a small vocabulary: the number of operations depends on none of these."""
    cfg = replace(cfg, n_layers=2, vocab_size=1000)
    return LanguageModel(model_config(vars(cfg))), torch.randint(1000, (2, 1, 200)).unbind()


def cifar10(cfg):
    m = VisionTransformer(model_config(vars(cfg)), image_size=32, patch_size=4, n_classes=10, pool=cfg.pool)
    return m, (torch.randn(2, 3, 32, 32), torch.randint(10, (2,)))


@pytest.mark.parametrize("make, script, dtype, at_most", [
    (fineweb_350m, train_lm, torch.float32, 2.5), (fineweb_350m, train_lm, torch.bfloat16, 2.5),
    (cifar10, train_vit, torch.float32, 2.5), (cifar10, train_vit, torch.bfloat16, 2.1)])
def test_a_dat_launches_about_twice_the_kernels_of_a_transformer(make, script, dtype, at_most, monkeypatch):
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda m, *shapes: m.fast)        # as on a GPU
    cfg = script.Config(**script.PRESETS[make.__name__])
    dat, transformer = (launches(*make(c), c, dtype) for c in (cfg, replace(cfg, n_ra=0)))
    print(f"{make.__name__}, {dtype}: DAT {dat}, Transformer {transformer} operations, {dat / transformer:.3f} x")
    assert transformer > 100 and dat <= at_most * transformer
