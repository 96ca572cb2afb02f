"""Leave a model and the random number generators as they were."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run its block with the model in eval mode, and put everything back, whatever happens.

    Everything is the train or eval flag of every module, buffers (values and identity), and the state of the
    random number generators. Meanwhile no parameter requires a gradient.
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
                for buffer, copy in copies:  # by value: BatchNorm and `.data` count no version up
                    if not torch.equal(buffer, copy):
                        buffer.copy_(copy)


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Run its block in the precision of its tensors: autocast is for forward passes.

    Left on, it would round a backward pass, and what is made of attention, to half precision.
    """
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if on else nullcontext():
        yield


@contextmanager
def preserved_rng(used: set[torch.device]) -> Iterator[None]:
    """Put the state of torch's generators back: the CPU's and those of the devices that are used."""
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
