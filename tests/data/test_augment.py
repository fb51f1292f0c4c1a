"""Augmentation compared with slow code for one image, pixel by pixel, written from the papers.

Random choices are read from the result: all pixels of a batch are different numbers, so that a pixel identifies the
image and the position that it comes from.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from data.images import augment
from data.images.augment import (augmented, cut_and_paste, draw_lambda, mix, normalised, random_box, random_crop,
                                 random_flip, smoothed)

B, C, H, W = 6, 3, 5, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(n=B, height=H, width=W):
    """Pixels 1, 2, 3, ...: all different, and none is black."""
    return torch.arange(1.0, 1 + n * C * height * width).reshape(n, C, height, width)


def one_hot(labels, n):
    return torch.tensor([[float(label == c) for c in range(n)] for label in labels])


def share(hits, n, p):
    """Whether `hits` of n agrees with probability p within five standard deviations."""
    return abs(hits - n * p) < 5 * math.sqrt(n * p * (1 - p))


# Crops and mirror images

def window(image, padding, top, left):
    """The H x W window of a zero-padded image with the upper left corner (top, left), in loops."""
    out = torch.zeros_like(image)
    for c in range(image.size(0)):
        for y in range(image.size(1)):
            for x in range(image.size(2)):
                source_y, source_x = top + y - padding, left + x - padding
                if 0 <= source_y < image.size(1) and 0 <= source_x < image.size(2):
                    out[c, y, x] = image[c, source_y, source_x]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("padding", [1, 2])
def test_a_crop_is_a_window_of_the_zero_padded_image(padding, dtype):
    x = (images(1, 6, 7) * 2).to(dtype)                                 # 126 pixels: also different as uint8
    offsets = [(top, left) for top in range(2 * padding + 1) for left in range(2 * padding + 1)]
    allowed = [window(x[0], padding, *offset) for offset in offsets]
    counts = [0] * len(offsets)
    crops = random_crop(x.expand(500 * len(offsets), -1, -1, -1), padding)
    assert crops.dtype == dtype and crops.shape[1:] == x.shape[1:]
    for place, candidate in enumerate(allowed):
        counts[place] = (crops == candidate).all(-1).all(-1).all(-1).sum().item()
    assert sum(counts) == len(crops)                                    # every crop is exactly one of the windows
    # All offsets are equally likely, and independent: chi-square has mean d and variance 2 d.
    chi_square, d = sum((count - 500) ** 2 / 500 for count in counts), len(counts) - 1
    assert d - 5 * math.sqrt(2 * d) < chi_square < d + 5 * math.sqrt(2 * d)


def test_each_image_of_a_batch_has_its_own_crop():
    x, places = images(40), range(5)
    offsets = []
    for image, crop in zip(x, random_crop(x, 2)):
        offsets += [(top, left) for top in places for left in places if torch.equal(crop, window(image, 2, top, left))]
    assert len(offsets) == 40                                           # crop b is one window of image b
    assert len(set(offsets)) > 12 and all(set(side) == set(places) for side in zip(*offsets))


def test_about_half_of_the_images_are_mirrored_exactly():
    x = images(2000, 2, 3)
    flipped = 0
    for image, out in zip(x.tolist(), random_flip(x).tolist()):
        mirror = [[row[::-1] for row in colour] for colour in image]
        assert out in (image, mirror)
        flipped += out == mirror
    assert share(flipped, 2000, 0.5)


# MixUp

def partner(out, x, lam):
    """For each i the only j with out_i = lam x_i + (1 - lam) x_j, pixel by pixel."""
    js = []
    for i in range(len(x)):
        fits = [j for j in range(len(x)) if all(
            math.isclose(out[i, c, y, z], lam * x[i, c, y, z] + (1 - lam) * x[j, c, y, z], rel_tol=1e-5)
            for c in range(C) for y in range(x.size(2)) for z in range(x.size(3)))]
        assert len(fits) == 1
        js += fits
    return js


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.75])
def test_mixup_mixes_images_and_targets_with_the_same_weights(lam):
    x, targets = images(), torch.rand(B, 7)
    seen = set()
    for _ in range(5):
        out, mixed = mix(x, targets, lam)
        js = partner(out, x, lam)
        seen.add(tuple(js))
        assert sorted(js) == list(range(B))                             # a permutation
        for i, j in enumerate(js):
            for c in range(7):
                expected = lam * targets[i, c].item() + (1 - lam) * targets[j, c].item()
                assert mixed[i, c].item() == pytest.approx(expected)
    assert len(seen) > 1                                                # not always the same one
    out, mixed = mix(x, targets, 1.0)
    assert torch.equal(out, x) and torch.equal(mixed, targets)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambda_has_mean_and_variance_of_the_beta_distribution(alpha):
    n = 4000
    drawn = [draw_lambda(alpha) for _ in range(n)]
    assert all(isinstance(lam, float) and 0 <= lam <= 1 for lam in drawn)
    mean = sum(drawn) / n
    variance = sum((lam - mean) ** 2 for lam in drawn) / n
    true_variance = 1 / (4 * (2 * alpha + 1))                           # Beta(a, a): a^2 / ((2a)^2 (2a + 1))
    assert abs(mean - 0.5) < 5 * math.sqrt(true_variance / n)
    assert variance == pytest.approx(true_variance, rel=0.1)


# CutMix

@pytest.mark.parametrize("box", [(1, 4, 0, 3), (0, 5, 0, 4), (2, 2, 1, 3), (4, 5, 3, 4)])
def test_cutmix_copies_the_box_of_another_image_and_mixes_targets_by_area(box):
    top, bottom, left, right = box
    x, targets = images(), torch.rand(B, 7)
    own = one_hot(range(B), B)                                          # one-hot targets: the share of each image
    state = torch.get_rng_state()
    out, mixed = cut_and_paste(x, targets, *box)
    torch.set_rng_state(state)
    _, shares = cut_and_paste(x, own, *box)
    js = []
    for i in range(B):
        source = [[[int(out[i, c, y, z] - 1) // (C * H * W) for z in range(W)] for y in range(H)] for c in range(C)]
        foreign = {source[c][y][z] for c in range(C) for y in range(top, bottom) for z in range(left, right)} or {i}
        assert len(foreign) == 1
        j, = foreign
        js.append(j)
        pasted = 0
        for c in range(C):
            for y in range(H):
                for z in range(W):
                    inside = top <= y < bottom and left <= z < right
                    assert out[i, c, y, z] == x[j if inside else i, c, y, z]
                    pasted += inside
        area = pasted / (C * H * W)
        for k in range(B):
            assert shares[i, k].item() == pytest.approx((k == i) * (1 - area) + (k == j) * area, abs=1e-6)
        if area:
            torch.testing.assert_close(mixed[i], (1 - area) * targets[i] + area * targets[j])
    assert sorted(js) == list(range(B))
    if area == 0:
        assert torch.equal(mixed, targets)


def slow_box(lam, size, centre):
    """The positions on one side of the paper's box: size * sqrt(1 - lam) pixels around `centre`, clipped."""
    side = round(size * math.sqrt(1 - lam))
    start = centre - side // 2
    return [place for place in range(start, start + side) if 0 <= place < size]


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_a_box_is_that_of_the_paper_with_a_uniform_centre_and_clipped(lam):
    allowed = [{(len(side) and side[0], len(side)) for side in (slow_box(lam, size, centre) for centre in range(size))}
               for size in (9, 16)]
    seen, areas, n = [set(), set()], 0, 3000
    for _ in range(n):
        top, bottom, left, right = random_box(lam, 9, 16)
        assert 0 <= top <= bottom <= 9 and 0 <= left <= right <= 16
        for which, (start, stop) in enumerate(((top, bottom), (left, right))):
            seen[which].add(((stop - start) and start, stop - start))
        areas += (bottom - top) * (right - left)
    assert seen == allowed                                              # all possible boxes occur, and no others
    expected = math.prod(sum(len(slow_box(lam, size, centre)) for centre in range(size)) / size for size in (9, 16))
    assert areas / n == pytest.approx(expected, rel=0.06, abs=1e-9)
    if lam == 1.0:
        assert areas == 0


