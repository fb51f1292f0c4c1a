"""Train an image classifier: a Vision Dual Attention Transformer, then a Vision Transformer of the same shape.

    python train_vit.py                                   letters from many fonts, built in; curves in out/vit
    python train_vit.py --seed=1,2,3                      three seeds of each: means, bands and the paired difference
    python train_vit.py --preset=cifar10_small            CIFAR-10 (170 MB), a model for a CPU
    python train_vit.py --preset=cifar10 --baseline       the published models, 12 heads, 100 epochs: for a GPU
    python train_vit.py --preset=workspace                the Associative Transformer, and three controls; five minutes
    python train_vit.py --preset=imagenet --data=FOLDER   the paper's, on your copy of ILSVRC2012: for a large GPU

Validation images are a part of the training images. The test images (of letters: in fonts that occur nowhere else) are
used once, for the finished model.
"""
from dataclasses import asdict, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from data import images
from data.images import augment
from data.sort_of_clevr import QUESTION_BITS, SIZE, per_subtype
from model import TransformerConfig, VisionTransformer, model_config
from toolbox import figures, flops, training
from toolbox.checkpoints import load_checkpoint, load_initial
from toolbox.figures.predictions import draw_predictions
from toolbox.inside.images import draw_memory
from toolbox.options import agreed, at_least, one_line_errors, options, parse_options, start
from toolbox.output import unfailing_output
from toolbox.run import Run
from workspace import slot_columns, slot_statistics

DEFAULTS = dict(d_ff=256, position="learned", symbols="relative", n_symbols=16, symmetric=True, max_steps=2500,
                warmup_steps=100, weight_decay=0.05, log_every=50, out_dir="out/vit")


@options(**DEFAULTS)
class Config(training.TrainingOptions, TransformerConfig):
    patch_size: int = 8                     # height and width of a patch, which is a token
    pool: Literal["mean", "mean_cls", "cls"] = "mean"   # what the head reads: see model.VisionTransformer
    dat_n_kv_heads: int | None = None       # key/value heads in each group of a DAT; default: as n_kv_heads
    dat_attention_bias: Literal["as_the_other", "all", "output", "none"] = "as_the_other"   # attention_bias of a DAT
    # data
    data: str = "glyphs"                    # glyphs, sort_of_clevr (built in), cifar10, cifar100, or a folder of images
    objects: bool = False                   # sort_of_clevr: six tokens, one for each object, instead of patches
    image_size: int | None = None           # ImageNet: height and width of a crop; default 224 (others have 32)
    val_size: int = 2000                    # how many of the training images are for validation
    workers: int | None = None              # ImageNet: processes that read images; default: cores less one, at most 8
    # augmentation
    crop_padding: int = 0                   # random crops: up to so many pixels to each side; 0: off
    flip: bool = False                      # mirror half of the images; not for letters
    mixup: float = 0.0                      # parameter of the Beta distribution; 0: off. With cutmix, too: either one
    cutmix: float = 0.0                     # parameter of the Beta distribution; 0: off
    label_smoothing: float = 0.0            # share of the label that goes to all classes alike
    # training
    batch_size: int = 64                    # images in one forward pass
    grad_accum: int = 1                     # forward passes per step: the step sees batch_size * grad_accum images
    optimizer: Literal["adamw", "adam"] = "adamw"   # adam: weight_decay is an L2 penalty, on all parameters
    eval_every: int = 250                   # steps between validations, each with a checkpoint

    def __post_init__(self):
        super().__post_init__()
        at_least(self, dat_n_kv_heads=1, patch_size=1, image_size=1, val_size=1, workers=0, crop_padding=0, mixup=0,
                 cutmix=0, label_smoothing=0, batch_size=1, grad_accum=1, eval_every=1)
        for wrong, message in (
                (self.label_smoothing >= 1, f"label_smoothing={self.label_smoothing} must be below 1"),
                (any(value and not 1e-3 <= value <= 1e3 for value in (self.mixup, self.cutmix)),
                 f"mixup={self.mixup}, cutmix={self.cutmix}: give 0 (off), or 0.001 to 1000"),
                (not self.data, "data: give the folder of your images with --data=FOLDER (ImageNet's licence does not "
                                "allow a download)"),
                (self.data == "glyphs" and self.flip,
                 "flip: letters have no mirror images; it is for --data=cifar10 and the like"),
                (self.objects and self.data != "sort_of_clevr", "objects: only --data=sort_of_clevr has them"),
                (self.data == "sort_of_clevr" and (self.crop_padding or self.flip or self.mixup or self.cutmix),
                 "crop_padding, flip, mixup and cutmix change the answers to questions: leave them out with "
                 "--data=sort_of_clevr"),
                (self.data == "sort_of_clevr" and not self.objects and SIZE % self.patch_size,
                 f"patch_size={self.patch_size} does not divide {SIZE}, the size of these images: give "
                 f"--patch_size=15, 5 or 25")):
            if wrong:
                raise ValueError(message)
        for name in ("vocab_size", "max_len", "tie_embeddings"):
            if getattr(self, name) != getattr(TransformerConfig, name):
                raise ValueError(f"--{name}: it means nothing for images")
        try:
            model_config(asdict(self))
        except ValueError as error:
            raise ValueError(f"the DAT cannot have --dat_n_kv_heads={self.dat_n_kv_heads}: {error}") from None


