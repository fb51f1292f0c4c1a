"""Train an image classifier: a Vision Dual Attention Transformer, then a Vision Transformer of the same shape.

    python train_vit.py                                   letters from many fonts, built in; curves in out/vit
    python train_vit.py --seed=1,2,3                      three seeds of each: means, bands and the paired difference
    python train_vit.py --preset=cifar10_small            CIFAR-10 (170 MB), a model for a CPU
    python train_vit.py --preset=cifar10 --baseline       the published models, 12 heads, 100 epochs: for a GPU
    python train_vit.py --preset=imagenet --data=FOLDER   the paper's, on your copy of ILSVRC2012: for a large GPU

Validation images are a part of the training images. The test images, of letters in fonts that the others do not have,
are looked at once, by the finished model.
"""
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import compare
from toolbox import training
from config import TransformerConfig, at_least, model_config
from data.images import augment
from data.images import glyphs
from data import images
from data.images.imagenet import ImageNet
from model import VisionTransformer

CODE = ("train_vit.py", *(f"data/images/{name}.py" for name in ("augment", "glyphs", "__init__", "imagenet")))
MEASURED = ("val_loss", "val_accuracy")
GLYPHS = 42_000, 4_000                      # how many to draw: to learn from and validate on, and to test on


@dataclass
class Config(TransformerConfig):
    # the model
    d_ff: int | None = 256                  # width of the MLP
    position: Literal["learned", "sinusoidal", "rope"] = "learned"       # how patches know their place
    symbols: Literal["symbolic", "relative", "positional"] = "relative"  # who is the sender? see symbols.py
    n_symbols: int = 16                     # symbolic: size of the library; as many as there are patches
    symmetric: bool = True                  # W_q_rel = W_k_rel
    dat_n_kv_heads: int | None = None       # key/value heads in each group of a DAT; default: as n_kv_heads
    dat_attention_bias: Literal["as_the_other", "all", "output", "none"] = "as_the_other"   # attention_bias of a DAT
    patch_size: int = 8                     # height and width of a patch, which is a token
    pool: Literal["mean", "mean_cls", "cls"] = "mean"   # what the head reads: see model.VisionTransformer
    # what to look at
    data: str = "glyphs"                    # glyphs (built in), cifar10, cifar100, or a folder of CIFAR's or ImageNet's
    data_dir: str = "data/cache"            # where downloads are kept
    image_size: int | None = None           # ImageNet: height and width of a crop; default 224 (others have 32)
    val_size: int = 2000                    # how many of the training images are for validation
    workers: int | None = None              # ImageNet: processes that read images; default: cores less one, at most 8
    # how images differ from one time to the next, in training
    crop_padding: int = 0                   # random crops: up to so many pixels to each side; 0: off
    flip: bool = False                      # mirror half of them; not for letters
    mixup: float = 0.0                      # parameter of the Beta distribution; 0: off. With cutmix, too: either one
    cutmix: float = 0.0                     # parameter of the Beta distribution; 0: off
    label_smoothing: float = 0.0            # share of the label that goes to all classes alike
    # how to train
    batch_size: int = 64                    # images in one forward pass
    grad_accum: int = 1                     # forward passes per step: the step sees batch_size * grad_accum images
    max_steps: int = 2500                   # optimizer steps, and the horizon of the schedule
    optimizer: Literal["adamw", "adam"] = "adamw"   # adam: weight_decay is an L2 penalty, on all parameters
    learning_rate: float = 1e-3             # at its peak
    min_lr: float | None = None             # where the cosine ends; default learning_rate / 10
    schedule: Literal["cosine", "constant"] = "cosine"   # after the warm-up
    warmup_steps: int = 100                 # linear warm-up
    weight_decay: float = 0.05              # on tensors of two or more dimensions
    beta1: float = 0.9                      # Adam
    beta2: float = 0.999                    # Adam
    grad_clip: float = 0.0                  # largest gradient norm; 0: no clipping
    # how to look at it
    eval_every: int = 250                   # steps between validations, each with a checkpoint
    log_every: int = 50                     # steps between rows of log.csv
    # how to run it
    seed: int = 1                           # of weights, data order, augmentation, dropout; 1,2,3: one run each
    device: str = "auto"                    # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; auto: bfloat16 on GPUs that have it
    compile: bool = False                   # torch.compile: faster steps after a slow start
    out_dir: str = "out/vit"                # a folder for each run, and the figure of them all
    resume: bool = False                    # go on with an interrupted run from its last checkpoint
    baseline: bool = True                   # after a DAT, train the Transformer with as many heads
    match_params: bool = False              # give the baseline the d_ff that makes parameter counts agree within 1%

    def __post_init__(self):
        super().__post_init__()
        at_least(self, dat_n_kv_heads=1, patch_size=1, image_size=1, val_size=1, workers=0, crop_padding=0, mixup=0,
                 cutmix=0, label_smoothing=0, batch_size=1, grad_accum=1, max_steps=1, learning_rate=0, min_lr=0,
                 warmup_steps=0, weight_decay=0, grad_clip=0, eval_every=1, log_every=1, seed=0, beta1=0, beta2=0)
        if max(self.beta1, self.beta2, self.label_smoothing) >= 1 or self.seed >= 2 ** 63:
            raise ValueError(f"beta1={self.beta1}, beta2={self.beta2} and label_smoothing={self.label_smoothing} must "
                             f"be below 1, seed={self.seed} below 2^63")
        if any(value and not 1e-3 <= value <= 1e3 for value in (self.mixup, self.cutmix)):
            raise ValueError(f"mixup={self.mixup}, cutmix={self.cutmix}: give 0 (off), or 0.001 to 1000")
        if not self.data:
            raise ValueError("data: give the folder of your images with --data=FOLDER (ImageNet cannot be had freely)")
        if self.data == "glyphs" and self.flip:
            raise ValueError("flip: letters have no mirror images; it is for --data=cifar10 and the like")
        for name in ("vocab_size", "max_len", "tie_embeddings"):
            if getattr(self, name) != getattr(TransformerConfig, name):
                raise ValueError(f"--{name}: it means nothing for images")
        try:
            model_config(asdict(self))
        except ValueError as error:
            raise ValueError(f"the DAT cannot have --dat_n_kv_heads={self.dat_n_kv_heads}: {error}") from None


