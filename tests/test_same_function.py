"""The same function gets the same map, part by part, against full matrices in float64.

`tests/test_rewriting.py` draws spellings of one network at random; here, each part of a network has a table
of spellings and their plain forms. The plain network runs with all matrices in full, and takes gradients by
autograd with respect to A itself, with its norms and gates held constant.
"""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests import oracle, visible
from vitx import explain, explain_methods

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
    """

    def __init__(self, block=None, between=None, read=None, heads=(3, 3, 3), seed=4):
        super().__init__()
        self.block, self.between = block or attention_alone, between or (lambda t: t)
        self.read, self.heads = read or (lambda net, t: t[:, 0]), heads
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
            if self.block not in WITH_MLP:
                tokens = self.residual(tokens + self.fed(layer, tokens))
            if layer == 0:
                tokens = self.between(tokens)
        return self.norms[4](tokens)

    def forward(self, images):
        return self.head(self.read(self, self.tokens(images)))


def attention_alone(net, layer, tokens):
    return tokens + net.attended(layer, net.norms[layer](tokens))


def several(count, with_mlp=False):
    """Return a block of parallel attentions, plainly written."""

    def block(net, layer, tokens):
        normed = net.norms[layer](tokens)
        branch = sum(net.attended(layer, normed, number) for number in range(count))
        return tokens + (branch + net.fed(layer, tokens) if with_mlp else branch)

    return block


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


@pytest.mark.parametrize("heads", [2, 3])
def test_the_matrices_are_those_of_another_oracle(heads):
    """The other oracle captures A where the softmax computes it."""
    net = Net(heads=(heads,) * 3)
    seen, (_, maps) = oracle.observe(Net(heads=(heads,) * 3), IMAGES, TARGET), full_matrices(net)
    for method in ("rollout", "grad_rollout"):
        wanted = oracle.maps_of(seen, method, 1, "token")
        assert torch.allclose(maps[method].flatten(1), wanted, rtol=1e-9, atol=1e-12)
    assert torch.allclose(maps["gae"].flatten(1), oracle.gae_maps(seen, 1, "token"), rtol=1e-9, atol=1e-12)


def test_shares_of_a_mixing_are_in_proportion():
    """The matrix of a linear map of tokens has the right entries, one by one."""
    weights = fixed(5)
    for row, found in zip(weights, mixing(plain_mixing), strict=True):
        total = sum(abs(w) for w in row.tolist())
        assert found.tolist() == pytest.approx([abs(w) / total for w in row.tolist()])
    assert mixing(first_takes_mean)[0].tolist() == pytest.approx([0.5, *[0.5 / 16] * 16])
    assert mixing(dropped).sum(1).tolist() == [0.0 if i in (3, 8, 13) else 1.0 for i in range(COUNT)]


# ---- attentions -------------------------------------------------------------------------------------------


def all_terms(net, layer, tokens, count, with_mlp):
    normed = net.norms[layer](tokens)
    terms = [net.attended(layer, normed, number) for number in range(count)]
    return [*terms, net.fed(layer, tokens)] if with_mlp else terms


def beside(count, with_mlp, add):
    """Return a block of parallel attentions, whose sum `add` writes: (tokens, terms) -> tokens."""

    def block(net, layer, tokens):
        return add(tokens, all_terms(net, layer, tokens, count, with_mlp))

    return block


def one_by_one(tokens, terms):
    for term in terms:
        tokens = tokens + term
    return tokens


def one_by_one_in_place(tokens, terms):
    tokens = tokens.clone()
    for term in terms:
        tokens += term
    return tokens


def last_first(tokens, terms):
    total = terms[-1]
    for term in [*terms[-2::-1], tokens]:
        total = term + total
    return total


def by_two(tokens, terms):
    return (tokens + terms[0]) + sum(terms[1:])


def stacked(tokens, terms):
    return torch.stack([*terms, tokens], -1).sum(-1)


def separate_norms(net, layer, tokens):
    """Normalize the tokens separately for each attention, with the same weights."""
    terms = [net.attended(layer, net.norms[layer](tokens), number) for number in range(2)]
    return tokens + terms[0] + terms[1]


ADDITIONS = {
    "one by one": one_by_one,
    "one by one, in place": one_by_one_in_place,
    "the last first": last_first,
    "by two": by_two,
    "a stack": stacked,
}
BESIDE = {
    f"{count} attentions{', and an MLP' * with_mlp}{', of unlike heads' * (len(set(heads)) > 1)}: {name}": (
        beside(count, with_mlp, add),
        several(count, with_mlp),
        heads,
    )
    for count, with_mlp, heads in (
        (1, True, (3,)),
        (2, False, (3, 3)),
        (2, True, (3, 3)),
        (2, False, (2, 4)),
        (3, False, (3, 3, 3)),
        (3, True, (2, 3, 4)),
    )
    for name, add in ADDITIONS.items()
}
BESIDE["2 attentions, a norm each"] = (separate_norms, several(2), (3, 3))
# blocks that contain their MLP
WITH_MLP = {block for name, (*blocks, _) in BESIDE.items() if "MLP" in name for block in blocks}


@pytest.mark.parametrize("name", BESIDE)
def test_attentions_beside_each_other_are_heads_of_one_layer(name):
    block, plain, heads = BESIDE[name]
    check(Net(block, heads=heads), Net(plain, heads=heads))


def scored(make, mix=None):
    """Return a block with A from make(scores), and mix(A, v) in place of A @ v."""

    def block(net, layer, tokens):
        q, k, v = net.projected(layer, net.norms[layer](tokens))
        weights = net.attention(make(q @ k.mT / q.shape[-1] ** 0.5), layer)
        return tokens + net.joined(layer, (mix or torch.matmul)(weights, v))

    return block


def channels_first(net, layer, tokens):
    """Attend as LeViT, SHViT and MSRA's EfficientViT do: values (B, heads, D, N), with A on their right."""
    picture = net.norms[layer](tokens).mT
    linear, out = net.qkv[layer], net.out[layer]
    qkv = F.conv1d(picture, linear.weight[:, :, None], linear.bias)
    q, k, v = qkv.unflatten(1, (3, net.heads[0], -1)).unbind(1)
    attn = (q.transpose(-2, -1) @ k * q.shape[2] ** -0.5).softmax(dim=-1)
    picture = (v @ attn.transpose(-2, -1)).flatten(1, 2)
    return tokens + F.conv1d(picture, out.weight[:, :, None], out.bias).mT


