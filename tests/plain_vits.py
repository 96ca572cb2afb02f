"""A Vision Transformer that declares nothing, whose attention is written in one of many ways."""

import torch
from torch import nn
from torch.nn import functional as F

from tests import models

IMAGES = models.FAMILIES["deit"].images(dtype=torch.float64)
WIDTH, HEADS, DEPTH = 48, 3, 3


class Attention(nn.Module):
    """The same attention, written in one of many ways."""

    def __init__(self, how):
        super().__init__()
        self.how, self.qkv, self.out = how, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, count, width = x.shape
        dim, scale = width // HEADS, (width // HEADS) ** -0.5
        q, k, v = (t.reshape(batch, count, HEADS, dim) for t in self.qkv(x).chunk(3, -1))
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        folded = [t.reshape(batch * HEADS, count, dim) for t in heads_first]
        if self.how == "fused":
            mixed = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        elif self.how == "einsum of a list":
            a = torch.softmax(torch.einsum("nqhd,nkhd->nhqk", [q, k]) * scale, dim=3)
            mixed = torch.einsum("nhql,nlhd->nqhd", [a, v])
        elif self.how == "einsum with an ellipsis":
            q, k, v = heads_first
            a = torch.softmax(torch.einsum("...id,...jd->...ij", q, k) * scale, dim=-1)
            mixed = torch.einsum("...ij,...jd->...id", a, v).transpose(1, 2)
        elif self.how == "einsum, channels by two letters":
            q, k, v = (t.unflatten(-1, (2, -1)) for t in (q, k, v))
            a = torch.softmax(torch.einsum("bqhcd,bkhcd->bhqk", q, k) * scale, dim=-1)
            mixed = torch.einsum("bhqk,bkhcd->bqhcd", a, v).flatten(-2)
        elif self.how == "einsum, values first":
            a = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * scale, dim=-1)
            mixed = torch.einsum("bkhd,bhqk->bqhd", v, a)
        elif self.how == "bmm, heads in the batch":
            q, k, v = folded
            a = torch.bmm(q, k.mT).mul_(scale).softmax(-1)
            mixed = torch.bmm(a, v).view(batch, HEADS, count, dim).transpose(1, 2)
        elif self.how == "baddbmm":
            q, k, v = folded
            a = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, alpha=scale).softmax(-1)
            mixed = (a @ v).view(batch, HEADS, count, dim).transpose(1, 2)
        elif self.how == "fused, heads in the batch":
            mixed = F.scaled_dot_product_attention(*folded).view(batch, HEADS, count, dim).transpose(1, 2)
        elif self.how == "fused, a window dimension":
            windows = [t[:, :, None] for t in heads_first]
            mixed = F.scaled_dot_product_attention(*windows)[:, :, 0].transpose(1, 2)
        elif self.how == "out= and a buffer":
            q, k, v = heads_first
            scores = torch.empty(batch, HEADS, count, count, dtype=x.dtype)
            torch.matmul(q, k.mT, out=scores)
            mixed = torch.empty_like(q)
            for head in range(HEADS):
                a = torch.softmax(scores[:, head] * scale, -1)
                mixed[:, head] = a @ v[:, head]
            mixed = mixed.transpose(1, 2)
        elif self.how == "a softmax by hand":
            q, k, v = heads_first
            a = q @ k.mT * scale
            a = (a - a.amax(-1, keepdim=True)).exp()
            mixed = (a / a.sum(-1, keepdim=True) @ v).transpose(1, 2)
        else:
            assert self.how == "a copy of A is kept, and one beside"
            q, k, v = heads_first
            self.beside = torch.softmax(q @ k.mT, -1)
            a = torch.softmax(q @ k.mT * scale, -1)
            self.kept = a.clone()
            mixed = (a @ v).transpose(1, 2)
        return self.out(mixed.reshape(batch, count, width))


class Vit(nn.Module):
    """A Vision Transformer that declares nothing; `read` turns its tokens into the input of its head."""

    def __init__(self, how="fused", read=lambda tokens: tokens[:, 0]):
        super().__init__()
        self.embed, self.read = nn.Conv2d(3, WIDTH, 8, 8), read
        self.first = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.place = nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH))
        self.layers = nn.ModuleList(Attention(how) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, models.CLASSES)

    def tokens(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], 1) + self.place
        for norm, layer in zip(self.norms, self.layers, strict=True):
            tokens = tokens + layer(norm(tokens))
        return tokens

    def forward(self, x):
        return self.head(self.read(self.tokens(x)))


def vit(*args, **options):
    return models.spread(Vit(*args, **options)).double().eval()
