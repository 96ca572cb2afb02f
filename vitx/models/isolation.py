"""Contexts that leave a model and the random number generators as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# One thread at a time: flags and generators that another thread has set would count as the model's own.
_ALONE = RLock()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the block with the model in eval mode, and restore everything afterwards, even after an error.

    This restores the training flag of every module, the buffers (values and identity), and the state of the
    random number generators. Inside the block, no parameter requires a gradient.
    """
    with _ALONE:
        modules = list(model.modules())  # listed once, as the traversal is slow
        # Modules from torch.jit.freeze have no flag: they are always in eval mode.
        flags = [(module, module.training) for module in modules if hasattr(module, "training")]
        slots = [(module, dict(module._buffers)) for module in modules]
        buffers = [b for _, named in slots for b in named.values() if b is not None and not is_lazy(b)]
        copies = [Copied(buffer) for buffer in buffers if not buffer.is_meta]
        held = [p for module in modules for p in module._parameters.values() if p is not None]
        parameters = [parameter for parameter in held if not is_lazy(parameter)]
        # Inference tensors get no gradient anyway, and their requires_grad could not be restored.
        learning = [p for p in parameters if p.requires_grad and p.is_leaf and not p.is_inference()]
        with preserved_rng({tensor.device for tensor in (*parameters, *buffers)}):
            try:
                for module, flag in flags:
                    if flag:
                        module.training = False  # not .eval(), which may be overridden to keep blocks frozen
                for parameter in learning:
                    parameter.requires_grad = False
                yield
            finally:
                for parameter in learning:
                    parameter.requires_grad = True
                for module, flag in flags:
                    if module.training != flag:
                        module.training = flag
                for module, named in slots:
                    _put_back(module, named)
                for copy in copies:
                    copy.restore()


def _put_back(module: nn.Module, buffers: dict[str, Tensor | None]) -> None:
    """Give a module the buffers that it had."""
    now = dict(module._buffers)
    if list(now) == list(buffers) and all(now[name] is buffer for name, buffer in buffers.items()):
        return
    if isinstance(module, torch.jit.ScriptModule):  # its buffers are fixed, but for their values
        for name, buffer in buffers.items():
            setattr(module, name, buffer)
        return
    module._buffers.clear()
    module._buffers.update(buffers)


class Copied:
    """A tensor and a copy of what it held."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._copy = tensor, tensor.detach().clone()

    def restore(self) -> None:
        """Write the copy into the tensor if that has changed: a write would be noticed by autograd."""
        with torch.no_grad():
            if not self.tensor.is_nested and self.tensor.shape != self._copy.shape:
                self.tensor.resize_(self._copy.shape)
            if not self._is_same():
                self.tensor.copy_(self._copy)

    def _is_same(self) -> bool:
        """Return whether the values are the same: BatchNorm and `.data` do not increment the version."""
        one, other = self.tensor.detach(), self._copy
        if one.layout != torch.strided or one.is_nested:
            return False  # such tensors cannot be compared
        same = torch.equal(one, other)
        if same or not one.is_floating_point():
            return same
        one, other = one.double(), other.double()
        return bool(((one == other) | (one.isnan() & other.isnan())).all())


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Run the block in the precision of its tensors: autocast, meant for forward passes, would round more."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if on else nullcontext():
        yield


@contextmanager
def preserved_rng(used: set[torch.device]) -> Iterator[None]:
    """Restore the global generators after the block: Python's, NumPy's, and torch's of the devices in use."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device for device in used if device.type not in ("cpu", "meta", "mps")]
    kind = devices[0].type if devices else "cuda"
    indices = [device.index or 0 for device in devices if device.type == kind]
    # fork_rng needs the index of a device, which the MPS generator does not have.
    apple = torch.mps.get_rng_state() if any(device.type == "mps" for device in used) else None
    with torch.random.fork_rng(indices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            if apple is not None:
                torch.mps.set_rng_state(apple)
