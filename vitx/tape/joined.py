"""The A of several attentions that are heads of one layer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vitx.functional.tiles import Memory, Part
from vitx.tape.kept import Keeper
from vitx.tape.weights import Gradient, Weights


class JoinedWeights(Weights):
    """The A of attentions with rows and columns of the same shape: their heads stand one behind the other."""

    def __init__(self, parts: Sequence[Weights]) -> None:
        """Describes A."""
        tokens, _, queries, keys = parts[0].shape
        heads = [part.shape[1] for part in parts]
        like = torch.empty(0, dtype=parts[0].dtype, device=parts[0].device)
        super().__init__(
            (tokens, sum(heads), queries, keys),
            like,
            keeps=False,
            memory=Memory(),
            keeper=Keeper(),
            sums_to_1=all(part.sums_to_1 for part in parts),
        )
        self._parts = parts
        self._owner = [
            (part, head) for part, count in zip(parts, heads, strict=True) for head in range(count)
        ]

    def _weights(self) -> Part:
        # Prepared anew for each tile: the operands of all parts use the same memory.
        return self._by_head(
            {id(part): lambda *tile, part=part: part._weights()(*tile) for part in self._parts}
        )

    def _outer(self, gradient: Gradient) -> Part:
        return self._by_head({id(p): p._outer(g) for p, g in zip(self._parts, gradient, strict=True)})

    def _by_head(self, computes: Mapping[int, Part]) -> Part:
        def part(images: slice, heads: slice, rows: slice | Tensor) -> Tensor:
            each = [computes[id(owner)](images, slice(h, h + 1), rows) for owner, h in self._owner[heads]]
            return each[0] if len(each) == 1 else torch.cat([one.clone() for one in each], 1)

        return part
