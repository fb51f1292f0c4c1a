"""Wrong input of train_lm.py: one clear line, exit status 2, no traceback."""
import pytest

import train_lm


def stopped_by(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        train_lm.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_wrong_input_is_one_clear_line(tmp_path, capsys):
    latin, short = tmp_path / "latin.txt", tmp_path / "short.txt"
    (tmp_path / "text.txt").write_text("to be or not to be. " * 500)
    latin.write_bytes("déjà vu ".encode("latin-1") * 500)
    short.write_text("too short")
    assert "n_ra=9" in stopped_by(["--n_ra=9"], capsys)
    assert "d_model=100" in stopped_by(["--d_model=100"], capsys)
    assert "no file nowhere.txt" in stopped_by(["--data=nowhere.txt"], capsys)
    assert "not UTF-8" in stopped_by([f"--data={latin}"], capsys)
    assert "less than one context" in stopped_by([f"--data={short}"], capsys)
    assert "did you mean --n_ra?" in stopped_by(["--n_rs=4"], capsys)
    for wrong in ("--batch_size=0", "--eval_every=0", "--log_every=0", "--max_steps=0", "--micro_batch=0", "--seed=-1",
                  "--n_shards=0", "--first_mb=0", "--eval_windows=0", "--warmup_steps=-3", "--grad_clip=-1",
                  "--learning_rate=nan"):
        assert "must be at least" in stopped_by([wrong], capsys)
    assert "below 1" in stopped_by(["--beta2=2"], capsys) and "2^63" in stopped_by([f"--seed={2 ** 63}"], capsys)
    assert "short.txt" in stopped_by([f"--data={latin}".replace("latin", "text"), f"--out_dir={short}/out"], capsys)
    assert "vocab_size=100: bytes has 256 tokens" in stopped_by(["--vocab_size=100"], capsys)
    assert "did you mean gpt2" in stopped_by(["--tokenizer=gtp2"], capsys)
    assert "invalid choice" in stopped_by(["--preset=big"], capsys)
    assert "device=abacus" in stopped_by(["--device=abacus", f"--out_dir={tmp_path / 'out'}"], capsys)
