"""train_vit.py: the published models, what is measured, runs, wrong input. (The loop itself: test_loops.py.)"""
import csv
import json
import math
import os
import re
import weakref
from dataclasses import replace
from functools import partial
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import train_vit
from data import images
from data.images import augment
from model import TransformerConfig, VisionTransformer
from toolbox import training
from toolbox.run import Run, load_checkpoint
from train_vit import PRESETS, Config, evaluate, make_model

TINY = ["--d_model=16", "--d_ff=16", "--n_layers=1", "--n_heads=2", "--n_ra=1", "--batch_size=8", "--val_size=40",
        "--warmup_steps=2", "--max_steps=6", "--eval_every=3", "--log_every=1", "--device=cpu"]
CIFAR10, CIFAR100 = SimpleNamespace(size=32, n_classes=10), SimpleNamespace(size=32, n_classes=100)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_glyphs(monkeypatch):
    for part, n in (("train", 200), ("test", 60)):
        monkeypatch.setitem(images.N_GLYPHS, part, n)


def count_parameters(cfg, data):
    return training.count_parameters(partial(make_model, data=data), cfg)


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


def n_parameters(cfg, data):
    return training.count_parameters(partial(make_model, data=data), cfg)


def folders(tmp_path):
    return sorted(p.parent for p in tmp_path.glob("*/config.json") if p.parent.suffix != ".old")


# ---- the models ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, data, n_ra, published", [
    ("cifar10", CIFAR10, 6, 6_025_834), ("cifar10", CIFAR10, 0, 7_149_034),
    ("cifar100", CIFAR100, 6, 6_060_484), ("cifar100", CIFAR100, 0, 7_183_684)])
def test_the_published_models_have_as_many_parameters_as_published(preset, data, n_ra, published):
    cfg = Config(**PRESETS[preset])
    dat, vit = training.with_baselines([replace(cfg, baseline=True)], partial(make_model, data=data))
    assert (dat.n_sa, dat.n_ra, vit.n_sa, vit.n_ra) == (6, 6, 12, 0)
    assert n_parameters(dat if n_ra else vit, data) == published
    assert n_parameters(replace(cfg, n_ra=n_ra), data) == published             # as with --n_ra=0
    if (preset, n_ra) == ("cifar10", 6):
        assert n_parameters(replace(cfg, symmetric=False), data) == 6_615_658       # also published


@pytest.mark.parametrize("n_ra, n_sa", [(6, 10), (0, 16)])
def test_the_imagenet_preset_is_the_papers_model(n_ra, n_sa):
    cfg = replace(Config(**{**PRESETS["imagenet"], "data": "somewhere"}), n_ra=n_ra)
    with torch.device("meta"):
        model = make_model(cfg, SimpleNamespace(size=224, n_classes=1000))
    assert cfg.n_sa == n_sa and model.cfg.max_len == 14 * 14 + 1 and len(model.stack.blocks) == 24
    assert model.stack.blocks[0].mlp.W_3.weight.shape == (4096, 1024) and not list(model.norm.parameters())
    assert [name for name, _ in model.stack.blocks.named_parameters() if name.endswith("bias")] == []
    assert cfg.batch_size * cfg.grad_accum == 1024 and cfg.max_steps == 45 * (1_281_167 // 1024)
    assert (cfg.optimizer, cfg.learning_rate, cfg.schedule, cfg.warmup_steps) == ("adamw", 5e-4, "constant", 0)
    assert (cfg.beta1, cfg.beta2, cfg.dropout, cfg.norm_first) == (0.9, 0.99, 0.1, True)
    assert (cfg.pool, cfg.symbols, cfg.symmetric, cfg.position) == ("cls", "relative", True, "learned")
    assert cfg.mixup == cfg.cutmix == cfg.crop_padding == 0 and cfg.activation == "swiglu"


def test_attention_has_biases_where_the_options_say():
    def biases(**options):
        cfg = TransformerConfig(d_model=8, n_heads=2, n_ra=1, n_layers=1, symbols="positional", **options)
        names = {name.replace("stack.blocks.0.", "") for name, _ in
                 make_model_of(cfg).named_parameters() if name.startswith("stack.blocks") and "bias" in name}
        attention = {name for name in names if name.startswith("attention")}
        return names - attention, attention

    outputs = {"attention.sensory.W_o.bias", "attention.relational.W_o.bias"}
    others, everywhere = biases(bias=True)
    assert outputs < everywhere and "attention.relational.W_q_rel.bias" in everywhere and "mlp.W_1.bias" in others
    assert biases(bias=True, attention_bias="output") == (others, outputs)
    assert biases(bias=True, attention_bias="none") == (others, set())
    assert biases() == (set(), set()) and biases(attention_bias="all") == (set(), everywhere)


def make_model_of(cfg):
    return VisionTransformer(cfg, image_size=8, patch_size=4, n_classes=2)


class Peak(TorchDispatchMode):
    """Bytes of the tensors that exist, and their maximum."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                self.known.add(key)
                self.now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self.freed, key, tensor.untyped_storage().nbytes())
        return out

    def freed(self, key, n):
        self.known.discard(key)
        self.now -= n


def test_a_step_of_the_published_dat_needs_at_most_one_and_a_half_times_the_memory():
    """Of what grows with the batch. (The weights are not counted; the DAT has fewer.)"""
    peaks = []
    for n_ra in (0, 6):
        model = make_model(replace(Config(**PRESETS["cifar10"]), n_ra=n_ra, n_layers=2), CIFAR10)
        for B in (4, 12):
            with Peak() as memory:
                model(torch.rand(B, 3, 32, 32), torch.zeros(B, dtype=torch.long))[1].backward()
            peaks.append(memory.peak)
    vit, dat = peaks[1] - peaks[0], peaks[3] - peaks[2]
    assert 8 * 65 * 384 * 4 < vit < dat < 1.5 * vit                    # more than one activation: memory is counted


# ---- what is learned and measured ------------------------------------------------------------------------------------

def fitted(data, tmp_path, steps=150):
    """-> validation and training accuracy of a small DAT."""
    cfg = Config(d_model=32, d_ff=64, n_layers=1, n_heads=2, n_ra=1, batch_size=32, max_steps=steps, eval_every=steps,
                 learning_rate=3e-3, warmup_steps=10, weight_decay=0.0, out_dir=str(tmp_path))
    with Run(cfg, data.facts, unit="images", per_step=cfg.batch_size, metrics=("val_loss", "val_accuracy")) as run:
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
        scores = json.loads((folder / "config.json").read_text())["scores"]
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
    ("--data=nowhere", "no folder nowhere: --data takes glyphs, cifar10, cifar100, or a folder"),
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