# The published models (v3): ViDAT 6+6 with 3 key/value heads in each group, 6.026 M parameters, ViT 12+0 with 7.149 M.
# (authors' code: their DAT blocks pass the option of a bias in W_o to the MLP only)
CIFAR = dict(d_model=384, n_layers=8, n_heads=12, n_ra=6, d_ff=384, patch_size=4, pool="mean_cls", position="learned",
             symbols="relative", symmetric=True, n_symbols=64, bias=True, attention_bias="output", dat_n_kv_heads=3,
             dat_attention_bias="none", crop_padding=4, flip=True, cutmix=1.0, val_size=5000, batch_size=128,
             max_steps=39_100, optimizer="adam", learning_rate=1e-3, min_lr=1e-5, weight_decay=5e-5, warmup_steps=1955,
             eval_every=391, baseline=False)
# paper: validation images are the test images, and all 50,000 are learned from, 100 times; here: 45,000, as many steps
# (of ImageNet 1,271,167 of 1,281,167, as many steps as 45 epochs). Mirror images of ImageNet: as in the authors' code.
PRESETS = {
    "cifar10": dict(CIFAR, data="cifar10"),
    "cifar100": dict(CIFAR, data="cifar100"),
    # on two cores: the same recipe in small
    "cifar10_small": dict(CIFAR, data="cifar10", d_model=192, n_layers=4, n_heads=6, n_ra=3, dat_n_kv_heads=None,
                          d_ff=192, val_size=1000, max_steps=1500, warmup_steps=75, eval_every=150, baseline=True),
    # Figure 5: 45 epochs of 1,251 steps of 1,024 images
    "imagenet": dict(data="", d_model=1024, n_layers=24, n_heads=16, n_ra=6, d_ff=4096, activation="swiglu",
                     position="learned", symbols="relative", symmetric=True, n_symbols=196, final_norm=False,
                     dropout=0.1, patch_size=16, pool="cls", val_size=10_000, flip=True, batch_size=32, grad_accum=32,
                     max_steps=56_295, learning_rate=5e-4, schedule="constant", warmup_steps=0, weight_decay=0.1,
                     beta2=0.99, eval_every=1251, baseline=False),
}