def one_head_after_the_other(net, layer, tokens):
    """Split the weights by heads, as EfficientViT's cascade does; each head adds to the residual."""
    normed, size = net.norms[layer](tokens), WIDTH // net.heads[0]
    weights, biases = net.qkv[layer].weight.chunk(3), net.qkv[layer].bias.chunk(3)
    for head in range(net.heads[0]):
        own = slice(head * size, (head + 1) * size)
        q, k, v = (F.linear(normed, w[own], b[own]) for w, b in zip(weights, biases, strict=True))
        mixed = torch.bmm((torch.bmm(q, k.mT) / size**0.5).softmax(2), v)
        tokens = tokens + mixed @ net.out[layer].weight[:, own].T
    return tokens + net.out[layer].bias


def fused_masked(mask):
    def block(net, layer, tokens):
        q, k, v = net.projected(layer, net.norms[layer](tokens))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q.shape[2]))
        return tokens + net.joined(layer, mixed)

    return block


def sigmoid(scores):
    return torch.sigmoid(scores - math.log(COUNT))


def diagonal(count):
    return torch.eye(count, dtype=torch.bool)


def without_diagonal(scores):
    return scores.masked_fill(diagonal(scores.shape[-1]), -math.inf).softmax(-1)


def diagonal_by_index(scores):
    at = torch.arange(scores.shape[-1])
    scores[:, :, at, at] = -math.inf
    return scores.softmax(-1)


def diagonal_by_a_view(scores):
    scores.diagonal(dim1=-2, dim2=-1).fill_(-math.inf)
    return scores.softmax(-1)


def diagonal_entry_by_entry(scores):
    for i in range(scores.shape[-1]):
        scores[..., i, i] = -math.inf
    return scores.softmax(-1)


def diagonal_by_index_put(scores):
    at = torch.arange(scores.shape[-1])
    every = [torch.arange(n)[(..., *[None] * (2 - d))] for d, n in enumerate(scores.shape[:2])]
    return torch.index_put(scores, (*every, at, at), torch.tensor(-math.inf, dtype=scores.dtype)).softmax(-1)


def summed(weights, v):
    return (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def on_the_right(weights, v):
    return (v.mT @ weights.mT).mT


def shrunk(scores):
    """Return rows of a softmax that do not sum to 1."""
    return 0.5 * scores.softmax(-1)


def doubled(scores):
    return 2 * scores.softmax(-1)


def off_by_one(scores):
    """Return a softmax whose rows also attend to nothing, with a score of 0."""
    return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]


def one_more(exponentials):
    return 1 + exponentials.sum(-1, keepdim=True)


def greatest(scores):
    """Return a softmax with only the four greatest entries of each row."""
    weights = scores.softmax(-1)
    return weights * (weights >= weights.topk(4, -1).values[..., -1:])


def greatest_scattered(scores):
    values, at = scores.softmax(-1).topk(4, -1)
    return torch.zeros_like(scores).scatter(-1, at, values)


def distances(scores):
    at = torch.arange(scores.shape[-1], dtype=scores.dtype)
    return (at[:, None] - at).abs() / 5


def decaying(scores):
    """Return a softmax that falls off with the distance of the tokens."""
    return scores.softmax(-1) * (-distances(scores)).exp()


def gated(scores):
    """Return a softmax whose rows are weakened by a gate."""
    return scores.softmax(-1) * torch.sigmoid(scores.mean(-1, keepdim=True))


def of_half(scores):
    """Return exponentials over the sum of some of them."""
    return scores.exp() / scores[..., ::2].exp().sum(-1, keepdim=True)