def train(cfg, run, data, device, dtype, stop_requested):
    """One run, from its first step or its last checkpoint to max_steps."""
    with one_line_errors():
        torch.manual_seed(cfg.seed)
        model = make_model(cfg, data).to(device)
        optimizer = make_optimizer(model, cfg)
        run.begin(model, optimizer, device, flops.per_image(model))
    print(f"\n{run.folder}: {cfg.n_sa} sensory + {cfg.n_ra} relational heads, "
          f"{run.record['n_parameters']:,} parameters")
    forward = training.compiled(model, device, cfg.grad_accum == 1) if cfg.compile else model

    if run.step == 0:
        with run.paused():                                            # evaluation does not count as training time
            loss, accuracy, _ = evaluate(model, data, "val", device, dtype)
            run.log(0, val_loss=loss, val_accuracy=accuracy, **slot_statistics(model))
    batches = data.training_batches(cfg.batch_size, cfg.seed, run.step + 1, cfg.grad_accum)
    for step in range(run.step + 1, cfg.max_steps + 1):
        training.reseed(cfg.seed, step)                               # for augmentation and dropout
        lr = training.set_learning_rate(optimizer, step, cfg)
        mean_loss = accuracy = 0.0
        for _ in range(cfg.grad_accum):
            with one_line_errors():                                   # images may vanish from a disk
                x, y, *questions = next(batches)                      # uint8 (B, 3, H, W), (B,), perhaps (B, 18)
            x, y = for_training(x, y, cfg, data)                      # float, (B, n_classes)
            with training.autocast(device, dtype):
                logits, loss = forward(x, y, *questions)
            right = logits.argmax(-1) == y.argmax(-1)                 # of mixed images: the one with the larger share
            accuracy = accuracy + right.float().mean() / cfg.grad_accum
            loss = loss / cfg.grad_accum
            loss.backward()
            mean_loss = mean_loss + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.add(mean_loss, norm, accuracy)

        if step % cfg.log_every == 0 or step == cfg.max_steps:
            run.log(step, **run.means(), lr=lr)
        if step % cfg.eval_every == 0 or step == cfg.max_steps:
            with run.paused():
                loss, accuracy, _ = evaluate(model, data, "val", device, dtype)
                run.log(step, val_loss=loss, val_accuracy=accuracy, **slot_statistics(model))
                if loss < run.best:
                    run.best = loss
                    run.save("best.pt", step, model, optimizer)
                run.save("last.pt", step, model, optimizer)
        if stop_requested():                                          # Ctrl-C or SIGTERM
            run.save("last.pt", step, model, optimizer)
            run.stop(step)
    run.finish()


def make_model(cfg, data):
    further = dict(patch_size=cfg.patch_size)
    if cfg.data == "sort_of_clevr":
        further = dict(patch_size=1 if cfg.objects else cfg.patch_size, channels=data.channels,
                       question_size=QUESTION_BITS)
    return VisionTransformer(model_config(asdict(cfg)), image_size=data.size, n_classes=data.n_classes, pool=cfg.pool,
                             **further)


def make_optimizer(model, cfg):
    """AdamW as everywhere else here, or the Adam of the published CIFAR runs."""
    if cfg.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                                weight_decay=cfg.weight_decay, fused=next(model.parameters()).is_cuda)
    return training.make_optimizer(model, cfg)


def for_training(x, y, cfg, data):
    """Images (B, 3, H, W) and labels (B,) -> augmented and normalised pixels, and probabilities (B, n_classes)."""
    x, y = augment.augmented(x, y, n_classes=data.n_classes, padding=cfg.crop_padding, flip=cfg.flip,
                             mixup=cfg.mixup, cutmix=cfg.cutmix, smoothing=cfg.label_smoothing)
    return augment.normalised(x, data.mean, data.std), y