# ---- images ----------------------------------------------------------------------------------------------------------

def load(cfg, device):
    """The images that --data names, with what there is to know of them: data.images.Images, or ImageNet."""
    folder = Path(cfg.data).expanduser()
    kind = cfg.data if cfg.data in ("glyphs", *images.CIFAR) else images.kind_of(folder)
    if kind == "imagenet":
        return ImageNet(folder, size=cfg.image_size or 224, val_size=cfg.val_size, device=device, workers=cfg.workers)
    if cfg.image_size:
        raise ValueError(f"image_size={cfg.image_size}: it is for ImageNet; the images of {kind} have 32")
    if kind == "glyphs":
        train, test = (glyphs.generate(part, n, 0) for part, n in zip(("train", "test"), GLYPHS))
        names, mean, std = list(glyphs.CHARACTERS), glyphs.MEAN, glyphs.STD
    else:
        if cfg.data == kind:
            folder = images.fetch_cifar(kind, cfg.data_dir)
        *train, test_images, test_labels = images.load_cifar(kind, folder)
        test, names, (mean, std) = (test_images, test_labels), images.class_names(kind, folder), images.STATISTICS[kind]
    return images.Images(kind, train, test, class_names=names, mean=mean, std=std, val_size=cfg.val_size, device=device)


def for_training(x, y, cfg, data):
    """Images (B, 3, H, W) and labels (B,) as the model is to see them: pixels, and probabilities (B, n_classes)."""
    x, y = augment.augmented(x, y, n_classes=data.n_classes, padding=cfg.crop_padding, flip=cfg.flip,
                             mixup=cfg.mixup, cutmix=cfg.cutmix, smoothing=cfg.label_smoothing)
    return augment.normalised(x, data.mean, data.std), y


# ---- the model -------------------------------------------------------------------------------------------------------

def make_model(cfg, data):
    return VisionTransformer(model_config(asdict(cfg)), image_size=data.size, patch_size=cfg.patch_size,
                             n_classes=data.n_classes, pool=cfg.pool)


def count_parameters(cfg, data):
    """How many the model will have."""
    with torch.device("meta"):                                        # shapes only, nothing allocated
        return sum(p.numel() for p in make_model(cfg, data).parameters())


def make_optimizer(model, cfg):
    """AdamW as everywhere else here, or the Adam of the published CIFAR runs."""
    if cfg.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                                weight_decay=cfg.weight_decay)
    return training.make_optimizer(model, cfg)


@torch.no_grad()
def evaluate(model, data, part, device, dtype, batch_size=250):
    """Over "val" or "test", nothing augmented: mean cross-entropy in nats, share of right answers, number of images."""
    model.eval()
    n = loss = right = 0
    for x, y in data.batches(part, batch_size):
        with training.autocast(device, dtype):
            logits, _ = model(augment.normalised(x, data.mean, data.std))
        n += len(y)
        loss += F.cross_entropy(logits.float(), y, reduction="sum").item()
        right += (logits.argmax(-1) == y).sum().item()
    model.train()
    if not n:
        raise ValueError(f"none of the {part} images could be read")
    return loss / n, right / n, n


def train(cfg, run, data, device, dtype):
    """One run, from its first step or its last checkpoint to max_steps; leaves config.json, log.csv and checkpoints."""
    with training.one_line_errors():
        torch.manual_seed(cfg.seed)
        model = make_model(cfg, data).to(device)
        optimizer = make_optimizer(model, cfg)
        run.begin(model, optimizer, device)
    print(f"\n{run.folder}: {cfg.n_sa} sensory + {cfg.n_ra} relational heads, "
          f"{run.record['n_parameters']:,} parameters")
    forward = torch.compile(model) if cfg.compile else model

    def validate():
        with training.one_line_errors():
            loss, accuracy, _ = evaluate(model, data, "val", device, dtype)
        run.validated(val_loss=loss, val_accuracy=accuracy)

    if run.step == 0:
        validate()
    batches = data.training_batches(cfg.batch_size, cfg.seed, run.step + 1, cfg.grad_accum)
    for step in run.steps():
        training.reseed(cfg.seed, step)                               # for augmentation and dropout
        lr = training.learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        mean_loss = 0.0
        for _ in range(cfg.grad_accum):
            with training.one_line_errors():                          # images may vanish from a disk
                x, y = next(batches)                                  # uint8 (B, 3, H, W), (B,)
            x, y = for_training(x, y, cfg, data)                      # float, (B, n_classes)
            with training.autocast(device, dtype):
                _, loss = forward(x, y)
            (loss / cfg.grad_accum).backward()
            mean_loss += loss.item() / cfg.grad_accum
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        run.check(train_loss=mean_loss, gradient_norm=norm.item())    # stop before the weights are spoilt
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step_done(mean_loss, lr)
        if run.validation_due():
            validate()


