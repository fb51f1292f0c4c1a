"""Augmentation against slow code for one image, pixel by pixel, written from the papers and not from ours.

Where something is random, the test finds out what was drawn from what came back: every image below has pixels of its
own (no two of all are equal), so that a pixel says which image and which place it came from.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from data.images import augment
from data.images.augment import (augmented, cut_and_paste, draw_lambda, mix, normalised, random_box, random_crop, random_flip,
                          smoothed)

B, C, H, W = 6, 3, 5, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(n=B, height=H, width=W):
    """Pixels 1, 2, 3, ...: all different, and none black."""
    return torch.arange(1.0, 1 + n * C * height * width).reshape(n, C, height, width)


def one_hot(labels, n):
    return torch.tensor([[float(label == c) for c in range(n)] for label in labels])


def share(hits, n, p):
    """True if `hits` of n is what a probability p gives, within five standard deviations."""
    return abs(hits - n * p) < 5 * math.sqrt(n * p * (1 - p))


# Crop and flip

def window(image, padding, top, left):
    """The H x W window of one zero-padded image whose upper left corner is at (top, left), by loops."""
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
def test_a_crop_is_a_window_of_the_image_in_a_black_frame(padding, dtype):
    x = (images(1, 6, 7) * 2).to(dtype)                                 # 126 pixels: as bytes they differ, too
    offsets = [(top, left) for top in range(2 * padding + 1) for left in range(2 * padding + 1)]
    allowed = [window(x[0], padding, *offset) for offset in offsets]
    counts = [0] * len(offsets)
    crops = random_crop(x.expand(500 * len(offsets), -1, -1, -1), padding)
    assert crops.dtype == dtype and crops.shape[1:] == x.shape[1:]
    for place, candidate in enumerate(allowed):
        counts[place] = (crops == candidate).all(-1).all(-1).all(-1).sum().item()
    assert sum(counts) == len(crops)                                    # every crop is exactly one of the windows
    # All are equally likely, and up or down says nothing of left or right: chi-square has mean d and variance 2 d.
    chi_square, d = sum((count - 500) ** 2 / 500 for count in counts), len(counts) - 1
    assert d - 5 * math.sqrt(2 * d) < chi_square < d + 5 * math.sqrt(2 * d)


def test_each_image_of_a_batch_is_cropped_by_itself():
    x, places = images(40), range(5)
    offsets = []
    for image, crop in zip(x, random_crop(x, 2)):
        offsets += [(top, left) for top in places for left in places if torch.equal(crop, window(image, 2, top, left))]
    assert len(offsets) == 40                                           # image b comes from image b, from one place
    assert len(set(offsets)) > 12 and all(set(side) == set(places) for side in zip(*offsets))


def test_a_flip_is_an_exact_mirror_of_about_half_of_the_images():
    x = images(2000, 2, 3)
    flipped = 0
    for image, out in zip(x.tolist(), random_flip(x).tolist()):
        mirror = [[row[::-1] for row in colour] for colour in image]
        assert out in (image, mirror)
        flipped += out == mirror
    assert share(flipped, 2000, 0.5)


# MixUp

def partner(out, x, lam):
    """The one j for which out = lam x_i + (1 - lam) x_j, of every i, by trying all, with the formula pixel by pixel."""
    js = []
    for i in range(len(x)):
        fits = [j for j in range(len(x)) if all(
            math.isclose(out[i, c, y, z], lam * x[i, c, y, z] + (1 - lam) * x[j, c, y, z], rel_tol=1e-5)
            for c in range(C) for y in range(x.size(2)) for z in range(x.size(3)))]
        assert len(fits) == 1
        js += fits
    return js


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.75])
def test_mixup_mixes_two_images_and_their_targets_alike(lam):
    x, targets = images(), torch.rand(B, 7)
    seen = set()
    for _ in range(5):
        out, mixed = mix(x, targets, lam)
        js = partner(out, x, lam)
        seen.add(tuple(js))
        assert sorted(js) == list(range(B))                             # a permutation: each is given away once
        for i, j in enumerate(js):
            for c in range(7):
                expected = lam * targets[i, c].item() + (1 - lam) * targets[j, c].item()
                assert mixed[i, c].item() == pytest.approx(expected)
    assert len(seen) > 1                                                # and not always the same
    out, mixed = mix(x, targets, 1.0)
    assert torch.equal(out, x) and torch.equal(mixed, targets)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambda_has_the_moments_of_beta(alpha):
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
def test_cutmix_pastes_the_same_place_of_another_image_and_mixes_targets_by_area(box):
    top, bottom, left, right = box
    x, targets = images(), torch.rand(B, 7)
    own = one_hot(range(B), B)                                          # as targets they tell who gave how much
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
    """One side of the paper's box, before it is clipped: size sqrt(1 - lam) long, around the pixel `centre`."""
    side = round(size * math.sqrt(1 - lam))
    start = centre - side // 2
    return [place for place in range(start, start + side) if 0 <= place < size]


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_a_box_is_that_of_the_paper_with_its_centre_anywhere_and_its_outside_cut_off(lam):
    allowed = [{(len(side) and side[0], len(side)) for side in (slow_box(lam, size, centre) for centre in range(size))}
               for size in (9, 16)]
    seen, areas, n = [set(), set()], 0, 3000
    for _ in range(n):
        top, bottom, left, right = random_box(lam, 9, 16)
        assert 0 <= top <= bottom <= 9 and 0 <= left <= right <= 16
        for which, (start, stop) in enumerate(((top, bottom), (left, right))):
            seen[which].add(((stop - start) and start, stop - start))
        areas += (bottom - top) * (right - left)
    assert seen == allowed                                              # all that may occur do, and nothing else
    expected = math.prod(sum(len(slow_box(lam, size, centre)) for centre in range(size)) / size for size in (9, 16))
    assert areas / n == pytest.approx(expected, rel=0.06, abs=1e-9)
    if lam == 1.0:
        assert areas == 0


