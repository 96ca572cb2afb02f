"""Leaves a model and the random number generators as they were."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Runs its block with the model in eval mode, and then puts everything back, whatever happened.

    What is put back: the train or eval flag of every module, buffers (values and identity), and the
    state of the random number generators of the CPU and of the model's devices. Meanwhile no parameter
    requires a gradient, so that autograd keeps less of each layer.
    """
    modules = list(model.modules())  # walked once, as that takes its time
    # What torch.jit.freeze made has no flag: it is in eval mode for good.
    flags = [(module, module.training) for module in modules if hasattr(module, "training")]
    slots = [(module, dict(module._buffers)) for module in modules]
    buffers = [b for _, named in slots for b in named.values() if b is not None]
    copies = [(buffer, buffer.detach().clone()) for buffer in buffers]
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    # What was made under inference mode has no gradient anyway, and could not be put back.
    learning = [p for p in parameters if p.requires_grad and p.is_leaf and not p.is_inference()]
    with preserved_rng({tensor.device for tensor in (*parameters, *buffers)}):
        try:
            for module, flag in flags:
                if flag:
                    module.training = False  # not .eval(): it may be overridden, to keep blocks frozen
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
                for buffer, copy in _changed(copies):
                    buffer.copy_(copy)


def _changed(copies: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Finds the tensors that are no longer as they were copied, with one read from each device.

    By value: BatchNorm and `.data` write without counting up the tensor's version.
    """
    found = []
    for device in {buffer.device for buffer, _ in copies}:
        here = [pair for pair in copies if pair[0].device == device]
        flags = torch.stack([(buffer != copy).any() for buffer, copy in here]).tolist()
        found += [pair for pair, changed in zip(here, flags, strict=True) if changed]
    return found


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Runs its block in the precision of its tensors: autocast is for forward passes.

    Left on, it would round a backward pass, and what is made of attention, to half precision.
    """
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            yield
    else:
        yield


@contextmanager
def preserved_rng(used: set[torch.device]) -> Iterator[None]:
    """Puts the state of torch's generators back: the CPU's and those of the devices that are used."""
    devices = [device for device in used if device.type not in ("cpu", "meta", "mps")]
    kind = devices[0].type if devices else "cuda"
    indices = [device.index or 0 for device in devices if device.type == kind]
    # fork_rng asks for a device's number, which Apple's generator does not take.
    apple = torch.mps.get_rng_state() if any(device.type == "mps" for device in used) else None
    with torch.random.fork_rng(indices, device_type=kind):
        try:
            yield
        finally:
            if apple is not None:
                torch.mps.set_rng_state(apple)
