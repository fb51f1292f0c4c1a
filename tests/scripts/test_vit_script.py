"""train_vit.py: what is learned and measured, runs, wrong input. (See also test_loops.py and test_vit_models.py.)"""
import csv
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import train_vit
from data import images
from data.images import augment
from toolbox.run import Run, load_checkpoint
from train_vit import Config, evaluate, make_model

TINY = ["--d_model=16", "--d_ff=16", "--n_layers=1", "--n_heads=2", "--n_ra=1", "--batch_size=8", "--val_size=40",
        "--warmup_steps=2", "--max_steps=6", "--eval_every=3", "--log_every=1", "--device=cpu"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_glyphs(monkeypatch):
    for part, n in (("train", 200), ("test", 60)):
        monkeypatch.setitem(images.N_GLYPHS, part, n)


def bars(n, seed, shuffled=False):
    """Images in which one of four rows of patches is red; it is the class, or with `shuffled` labels it is not.

    (Red and not bright: the norm before the patch embedding takes a patch's mean away.)
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=n)
    x = rng.integers(0, 100, (n, 3, 32, 32)).astype(np.uint8)
    for image, label in zip(x, labels):
        image[0, 8 * label:8 * label + 8] += 100
    return x, rng.permutation(labels) if shuffled else labels


def bar_images(n=300, n_test=40, val_size=100, shuffled=False):
    return images.Images("bars", bars(n, 1, shuffled), bars(n_test, 2), class_names=list("abcd"), mean=(0.5,) * 3,
                         std=(0.25,) * 3, val_size=val_size)


def folders(tmp_path):
    return sorted(p.parent for p in tmp_path.glob("*/config.json") if p.parent.suffix != ".old")


# ---- what is learned and measured ------------------------------------------------------------------------------------

def fitted(data, tmp_path, steps=150):
    """-> validation and training accuracy of a small DAT."""
    cfg = Config(d_model=32, d_ff=64, n_layers=1, n_heads=2, n_ra=1, batch_size=32, max_steps=steps, eval_every=steps,
                 learning_rate=3e-3, warmup_steps=10, weight_decay=0.0, out_dir=str(tmp_path))
    with Run(cfg, data.facts, unit="images", per_step=cfg.batch_size,
             metrics=("train_accuracy", "val_loss", "val_accuracy")) as run:
        train_vit.train(cfg, run, data, CPU, torch.float32, lambda: False)
    model = make_model(cfg, data)
    model.load_state_dict(load_checkpoint(run.folder / "last.pt")["model"])
    return evaluate(model, data, "val", CPU, torch.float32)[1], evaluate(model, data, "train", CPU, torch.float32)[1]


def test_true_labels_are_learned_and_shuffled_labels_only_by_heart(tmp_path):
    val, train = fitted(bar_images(), tmp_path / "true")
    assert val > 0.9 and train > 0.9
    val, train = fitted(bar_images(600, val_size=400, shuffled=True), tmp_path / "shuffled", steps=400)
    assert train > 0.6                                                  # learned by heart ...
    assert abs(val - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)           # ... but no better than chance (4 sigma)


def test_evaluation_equals_a_loop_over_single_images():
    data = bar_images()
    torch.manual_seed(0)
    model = make_model(Config(d_model=16, n_layers=1, n_heads=2, n_ra=1, dropout=0.5), data)
    x, y = data.parts["val"]
    losses, right = [], 0
    model.eval()
    for image, label in zip(x, y):
        logits = model(((image / 255 - 0.5) / 0.25)[None])[0][0]
        losses.append(logits.logsumexp(0).item() - logits[label].item())
        right += logits.argmax().item() == label.item()
    for batch_size in (1, 7, 100):
        loss, accuracy, n = evaluate(model, data, "val", CPU, torch.float32, batch_size)
        assert (accuracy, n) == (right / 100, 100) and loss == pytest.approx(sum(losses) / 100, rel=1e-5)
    assert model.training                                              # as for training


def test_augmentation_is_for_training_only(monkeypatch):
    data = bar_images()
    cfg = Config(d_model=16, n_layers=1, n_heads=2, n_ra=1, crop_padding=4, flip=True, cutmix=1.0, data="bars")
    torch.manual_seed(1)
    x, y = train_vit.for_training(*next(data.training_batches(16, 1, 1)), cfg, data)
    assert x.shape == (16, 3, 32, 32) and ((y > 0).sum(1) > 1).any()     # mixed labels
    for name in ("augmented", "random_crop", "random_flip", "mix", "cut_and_paste", "smoothed"):
        monkeypatch.setattr(augment, name, None)
    model = make_model(cfg, data)
    before = torch.get_rng_state()
    first = evaluate(model, data, "val", CPU, torch.float32)
    assert torch.equal(before, torch.get_rng_state())                  # nothing was drawn
    assert first == evaluate(model, data, "val", CPU, torch.float32)


# ---- runs ------------------------------------------------------------------------------------------------------------

@pytest.mark.figures
def test_a_plain_run_trains_both_models_uses_the_test_images_once_and_is_reused(tmp_path, capsys, monkeypatch):
    args = [*TINY, f"--out_dir={tmp_path}"]
    evaluated = []
    monkeypatch.setattr(train_vit, "evaluate", lambda *a, **k: (evaluated.append(a[2]), evaluate(*a, **k))[1])
    train_vit.main(args)
    shown = capsys.readouterr().out
    assert [f.name[:13] for f in folders(tmp_path)] == ["sa1_ra1_seed1", "sa2_ra0_seed1"]
    assert evaluated == ["val", "val", "val", "test"] * 2
    for folder in folders(tmp_path):
        assert {p.name for p in folder.iterdir()} == {"config.json", "log.csv", "best.pt", "last.pt", "predictions.png"}
        record = json.loads((folder / "config.json").read_text())
        scores = record["scores"]
        assert record["operations_per_image"] > record["n_parameters"]
        assert scores["images"] == 60 and 0 <= scores["test_accuracy"] <= 1
        assert f"accuracy {scores['test_accuracy']:.4f}" in shown
        assert f"| {scores['test_accuracy']:.4f} | 1 |" in (tmp_path / "table.md").read_text()
    assert "images: glyphs, 34 classes, 160 for training, 40 for validation, 60 for testing" in shown
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    train_vit.main(args)
    assert capsys.readouterr().out.count(": reused") == 2 and len(evaluated) == 8      # not evaluated again
    record = folders(tmp_path)[0] / "config.json"                      # killed between its last step and the test
    content = json.loads(record.read_text())
    scores = content.pop("scores")
    record.write_text(json.dumps(content))
    train_vit.main(args)
    assert json.loads(record.read_text())["scores"] == scores and evaluated[8:] == ["test"]


def test_gradient_accumulation_sees_the_whole_batch(tmp_path):
    losses = []
    for sizes in (["--batch_size=16"], ["--batch_size=4", "--grad_accum=4"]):
        out = tmp_path / sizes[0][2:]
        train_vit.main([*TINY, *sizes, "--baseline=False", f"--out_dir={out}"])
        log, = out.glob("*/log.csv")
        with open(log, newline="") as f:
            losses.append([float(row["train_loss"]) for row in csv.DictReader(f) if row["train_loss"]])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_same_images_in_another_place_are_the_same(tmp_path, capsys):
    x, labels = bars(60, 1)
    rows = np.concatenate([labels[:, None].astype(np.uint8), x.reshape(60, -1)], 1)
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for name in ("data_batch_1.bin", "test_batch.bin"):
            (tmp_path / place / name).write_bytes(rows.tobytes())
    for folder in (f"{tmp_path}/here", f"{tmp_path}/here/", f"{tmp_path}/there"):
        train_vit.main([*TINY, f"--data={folder}", "--baseline=False", f"--out_dir={tmp_path / 'out'}"])
    out, err = capsys.readouterr()
    assert out.count(": reused") == 2 and "has 1 of the 5 files of training images" in err
    assert len(list((tmp_path / "out").glob("sa*"))) == 1


def test_a_model_that_cannot_be_built_is_found_before_anything_is_trained(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train_vit.main([*TINY, "--patch_size=8,5", f"--out_dir={tmp_path / 'out'}"])
    assert error.value.code == 2 and "not a multiple of patch_size=5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_published_pair_is_compared(tmp_path, capsys):
    train_vit.main([*TINY, "--n_heads=4", "--n_ra=2", "--dat_n_kv_heads=1", "--bias", "--attention_bias=output",
                    "--dat_attention_bias=none", "--seed=1,2,3", "--max_steps=2", f"--out_dir={tmp_path}"])
    shown = capsys.readouterr().out
    assert "DAT 2+2 - Transformer 4+0: " in shown and "test accuracy, 95% interval" in shown
    vit = torch.load(next(tmp_path.glob("sa4_ra0_seed1*/last.pt")), weights_only=True)["model"]
    dat = torch.load(next(tmp_path.glob("sa2_ra2_seed1*/last.pt")), weights_only=True)["model"]
    assert vit["stack.blocks.0.attention.sensory.W_k.weight"].shape == (16, 16)
    assert dat["stack.blocks.0.attention.sensory.W_k.weight"].shape == (4, 16)
    assert "stack.blocks.0.attention.sensory.W_o.bias" in vit and "stack.blocks.0.attention.sensory.W_o.bias" not in dat


def test_l2_is_part_of_adams_gradient_on_all_parameters():
    model = torch.nn.LayerNorm(4)
    optimizer = train_vit.make_optimizer(model, Config(optimizer="adam", weight_decay=0.1, learning_rate=1e-3))
    model.weight.grad, model.bias.grad = torch.zeros(4), torch.zeros(4)
    optimizer.step()                                                    # Adam's first step is lr * sign of the gradient
    torch.testing.assert_close(model.weight.data, torch.full((4,), 1 - 1e-3))


def test_damaged_images_of_a_folder_are_named_counted_and_left_out(tmp_path, capsys):
    x, labels = bars(60, 1)
    for i, (image, label) in enumerate(zip(x, labels)):
        for part in ("train", "val"):
            folder = tmp_path / "set" / part / "abcd"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i}.JPEG")
    broken = next((tmp_path / "set/train/a").glob("*.JPEG")), next((tmp_path / "set/val/b").glob("*.JPEG"))
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    broken[1].write_bytes(b"<html>")
    train_vit.main([*TINY, f"--data={tmp_path / 'set'}", "--image_size=32", "--val_size=10", "--workers=0",
                    "--max_steps=20", f"--out_dir={tmp_path / 'out'}"])
    out, err = capsys.readouterr()
    for path in broken:
        assert err.count(str(path)) == 1
    assert "could not be read: 2 images" in out and "59 test images" in out and "images: imagenet, 4 classes" in out


# ---- wrong input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, words", [
    ("--data=nowhere", "no folder nowhere: --data takes glyphs, sort_of_clevr, cifar10, cifar100, or a folder"),
    ("--data={tmp}", "is not a folder with data_batch_1.bin"),
    ("--data={tmp}/flat", "has no folder val/: the expected layout is train/<class>"),
    ("--data={tmp}/cut", "has 3,000 bytes, not a multiple of the 3,073"),
    ("--preset=imagenet", "give the folder of your images with --data=FOLDER"),
    ("--preset=cifar10 --n_ra=4", "the DAT cannot have --dat_n_kv_heads=3: n_kv_heads=3 does not divide n_sa=8"),
    ("--flip", "letters have no mirror images"),
    ("--val_size=200", "only 200 training images of glyphs"),
    ("--patch_size=5 --val_size=20", "image_size=32 is not a multiple of patch_size=5"),
    ("--label_smoothing=1", "must be below 1"),
    ("--cutmix=-1", "cutmix=-1.0: must be at least 0"),
    ("--cutmix=inf", "cutmix=inf: give 0 (off), or 0.001 to 1000"),
    ("--image_size=64", "image_size=64: only for ImageNet; images of glyphs are 32"),
    ("--data={tmp}/py", "holds the Python version of CIFAR"),
    ("--max_len=64", "--max_len: it means nothing for images"),
    ("--val_size=10,20", "--val_size: give one value, not a list"),
    ("--pool=max", "choose from mean, mean_cls, cls"),
    ("--cutmx=1", "did you mean --cutmix"),
    ("--memory_slots=-1", "memory_slots=-1: must be at least 0"),
    ("--memory_slots=4 --memory_decay=2", "memory_decay=2.0 must be between 0 and 1"),
    ("--memory_slots=4 --recompute", "would write twice"),
    ("--memory_queries=lerned", "did you mean learned?"),
    ("--preset=sort_of_clevr --flip", "change the answers to questions"),
    ("--preset=sort_of_clevr --crop_padding=2", "change the answers to questions"),
    ("--preset=sort_of_clevr --cutmix=1", "change the answers to questions"),
    ("--preset=sort_of_clevr --mixup=1", "change the answers to questions"),
    ("--data=sort_of_clevr", "patch_size=8 does not divide 75, the size of these images: give --patch_size=15"),
    ("--preset=sort_of_clevr --image_size=64", "images of sort_of_clevr are 75 pixels wide"),
    ("--preset=sort_of_clevr --val_size=9800", "there are only 9,800 training images of sort_of_clevr"),
    ("--objects", "objects: only --data=sort_of_clevr has them"),
    ("--device=abacus", "device=abacus cannot be used here")])
def test_wrong_input_is_one_clear_line(wrong, words, capsys, tmp_path):
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "py").mkdir()
    (tmp_path / "py" / "data_batch_1").write_bytes(b"pickle")
    (tmp_path / "cut" / "data_batch_1.bin").write_bytes(bytes(3000))
    with pytest.raises(SystemExit) as error:
        train_vit.main([*wrong.format(tmp=tmp_path).split(), f"--out_dir={tmp_path / 'out'}"])
    assert error.value.code == 2 and not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_cifar_without_network_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(images.CIFAR, "cifar10", {**images.CIFAR["cifar10"], "url": "http://127.0.0.1:9/c.tar.gz",
                                                  "retries": 0})
    with pytest.raises(SystemExit) as error:
        train_vit.main(["--preset=cifar10", f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}", "--device=cpu"])
    assert error.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cifar10.tar.gz" in line and "http://127.0.0.1:9/c.tar.gz" in line and "--data_dir" in line


@pytest.mark.skipif("DAT_TEST_DATA" not in os.environ, reason="needs real images")
def test_real_images_are_learned_from(tmp_path, capsys):
    folder = f"{os.environ['DAT_TEST_DATA']}/data/cifar-10-batches-bin"
    train_vit.main([*TINY, f"--data={folder}", "--val_size=9800", "--flip", "--crop_padding=4", "--cutmix=1",
                    "--max_steps=40", "--batch_size=64", "--learning_rate=3e-3", "--baseline=False", "--eval_every=40",
                    f"--out_dir={tmp_path}"])
    assert "10 classes, 200 for training, 9,800 for validation, 1,000 for testing" in (out := capsys.readouterr().out)
    losses = [float(loss) for loss in re.findall(r"val_loss (\d\.\d+)", out)]
    assert losses[1] < losses[0] - 0.1
