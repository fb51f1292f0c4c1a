"""The vision Transformer: how images are cut into patches, what a position is, and what the classifier reads."""
import pytest
import torch
from helpers import SYMBOLS

from model import TransformerConfig, VisionTransformer, patchify

SIZE, PATCH = 12, 4                                                     # 9 patches


def make(pool="mean", **changes):
    torch.manual_seed(0)
    options = dict(d_model=16, n_layers=2, n_heads=4, n_ra=2, position="learned", symbols="positional")
    cfg = TransformerConfig(**{**options, **changes})
    return VisionTransformer(cfg, image_size=SIZE, patch_size=PATCH, n_classes=3, pool=pool).double().eval()


def images(n=2, channels=3):
    return torch.rand(n, channels, SIZE, SIZE, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_patches_go_row_by_row_with_channels_last():
    x = images()
    for b, patches in enumerate(patchify(x, PATCH)):
        for number, patch in enumerate(patches):
            top, left = divmod(number, SIZE // PATCH)
            y, z = top * PATCH, left * PATCH
            pixels = [x[b, c, y + i, z + j] for i in range(PATCH) for j in range(PATCH) for c in range(3)]
            assert torch.equal(patch, torch.stack(pixels))


@pytest.mark.parametrize("size, patch, channels", [(12, 4, 3), (12, 3, 1), (8, 8, 3), (6, 1, 2)])
def test_patches_put_together_again_give_the_image(size, patch, channels):
    x = torch.rand(2, channels, size, size)
    back, n = torch.full_like(x, float("nan")), size // patch
    for b, patches in enumerate(patchify(x, patch)):
        assert patches.shape == (n * n, patch * patch * channels)
        for number, pixels in enumerate(patches):
            top, left = number // n * patch, number % n * patch
            for index, value in enumerate(pixels):
                i, j, c = index // (patch * channels), index // channels % patch, index % channels
                back[b, c, top + i, left + j] = value
    assert torch.equal(back, x)


def reorder_patches(x, order):
    """Images whose patch k is patch order[k] of x."""
    out, n = x.clone(), SIZE // PATCH
    for new, old in enumerate(order.tolist()):
        (i, j), (k, m) = divmod(new, n), divmod(old, n)
        out[..., i * PATCH:(i + 1) * PATCH, j * PATCH:(j + 1) * PATCH] = x[..., k * PATCH:(k + 1) * PATCH,
                                                                            m * PATCH:(m + 1) * PATCH]
    return out


@pytest.mark.parametrize("n_ra", [0, 2, 4])
@pytest.mark.parametrize("pool", ["mean", "mean_cls", "cls"])
def test_patches_reordered_together_with_their_positions_and_symbols_give_the_same_logits(pool, n_ra):
    order = torch.tensor([3, 1, 8, 0, 5, 2, 7, 6, 4])
    model, x = make(pool, n_ra=n_ra), images()
    before = model(x)[0]
    moved = model(reorder_patches(x, order))[0]
    assert (moved - before).abs().max() > 1e-3                          # position matters ...
    rows = order if pool == "mean" else torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
    with torch.no_grad():
        model.stack.positions.weight.copy_(model.stack.positions.weight[rows].clone())
        for symbols in model.stack.symbols:
            symbols.library.copy_(symbols.library[rows].clone())
    again = model(reorder_patches(x, order))[0]
    torch.testing.assert_close(again, before, rtol=0, atol=1e-12)       # ... and nothing else does


@pytest.mark.parametrize("pool", ["mean", "mean_cls", "cls"])
def test_the_classifier_reads_the_class_token_or_the_mean_as_pool_says(pool):
    model, states = make(pool), {}
    model.stack.register_forward_hook(lambda module, args, out: states.update(x=out))
    logits = model(images())[0]
    x = states["x"]
    assert x.shape == (2, 9 if pool == "mean" else 10, 16)
    pooled = x[:, 0] if pool == "cls" else x.sum(1) / x.size(1)         # and only then normalised
    centred = pooled - pooled.sum(-1, keepdim=True) / 16
    normed = centred / ((centred ** 2).sum(-1, keepdim=True) / 16 + 1e-5).sqrt()
    torch.testing.assert_close(logits, model.head(normed))
    assert logits.shape == (2, 3)


def test_the_class_token_is_the_first_and_the_same_for_all_images():
    model, states = make("cls"), {}
    model.stack.register_forward_pre_hook(lambda module, args: states.update(x=args[0]))
    model(images())
    assert torch.equal(states["x"][:, 0], model.cls.expand(2, -1))
    torch.testing.assert_close(states["x"][:, 1:], model.embedding(patchify(images(), PATCH)))


@pytest.mark.parametrize("symbols", SYMBOLS)
@pytest.mark.parametrize("n_ra", [0, 2, 4])
def test_every_parameter_gets_a_gradient(symbols, n_ra):
    model = make("mean_cls", symbols=symbols, n_ra=n_ra, n_symbols=5, symbol_heads=2)
    _, loss = model(images(), torch.tensor([0, 2]))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_loss_is_the_mean_cross_entropy():
    logits, loss = make()(images(), torch.tensor([0, 2]))
    by_hand = -(logits[0].log_softmax(-1)[0] + logits[1].log_softmax(-1)[2]) / 2
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize("n_ra", [0, 1, 2])
def test_eight_random_images_can_be_memorised(n_ra):
    torch.manual_seed(0)
    cfg = TransformerConfig(d_model=32, n_layers=2, n_heads=2, n_ra=n_ra, position="learned", symbols="positional")
    model = VisionTransformer(cfg, image_size=SIZE, patch_size=PATCH, n_classes=3)
    x, y = images(8).float(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_without_a_final_norm_the_classifier_reads_the_pooled_tokens():
    model, states = make(final_norm=False), {}
    assert not [name for name, _ in model.named_parameters() if "norm" in name and "blocks" not in name]
    model.stack.blocks[-1].register_forward_hook(lambda module, args, out: states.update(x=out))
    logits = model(images())[0]
    torch.testing.assert_close(logits, model.head(states["x"].sum(1) / 9))


# ---- questions -------------------------------------------------------------------------------------------------------

def asked(pool="mean", **options):
    torch.manual_seed(0)
    cfg = TransformerConfig(d_model=16, n_layers=2, n_heads=4, n_ra=2, position="learned", symbols="positional")
    options = {**dict(image_size=SIZE, patch_size=PATCH), **options}
    return VisionTransformer(cfg, n_classes=3, pool=pool, question_size=5, **options).double().eval()


@pytest.mark.parametrize("pool", ["mean", "mean_cls", "cls"])
def test_a_question_is_the_first_token_in_the_class_tokens_place(pool):
    model, states, questions = asked(pool), {}, torch.rand(2, 5, dtype=torch.double)
    model.stack.register_forward_pre_hook(lambda module, args: states.update(x=args[0]))
    logits, loss = model(images(), torch.tensor([0, 2]), questions)
    assert states["x"].shape == (2, 10, 16) == (2, model.cfg.max_len, 16) and model.cls is None
    weight, bias = model.question.weight, model.question.bias
    torch.testing.assert_close(states["x"][:, 0], questions @ weight.T + bias)
    torch.testing.assert_close(states["x"][:, 1:], model.embedding(patchify(images(), PATCH)))
    other = model(images(), None, questions.flip(0))[0]
    assert (other - logits).abs().max() > 1e-4 and loss.isfinite()


def test_objects_are_an_image_of_one_row_whose_patches_are_pixels():
    model = asked("cls", image_size=(1, 6), patch_size=1, channels=7)
    x, q = torch.rand(2, 7, 1, 6, dtype=torch.double), torch.rand(2, 5, dtype=torch.double)
    assert torch.equal(patchify(x, 1), x[:, :, 0].mT)
    assert model.cfg.max_len == 7 and model(x, None, q)[0].shape == (2, 3)


def test_a_model_without_questions_has_no_parameter_for_them_and_neither_is_forgotten():
    assert not [name for name in make().state_dict() if "question" in name]
    for model, arguments in ((make(), (None, torch.rand(2, 5, dtype=torch.double))), (asked(), ())):
        with pytest.raises(ValueError, match="questions: give them if the model has a question_size, and only then"):
            model(images(), *arguments)


@pytest.mark.parametrize("changes, words", [(dict(patch_size=5), "image_size=12 is not a multiple of patch_size=5"),
                                            (dict(pool="max"), "pool='max': choose from cls, mean, mean_cls")])
def test_sizes_that_do_not_fit_raise_an_error_that_names_them(changes, words):
    with pytest.raises(ValueError, match=words):
        VisionTransformer(TransformerConfig(position="learned"), n_classes=2,
                          **{**dict(image_size=SIZE, patch_size=PATCH), **changes})


@pytest.mark.parametrize("shape", [(2, 3, 12, 16), (2, 1, 12, 12), (2, 3, 16, 16)])
def test_images_of_another_shape_raise_an_error(shape):
    with pytest.raises(ValueError, match=r"the model was made for \(3, 12, 12\)"):
        make()(torch.rand(shape, dtype=torch.double))
