"""Labelled images for training, validation and testing.

    data = load("glyphs", data_dir="data/cache", val_size=2000)        # or cifar10, cifar100, a folder of ImageNet
    for x, y in data.training_batches(128, seed=1, first_step=1):      # uint8 (128, 3, 32, 32), int64 (128,)
    train_images, train_labels, test_images, test_labels = load_cifar10("cifar-10-batches-bin")

The validation images are a part of the training images, the same part whatever the seed. The test images are for the
finished model only.

sources.py     load: the data set that --data names
glyphs.py      characters in many fonts, generated: `python -m data.images.glyphs` draws examples
cifar.py       the files of CIFAR-10 and CIFAR-100
questions.py   Sort-of-CLEVR: images with questions about them
dataset.py     a data set in memory; the order of the training images
imagenet.py    ImageNet from a folder, read by worker processes
augment.py     random crops, mirror images, MixUp, CutMix, normalisation
"""
from data.images.cifar import CIFAR, FILES, FOLDERS, STATISTICS, class_names, fetch_cifar, load_cifar, load_cifar10
from data.images.cifar import load_cifar100
from data.images.dataset import Images, rows_of
from data.images.imagenet import ImageNet
from data.images.questions import N_IMAGES, Questions
from data.images.sources import N_GLYPHS, kind_of, load

__all__ = ["CIFAR", "FILES", "FOLDERS", "ImageNet", "Images", "N_GLYPHS", "N_IMAGES", "Questions", "STATISTICS",
           "class_names", "fetch_cifar", "kind_of", "load", "load_cifar", "load_cifar10", "load_cifar100", "rows_of"]