def test_an_odd_box_far_from_the_edge_is_in_the_middle_of_its_centre_and_of_the_right_size():
    lam = 1 - (5 / 31) ** 2
    sizes = {(bottom - top, right - left) for top, bottom, left, right in (random_box(lam, 31, 31) for _ in range(500))}
    assert (5, 5) in sizes and max(sizes) == (5, 5) and len(sizes) > 1  # the others are clipped


# All together

def gives(part, x):
    """Which images' pixels are in `part`."""
    return {int(pixel - 1) // (x[0].numel()) for pixel in part.flatten().tolist() if pixel}


def test_everything_off_leaves_the_images_and_makes_one_hot_targets():
    x, labels = images().to(torch.uint8), torch.tensor([0, 3, 2, 2, 1, 0])
    out, targets = augmented(x, labels, n_classes=5)
    assert out.dtype == torch.float32 and torch.equal(out, x.float())
    assert torch.equal(targets, one_hot(labels.tolist(), 5))


def test_smoothing_is_that_of_pytorchs_cross_entropy():
    logits, labels = torch.randn(B, 5, dtype=torch.double), torch.tensor([0, 3, 2, 2, 1, 4])
    for amount in (0.0, 0.1, 0.5):
        targets = smoothed(labels, 5, amount)
        ours = -sum(targets[i, c] * logits[i].log_softmax(-1)[c] for i in range(B) for c in range(5)) / B
        theirs = F.cross_entropy(logits, labels, label_smoothing=amount)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        assert torch.equal(augmented(images(), labels, n_classes=5, smoothing=amount)[1], targets)


EVERYTHING = dict(n_classes=4, padding=2, flip=True, mixup=0.8, cutmix=1.0, smoothing=0.1)


@pytest.mark.parametrize("options", [EVERYTHING, {**EVERYTHING, "mixup": 0.0}, {**EVERYTHING, "cutmix": 0.0}], ids=str)
def test_targets_are_probabilities_inputs_stay_and_the_seed_decides(options):
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
def test_no_step_writes_into_what_it_was_given(step):
    x, targets = images(), torch.rand(B, 4)
    x_before, targets_before = x.clone(), targets.clone()
    for _ in range(5):
        step(x, targets)
    assert torch.equal(x, x_before) and torch.equal(targets, targets_before)


def kind_of(x, **options):
    """What was done to a batch: every pixel says it, and where images are mixed, so do the targets."""
    out, targets = augmented(x, torch.arange(len(x)), n_classes=len(x), **options)
    if (out == x).all():
        return "nothing"
    if (out == out.round()).all() and max(len(gives(image, x)) for image in out) == 2:
        return "cutmix"
    torch.testing.assert_close(out.flatten(1), targets @ x.flatten(1))  # sum over j of target_ij x_j: nothing but MixUp
    return "mixup"


@pytest.mark.parametrize("options, kinds", [({}, {"nothing"}), (dict(mixup=8.0), {"mixup"}),
                                            (dict(cutmix=8.0), {"cutmix"})], ids=str)
def test_mixup_and_cutmix_are_done_where_they_are_asked_for(options, kinds):
    assert {kind_of(images(12), **options) for _ in range(40)} == kinds


def test_with_mixup_and_cutmix_a_coin_decides_for_the_whole_batch():
    kinds = [kind_of(images(12), mixup=8.0, cutmix=8.0) for _ in range(400)]
    assert set(kinds) == {"mixup", "cutmix"} and share(kinds.count("mixup"), 400, 0.5)


def test_lambda_is_drawn_from_the_parameter_of_the_one_that_was_chosen(monkeypatch):
    asked = []
    monkeypatch.setattr(augment, "draw_lambda", lambda beta: asked.append(beta) or 0.3)
    x, labels = images(20), torch.zeros(20, dtype=torch.long)
    for _ in range(40):
        before = len(asked)
        out, _ = augmented(x, labels, n_classes=2, mixup=0.2, cutmix=0.7)
        whole = bool((out == out.round()).all())
        assert asked[before:] == [0.7 if whole else 0.2]
    assert set(asked) == {0.2, 0.7}


def test_mixed_targets_tell_the_share_of_pixels_through_all_of_augmented():
    """White images and black ones: how white an image is now is what its target must say (no crop, nothing clipped)."""
    labels = torch.tensor([0, 1] * 10)
    x = (labels * 255).to(torch.uint8)[:, None, None, None].expand(-1, 3, 7, 9)
    mixed = 0
    for _ in range(60):
        out, targets = augmented(x, labels, n_classes=2, flip=True, mixup=1.0, cutmix=1.0)
        torch.testing.assert_close(out.mean((1, 2, 3)) / 255, targets[:, 1], rtol=0, atol=1e-5)
        mixed += (targets[:, 1] % 1 != 0).any()
    assert mixed > 30


def test_normalisation_is_by_colour():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    for x in (torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8), 255 * torch.rand(2, 3, 4, 5)):
        out = normalised(x, mean, std)
        assert out.dtype == torch.float32
        for b, c, y, z in [(b, c, y, z) for b in range(2) for c in range(3) for y in range(4) for z in range(5)]:
            assert out[b, c, y, z].item() == pytest.approx((x[b, c, y, z].item() / 255 - mean[c]) / std[c], abs=1e-5)
