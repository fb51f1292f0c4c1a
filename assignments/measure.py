"""What the graders measure of a function in PyTorch: derivatives, numbers of operations, memory."""
import traceback
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from assignments.grading import check


def check_gradients(function, definition, inputs, what):
    """Autograd's derivative along a random direction of each input, against a difference of two values of `definition`.

    function, definition: from the named floating-point inputs to one tensor.
    """
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out = function(**inputs)
    assert out.requires_grad, f"{what}: the result has no gradient; something detaches it"
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), list(inputs.values()), allow_unused=True)
    for (name, tensor), gradient in zip(inputs.items(), gradients):
        assert gradient is not None, f"{what}: no gradient reaches {name}"
        step = torch.randn_like(tensor)
        with torch.no_grad():
            plus, minus = (definition(**{**inputs, name: tensor + eps * step}) for eps in (1e-5, -1e-5))
            expected = ((plus - minus) * weight).sum() / 2e-5
        check((gradient * step).sum(), expected, f"{what}: derivative with respect to {name}, in a random direction",
              tol=1e-5)


class Watch(TorchDispatchMode):
    """Counts PyTorch's operations, the numbers in memory at one time, and notes the largest tensor.

    file: the path of the student's file, whose line is noted for the largest tensor.
    """

    def __init__(self, file=None):
        super().__init__()
        self.file = file
        self.operations, self.peak, self.largest, self.alive = 0, 0, (0, ""), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, numel = storage._cdata, storage.nbytes() // tensor.element_size()
                if key not in self.alive:
                    self.alive[key] = numel
                    weakref.finalize(storage, self.alive.pop, key, None)
                if numel > self.largest[0]:
                    lines = [frame.lineno for frame in traceback.extract_stack() if frame.filename == self.file]
                    where = f" (line {lines[-1]} of answers.py)" if lines else ""
                    self.largest = numel, f"{func} of the shape {tuple(tensor.shape)}{where}"
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def check_operations(call, what):
    """call(B, n) takes about as many operations for many tokens and sequences as for few."""
    counts = []
    for B, n in ((2, 4), (100, 4), (2, 100)):
        with Watch() as watch:
            call(B, n)
        counts.append(watch.operations)
        assert counts[-1] <= 2 * counts[0], (
            f"{what}: {counts[0]} PyTorch operations for B=2, n=4 but {counts[-1]} for B={B}, n={n}; expected the same "
            "number, so no Python loop over sequences or tokens")
