"""The data set that --data names: glyphs, sort_of_clevr, cifar10, cifar100, or a folder of CIFAR's or ImageNet's."""
from pathlib import Path

from data.images.cifar import CIFAR, FILES, STATISTICS, class_names, fetch_cifar, load_cifar
from data.images.dataset import Images
from data.images.imagenet import ImageNet
from data.images.questions import Questions
from data.sort_of_clevr import SIZE

N_GLYPHS = {"train": 42_000, "test": 4_000}   # how many are drawn, for training and validation, and for testing


def load(name, *, data_dir, image_size=None, val_size, workers=None, objects=False, device="cpu"):
    """-> Images, or ImageNet for a folder in its layout, or Questions for sort_of_clevr.

    name: glyphs, sort_of_clevr, cifar10, cifar100, or the path of a folder. data_dir: where downloads are kept.
    image_size: ImageNet: height and width of a crop, default 224. val_size: how many of the training images are for
    validation. workers: ImageNet: processes that read images. objects: see Questions. Raises ValueError or
    DownloadError, one line.
    """
    folder = Path(name).expanduser()
    kind = name if name in ("glyphs", "sort_of_clevr", *CIFAR) else kind_of(folder)
    if kind == "imagenet":
        return ImageNet(folder, size=image_size or 224, val_size=val_size, device=device, workers=workers)
    if image_size:
        raise ValueError(f"image_size={image_size}: only for ImageNet; images of {kind} are "
                         f"{SIZE if kind == 'sort_of_clevr' else 32} pixels wide")
    if kind == "sort_of_clevr":
        return Questions(val_size=val_size, objects=objects, device=device)
    if kind == "glyphs":
        from data.images import glyphs         # not above: `python -m data.images.glyphs` would import it twice
        train, test = (glyphs.generate(part, n, 0) for part, n in N_GLYPHS.items())
        names, mean, std = list(glyphs.CHARACTERS), glyphs.MEAN, glyphs.STD
    else:
        if name == kind:
            folder = fetch_cifar(kind, data_dir)
        *train, test_images, test_labels = load_cifar(kind, folder)
        test, names, (mean, std) = (test_images, test_labels), class_names(kind, folder), STATISTICS[kind]
    return Images(kind, train, test, class_names=names, mean=mean, std=std, val_size=val_size, device=device)


def kind_of(folder):
    """What a folder contains: cifar10, cifar100 or imagenet. Raises ValueError if it is none of them."""
    folder = Path(folder)
    for name, (train, _, _) in FILES.items():
        if any((folder / file).is_file() for file in train):
            return name
    if (folder / "train").is_dir():
        return "imagenet"
    # as torchvision leaves it: root/cifar-10-batches-py/data_batch_1, root/cifar-100-python/meta
    if any([*folder.glob(f"{inside}data_batch_1"), *folder.glob(f"{inside}meta")] for inside in ("", "cifar-10*-py*/")):
        raise ValueError(f"{folder} holds the Python version of CIFAR, a pickle, which could run any code: give "
                         f"--data=cifar10 or --data=cifar100, which download the binary version, or its folder")
    layouts = "data_batch_1.bin, ... (CIFAR-10), train.bin (CIFAR-100) or train/<class>/*.JPEG (ImageNet)"
    if folder.is_dir():
        raise ValueError(f"{folder} is not a folder with {layouts}")
    raise ValueError(f"no folder {folder}: --data takes glyphs, sort_of_clevr, cifar10, cifar100, or a folder with "
                     f"{layouts}")
