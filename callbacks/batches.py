"""Where `read_batch` was before it served every framework; import it from `vitx.watch.batches`."""

from vitx.watch.batches import read_batch

__all__ = ["read_batch"]
