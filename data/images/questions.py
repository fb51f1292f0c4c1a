"""Sort-of-CLEVR as a data set: images, and ten questions about each, which the model reads beside the image.

The methods are those of data/images/dataset.py, and yield questions, too. Training, validation and test questions are
about different images.
"""
import hashlib
import itertools

import numpy as np
import torch

from data import sort_of_clevr
from data.images.dataset import rows_of
from data.sort_of_clevr import ANSWERS, COLOURS, SUBTYPES

N_IMAGES = {"train": 9_800, "test": 2_000}    # for training and validation, and for testing (paper: 200)


class Questions:
    """Binary questions about N_IMAGES images, val_size of which are for validation, on `device`.

    objects: instead of the pixels the model gets six tokens, one for each object: an "image" of 1 x 6 pixels with ten
    channels (`object_tokens`), not to be normalised. Raises ValueError if there are not enough images.
    """

    def __init__(self, *, val_size, objects=False, device="cpu"):
        if val_size >= N_IMAGES["train"]:
            raise ValueError(f"val_size={val_size}: there are only {N_IMAGES['train']:,} training images of "
                             f"sort_of_clevr")
        self.name, self.class_names, self.n_classes, self.unreadable = "sort_of_clevr", list(ANSWERS), len(ANSWERS), {}
        self.size, self.channels = ((1, 6), 10) if objects else (sort_of_clevr.SIZE, 3)
        # augment.normalised takes (x / 255 - mean) / std: object tokens stay as they are
        self.mean, self.std = ((0.0,) * 10, (1 / 255,) * 10) if objects else ((0.5,) * 3, (0.25,) * 3)
        drawn = {part: sort_of_clevr.generate(n, seed) for seed, (part, n) in enumerate(N_IMAGES.items())}
        digest = hashlib.sha256(b"".join(array.tobytes() for part in drawn.values() for array in part)).hexdigest()
        _, scenes, *test = drawn["test"]
        self.subtype = test[-1].reshape(-1)                               # of the test questions
        self.facts = {"data": self.name, "sha256": digest, "classes": self.n_classes,
                      "levels": {"guessing": sort_of_clevr.guessing(*test[1:]),
                                 "counting": sort_of_clevr.counting(scenes, *test)}}
        drawn["val"], drawn["train"] = sort_of_clevr.split(drawn["train"], val_size)
        self.parts = {}
        for part in ("train", "val", "test"):
            pixels, scenes, questions, answers, _ = drawn[part]
            x = sort_of_clevr.object_tokens(scenes)[:, None] if objects else pixels          # (N, 1, 6, 10) or as drawn
            self.parts[part] = [torch.from_numpy(a).to(device) for a in (
                np.ascontiguousarray(x.transpose(0, 3, 1, 2)), answers.reshape(-1),
                questions.reshape(-1, questions.shape[-1]).astype(np.float32))]
            self.facts[part] = answers.size

    def rows(self, part, chosen):
        """Of the questions with these numbers: images (B, C, H, W), answers (B,), questions (B, 18)."""
        images, answers, questions = self.parts[part]
        return images[chosen // (len(answers) // len(images))], answers[chosen], questions[chosen]

    def training_batches(self, batch_size, seed, first_step, grad_accum=1):
        """Yields `rows` of batch_size questions without end, from step `first_step` on, grad_accum times per step."""
        answers = self.parts["train"][1]
        for step in itertools.count(first_step):
            order = torch.from_numpy(rows_of(step, len(answers), batch_size * grad_accum, seed)).to(answers.device)
            for chosen in order.split(batch_size):
                yield self.rows("train", chosen)

    def batches(self, part, batch_size):
        """Yields all `rows` of "val" or "test" once, in order."""
        answers = self.parts[part][1]
        for chosen in torch.arange(len(answers), device=answers.device).split(batch_size):
            yield self.rows(part, chosen)

    def captions(self, questions):
        """Questions (B, 18) in two words: "nearest red"."""
        names, colours = list(SUBTYPES), list(COLOURS)
        return [f"{names[3 * int(q[12:15].argmax()) + int(q[15:18].argmax())]} {colours[int(q[:6].argmax())]}"
                for q in questions]
