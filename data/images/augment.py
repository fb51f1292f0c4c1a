"""Augmentation of training images: batches of tensors, on any device.

    x, y = augmented(images, labels, n_classes=10, padding=4, flip=True, cutmix=1.0)

All random numbers come from PyTorch's CPU generator. A train script seeds it with (seed, step), so that a step sees the
same images on every device.
"""
import torch
import torch.nn.functional as F


def augmented(images, labels, *, n_classes, padding=0, flip=False, mixup=0.0, cutmix=0.0, smoothing=0.0):
    """images (B, C, H, W), labels (B,) -> images as float in 0 ... 255, and labels as probabilities (B, n_classes).

    padding: of random crops, in pixels; flip: mirror half of the images; smoothing: of the labels. mixup, cutmix:
    parameter of the Beta distribution, 0: off; with both on, each batch uses one of them, with equal probability.
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


def beside(x, images):
    """x on the device of the images; a GPU need not finish its earlier work first."""
    return x.to(images.device, non_blocking=images.is_cuda)


def random_crop(images, padding):
    """Each image shifted by up to `padding` pixels vertically and horizontally; the border is filled with black."""
    top, left = beside(torch.randint(2 * padding + 1, (2, len(images))), images)
    b, c, h, w = (torch.arange(n, device=images.device) for n in images.shape)
    y, x = (top[:, None] + h)[:, None, :, None], (left[:, None] + w)[:, None, None]         # (B, 1, H, 1), (B, 1, 1, W)
    return F.pad(images, (padding,) * 4)[b[:, None, None, None], c[:, None, None], y, x]     # (B, C, H, W)


def random_flip(images):
    """Each image mirrored horizontally with probability 1/2."""
    chosen = beside(torch.rand(len(images)) < 0.5, images)
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def smoothed(labels, n_classes, smoothing):
    """Labels (B,) as probabilities (B, n_classes): 1 - smoothing for the label, the rest evenly for all classes."""
    return (1 - smoothing) * F.one_hot(labels, n_classes).float() + smoothing / n_classes


def draw_lambda(beta):
    """lam ~ Beta(beta, beta), the weight of the image itself; its partner has the weight 1 - lam."""
    return torch.distributions.Beta(beta, beta).sample().item()


def mix(images, targets, lam):
    """MixUp (Zhang et al., 2018): lam x_i + (1 - lam) x_j for images and targets; j is a permutation of the batch."""
    j = beside(torch.randperm(len(images)), images)
    return lam * images + (1 - lam) * images[j], lam * targets + (1 - lam) * targets[j]


def random_box(lam, H, W):
    """top, bottom, left, right of a box of about (1 - lam) H W pixels around a random pixel, clipped to the image."""
    h, w = round(H * (1 - lam) ** 0.5), round(W * (1 - lam) ** 0.5)
    top, left = torch.randint(H, ()).item() - h // 2, torch.randint(W, ()).item() - w // 2   # the centre is uniform
    return max(top, 0), min(top + h, H), max(left, 0), min(left + w, W)


def cut_and_paste(images, targets, top, bottom, left, right):
    """CutMix (Yun et al., 2019): the box is copied from image j; targets are mixed by area, lam = 1 - box / image.

    One box for the batch, as in the authors' code, which rounds its sides down to even numbers; here: to integers.
    """
    j = beside(torch.randperm(len(images)), images)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[j, :, top:bottom, left:right]
    lam = 1 - (bottom - top) * (right - left) / (images.size(-2) * images.size(-1))
    return mixed, lam * targets + (1 - lam) * targets[j]


def normalised(images, mean, std):
    """images (B, C, H, W) in 0 ... 255 -> float, by colour (x / 255 - mean) / std."""
    mean, std = (beside(torch.tensor(values), images)[:, None, None] for values in (mean, std))
    return (images / 255 - mean) / std
