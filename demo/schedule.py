"""The learning rate schedule of a run."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> dict[str, object]:
    """Return a schedule of linear warm-up and cosine decay to 0, in the form that Lightning takes."""
    warmup = LinearLR(optimizer, 0.01, total_iters=warmup_steps)
    cosine = CosineAnnealingLR(optimizer, max(1, total_steps - warmup_steps))
    schedule = SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])
    return {"scheduler": schedule, "interval": "step"}
