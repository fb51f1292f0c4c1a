"""What several tests share: a run that takes a second."""
import os

import pytest

import relational_attention

TINY = ["--d_model=16", "--n_layers=1", "--n_heads=2", "--n_ra=1", "--max_len=16", "--batch_size=2", "--n_symbols=4",
        "--symbol_heads=2", "--eval_windows=8", "--dropout=0.1", "--baseline=False", "--warmup_steps=5", "--device=cpu"]

if "DAT_TEST_DATA" in os.environ:              # GPT-2's tokenizer is there, too, and need not be fetched
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", os.path.join(os.environ["DAT_TEST_DATA"], "data", "tiktoken_cache"))


@pytest.fixture
def tiny(tmp_path):
    """The options of a run that takes a second, on a text of its own."""
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    return [*TINY, f"--data={tmp_path / 'text.txt'}", f"--out_dir={tmp_path / 'out'}", f"--data_dir={tmp_path / 'cache'}"]


@pytest.fixture
def only_run(tmp_path):
    """A function that finds the folder of the one run under tmp_path / "out"."""
    def find():
        folder, = (p.parent for p in (tmp_path / "out").glob("*/config.json") if p.parent.suffix != ".old")
        return folder
    return find


@pytest.fixture
def fast_form(monkeypatch):
    """For tests whose sequences are short, but which are to test the form for long ones."""
    monkeypatch.setattr(relational_attention, "SHORT", 0)