@torch.no_grad()
def evaluate(model, data, part, device, dtype, batch_size=250):
    """Over "val" or "test", nothing augmented: mean cross-entropy in nats, share of right answers, number of images."""
    model.eval()
    n = loss = right = 0
    with one_line_errors():                                           # images may vanish from a disk
        for x, y, *questions in data.batches(part, batch_size):
            with training.autocast(device, dtype):
                logits, _ = model(augment.normalised(x, data.mean, data.std), None, *questions)
            n += len(y)
            loss += F.cross_entropy(logits.float(), y, reduction="sum").item()
            right += (logits.argmax(-1) == y).sum().item()
        if not n:
            raise ValueError(f"none of the {part} images could be read")
    model.train()
    return loss / n, right / n, n


@torch.no_grad()
def score(run, data, device, dtype):
    """Evaluates the finished model on the test images, once: scores into config.json, and figures."""
    path, cfg = run.folder / "predictions.png", run.cfg
    if "scores" not in run.record or not (path.exists() or cfg.objects):
        model = make_model(cfg, data).to(device).eval()
        model.load_state_dict(load_checkpoint(run.folder / "last.pt")["model"])
        if not cfg.objects:                                           # there are no images to draw
            draw_answers(model, data, device, dtype, path)
        if cfg.memory_slots and not cfg.objects:
            x, _, *questions = next(data.batches("test", cfg.batch_size))          # as many images as in training
            draw_memory(model, (augment.normalised(x, data.mean, data.std), None, *questions), x,
                        run.folder / "slots.png")
    if "scores" not in run.record:
        loss, accuracy, n = evaluate(model, data, "test", device, dtype)
        scores = {"test_loss": loss, "test_accuracy": accuracy, "images": n}
        run.finish(scores=scores | by_subtype(model, data, device, dtype))
    scores, what = run.record["scores"], "questions" if data.name == "sort_of_clevr" else "images"
    print(f"{run.folder.name}, final model: {scores['images']:,} test {what}, loss {scores['test_loss']:.4f}, "
          f"accuracy {scores['test_accuracy']:.4f}" + ("" if cfg.objects else f"; some answers: {path}"))


def by_subtype(model, data, device, dtype):
    """Of Sort-of-CLEVR, the share of right answers to each kind of test questions; of other data nothing."""
    if data.name != "sort_of_clevr":
        return {}
    model.eval()
    right = []
    for x, y, questions in data.batches("test", 250):
        with training.autocast(device, dtype):
            logits, _ = model(augment.normalised(x, data.mean, data.std), None, questions)
        right.append(logits.argmax(-1) == y)
    found = per_subtype(torch.cat(right).cpu().numpy(), data.subtype)
    for level, known in {"this model": found, **data.facts["levels"]}.items():
        print(f"{level:>10}: " + ", ".join(f"{kind} {share:.3f}" for kind, share in known.items()))
    return {kind: share for kind, share in found.items() if kind != "all"}


def draw_answers(model, data, device, dtype, path):
    """The first test images and what the model answers."""
    x, y, *questions = next(data.batches("test", 40))
    with training.autocast(device, dtype):
        logits, _ = model(augment.normalised(x, data.mean, data.std), None, *questions)
    draw_predictions(x.cpu().numpy(), y.tolist(), logits.float().softmax(-1).cpu(), data.class_names, path,
                     captions=data.captions(*questions) if questions else None)


@unfailing_output()
def main(argv=None):
    with one_line_errors():
        configs = parse_options(Config, PRESETS, argv)
        first = agreed(configs, ("data", "data_dir", "image_size", "val_size", "workers", "objects", "out_dir",
                                 "device", "dtype", "init_from"))
        initial = load_initial(first.init_from) if first.init_from else None
        device, dtype, why = training.choose_device(first.device, first.dtype)
        data = images.load(first.data, data_dir=first.data_dir, image_size=first.image_size, val_size=first.val_size,
                           workers=first.workers, objects=first.objects, device=device)
        # images are identified by name and checksum, not by their path
        configs = training.with_baselines([replace(cfg, data=data.name) for cfg in configs],
                                          partial(make_model, data=data))
        what = "questions" if data.name == "sort_of_clevr" else "images"
        print(f"{what}: {data.name}, {data.n_classes} classes, " + ", ".join(
            f"{data.facts[part]:,} for {what}" for part, what in (("train", "training"), ("val", "validation"),
                                                                  ("test", "testing"))) + f"\ndevice: {why}")
        runs = [Run(cfg, {**data.facts, "dtype": str(dtype)}, unit="images", per_step=cfg.batch_size * cfg.grad_accum,
                    metrics=("train_accuracy", "val_loss", "val_accuracy", *slot_columns(cfg)), initial=initial)
                for cfg in configs]
    for cfg, run in zip(configs, runs):
        if not run.reusable():
            with run, training.stop_on_signal() as stop_requested:
                train(cfg, run, data, device, dtype, stop_requested)
        with one_line_errors():
            score(run, data, device, dtype)
    with one_line_errors():
        figures.report([run.folder for run in runs], first.out_dir, first.paper)
    if data.unreadable:
        print(f"left out, as they could not be read: {len(data.unreadable):,} images, named above")
    if all(cfg.n_ra for cfg in configs):
        print("For the Transformer beside it, repeat the command with --baseline; what is finished is reused.")


