"""Images: which patches one patch relates to, what the class token attends to, what is lost without relations."""
from functools import partial

import torch
import torch.nn.functional as F

from data import images
from data.images import augment
from toolbox.figures import inside as figures
from toolbox.figures.slots import draw_slots
from toolbox.inside import layers_of, watch
from toolbox.inside.knock_outs import by_layer, knocked_out, losses_table
from toolbox.inside.tables import say_if_fewer
from workspace import slot_attention, slot_statistics

IMAGES = 500                                # test images for the numbers, unless --n says otherwise
DRAWN = 3                                   # how many of them are drawn


def look(runs, o, out):
    """runs: look.Looked. -> the text of the tables, and the files drawn in `out`."""
    texts, files, rows = [], [], []
    for run in runs:
        x, y, pictures = test_images(run, o)
        new = knocked_out(run, o, by_layer(layers_of(run.model)), partial(losses, run.model, x, y))
        rows += new
        texts += [f"{run.name}: {len(x)} test images of {run.data.name}",
                  losses_table(new, "nats", "images"), accuracy_line(run, x, y)]
        if run is runs[0]:
            files += draw(run, o, out, x, pictures, texts)
            if run.options["memory_slots"]:
                files.append(out / "slots.png")
                texts.append("\n".join(draw_memory(run.model, (x,), pictures, files[-1])))
    if any(row["what"] in ("relations", "symbols") for row in rows):
        files.append(out / "relations_or_symbols.png")
        figures.draw_relations_or_symbols(files[-1], f"images, {runs[0].data.name}", rows, "nats")
    return "\n\n".join(texts), files


def load_data(options, o, device):
    """The images of a run with these options: of files, those in --data. ValueError for images with questions."""
    if options["data"] == "sort_of_clevr":
        raise ValueError("look.py draws runs on images without questions; the table of train_vit.py has the accuracy "
                         "on Sort-of-CLEVR by kind of question")
    return images.load(o.data or options["data"], data_dir=o.data_dir, image_size=options["image_size"],
                       val_size=options["val_size"], workers=options["workers"], device=device)


def test_images(run, o):
    """-> normalised pixels (N, 3, H, W), labels (N,), and the images as they are: uint8 (N, 3, H, W)."""
    found, labels = [], []
    for x, y in run.data.batches("test", 100):
        found.append(x)
        labels.append(y)
        if sum(map(len, labels)) >= (o.n or IMAGES):
            break
    found, labels = (torch.cat(parts)[:o.n or IMAGES] for parts in (found, labels))
    say_if_fewer(o, len(labels), f"test images of {run.data.name}")
    return augment.normalised(found, run.data.mean, run.data.std), labels, found.cpu()


@torch.no_grad()
def logits_of(model, x):
    return torch.cat([model(part)[0] for part in x.tensor_split(-(-len(x) // 250))])


def losses(model, x, y):
    """Cross-entropy of each image: (N,) in nats."""
    return F.cross_entropy(logits_of(model, x), y, reduction="none").double().cpu()


def accuracy_line(run, x, y):
    return f"accuracy {(logits_of(run.model, x).argmax(-1) == y).double().mean():.3f}"


def draw(run, o, out, x, pictures, texts):
    """r (of a Transformer: attention) of one patch with all others, and the class token's attention -> the files."""
    side = run.data.size // run.options["patch_size"]
    patch = side * (side // 2) + side // 2 if o.patch is None else o.patch
    if patch >= side * side:
        raise ValueError(f"patch={patch}: these images have patches 0 to {side * side - 1}, row by row")
    number = o.layer or run.model.cfg.n_layers
    has_class = run.model.cls is not None
    with torch.no_grad(), watch(run.model, number) as layers:
        run.model(x[:DRAWN])
    layer = next((one for one in layers if one.n_relations), None)
    name, maps = ("relation", layer.r) if layer else ("attention head", layers[0].alpha)
    if not layer:
        kind = "an Associative Transformer" if run.options["memory_slots"] else "a Transformer"
        texts.append(f"{run.name} has " + ("RCA heads: no relations r" if run.options["n_ra"] else
                                           f"no relations: it is {kind}") + ", only attention is drawn")
    maps = maps[:, :4, has_class + patch, has_class:].unflatten(-1, (side, side)).cpu().numpy()
    files = [out / f"patch_{'relations' if layer else 'attention'}.png"]
    figures.draw_patch(files[0], f"{run.name}, layer {number}: {name}s of the framed patch (receiver) with all others",
                       pictures[:DRAWN].numpy(), maps, name, patch, run.options["patch_size"], signed=bool(layer))
    if has_class:
        alpha = torch.cat([one.alpha for one in layers], 1)[:, :4, 0, 1:].unflatten(-1, (side, side)).cpu().numpy()
        files.append(out / "class_token.png")
        figures.draw_patch(files[-1], f"{run.name}, layer {number}: what the class token attends to",
                           pictures[:DRAWN].numpy(), alpha, "head", None, run.options["patch_size"], signed=False)
    else:
        texts.append(f"{run.name} averages its patches: it has no class token")
    return files


def draw_memory(model, batch, pictures, path):
    """What the slots of the first and the last layer attend to in a batch of images -> one line about each layer.

    batch: the model's inputs; pictures: the images as they are, uint8 (N, 3, H, W).
    """
    shares, found = slot_attention(model, *batch), slot_statistics(model)
    slots, width = model.cfg.memory_slots, model.cfg.memory_width
    lines = [f"layer {i}: effective rank {found[f'rank_{i}']:.1f} of at most {min(slots, width)}, mean cosine "
             f"{found[f'cosine_{i}']:.2f}" for i in range(1, len(shares) + 1)]
    drawn = sorted({0, len(shares) - 1})
    draw_slots(pictures.cpu().numpy(), [shares[i].cpu().numpy() for i in drawn], [lines[i] for i in drawn], path)
    return lines
