"""train_vit.py with a memory in each block, and with questions about images (Sort-of-CLEVR)."""
import csv
import itertools
import json

import pytest
import torch
from test_vit_script import CPU, TINY, few_glyphs, folders                  # few_glyphs: a fixture

import train_vit
from data import images
from data.images import augment
from data.sort_of_clevr import SUBTYPES
from train_vit import Config, evaluate, make_model

__all__ = ["few_glyphs"]


@pytest.mark.figures
def test_a_run_with_slots_logs_how_different_they_are_and_draws_what_they_attend_to(tmp_path, capsys):
    train_vit.main([*TINY, "--n_ra=0", "--n_layers=2", "--memory_slots=0,4", "--memory_width=6", "--bottleneck=8",
                    "--match_params", f"--out_dir={tmp_path}"])
    shown = capsys.readouterr().out
    assert "AiT 2+0, d_ff=16 - Transformer 2+0, d_ff=" in shown
    for folder in folders(tmp_path):
        with open(folder / "log.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        slots = json.loads((folder / "config.json").read_text())["options"]["memory_slots"]
        assert (folder / "slots.png").exists() == bool(slots) == ("rank_2" in rows[0])
        for row in rows:
            if slots and row["val_loss"]:
                assert 1 <= float(row["rank_1"]) <= 4 and -1 <= float(row["cosine_2"]) <= 1
    train_vit.main([*TINY, "--n_ra=0", "--n_layers=2", "--memory_slots=4", "--memory_width=6", "--bottleneck=8",
                    "--match_params", f"--out_dir={tmp_path}"])
    assert ": reused" in capsys.readouterr().out


@pytest.fixture
def few_questions(monkeypatch):
    for part, n in (("train", 60), ("test", 30)):
        monkeypatch.setitem(images.N_IMAGES, part, n)


def test_no_image_is_in_two_parts_and_each_of_its_questions_comes_once(few_questions):
    data, pixels = images.Questions(val_size=20), {}
    for part, n in (("train", 40), ("val", 20), ("test", 30)):
        batches = list(data.batches(part, 64))
        x, y, q = (torch.cat(arrays) for arrays in zip(*batches))
        assert x.shape == (10 * n, 3, 75, 75) and x.dtype == torch.uint8 and q.shape == (10 * n, 18)
        assert data.facts[part] == len(y) == 10 * n
        pixels[part] = {image.numpy().tobytes() for image in x}
        assert len(pixels[part]) == n
    assert not (pixels["train"] & pixels["val"] or pixels["train"] & pixels["test"] or pixels["val"] & pixels["test"])
    seen = [q for _, _, q in itertools.islice(data.training_batches(50, 1, 1), 8)]         # an epoch of 400 questions
    x, y, q = data.rows("train", torch.arange(400))
    assert sorted(map(tuple, torch.cat(seen).tolist())) == sorted(map(tuple, q.tolist()))
    fresh = next(data.training_batches(50, 1, 3))
    again = list(itertools.islice(data.training_batches(50, 1, 1), 3))[-1]
    assert all(torch.equal(one, other) for one, other in zip(fresh, again))


def test_pictures_and_object_tokens_come_with_the_same_questions_and_answers(few_questions):
    pictures, objects = images.Questions(val_size=20), images.Questions(val_size=20, objects=True)
    for (x, y, q), (tokens, y2, q2) in zip(pictures.batches("test", 70), objects.batches("test", 70)):
        assert torch.equal(y, y2) and torch.equal(q, q2) and tokens.shape == (len(x), 10, 1, 6)
        same = augment.normalised(tokens, objects.mean, objects.std)
        torch.testing.assert_close(same, tokens)                       # normalisation leaves them as they are
        for image, six in zip(x, tokens[:, :, 0].mT):                  # a red object where the first token says
            column, row = (six[0, 6:8] * 32 + 37).round().int().tolist()
            assert image[:, row, column].tolist() == [255, 0, 0]
    assert pictures.captions(q[:1])[0].split()[0] in ("nearest", "furthest", "count")


@pytest.mark.parametrize("options", [[], ["--objects"]])
def test_questions_are_scored_by_kind_beside_two_levels_without_vision(options, few_questions, tmp_path, capsys):
    args = [*TINY, "--data=sort_of_clevr", "--patch_size=25", "--pool=cls", "--val_size=20", "--memory_slots=0,4",
            *options, f"--out_dir={tmp_path}"]
    train_vit.main(args)
    shown = capsys.readouterr().out
    subtype = images.Questions(val_size=20).subtype
    assert len(folders(tmp_path)) == 4                                 # DAT and Transformer, with and without memory
    assert shown.count("  guessing: all 0.") == shown.count("  counting: all 0.") == 4
    assert "Without places, counting shapes: all 0." in (tmp_path / "table.md").read_text()
    for folder in folders(tmp_path):
        scores = json.loads((folder / "config.json").read_text())["scores"]
        assert scores.keys() == {"test_loss", "test_accuracy", "images", "nearest", "furthest", "count"}
        mean = sum(scores[kind] * (subtype == i).mean() for i, kind in enumerate(SUBTYPES) if kind in scores)
        assert mean == pytest.approx(scores["test_accuracy"])          # of the model as it is after training
        assert (folder / "predictions.png").exists() == (not options)
    train_vit.main(args)
    assert capsys.readouterr().out.count(": reused") == 4


def test_the_accuracies_by_kind_average_to_that_of_all_questions_and_leave_the_memory_alone(few_questions):
    data = images.Questions(val_size=20)
    cfg = Config(d_model=16, n_layers=1, n_heads=2, n_ra=1, data="sort_of_clevr", patch_size=25, memory_slots=4)
    torch.manual_seed(0)
    model = make_model(cfg, data).train()
    before = model.stack.blocks[0].mlp.memory.clone()
    shares = train_vit.by_subtype(model, data, CPU, torch.float32)
    assert torch.equal(model.stack.blocks[0].mlp.memory, before)
    kinds = list(SUBTYPES)
    counts = {kind: (data.subtype == kinds.index(kind)).sum() for kind in shares}
    assert sum(counts.values()) == 300
    mean = sum(shares[kind] * counts[kind] for kind in shares) / 300
    assert mean == pytest.approx(evaluate(model, data, "test", CPU, torch.float32)[1])