# ---- published models ------------------------------------------------------------------------------------------------

# v3 of the paper: ViDAT 6+6 with 3 key/value heads in each group, 6.026 M parameters, ViT 12+0 with 7.149 M.
# (authors' code: their DAT blocks pass the option of a bias in W_o to the MLP only)
CIFAR = dict(d_model=384, n_layers=8, n_heads=12, n_ra=6, d_ff=384, patch_size=4, pool="mean_cls", position="learned",
             symbols="relative", symmetric=True, n_symbols=64, bias=True, attention_bias="output", dat_n_kv_heads=3,
             dat_attention_bias="none", crop_padding=4, flip=True, cutmix=1.0, val_size=5000, batch_size=128,
             max_steps=39_100, optimizer="adam", learning_rate=1e-3, min_lr=1e-5, weight_decay=5e-5, warmup_steps=1955,
             eval_every=391, baseline=False)
# The Associative Transformer (workspace.py) for CIFAR-10, and with --data=cifar100. paper: the learning rate warms up
# from 1e-5, tokens have no positions, and the head reads them side by side; here: all of it as in our other models.
AIT = dict(data="cifar10", n_ra=0, d_model=768, n_heads=12, d_ff=3072, patch_size=4, position="learned", bias=True,
           attention_bias="output", memory_slots=32, memory_width=32, memory_heads=8, bottleneck=512, crop_padding=4,
           flip=True, val_size=5000, batch_size=512, max_steps=9800, learning_rate=1e-4, min_lr=1e-6, weight_decay=0.01,
           warmup_steps=490, eval_every=98)
# paper: validation images are the test images, and all 50,000 are trained on, 100 times; here: 45,000, as many steps
# (of ImageNet 1,271,167 of 1,281,167, as many steps as 45 epochs). Mirror images of ImageNet: as in the authors' code.
PRESETS = {
    "cifar10": dict(CIFAR, data="cifar10"),
    "cifar100": dict(CIFAR, data="cifar100"),
    # for two cores: a smaller model with the same recipe
    "cifar10_small": dict(CIFAR, data="cifar10", d_model=192, n_layers=4, n_heads=6, n_ra=3, dat_n_kv_heads=None,
                          d_ff=192, val_size=1000, max_steps=1500, warmup_steps=75, eval_every=150, baseline=True),
    # Figure 5: 45 epochs of 1,251 steps of 1,024 images (--rel_proj_dim=170: the published width of relations)
    "imagenet": dict(data="", d_model=1024, n_layers=24, n_heads=16, n_ra=6, d_ff=4096, activation="swiglu",
                     position="learned", symbols="relative", symmetric=True, n_symbols=196, final_norm=False,
                     dropout=0.1, patch_size=16, pool="cls", val_size=10_000, flip=True, batch_size=32, grad_accum=32,
                     max_steps=56_295, learning_rate=5e-4, schedule="constant", warmup_steps=0, weight_decay=0.1,
                     beta2=0.99, eval_every=1251, baseline=False),
    # four models: ViT and MLP + norm, both of equal parameters, and AiT: published, and with learned queries
    "workspace": dict(n_ra=0, d_model=64, n_layers=2, n_heads=4, max_steps=1500, memory_slots=(0, 32),
                      mlp_norm=(False, True), memory_queries=("memory", "learned"), match_params=True),
    "sort_of_clevr": dict(data="sort_of_clevr", patch_size=15, pool="cls", d_model=64, n_layers=3, n_heads=4, n_ra=2,
                          val_size=300, max_steps=4000, eval_every=500),
    "ait_small": dict(AIT, n_layers=2), "ait_medium": dict(AIT, n_layers=6), "ait_base": dict(AIT, n_layers=12),
}

if __name__ == "__main__":
    start(main)
