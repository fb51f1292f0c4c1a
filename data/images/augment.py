"""Images made different while a model learns: batches of tensors, on whatever device they lie, never in evaluation.

    x, y = augmented(images, labels, n_classes=10, padding=4, flip=True, cutmix=1.0)

What is random comes from PyTorch's CPU generator, so that (seed, step) fixes it on every device (training.reseed).
"""
import torch
import torch.nn.functional as F


def augmented(images, labels, *, n_classes, padding=0, flip=False, mixup=0.0, cutmix=0.0, smoothing=0.0):
    """images (B, C, H, W), labels (B,) -> images as float in 0 ... 255, and labels as probabilities (B, n_classes).

    mixup, cutmix: parameter of the Beta distribution, 0: off; with both on, a coin decides for each batch.
    """
    if padding:
        images = random_crop(images, padding)
    if flip:
        images = random_flip(images)
    images, targets = images.float(), smoothed(labels, n_classes, smoothing)
    if mixup and (not cutmix or torch.rand(()) < 0.5):
        return mix(images, targets, draw_lambda(mixup))
    if cutmix:
        return cut_and_paste(images, targets, *random_box(draw_lambda(cutmix), images.size(-2), images.size(-1)))
    return images, targets


def random_crop(images, padding):
    """Each image moved by up to `padding` pixels, down or up and right or left; black comes in from the edge."""
    top, left = torch.randint(2 * padding + 1, (2, len(images))).to(images.device)
    b, c, h, w = (torch.arange(n, device=images.device) for n in images.shape)
    y, x = (top[:, None] + h)[:, None, :, None], (left[:, None] + w)[:, None, None]         # (B, 1, H, 1), (B, 1, 1, W)
    return F.pad(images, (padding,) * 4)[b[:, None, None, None], c[:, None, None], y, x]     # (B, C, H, W)


def random_flip(images):
    """Each image mirrored, right and left exchanged, with probability 1/2."""
    chosen = (torch.rand(len(images)) < 0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def smoothed(labels, n_classes, smoothing):
    """Labels (B,) as probabilities (B, n_classes): 1 - smoothing on the label, the rest on all classes alike."""
    return (1 - smoothing) * F.one_hot(labels, n_classes).float() + smoothing / n_classes


def draw_lambda(beta):
    """The share of an image that remains its own, Beta(beta, beta)."""
    return torch.distributions.Beta(beta, beta).sample().item()


def mix(images, targets, lam):
    """MixUp (Zhang et al., 2018): lam x_i + (1 - lam) x_j, and so the targets; j is a permutation of the batch."""
    j = torch.randperm(len(images)).to(images.device)
    return lam * images + (1 - lam) * images[j], lam * targets + (1 - lam) * targets[j]


def random_box(lam, H, W):
    """top, bottom, left, right of a box of about (1 - lam) H W pixels; what would lie outside the image is cut off."""
    h, w = round(H * (1 - lam) ** 0.5), round(W * (1 - lam) ** 0.5)
    top, left = torch.randint(H, ()).item() - h // 2, torch.randint(W, ()).item() - w // 2   # its centre: anywhere
    return max(top, 0), min(top + h, H), max(left, 0), min(left + w, W)


def cut_and_paste(images, targets, top, bottom, left, right):
    """CutMix (Yun et al., 2019): the box comes from image j; targets mix by area, lam = 1 - box / image.

    One box for the batch, as in the authors' code. There its size is cut to even numbers; here to whole ones.
    """
    j = torch.randperm(len(images)).to(images.device)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[j, :, top:bottom, left:right]
    lam = 1 - (bottom - top) * (right - left) / (images.size(-2) * images.size(-1))
    return mixed, lam * targets + (1 - lam) * targets[j]


def normalised(images, mean, std):
    """images (B, C, H, W) in 0 ... 255 -> float, by colour (x / 255 - mean) / std."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images / 255 - mean) / std
