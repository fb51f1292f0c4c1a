"""Checkpoints: files of plain Python values and tensors, which can be read without running code from them."""
import hashlib
import re
from pathlib import Path

import numpy as np
import torch

from toolbox.files import write_atomically

PLAIN = (bool, int, float, str, type(None), torch.Tensor, torch.nn.Parameter)
# Earlier checkpoints may hold numbers of NumPy, which are read, too: as plain ones.
NUMBERS = [np.dtype, np.float64(0).__reduce__()[0], *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]


def plain(value, name="checkpoint"):
    """The same value in plain Python: a NumPy number becomes a number. TypeError for what could not be read again.

    Plain are numbers, strings, None, tensors, and dicts, lists and tuples of these.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in PLAIN:
        return value
    if isinstance(value, dict):                                       # in place of it only where something changes
        items = {plain(key, f"a name in {name}"): plain(item, f"{name}[{key!r}]") for key, item in value.items()}
        return value if all(items[key] is value[key] for key in value) else items
    if type(value) in (list, tuple):
        return type(value)(plain(item, f"{name}[{i}]") for i, item in enumerate(value))
    raise TypeError(f"{name} is of {type(value)}: a checkpoint holds numbers, strings and tensors only")


def save_checkpoint(path, state):
    """Writes `state` whole or not at all. Raises TypeError if it could not be read again, OSError on a full disk."""
    state = plain(state)

    def write(temporary):
        with open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:                             # PyTorch's own, in many lines, about the file's
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    write_atomically(path, write, needed=size_of(state))


def size_of(value):
    """Bytes of all tensors in it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(size_of, items))


def load_checkpoint(path):
    """What Run.save wrote: {"options", "facts", "model", ...}. ValueError, of one line, if it is missing or damaged."""
    try:
        with torch.serialization.safe_globals(NUMBERS):
            checkpoint = plain(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}") from None
    except Exception as error:               # pickle, zip and torch each raise errors of their own here
        if isinstance(error, MemoryError) or getattr(error, "filename", None):     # no memory, no permission
            raise
        text = str(error)                    # of which the advice to switch weights_only off is left out
        reason = (re.search(r"WeightsUnpickler error:\s*(\S.*)", text) or re.search(r"trusted source\.\s*(\S.*)", text)
                  or re.match("(.*)", text))
        reason = reason[1][:200] or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of this project, or damaged: {reason}") from None
    if not isinstance(checkpoint, dict) or not {"options", "facts", "model"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of this project")
    return checkpoint


def load_weights(model, weights, path):
    """Raises ValueError, naming the first tensor that does not fit, if the checkpoint is of another shape."""
    own = model.state_dict()
    for name in [*own, *weights]:
        has, needs = (tuple(d[name].shape) if name in d else "absent" for d in (weights, own))
        if has != needs:
            raise ValueError(f"{path} is of another shape: {name} is {has} there, {needs} in this model")
    model.load_state_dict(weights)


# ---- --init_from -----------------------------------------------------------------------------------------------------

# Options that change what a model computes, but not the shapes of its weights. (`load_weights` compares shapes.)
NOT_IN_SHAPES = ("n_heads", "n_ra", "activation", "norm", "norm_first", "position", "tie_embeddings", "pool")
NOT_IN_SHAPES_OF_RELATIONS = ("symbols", "symbol_heads", "rel_activation", "ra_type", "share_qk", "symmetric")


def load_initial(path):
    """The weights to start with, from a checkpoint or from the last one in a run's folder. See `initial_weights`."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    checkpoint = load_checkpoint(path)
    return initial_weights(path, checkpoint["model"], checkpoint["options"], checkpoint["facts"])


def initial_weights(path, weights, options, facts):
    """{"path", "model", "options", "facts", "sha256"}: weights, the options of their model, what it was trained on."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {"path": path, "model": weights, "options": options, "facts": facts, "sha256": digest.hexdigest()}


def initialise(model, initial, options):
    """Gives the model these weights. Raises ValueError, naming the options, if they are of another model."""
    theirs, names = initial["options"], NOT_IN_SHAPES + (NOT_IN_SHAPES_OF_RELATIONS if options["n_ra"] else ())
    needed = [f"--{name}={theirs[name]}" for name in names if name in theirs and theirs[name] != options.get(name)]
    if needed:
        raise ValueError(f"the weights of {initial['path']} are of another model: give {' '.join(needed)}")
    load_weights(model, initial["model"], initial["path"])
    print(f"starting with the weights of {initial['path']}")