ATTENTIONS = {
    "channels first": (channels_first, attention_alone),
    "one head after the other": (one_head_after_the_other, attention_alone),
    "a product and a sum": (scored(lambda s: s.softmax(-1), summed), attention_alone),
    "values on the left": (scored(lambda s: s.softmax(-1), on_the_right), attention_alone),
    "sigmoid": (scored(sigmoid), scored(sigmoid)),
    "sigmoid, a product and a sum": (scored(sigmoid, summed), scored(sigmoid)),
    "sigmoid, values on the left": (scored(sigmoid, on_the_right), scored(sigmoid)),
    "sigmoid by exp": (scored(lambda s: 1 / (1 + COUNT * (-s).exp())), scored(sigmoid)),
    "LSA, masked_fill": (scored(without_diagonal), scored(without_diagonal)),
    "LSA, fused": (fused_masked(lambda n: ~diagonal(n)), scored(without_diagonal)),
    "LSA, by index": (scored(diagonal_by_index), scored(without_diagonal)),
    "LSA, by a view": (scored(diagonal_by_a_view), scored(without_diagonal)),
    "LSA, entry by entry": (scored(diagonal_entry_by_entry), scored(without_diagonal)),
    "LSA, index_put": (scored(diagonal_by_index_put), scored(without_diagonal)),
    "half a softmax": (scored(shrunk), scored(shrunk)),
    "half a softmax, a product and a sum": (scored(shrunk, summed), scored(shrunk)),
    "off by one": (scored(off_by_one), scored(off_by_one)),
    "off by one, exp": (scored(lambda s: s.exp() / one_more(s.exp())), scored(off_by_one)),
    "off by one, log": (scored(lambda s: (s - one_more(s.exp()).log()).exp()), scored(off_by_one)),
    "off by one, divided afterwards": (
        scored(torch.exp, lambda w, v: w @ v / one_more(w)),
        scored(off_by_one),
    ),
    "divided afterwards, tokens first": (
        scored(torch.exp, lambda w, v: ((w @ v).transpose(1, 2) / w.sum(-1).mT[..., None]).transpose(1, 2)),
        attention_alone,
    ),
    "divided afterwards, by ones": (
        scored(torch.exp, lambda w, v: (w @ v) * (w @ torch.ones_like(v[..., :1])).reciprocal()),
        attention_alone,
    ),
    "the greatest alone": (scored(greatest), scored(greatest)),
    "the greatest alone, scattered": (scored(greatest_scattered), scored(greatest)),
    "decaying": (scored(decaying), scored(decaying)),
    "decaying, exp": (scored(lambda s: (s.log_softmax(-1) - distances(s)).exp()), scored(decaying)),
    "decaying, less logsumexp": (
        scored(lambda s: (s - s.logsumexp(-1, True) - distances(s)).exp()),
        scored(decaying),
    ),
    "gated": (scored(gated), scored(gated)),
    "over the sum of some": (scored(of_half), scored(of_half)),
    "twice a softmax, exp": (scored(lambda s: (s.log_softmax(-1) + math.log(2)).exp()), scored(doubled)),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
    block, plain = ATTENTIONS[name]
    check(Net(block), Net(plain))


# ---- what is done to tokens between two attentions ---------------------------------------------------------


def fixed(seed, outward=COUNT):
    """Return weights that mix tokens; some are 0, and some are negative."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(outward, COUNT, dtype=torch.float64, generator=generator)
    matrix[matrix.abs() < 0.6] = 0
    matrix[:, 0] = 1.0
    return matrix


class Mixing(nn.Module):
    """A mixing of tokens by a fixed matrix, which is a buffer or a plain tensor."""

    def __init__(self, apply, plain=False):
        super().__init__()
        self.register_buffer("matrix", None if plain else fixed(5))
        if plain:
            del self.matrix
            self.matrix = fixed(5)
        self.apply_it = apply

    def forward(self, t):
        return self.apply_it(self.matrix, t)


def plain_mixing(t):
    return torch.stack([sum(w * t[:, i] for i, w in enumerate(row)) for row in fixed(5)], 1)


def clusters():
    """Return the cluster of each token; the first is for the class token alone, and the tenth is empty."""
    return torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6, 7, 7, 8, 8, 8, 8])


def sizes_of_clusters():
    return clusters().bincount(minlength=10).clamp(min=1)


def in_clusters(t, mean):
    rows = [t[:, clusters() == number].sum(1) for number in range(10)]
    sizes = sizes_of_clusters().to(t)
    return torch.stack([row / size if mean else row for row, size in zip(rows, sizes, strict=True)], 1)


def index_of(t):
    return clusters()[None, :, None].expand(len(t), -1, t.shape[-1])


def clone_then(change):
    """Return a function that applies an in-place change to a copy of the tokens."""

    def written(t):
        t = t.clone()
        back = change(t)
        return t if back is None else back

    return written


def first_takes_mean(t):
    return torch.cat([t[:, :1] + t[:, 1:].mean(1, keepdim=True), t[:, 1:]], 1)


def first_is_mean(t):
    return torch.cat([t[:, 1:].mean(1, keepdim=True), t[:, 1:]], 1)


def order_of(**moved):
    """Return a reordering of the tokens; t3=5 puts token 5 in place 3."""
    order = torch.arange(COUNT)
    for name, source in moved.items():
        order[int(name[1:])] = source
    return lambda t: t[:, order]


def add_to_first(t):
    t[:, 0].add_(t[:, 1:].mean(1))


def add_to_view(t):
    first, patches = t[:, 0], t[:, 1:]
    first += patches.mean(1)


def read_of_old_view(t):
    """Copy from a view that is older than a write, and that shows what was written."""
    third = t[:, 3]
    t[:, 3] = t[:, 5]
    t[:, 7] = third


def read_of_old_copy(t):
    third = t[:, 3].clone()
    t[:, 3] = t[:, 5]
    t[:, 7] = third


def view_of_a_view(t):
    turned = t.transpose(0, 1)
    row = turned[3]
    row.copy_(turned[5])


def view_in_channels(t):
    """Write to the same token twice, through different views."""
    token = t[:, 4]
    token[:, ::2] = t[:, 9, ::2]
    t[:, 4, 1::2] = t[:, 9, 1::2]


def written_in_flat(t):
    t.view(-1, t.shape[-1])[6::COUNT] = t[:, 2]


def mean_by_copy(t):
    made = torch.empty_like(t)
    made.copy_(t)
    made[:, :1] = t[:, 1:].mean(1, keepdim=True)
    return made


def turned_by_copies(t):
    """Transpose by copies, as functionalized programs do."""
    aten = torch.ops.aten
    turned = aten.transpose_copy.int(aten.permute_copy(t, [0, 2, 1]), 1, 2)
    return torch.stack([aten.t_copy(aten.t_copy(one)) for one in turned])


def shifted_by_scratch(t):
    scratch = torch.linspace(-1, 1, t.shape[-1], dtype=t.dtype)
    shifted = t + scratch
    scratch.zero_()
    return shifted


def gathered_into(t):
    made = torch.empty_like(t)
    torch.index_select(t, 1, torch.arange(COUNT).roll(2), out=made)
    return made


def concatenated_into(t):
    made = torch.empty_like(t)
    torch.cat([t[:, -2:], t[:, :-2]], 1, out=made)
    return made


def swapped_by_index_put(t):
    rows = torch.arange(len(t))[:, None]
    return t.index_put_((rows, torch.tensor([[3, 5]])), t[:, [5, 3]])


def accumulated(t):
    made = torch.zeros_like(t)
    for place in range(t.shape[1]):
        made[:, place] += t[:, place]
    made[:, 0] += t[:, 1:].mean(1)
    return made


def zeroed_then_written(t):
    old = t.clone()
    t.zero_()
    t.add_(old)
    t[:, 0] += old[:, 1:].mean(1)


def some_dropped():
    return torch.arange(COUNT) % 5 == 3


def zeros_by_index(t):
    t[:, some_dropped()] = 0


def mean_into_itself(t):
    t[:, :1].copy_(t[:, 1:].mean(1, keepdim=True))


def rolled_within(t):
    t[:, 1:].copy_(t[:, 1:].roll(3, 1))


def dropped(t):
    return torch.where(some_dropped()[:, None], torch.zeros_like(t), t)


def turned(t):
    return torch.cat([t[:, :1], t[:, 1:].roll(3, 1)], 1)


def restored(t):
    """Put the kept tokens back among mask tokens, as masked autoencoders do."""
    return t[:, torch.tensor([0, *range(COUNT - 1, 0, -1)])]


def by_masked_scatter(t):
    mask = torch.arange(COUNT) > 0
    made = t[:, :1].expand_as(t).clone()
    return made.masked_scatter(mask[:, None].expand_as(t), t[:, 1:].flip(1))


def merged_tokens(t):
    """Merge the last four tokens into places 1, 1, 2 and 3, as token merging does."""
    parts = [t[:, 0], (t[:, 1] + t[:, -4] + t[:, -3]) / 3, (t[:, 2] + t[:, -2]) / 2, (t[:, 3] + t[:, -1]) / 2]
    return torch.cat([torch.stack(parts, 1), t[:, 4:-4]], 1)


def merged_by_scatter_reduce(t):
    where = torch.tensor([1, 1, 2, 3])[None, :, None].expand(len(t), -1, t.shape[-1])
    return t[:, :-4].scatter_reduce(1, where, t[:, -4:], "mean", include_self=True)


BETWEEN = {
    "a buffer": (Mixing(lambda m, t: m @ t), plain_mixing),
    "a buffer, einsum": (Mixing(lambda m, t: torch.einsum("mn,bnc->bmc", m, t)), plain_mixing),
    "a buffer, bmm": (Mixing(lambda m, t: torch.bmm(m.expand(len(t), -1, -1), t)), plain_mixing),
    "a buffer, on the right": (Mixing(lambda m, t: (t.mT @ m.T).mT), plain_mixing),
    "a buffer, F.linear": (Mixing(lambda m, t: F.linear(t.mT, m).mT), plain_mixing),
    "a buffer, a product and a sum": (Mixing(lambda m, t: (m[..., None] * t[:, None]).sum(2)), plain_mixing),
    "a buffer, tensordot": (
        Mixing(lambda m, t: torch.tensordot(t, m, ([1], [1])).transpose(1, 2)),
        plain_mixing,
    ),
    "a plain tensor": (Mixing(lambda m, t: m @ t, plain=True), plain_mixing),
    "a plain tensor, a product and a sum": (
        Mixing(lambda m, t: (m[..., None] * t[:, None]).sum(2), plain=True),
        plain_mixing,
    ),
    "a plain tensor, abs first": (Mixing(lambda m, t: (m.abs() * m.sign()) @ t, plain=True), plain_mixing),
    "index_add": (
        lambda t: t.new_zeros(len(t), 10, t.shape[-1]).index_add(1, clusters(), t),
        lambda t: in_clusters(t, mean=False),
    ),
    "index_add_": (
        lambda t: t.new_zeros(len(t), 10, t.shape[-1]).index_add_(1, clusters(), t),
        lambda t: in_clusters(t, mean=False),
    ),
    "scatter_add": (
        lambda t: t.new_zeros(len(t), 10, t.shape[-1]).scatter_add(1, index_of(t), t),
        lambda t: in_clusters(t, mean=False),
    ),
    "scatter_reduce, sum": (
        lambda t: t.new_zeros(len(t), 10, t.shape[-1]).scatter_reduce(1, index_of(t), t, "sum"),
        lambda t: in_clusters(t, mean=False),
    ),
    "scatter_reduce, mean": (
        lambda t: t.new_zeros(len(t), 10, t.shape[-1]).scatter_reduce(
            1, index_of(t), t, "mean", include_self=False
        ),
        lambda t: in_clusters(t, mean=True),
    ),
    "one-hot clusters": (
        lambda t: F.one_hot(clusters(), 10).to(t).T @ t / sizes_of_clusters().to(t)[:, None],
        lambda t: in_clusters(t, mean=True),
    ),
    "scatter_reduce, merging": (merged_by_scatter_reduce, merged_tokens),
    "masked_scatter": (by_masked_scatter, restored),
    "masked_fill": (lambda t: t.masked_fill(some_dropped()[:, None], 0.0), dropped),
    "masked_fill_": (clone_then(lambda t: t.masked_fill_(some_dropped()[:, None], 0.0)), dropped),
    "index_fill_": (clone_then(lambda t: t.index_fill_(1, some_dropped().nonzero()[:, 0], 0)), dropped),
    "zeros by index": (clone_then(zeros_by_index), dropped),
    "into a slice": (clone_then(add_to_first), first_takes_mean),
    "into a view": (clone_then(add_to_view), first_takes_mean),
    "accumulated": (accumulated, first_takes_mean),
    "zeroed, then written": (clone_then(zeroed_then_written), first_takes_mean),
    "copy_, then a slice": (mean_by_copy, first_is_mean),
    "a slice of itself": (clone_then(mean_into_itself), first_is_mean),
    "a view that is older than the write": (clone_then(read_of_old_view), order_of(t3=5, t7=5)),
    "a copy that is older than the write": (clone_then(read_of_old_copy), order_of(t3=5, t7=3)),
    "a view of a view": (clone_then(view_of_a_view), order_of(t3=5)),
    "views of some channels": (clone_then(view_in_channels), order_of(t4=9)),
    "a flat view": (clone_then(written_in_flat), order_of(t6=2)),
    "tokens by index": (
        clone_then(lambda t: t.__setitem__((slice(None), [3, 5]), t[:, [5, 3]])),
        order_of(t3=5, t5=3),
    ),
    "index_put_": (clone_then(swapped_by_index_put), order_of(t3=5, t5=3)),
    "out=": (gathered_into, lambda t: t.roll(2, 1)),
    "out= of cat": (concatenated_into, lambda t: t.roll(2, 1)),
    "rolled within itself": (clone_then(rolled_within), turned),
    "detach": (lambda t: t.detach(), lambda t: t),
    "views that are copies": (turned_by_copies, lambda t: t),
    "type": (lambda t: t.type(torch.float64), lambda t: t),
    "type, by name": (lambda t: t.type("torch.DoubleTensor"), lambda t: t),
    "type_as": (lambda t: t.type_as(torch.zeros((), dtype=torch.float64)), lambda t: t),
    "data": (lambda t: t.data, lambda t: t),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_done_to_tokens(name):
    """Shares are proportional to |weight|, so that nothing goes where it is 0."""
    change, plain = BETWEEN[name]
    with torch.no_grad():
        # of the real width: `out=` and indices need not fit the channels of the probe in `mixing`
        tokens = torch.randn(2, COUNT, WIDTH, dtype=torch.float64)
        assert torch.allclose(change(tokens.clone()), plain(tokens), rtol=0, atol=1e-12)
    # evidence cannot know whether a token plus the mean of others is a residual
    methods = BEGINNING if plain is first_takes_mean else METHODS
    check(frozen(Net(between=change)), Net(between=plain), methods)


def test_a_constant_that_is_written_over_later():
    scratch, kept = (found_maps(frozen(Net(between=change))) for change in (shifted_by_scratch, shifted))
    assert max(off(scratch, kept).values()) < 1e-6


def shifted(t):
    return t + torch.linspace(-1, 1, t.shape[-1], dtype=t.dtype)


def frozen(net):
    """Turn off the gradients of the parameters, as `out=` requires."""
    return net.requires_grad_(False)


# ---- reading ----------------------------------------------------------------------------------------------


def weights_of_tokens(net, t):
    """Return one weight for each token, (B, N, 1), as attention pooling computes it."""
    return net.pooling(net.score(t).softmax(1).mT).mT


def plain_pooling(net, t):
    return (weights_of_tokens(net, t).mT @ t)[:, 0]


def many_instances(net, t):
    """Pool one bag after the other, as attention-based multiple instance learning does."""
    bags = []
    for h in t:
        a = torch.softmax(net.score(h), dim=0)
        bags.append(torch.mm(a.T, h))
    return torch.cat(bags)


def transposed_first(net, t):
    a = F.softmax(torch.transpose(net.score(t), 2, 1), dim=2)
    return torch.bmm(a, t).squeeze(1)


def weights_below():
    """Return a weight for each token; some are 0, and some are negative."""
    return fixed(9, 1)[0]


def mean_of_some(t):
    return t[:, some_kept()].mean(1)


def some_kept():
    return torch.arange(COUNT) % 3 == 1


def pixels_in_rows(t):
    return t[:, 1:].unflatten(1, (SIDE, SIDE))


READS = {
    "pooling, a product and a sum": (lambda net, t: (net.score(t).softmax(1) * t).sum(1), plain_pooling),
    "pooling, values first": (lambda net, t: (t * torch.softmax(net.score(t), 1)).sum(dim=1), plain_pooling),
    "pooling, mm": (many_instances, plain_pooling),
    "pooling, bmm": (transposed_first, plain_pooling),
    "pooling, einsum": (
        lambda net, t: torch.einsum("bn,bnc->bc", net.score(t)[..., 0].softmax(1), t),
        plain_pooling,
    ),
    "pooling, tokens last": (lambda net, t: (t.mT @ net.score(t).softmax(1))[..., 0], plain_pooling),
    "pooling, matmul of rows": (
        lambda net, t: torch.matmul(net.score(t).squeeze(-1).softmax(-1).unsqueeze(-2), t).squeeze(-2),
        plain_pooling,
    ),
    "pooling by hand": (
        lambda net, t: (net.score(t).exp() * t).sum(1) / net.score(t).exp().sum(1),
        plain_pooling,
    ),
    "a masked mean": (
        lambda net, t: (t * some_kept()[:, None]).sum(1) / some_kept().sum(),
        lambda net, t: mean_of_some(t),
    ),
    "a masked mean, matmul": (
        lambda net, t: (some_kept().to(t)[None] @ t)[:, 0] / some_kept().sum(),
        lambda net, t: mean_of_some(t),
    ),
    "a masked mean, masked_fill": (
        lambda net, t: t.masked_fill(~some_kept()[:, None], 0).sum(1) / some_kept().sum(),
        lambda net, t: mean_of_some(t),
    ),
    "a masked mean, where": (
        lambda net, t: torch.where(some_kept()[:, None], t, 0.0).sum(1) / some_kept().sum(),
        lambda net, t: mean_of_some(t),
    ),
    "a masked mean, masked_select": (
        lambda net, t: (
            t.masked_select(some_kept()[:, None]).view(len(t), -1, t.shape[-1]).mean(1)
        ),
        lambda net, t: mean_of_some(t),
    ),
    "a one-hot selection": (
        lambda net, t: torch.einsum("n,bnc->bc", F.one_hot(torch.tensor(4), COUNT).to(t), t),
        lambda net, t: t[:, 4],
    ),
    "a one-hot selection, a product and a sum": (
        lambda net, t: (F.one_hot(torch.tensor(4), COUNT)[:, None] * t).sum(1),
        lambda net, t: t[:, 4],
    ),
    "a weighted mean": (
        lambda net, t: torch.einsum("n,bnc->bc", weights_below().to(t), t),
        lambda net, t: sum(w * t[:, i] for i, w in enumerate(weights_below())),
    ),
    "a weighted mean, a product and a sum": (
        lambda net, t: (weights_below()[:, None] * t).sum(1),
        lambda net, t: sum(w * t[:, i] for i, w in enumerate(weights_below())),
    ),
    "a weighted mean, in two steps": (
        lambda net, t: (weights_below()[1:].view(SIDE, SIDE, 1) * pixels_in_rows(t)).sum(1).sum(1),
        lambda net, t: sum(w * t[:, 1 + i] for i, w in enumerate(weights_below()[1:])),
    ),
    "a mean in two steps": (
        lambda net, t: pixels_in_rows(t).mean(1).mean(1),
        lambda net, t: t[:, 1:].mean(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_what_is_read(name):
    read, plain = READS[name]
    check(Net(read=read), Net(read=plain))


def gem(t, exponent):
    """Return the generalized mean of the patches."""
    return t[:, 1:].clamp(min=1e-6).pow(exponent).mean(1).pow(1 / exponent)


def held_gem(net, t):
    """Return the generalized mean with its gates held constant."""
    patches = t[:, 1:]
    powers = (patches * (patches.clamp(min=1e-6).pow(3) / patches).detach()).mean(1)
    return powers * (powers.pow(1 / 3) / powers).detach()


def gem_of_pictures(t, exponent):
    """Return the generalized mean as retrieval models write it."""
    picture = t[:, 1:].mT.unflatten(2, (SIDE, SIDE))
    return F.avg_pool2d(picture.clamp(min=1e-6).pow(exponent), (SIDE, SIDE)).pow(1.0 / exponent).flatten(1)


@pytest.mark.parametrize("mean", [gem, gem_of_pictures])
@pytest.mark.parametrize("learned", [False, True])
def test_the_exponent_of_a_generalized_mean_may_be_learned(learned, mean):
    net = Net(read=lambda net, t: mean(t, net.exponent))
    net.exponent = nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64)) if learned else 3.0
    evenly = torch.tensor([0.0, *[1 / 16] * 16], dtype=torch.float64)
    check(net, Net(read=held_gem), row=evenly)


# ---- around the network ------------------------------------------------------------------------------------


class Around(nn.Module):
    """A model that calls networks in a given way."""

    def __init__(self, call, *nets):
        super().__init__()
        self.nets, self.call = nn.ModuleList(nets), call

    def forward(self, x):
        return self.call(*self.nets, x)


MEAN, DEVIATION = (
    torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.3, 0.4, 0.5], [0.7, 0.8, 0.9])
)


def normalized_in_place(net, x):
    x.sub_(MEAN).div_(DEVIATION)
    return net(x)


def normalized_by_channel(net, x):
    for channel in range(3):
        x[:, channel] -= MEAN[channel, 0, 0]
        x[:, channel].div_(DEVIATION[channel, 0, 0])
    return net(x)


def normalized_into(net, x):
    torch.sub(x, MEAN, out=x)
    return net(torch.div(x, DEVIATION, out=x))


@pytest.mark.parametrize("call", [normalized_in_place, normalized_by_channel, normalized_into])
def test_an_input_that_is_normalized_in_place(call):
    """The caller's images stay unchanged."""
    _, wanted = full_matrices(Net(), (IMAGES - MEAN) / DEVIATION)
    images = IMAGES.clone()
    found = explain_methods(frozen(Around(call, Net())), images, list(METHODS), target=TARGET)
    assert torch.equal(images, IMAGES)
    maps = {name: one.signed if name == "evidence" else one.maps for name, one in found.items()}
    far = off(maps, in_shares(wanted))
    assert max(far.values()) < 1e-6, far


def same(x):
    return x


def mirrored(x):
    return x.flip(-1)


def turned_by(quarters):
    return lambda x: torch.rot90(x, quarters, (-2, -1))


def in_one_batch(net, x):
    return net(torch.cat([x, x.flip(3)])).view(2, len(x), -1).mean(0)


def in_turns(net, x):
    """Interleave the images with their mirror images, which are written over copies."""
    twice = x.repeat_interleave(2, 0)
    twice[1::2] = twice[1::2].flip(3)
    return net(twice).unflatten(0, (-1, 2)).mean(1)


def by_turning(net, x):
    total = 0
    for quarters in range(4):
        total += net(torch.rot90(x, quarters, (2, 3)))
    return total / 4


def into_rows(one, other, x):
    made = x.new_empty(2, len(x), CLASSES)
    made[0], made[1] = one(x), other(x)
    return made.mean(0)


def features_first(one, other, x):
    """Average the features of two networks, and read them by one head."""
    features = (one.read(one, one.tokens(x)) + other.read(other, other.tokens(x))) / 2
    return one.head(features)


TWO = (lambda: Net(seed=4), lambda: Net(read=lambda net, t: t[:, 1:].mean(1), seed=6))
FLIPS = [(0, same, same), (0, mirrored, mirrored)]
TURNS = [(0, turned_by(n), turned_by(-n)) for n in range(4)]
BOTH = [(0, same, same), (1, same, same)]
# (call, members in even shares); member: (number of the network, change of its input, inverse for its map)
TOGETHER = {
    "mirrored, two calls": (lambda net, x: (net(x) + net(x.flip(3))) / 2, FLIPS),
    "mirrored, a stack": (lambda net, x: torch.stack([net(x), net(x.flip(-1))]).mean(0), FLIPS),
    "mirrored, one batch": (in_one_batch, FLIPS),
    "mirrored, one batch, in turns": (in_turns, FLIPS),
    "mirrored, lerp": (lambda net, x: torch.lerp(net(x), net(x.flip(3)), 0.5), FLIPS),
    "turned": (by_turning, TURNS),
    "turned, a stack": (
        lambda net, x: torch.stack([net(torch.rot90(x, n, (2, 3))) for n in range(4)], 1).mean(1),
        TURNS,
    ),
    "two networks": (lambda one, other, x: (one(x) + other(x)) / 2, BOTH),
    "two networks, a stack": (lambda one, other, x: torch.stack([one(x), other(x)], -1).mean(-1), BOTH),
    "two networks, rows": (into_rows, BOTH),
    "two networks, one head": (features_first, BOTH),
    "two networks, einsum": (
        lambda one, other, x: torch.einsum("nbk->bk", torch.stack([one(x), other(x)])) / 2,
        BOTH,
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_is_averaged_in_the_network(name):
    call, members = TOGETHER[name]
    nets = [make() for make in TWO[: 1 + max(number for number, *_ in members)]]
    if call is features_first:
        nets[1].head = nets[0].head
    share = 1 / len(members)
    parts = [
        {key: back(value) for key, value in full_matrices(nets[number], change(IMAGES), share)[1].items()}
        for number, change, back in members
    ]
    wanted = {key: sum(part[key] for part in parts) for key in parts[0]}
    for method in ("rollout", "grad_rollout", "gae"):
        wanted[method] = wanted[method] * share
    far = off(found_maps(frozen(Around(call, *nets))), in_shares(wanted))
    assert max(far.values()) < 1e-6, far


def test_the_mean_of_two_networks_of_probabilities():
    """Rollout does not depend on the class, so probabilities serve as well as logits."""
    nets = [make() for make in TWO]
    model = Around(lambda one, other, x: (one(x).softmax(-1) + other(x).softmax(-1)) / 2, *nets)
    wanted = sum(full_matrices(net)[1]["rollout"] for net in nets) / 2
    assert off({"rollout": explain(model, IMAGES).maps}, {"rollout": wanted})["rollout"] < 1e-6


# ---- where the score was read ------------------------------------------------------------------------------


def of_all_tokens(net, x):
    return net.head(net.tokens(x))


def of_pixels(net, x):
    """Return class scores for each patch, (B, CLASSES, SIDE, SIDE)."""
    return of_all_tokens(net, x)[:, 1:].mT.unflatten(2, (SIDE, SIDE))


def enlarged(net, x):
    return F.interpolate(of_pixels(net, x), scale_factor=2, mode="nearest")


def smoothly(net, x):
    return F.interpolate(of_pixels(net, x), scale_factor=2, mode="bilinear", align_corners=False)


def by_convolution(net, x):
    picture = net.tokens(x)[:, 1:].mT.unflatten(2, (SIDE, SIDE))
    kernel = net.out[2].weight[:CLASSES, :, None, None].expand(-1, -1, 3, 3)
    return F.conv2d(picture, kernel / 3, padding=1)


def by_queries(net, x):
    """Decode by one layer, in which learned queries attend to the tokens, (B, queries, CLASSES)."""
    q, k, v = net.projected(0, net.tokens(x), 1)
    q = net.place[:, 3:9].expand(len(x), -1, -1).unflatten(-1, (3, -1)).transpose(1, 2)
    mixed = (q @ k.mT).softmax(-1) @ v
    return net.head(net.place[:, 3:9] + net.joined(0, mixed, 1))


def by_class_tokens(net, x):
    """Return scores, (B, CLASSES), with a token and weights of its own for each class."""
    return (net.tokens(x)[:, :CLASSES] * net.head.weight).sum(-1) + net.head.bias


def two_class_tokens(net, x):
    return net.head(net.tokens(x)[:, :2])


# The output of a network, a target, the output of a wrapper and its target, and the token read (or None).
READ_OF = {
    "a token of all": (of_all_tokens, lambda y: y[:, 5, 1], lambda y: y[:, 5], 1, 5),
    "the class token of all": (of_all_tokens, lambda y: y[:, 0, 2], lambda y: y[:, 0], 2, 0),
    "the second class token": (two_class_tokens, lambda y: y[:, 1, 2], lambda y: y[:, 1], 2, 1),
    "a class token by an int": (by_class_tokens, 3, lambda y: y[:, [3]], lambda y: y[:, 0], 3),
    "a class token by its class": (by_class_tokens, [2, 2], lambda y: y[:, 2:3], lambda y: y[:, 0], 2),
    "a pixel": (of_pixels, lambda y: y[:, 1, 2, 3], lambda y: y[:, :, 2, 3], 1, 12),
    "a pixel, enlarged": (enlarged, lambda y: y[:, 1, 4, 7], lambda y: y[:, :, 4, 7], 1, 12),
    "a pixel, smoothly enlarged": (smoothly, lambda y: y[:, 1, 4, 6], lambda y: y[:, :, 4, 6], 1, None),
    "a pixel behind a convolution": (
        by_convolution,
        lambda y: y[:, 1, 2, 2],
        lambda y: y[:, :, 2, 2],
        1,
        None,
    ),
    "a query": (by_queries, lambda y: y[:, 4, 1], lambda y: y[:, 4], 1, None),
    "the largest query": (
        by_queries,
        lambda y: y[:, :, 1].amax(1),
        lambda y: y[torch.arange(2), y[:, :, 1].argmax(1)],
        *(1, None),
    ),
    "a query for each image": (
        by_queries,
        lambda y: y[torch.arange(2), torch.tensor([0, 3]), 1],
        lambda y: y[torch.arange(2), torch.tensor([0, 3])],
        *(1, None),
    ),
    "a box of pixels": (
        of_pixels,
        lambda y: y[:, 1, :2, 1:].mean((1, 2)),
        lambda y: y[:, :, :2, 1:].mean((2, 3)),
        *(1, None),
    ),
    "a mask of pixels": (
        of_pixels,
        lambda y: (y[:, 1] * torch.eye(SIDE)).sum((1, 2)) / SIDE,
        lambda y: y.diagonal(dim1=2, dim2=3).mean(2),
        *(1, None),
    ),
}


@pytest.mark.parametrize("name", READ_OF)
def test_each_method_begins_where_the_score_was_read(name):
    call, target, wrap, own, token = READ_OF[name]
    net = Net()
    model, wrapper = Around(call, net), Around(lambda net, x: wrap(call(net, x)), net)
    found = found_maps(model, BEGINNING, target=target)
    far = off(found, found_maps(wrapper, BEGINNING, target=own))
    assert max(far.values()) < 1e-6, far
    if token is not None:
        number = own if isinstance(own, int) else token
        _, wanted = full_matrices(Net(read=lambda net, t: t[:, token]), target=[number] * 2)
        far = off(found, wanted)
        assert max(far.values()) < 1e-6, far


def test_outputs_count_in_proportion_to_their_gradient():
    """The score is one pixel minus three times another; where a rollout begins, the sign does not matter."""
    model = Around(of_pixels, Net())
    one, other = (explain(model, IMAGES, target=lambda y, at=at: y[:, 1, at, at]).maps for at in (0, 2))
    found = explain(model, IMAGES, target=lambda y: y[:, 1, 0, 0] - 3 * y[:, 1, 2, 2]).maps
    assert off({"": found}, {"": (one + 3 * other) / 4})[""] < 1e-6
    assert off({"": one}, {"": other})[""] > 0.01


def test_a_rollout_without_a_target_begins_evenly():
    model = Around(of_all_tokens, Net())
    evenly = torch.full((COUNT,), 1 / COUNT, dtype=torch.float64)
    _, wanted = full_matrices(Net(), row=evenly)
    found = explain(model, IMAGES).maps
    assert off({"rollout": found}, wanted)["rollout"] < 1e-6


# ---- forms of a model --------------------------------------------------------------------------------------

FORMED = ("rollout", "grad_rollout", "evidence")


class Plainly(nn.Module):
    """A Vision Transformer that can be scripted."""

    def __init__(self):
        super().__init__()
        net = Net()
        self.embed, self.first, self.place, self.head = net.embed, net.first, net.place, net.head
        self.blocks = nn.ModuleList(PlainBlock(net, layer) for layer in range(2))
        self.norm = net.norms[4]

    def embedded(self, images):
        return self.embed(images).flatten(2).transpose(1, 2)

    def forward(self, images):
        tokens = self.embedded(images)
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1) + self.place
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


class CutsPatches(Plainly):
    """The same with a linear patch embedding, whose patches are cut out by a reshape."""

    def embedded(self, images):
        rows = images.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(rows.flatten(3).flatten(1, 2), self.embed.weight.flatten(1), self.embed.bias)


class PlainBlock(nn.Module):
    def __init__(self, net, layer):
        super().__init__()
        self.norm1, self.norm2 = net.norms[layer], net.norms[2 + layer]
        self.qkv, self.out = net.qkv[layer], net.out[layer]
        self.mlp = nn.Sequential(net.up[layer], nn.GELU(), net.down[layer])

    def forward(self, tokens):
        qkv = self.qkv(self.norm1(tokens)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


class OwnGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        gate = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx, gradient):
        x, gate = ctx.saved_tensors
        return gradient * (gate + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi))


class OwnAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, weights = ctx.saved_tensors
        slope = gradient @ v.mT
        scores = weights * (slope - (slope * weights).sum(-1, True)) / q.shape[-1] ** 0.5
        return scores @ k, scores.mT @ q, weights.mT @ gradient


class WithFunctions(PlainBlock):
    def forward(self, tokens):
        qkv = self.qkv(self.norm1(tokens)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        tokens = tokens + self.out(OwnAttention.apply(*qkv).transpose(1, 2).flatten(2))
        return tokens + self.mlp[2](OwnGelu.apply(self.mlp[0](self.norm2(tokens))))


class Inside(nn.Module):
    """A block that is run in a given way."""

    def __init__(self, block, how):
        super().__init__()
        self.block, self.how = block, how

    def forward(self, tokens):
        return self.how(self.block, tokens)


def traced():
    with torch.no_grad():
        return torch.jit.trace(Plainly().eval(), IMAGES, check_trace=False)


def made_in_inference_mode():
    with torch.inference_mode():
        return Plainly().eval()


def without_gradients(block, tokens):
    with torch.no_grad():
        return block(tokens)


def in_inference_mode(block, tokens):
    with torch.inference_mode():
        return block(tokens)


def all_blocks(change):
    def made():
        model = Plainly().eval()
        model.blocks = nn.ModuleList(change(block) for block in model.blocks)
        return model.eval()

    return made


def inside(how):
    return all_blocks(lambda block: Inside(block, how))


def with_functions():
    model = Plainly()
    net = Net()
    model.blocks = nn.ModuleList(WithFunctions(net, layer) for layer in range(2))
    return model.eval()


class SwappedIn(nn.Module):
    """A model with plain tensors as its weights, which are not part of the explained module."""

    def __init__(self, kind=Plainly):
        super().__init__()
        model = kind().eval()
        self.run = [model]
        self.held = {name: one.detach().clone() for name, one in model.named_parameters()}

    def forward(self, images):
        return torch.func.functional_call(self.run[0], self.held, (images,))


def scripted_part(block):
    block.mlp = torch.jit.script(block.mlp)
    return block


FORMS = {
    "as it is": lambda: Plainly().eval(),
    "in training mode": lambda: Plainly().train(),
    "frozen parameters": lambda: frozen(Plainly().eval()),
    "traced": traced,
    "traced and frozen": lambda: torch.jit.freeze(traced()),
    "exported": lambda: torch.export.export(Plainly().eval(), (IMAGES,)).module(),
    "scripted": lambda: torch.jit.script(Plainly().eval()),
    "scripted and frozen": lambda: torch.jit.freeze(torch.jit.script(Plainly().eval())),
    "scripted blocks": all_blocks(torch.jit.script),
    "scripted MLPs": all_blocks(scripted_part),
    "made in inference mode": made_in_inference_mode,
    "no_grad inside": inside(without_gradients),
    "inference_mode inside": inside(in_inference_mode),
    "checkpoints": inside(lambda block, t: checkpoint(block, t, use_reentrant=False)),
    "reentrant checkpoints": inside(lambda block, t: checkpoint(block, t, use_reentrant=True)),
    "functions of one's own": with_functions,
    "detached": inside(lambda block, t: block(t).detach()),
    "weights swapped in": lambda: SwappedIn().eval(),
    "weights swapped in, patches cut by a reshape": lambda: SwappedIn(CutsPatches).eval(),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_a_model_changes_nothing(name):
    """Each form computes the plain network, and its maps are those of full matrices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FORMS[name]()
        logits, wanted = full_matrices(Net())
        with torch.no_grad():
            assert torch.allclose(model(IMAGES), logits, rtol=0, atol=1e-9)
        far = off(found_maps(model, FORMED), in_shares(wanted))
    assert max(far.values()) < 1e-6, far


def autocast_inside(kind):
    def run(block, tokens):
        with torch.autocast("cpu", kind):
            return block(tokens)

    return lambda: inside(run)().float()


def quantized():
    return torch.ao.quantization.quantize_dynamic(Plainly().eval().float(), {nn.Linear}, dtype=torch.qint8)


# The model, the dtype of its images, and the tolerance of the maps.
ROUGH = {
    "single": (lambda: Plainly().eval().float(), torch.float32, 1e-4),
    "bfloat16": (lambda: Plainly().eval().bfloat16(), torch.bfloat16, 0.1),
    "half": (lambda: Plainly().eval().half(), torch.half, 0.02),
    "autocast to bfloat16": (autocast_inside(torch.bfloat16), torch.float32, 0.1),
    "autocast to half": (autocast_inside(torch.half), torch.float32, 0.02),
    "whole numbers": (quantized, torch.float32, 0.15),
}


@pytest.mark.parametrize("name", ROUGH)
def test_rounding_changes_little(name):
    make, kind, tolerance = ROUGH[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
        _, wanted = full_matrices(Net())
        far = off(found_maps(model, FORMED, IMAGES.to(kind)), in_shares(wanted))
    assert max(far.values()) < tolerance, far


def test_autocast_around_the_call():
    with torch.autocast("cpu", torch.bfloat16):
        found = found_maps(Plainly().eval().float(), FORMED, IMAGES.float())
    _, wanted = full_matrices(Net())
    far = off(found, in_shares(wanted))
    assert max(far.values()) < 0.1, far