def test_a_box_that_is_not_clipped_has_the_right_size():
    lam = 1 - (5 / 31) ** 2
    sizes = {(bottom - top, right - left) for top, bottom, left, right in (random_box(lam, 31, 31) for _ in range(500))}
    assert (5, 5) in sizes and max(sizes) == (5, 5) and len(sizes) > 1  # others are clipped


# Everything together

def sources_of(part, x):
    """The images that the pixels of `part` come from."""
    return {int(pixel - 1) // (x[0].numel()) for pixel in part.flatten().tolist() if pixel}


def test_without_options_images_stay_and_targets_are_one_hot():
    x, labels = images().to(torch.uint8), torch.tensor([0, 3, 2, 2, 1, 0])
    out, targets = augmented(x, labels, n_classes=5)
    assert out.dtype == torch.float32 and torch.equal(out, x.float())
    assert torch.equal(targets, one_hot(labels.tolist(), 5))


def test_label_smoothing_equals_that_of_pytorchs_cross_entropy():
    logits, labels = torch.randn(B, 5, dtype=torch.double), torch.tensor([0, 3, 2, 2, 1, 4])
    for amount in (0.0, 0.1, 0.5):
        targets = smoothed(labels, 5, amount)
        ours = -sum(targets[i, c] * logits[i].log_softmax(-1)[c] for i in range(B) for c in range(5)) / B
        theirs = F.cross_entropy(logits, labels, label_smoothing=amount)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        assert torch.equal(augmented(images(), labels, n_classes=5, smoothing=amount)[1], targets)


EVERYTHING = dict(n_classes=4, padding=2, flip=True, mixup=0.8, cutmix=1.0, smoothing=0.1)


@pytest.mark.parametrize("options", [EVERYTHING, {**EVERYTHING, "mixup": 0.0}, {**EVERYTHING, "cutmix": 0.0}], ids=str)
def test_targets_are_probabilities_and_the_result_is_a_function_of_the_seed(options):
    x, labels = images().to(torch.uint8), torch.tensor([0, 3, 2, 2, 1, 0])
    x_before, labels_before, results = x.clone(), labels.clone(), []
    for seed in [*range(20), *range(20)]:
        torch.manual_seed(seed)
        out, targets = augmented(x, labels, **options)
        assert torch.equal(x, x_before) and torch.equal(labels, labels_before)
        assert out.shape == x.shape and out.dtype == torch.float32 and 0 <= out.min() and out.max() <= 255
        assert (targets >= 0).all() and torch.allclose(targets.sum(-1), torch.ones(B))
        results.append((out, targets))
    for (out, targets), (again, targets_again) in zip(results[:20], results[20:]):
        assert torch.equal(out, again) and torch.equal(targets, targets_again)
    assert len({tuple(out.flatten().tolist()) for out, _ in results}) == 20


@pytest.mark.parametrize("step", [lambda x, t: random_crop(x, 2), lambda x, t: random_flip(x),
                                  lambda x, t: mix(x, t, 0.5), lambda x, t: cut_and_paste(x, t, 1, 3, 1, 3),
                                  lambda x, t: normalised(x, (0.5,) * 3, (0.2,) * 3)],
                         ids=["crop", "flip", "mixup", "cutmix", "normalised"])
def test_no_function_modifies_its_input(step):
    x, targets = images(), torch.rand(B, 4)
    x_before, targets_before = x.clone(), targets.clone()
    for _ in range(5):
        step(x, targets)
    assert torch.equal(x, x_before) and torch.equal(targets, targets_before)


def kind_of(x, **options):
    """Which augmentation a batch has, from its pixels, and for MixUp also from its targets."""
    out, targets = augmented(x, torch.arange(len(x)), n_classes=len(x), **options)
    if (out == x).all():
        return "nothing"
    if (out == out.round()).all() and max(len(sources_of(image, x)) for image in out) == 2:
        return "cutmix"
    torch.testing.assert_close(out.flatten(1), targets @ x.flatten(1))  # sum over j of target_ij x_j: MixUp
    return "mixup"


@pytest.mark.parametrize("options, kinds", [({}, {"nothing"}), (dict(mixup=8.0), {"mixup"}),
                                            (dict(cutmix=8.0), {"cutmix"})], ids=str)
def test_mixup_and_cutmix_are_off_by_default_and_on_when_given(options, kinds):
    assert {kind_of(images(12), **options) for _ in range(40)} == kinds


def test_with_mixup_and_cutmix_each_batch_uses_one_of_them_with_probability_a_half():
    kinds = [kind_of(images(12), mixup=8.0, cutmix=8.0) for _ in range(400)]
    assert set(kinds) == {"mixup", "cutmix"} and share(kinds.count("mixup"), 400, 0.5)


def test_lambda_is_drawn_with_the_parameter_of_the_chosen_augmentation(monkeypatch):
    betas = []
    monkeypatch.setattr(augment, "draw_lambda", lambda beta: betas.append(beta) or 0.3)
    x, labels = images(20), torch.zeros(20, dtype=torch.long)
    for _ in range(40):
        before = len(betas)
        out, _ = augmented(x, labels, n_classes=2, mixup=0.2, cutmix=0.7)
        is_cutmix = bool((out == out.round()).all())
        assert betas[before:] == [0.7 if is_cutmix else 0.2]
    assert set(betas) == {0.2, 0.7}


def test_mixed_targets_equal_the_share_of_pixels():
    """With white images of class 1 and black ones of class 0, the target of class 1 is the mean brightness."""
    labels = torch.tensor([0, 1] * 10)
    x = (labels * 255).to(torch.uint8)[:, None, None, None].expand(-1, 3, 7, 9)
    mixed = 0
    for _ in range(60):
        out, targets = augmented(x, labels, n_classes=2, flip=True, mixup=1.0, cutmix=1.0)
        torch.testing.assert_close(out.mean((1, 2, 3)) / 255, targets[:, 1], rtol=0, atol=1e-5)
        mixed += (targets[:, 1] % 1 != 0).any()
    assert mixed > 30


def test_normalisation_uses_mean_and_standard_deviation_of_each_colour():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    for x in (torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8), 255 * torch.rand(2, 3, 4, 5)):
        out = normalised(x, mean, std)
        assert out.dtype == torch.float32
        for b, c, y, z in [(b, c, y, z) for b in range(2) for c in range(3) for y in range(4) for z in range(5)]:
            assert out[b, c, y, z].item() == pytest.approx((x[b, c, y, z].item() / 255 - mean[c]) / std[c], abs=1e-5)
