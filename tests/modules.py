"""A module for functions that call other modules."""

from torch import nn


class Around(nn.Module):
    """A model that calls modules in a given way."""

    def __init__(self, call, *parts):
        super().__init__()
        self.parts, self.call = nn.ModuleList(parts), call

    def forward(self, x):
        return self.call(*self.parts, x)
