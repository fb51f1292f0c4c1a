"""What several tests share: a run that takes a second."""
import os
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode

import train_lm
from extras import blocked
from relational_attention import RelationalAttention
from toolbox.figures import curves, mathematics

TINY = ["--d_model=16", "--n_layers=1", "--n_heads=2", "--n_ra=1", "--max_len=16", "--batch_size=2", "--n_symbols=4",
        "--symbol_heads=2", "--eval_windows=8", "--dropout=0.1", "--baseline=False", "--warmup_steps=5", "--device=cpu"]

# The tensors of tests are small: a second thread only waits, in these processes and in those that they start.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1").split(",")[0]))

if "DAT_TEST_DATA" in os.environ:              # GPT-2's tokenizer is there, too, and need not be fetched
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", os.path.join(os.environ["DAT_TEST_DATA"], "data", "tiktoken_cache"))


@pytest.fixture(autouse=True)
def blank_figures(request, monkeypatch):
    """To lay out and write a figure takes longer than a small run: files stay empty but in tests marked `figures`."""
    if "figures" not in request.keywords:
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())


@pytest.fixture
def brief_reports(monkeypatch):
    """For tests of what comes before a report: no axes are laid out, and the sample has five tokens."""
    stream = train_lm.stream
    monkeypatch.setattr(train_lm, "stream", lambda model, idx, n, **options: stream(model, idx, 5, **options))
    for module in (curves, mathematics):
        monkeypatch.setattr(module, "draw", lambda *runs: Figure())


@pytest.fixture
def tiny(tmp_path):
    """The options of a run that takes a second, on a text of its own."""
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    return [*TINY, f"--data={tmp_path / 'text.txt'}", f"--out_dir={tmp_path / 'out'}",
            f"--data_dir={tmp_path / 'cache'}"]


@pytest.fixture
def only_run(tmp_path):
    """A function that finds the folder of the one run under tmp_path / "out"."""
    def find():
        folder, = (p.parent for p in (tmp_path / "out").glob("*/config.json") if p.parent.suffix != ".old")
        return folder
    return find


@pytest.fixture
def fast_form(monkeypatch):
    """Short sequences take the forms for long ones."""
    def long(self, q, k):
        return self.literal if q.size(-2) == 1 or self.rel_activation != "identity" else self.fast
    monkeypatch.setattr(RelationalAttention, "choose_form", long)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor, in numbers kept in memory, that any operation returns, forward or backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.fixture
def plain_blocks(monkeypatch):
    """The query blocks as plain functions: what an operator does inside is hidden from counters of operations."""
    monkeypatch.setattr(blocked, "forward_in_blocks", blocked.forward_pass)
    monkeypatch.setattr(blocked, "backward_in_blocks", blocked.backward_pass)


@pytest.fixture
def largest_tensor(plain_blocks):
    return LargestTensor


READING_ORDER = ["relational_attention", "symbols", "attention", "dropout_and_precision", "model", "workspace",
                 "conversion", "generation", "vision", "seq2seq", "theorem1", "inside"]


def pytest_collection_modifyitems(items):
    """The tests of tests/core run first, and in the order in which they are meant to be read."""
    def place(item):
        name = item.path.stem.removeprefix("test_")
        in_core = item.path.parent.name == "core" and name in READING_ORDER
        return READING_ORDER.index(name) if in_core else len(READING_ORDER)
    items.sort(key=place)
