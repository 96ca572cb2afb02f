"""Contexts that leave a model and the random number generators as they were."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the block with the model in eval mode, and restore everything afterwards, even after an error.

    This restores the training flag of every module, the buffers (values and identity), and the state of the
    random number generators. Inside the block, no parameter requires a gradient.
    """
    modules = list(model.modules())  # listed once, as the traversal is slow
    # Modules from torch.jit.freeze have no flag: they are always in eval mode.
    flags = [(module, module.training) for module in modules if hasattr(module, "training")]
    slots = [(module, dict(module._buffers)) for module in modules]
    buffers = [b for _, named in slots for b in named.values() if b is not None]
    copies = [(buffer, buffer.detach().clone()) for buffer in buffers]
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
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
                if module._buffers or named:
                    module._buffers.clear()
                    module._buffers.update(named)
            with torch.no_grad():
                for buffer, copy in copies:  # by value: BatchNorm and `.data` do not increment the version
                    if not torch.equal(buffer, copy):
                        buffer.copy_(copy)


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Run the block in the precision of its tensors: autocast, meant for forward passes, would round more."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if on else nullcontext():
        yield


@contextmanager
def preserved_rng(used: set[torch.device]) -> Iterator[None]:
    """Restore torch's generators after the block: that of the CPU and those of the devices in use."""
    devices = [device for device in used if device.type not in ("cpu", "meta", "mps")]
    kind = devices[0].type if devices else "cuda"
    indices = [device.index or 0 for device in devices if device.type == kind]
    # fork_rng needs the index of a device, which the MPS generator does not have.
    apple = torch.mps.get_rng_state() if any(device.type == "mps" for device in used) else None
    with torch.random.fork_rng(indices, device_type=kind):
        try:
            yield
        finally:
            if apple is not None:
                torch.mps.set_rng_state(apple)