# ---- the finished model ----------------------------------------------------------------------------------------------

def score(run, data, device, dtype):
    """The one look at the test images: accuracy and loss go into config.json, some answers into predictions.png."""
    if "scores" not in run.record or not (run.folder / "predictions.png").exists():
        model = make_model(run.cfg, data).to(device)
        model.load_state_dict(training.load_checkpoint(run.folder / "last.pt")["model"])
        draw_predictions(model, data, run.folder / "predictions.png", device, dtype)
    if "scores" not in run.record:
        loss, accuracy, n = evaluate(model, data, "test", device, dtype)
        run.record["scores"] = {"test_loss": loss, "test_accuracy": accuracy, "images": n}
        run.write_record()
    scores = run.record["scores"]
    print(f"{run.folder.name}, final model: {scores['images']:,} test images, loss {scores['test_loss']:.4f}, "
          f"accuracy {scores['test_accuracy']:.4f}; some answers: {run.folder / 'predictions.png'}")


@torch.no_grad()
def draw_predictions(model, data, path, device, dtype, rows=5, columns=8):
    """The first test images, with what the model takes each for and how sure it is; in red what is wrong."""
    x, y = next(data.batches("test", rows * columns))
    model.eval()
    with training.autocast(device, dtype):
        logits, _ = model(augment.normalised(x, data.mean, data.std))
    confidence, guess = logits.float().softmax(-1).max(-1)
    fig, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.75 * rows), layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, label, p, k in zip(axes.flat, x.cpu().numpy(), y.tolist(), confidence.tolist(), guess.tolist()):
        ax.imshow(image.transpose(1, 2, 0))
        truth = "" if k == label else f"\nis {data.class_names[label]}"
        ax.set_title(f"{data.class_names[k]} {p:.0%}{truth}", fontsize=9, color="tab:red" if truth else "tab:green")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(argv=None):
    with training.one_line_errors():
        configs = training.parse_options(Config, PRESETS, argv)
        first = training.agreed(configs, ("data", "data_dir", "image_size", "val_size", "workers", "out_dir", "device",
                                          "dtype"))
        device, dtype, why = training.choose_device(first.device, first.dtype)
        data = load(first, device)
        # the same images in another place are the same: their name and checksum tell runs apart, and not their path
        configs = training.with_baselines([replace(cfg, data=data.name) for cfg in configs],
                                          lambda cfg: count_parameters(cfg, data))
        for cfg in configs:
            count_parameters(cfg, data)                               # what cannot be built is found before training
        print(f"images: {data.name}, {data.n_classes} classes, " + ", ".join(
            f"{data.facts[part]:,} for {what}" for part, what in (("train", "training"), ("val", "validation"),
                                                                  ("test", "testing"))) + f"\ndevice: {why}")
    folders = []
    for cfg in configs:
        with training.one_line_errors():
            facts = {**data.facts, "dtype": str(dtype)}               # a result in bfloat16 is another one
            run = training.Run(cfg, CODE, facts, cfg.batch_size * cfg.grad_accum, MEASURED, unit="images")
            reusable = run.reusable()
        if not reusable:
            train(cfg, run, data, device, dtype)
        with training.one_line_errors():
            score(run, data, device, dtype)
        folders.append(run.folder)
    compare.report(folders, Path(first.out_dir))
    if data.unreadable:
        print(f"left out, as they could not be read: {len(data.unreadable):,} images, named above")
    if all(cfg.n_ra for cfg in configs):
        print("For the Transformer beside it, repeat the command with --baseline; what is finished is reused.")


if __name__ == "__main__":
    training.start(main)
