"""A network of exchangeable parts, whose plain form has its maps computed from full matrices in float64.

The same function gets the same map: the modules `test_same_*` have a table of spellings for each part of a
network, and their plain forms. The plain network runs with all matrices in full, and takes gradients by
autograd with respect to A itself, with its norms and gates held constant. `tests/test_rewriting.py` draws
spellings of one network at random.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests import visible
from vitx import explain_methods

WIDTH, SIDE, PATCH, CLASSES = 24, 4, 4, 5
COUNT = SIDE * SIDE + 1
TARGET = [1, 3]
BEGINNING = ("rollout", "grad_rollout", "gae")
METHODS = (*BEGINNING, "evidence")
IMAGES = torch.randn(
    2, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
)


class Net(nn.Module):
    """A small Vision Transformer of two blocks with exchangeable parts.

    Args:
        block: (net, layer, tokens) -> tokens: the part of a block that attends.
        between: tokens -> tokens, between the blocks.
        read: (net, tokens) -> (B, WIDTH).
        heads: the numbers of heads of the parallel attentions that a block may have.
        with_mlp: whether the block contains its MLP.
    """

    def __init__(self, block=None, between=None, read=None, heads=(3, 3, 3), with_mlp=False, seed=4):
        super().__init__()
        self.block, self.between = block or attention_alone, between or (lambda t: t)
        self.read, self.heads, self.with_mlp = read or (lambda net, t: t[:, 0]), heads, with_mlp
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, size=0.1, around=0.0):
            return nn.Parameter(around + size * torch.randn(*shape, generator=generator, dtype=torch.float64))

        def linear(inward, outward, size):
            made = nn.Linear(inward, outward, dtype=torch.float64)
            made.weight, made.bias = draw(outward, inward, size=size), draw(outward)
            return made

        def norm():
            made = nn.LayerNorm(WIDTH, dtype=torch.float64)
            made.weight, made.bias = draw(WIDTH, around=1.0), draw(WIDTH)
            return made

        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH, dtype=torch.float64)
        self.embed.weight, self.embed.bias = draw(WIDTH, 3, PATCH, PATCH, size=0.3), draw(WIDTH)
        self.first, self.place = draw(1, 1, WIDTH, size=0.5), draw(1, COUNT, WIDTH, size=0.5)
        self.qkv = nn.ModuleList(linear(WIDTH, 3 * WIDTH, 0.3) for _ in range(2 * len(heads)))
        self.out = nn.ModuleList(linear(WIDTH, WIDTH, 0.3) for _ in range(2 * len(heads)))
        self.norms = nn.ModuleList(norm() for _ in range(5))
        self.up = nn.ModuleList(linear(WIDTH, 32, 0.3) for _ in range(2))
        self.down = nn.ModuleList(linear(32, WIDTH, 0.3) for _ in range(2))
        self.score, self.head = linear(WIDTH, 1, 0.5), linear(WIDTH, CLASSES, 0.5)
        self.seen = None  # (layers, streams, pooling) while matrices are recorded
        self.eval()

    def attention(self, weights, layer):
        """Record A as a leaf, detached from its graph."""
        if self.seen is None:
            return weights
        weights = weights.detach().requires_grad_()
        self.seen[0][layer].append(weights)
        return weights

    def pooling(self, weights):
        """Record the attention of a pooling, (B, heads, N)."""
        if self.seen is None:
            return weights
        self.seen[2].append(weights.detach())
        return weights.detach()

    def residual(self, tokens):
        """Record the output of a residual."""
        if self.seen is not None:
            self.seen[1].append(tokens)
        return tokens

    def projected(self, layer, tokens, number=0):
        """Return queries, keys and values, (B, heads, N, D) each."""
        heads = self.heads[number]
        parts = self.qkv[2 * number + layer](tokens).chunk(3, -1)
        return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts]

    def joined(self, layer, mixed, number=0):
        return self.out[2 * number + layer](mixed.transpose(1, 2).flatten(2))

    def attended(self, layer, tokens, number=0):
        """Apply a plain attention."""
        q, k, v = self.projected(layer, tokens, number)
        weights = self.attention((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1), layer)
        return self.joined(layer, weights @ v, number)

    def fed(self, layer, tokens):
        return self.down[layer](F.gelu(self.up[layer](self.norms[2 + layer](tokens))))

    def tokens(self, images):
        tokens = self.embed(images).flatten(2).mT
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1) + self.place
        for layer in range(2):
            tokens = self.residual(self.block(self, layer, tokens))
            if not self.with_mlp:
                tokens = self.residual(tokens + self.fed(layer, tokens))
            if layer == 0:
                tokens = self.between(tokens)
        return self.norms[4](tokens)

    def forward(self, images):
        return self.head(self.read(self, self.tokens(images)))


def attention_alone(net, layer, tokens):
    return tokens + net.attended(layer, net.norms[layer](tokens))


def mixing(change, count=COUNT):
    """Return the matrix of a linear map of tokens, the same for all channels; its rows are shares."""
    matrix = change(torch.eye(count, dtype=torch.float64)[None])[0].abs()
    matrix = matrix if matrix.ndim == 2 else matrix[None]
    total = matrix.sum(1, keepdim=True)
    return matrix / torch.where(total == 0, 1, total)


def full_matrices(net, images=IMAGES, share=1.0, target=TARGET, row=None):
    """Return the output of a plainly written network, and its maps by each method.

    Args:
        net: records its matrices; `net.between` is linear in the tokens, and the same for all channels.
        images: the input of the network.
        share: the share of this network in the score of an ensemble.
        target: the class of each image.
        row: the share that `net.read` takes of each token, if it is neither linear nor a pooling.
    """
    layers, gradients, streams, pooling, logits = kept_matrices(net, images, share, target)
    between, maps = mixing(net.between), []
    for image in range(len(images)):
        if pooling:
            start = pooling[0][image].mean(0)
            start = start / start.sum()
        else:
            start = mixing(lambda t: net.read(net, t), len(between))[0] if row is None else row
        a, g, held = ([one[image] for one in kind] for kind in (layers, gradients, streams))
        maps.append(image_maps(a, g, held, start, between))
    return logits, {name: torch.stack([one[name] for one in maps]).view(-1, SIDE, SIDE) for name in maps[0]}


def kept_matrices(net, images, share, target):
    """Return A and G by layer, (B, heads, N, N), x * dS/dx by residual, (B, N), the pooling and output."""
    net.seen = ([[], []], [], [])
    with torch.enable_grad(), visible.Linearized():
        logits = net(images)
    layers, streams, pooling = net.seen
    net.seen = None
    flat = [attention for layer in layers for attention in layer]
    scores = share * sum(logits[image, index] for image, index in enumerate(target))
    found = torch.autograd.grad(scores, [*flat, *streams], allow_unused=True)
    of = {id(value): gradient for value, gradient in zip([*flat, *streams], found, strict=True)}
    gradients = [torch.cat([of[id(one)] for one in layer], 1) for layer in layers]
    held = [(x * of[id(x)]).sum(-1).detach() for x in streams]
    return [torch.cat(layer, 1).detach() for layer in layers], gradients, held, pooling, logits.detach()


def image_maps(attentions, gradients, held, start, between):
    """Return the maps of one image; for evidence, its two accounts "taken" and "held"."""
    maps = {}
    fused = {
        "rollout": [a.mean(0) for a in attentions],
        "grad_rollout": [(a * g).mean(0).relu() for a, g in zip(attentions, gradients, strict=True)],
        "gae": [(a * g).relu().mean(0) for a, g in zip(attentions, gradients, strict=True)],
    }
    for method, (lower, upper) in fused.items():
        first, second = (torch.eye(len(w), dtype=torch.float64) + w for w in (lower, upper))
        if method != "gae":
            first, second = (w / w.sum(1, keepdim=True) for w in (first, second))
        maps[method] = (start @ second @ between @ first)[1:]
    lower, upper = ((a * g).sum(0) for a, g in zip(attentions, gradients, strict=True))
    # relevance behind `between` is taken back through it
    maps["taken"] = (upper[start > 0].sum(0) @ between + lower[start @ between > 0].sum(0))[1:]
    half = len(held) // 2
    maps["held"] = (sum(held[half:]) @ between + sum(held[:half]))[1:]
    return maps


def in_shares(maps):
    """Return the maps with evidence, the sum of the shares of its two accounts."""
    shares = [maps[name] / maps[name].abs().sum((1, 2), keepdim=True) for name in ("taken", "held")]
    return {**maps, "evidence": sum(shares)}


def found_maps(model, methods=METHODS, images=IMAGES, target=TARGET):
    found = explain_methods(model, images.clone(), list(methods), target=target)
    return {name: one.signed if name == "evidence" else one.maps for name, one in found.items()}


def off(found, wanted):
    """Return the error of the maps of each method, relative to the largest value of each map."""
    assert all(found[name].shape == wanted[name].shape for name in found)
    far = {name: (found[name].double() - wanted[name].double()).abs().flatten(1).amax(1) for name in found}
    return {name: (far[name] / wanted[name].double().abs().flatten(1).amax(1)).max().item() for name in found}


def check(model, plain, methods=METHODS, **options):
    """Assert the output of the plain network, and the maps of its matrices."""
    logits, wanted = full_matrices(plain, **options)
    with torch.no_grad():
        assert torch.allclose(model(IMAGES.clone()), logits, rtol=0, atol=1e-9)
    far = off(found_maps(model, methods), in_shares(wanted))
    assert max(far.values()) < 1e-6, far


def fixed(seed, outward=COUNT):
    """Return weights that mix tokens; some are 0, and some are negative."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(outward, COUNT, dtype=torch.float64, generator=generator)
    matrix[matrix.abs() < 0.6] = 0
    matrix[:, 0] = 1.0
    return matrix


def frozen(net):
    """Turn off the gradients of the parameters, as `out=` requires."""
    return net.requires_grad_(False)


def clone_then(change):
    """Return a function that applies an in-place change to a copy of the tokens."""

    def written(t):
        t = t.clone()
        back = change(t)
        return t if back is None else back

    return written


def check_tokens(change, plain, methods=METHODS):
    """Assert that a change of the tokens between two attentions is like its plain form.

    Shares are proportional to |weight|, so that nothing goes where it is 0.
    """
    with torch.no_grad():
        # of the real width: `out=` and indices need not fit the channels of the probe in `mixing`
        tokens = torch.randn(2, COUNT, WIDTH, dtype=torch.float64)
        assert torch.allclose(change(tokens.clone()), plain(tokens), rtol=0, atol=1e-12)
    check(frozen(Net(between=change)), Net(between=plain), methods)


def spellings(like):
    """Return (spelling, plain form) by name, of spellings by plain form and name."""
    return {name: (way, plain) for plain, ways in like.items() for name, way in ways.items()}
