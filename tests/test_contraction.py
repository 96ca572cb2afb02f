"""Sums of products, however they are written: laid out as matrices, compared with einsum, and laid back."""

import itertools

import pytest
import torch

from vitx.tape.axes import dimension, tokens
from vitx.tape.contraction import Layout, of_matmul, of_sum
from vitx.tape.values import Step, Value

T, H, Q, K, D = 2, 3, 4, 5, 6
SIZES = {"t": T, "h": H, "q": Q, "k": K, "d": D}
CHANNELS = "hd"


def random(letters):
    return torch.randn([SIZES[letter] for letter in letters], dtype=torch.float64)


def axes_of(letters):
    return tuple(dimension(SIZES[letter], letter in CHANNELS) for letter in letters)


def valued(tensor, axes=None):
    value = Value(0, tensor.shape)
    value.made_by = Step("", [], [value], None, axes=lambda of: axes)
    return tensor, value


def check(contraction, a, v, put_out, weights_first=True):
    """Compare with A as (t, h, q, k), values as (t, h, k, d), and the product in the layout of the model."""
    weights, values = contraction[:2] if weights_first else contraction[1::-1]
    layout = Layout.of(contraction, weights, values)
    assert layout.count("H") == a.shape[1]
    torch.testing.assert_close(layout.grouped(weights.tensor, "THQK"), a)
    torch.testing.assert_close(layout.grouped(values.tensor, "THKD"), v)
    torch.testing.assert_close(layout.grouped(put_out, "THQD"), a @ v)
    torch.testing.assert_close(layout.to_values(v), values.tensor)


@pytest.mark.parametrize("weights_first", [True, False])
def test_matmul(weights_first):
    """(..., q, k) times (..., k, d), or values^T A^T as in LeViT."""
    a, v = random("thqk"), random("thkd")
    if weights_first:
        check(of_matmul(valued(a), valued(v, axes_of("thkd"))), a, v, a @ v)
        return
    contraction = of_matmul(valued(v.mT, axes_of("thdk")), valued(a.mT))
    check(contraction, a, v, v.mT @ a.mT, weights_first=False)


@pytest.mark.parametrize(
    ("left", "right", "summed"),
    [
        ("qk", "k", "qk,k->q"),
        ("k", "k", "k,k->"),
        ("tqk", "tkd", "tqk,tkd->qd"),
        ("tqk", "tkd", "tqk,tkd->tqd"),
    ],
)
def test_products_with_vectors_and_over_the_batch(left, right, summed):
    a, b = random(left), random(right)
    wanted = torch.einsum(summed, a, b)
    over_batch = "t" in left and "t" not in summed.partition("->")[2]
    contraction = of_matmul(valued(a), valued(b), over_batch=over_batch)
    product = a.reshape(contraction.left.shape) * b.reshape(contraction.right.shape)
    torch.testing.assert_close(product.sum(contraction.summed), wanted)
    assert contraction.out == list(product.sum(contraction.summed, keepdim=True).shape)


def test_heads_folded_into_the_batch():
    a, v = random("thqk"), random("thkd")
    folded = a.flatten(0, 1), v.flatten(0, 1)
    inside = ((*tokens((T,))[0], *dimension(H, True)), *axes_of("kd"))
    check(of_matmul(valued(folded[0]), valued(folded[1], inside)), a, v, folded[0] @ folded[1])


def test_heads_before_windows_in_the_batch():
    a, v = random("thqk"), random("thkd")
    folded = [x.transpose(0, 1).flatten(0, 1) for x in (a, v)]
    inside = ((*dimension(H, True), *tokens((T,))[0]), *axes_of("kd"))
    check(of_matmul(valued(folded[0]), valued(folded[1], inside)), a, v, folded[0] @ folded[1])


@pytest.mark.parametrize("order", list(itertools.permutations("hqkd")))
def test_a_product_that_is_summed(order):
    """(a * v).sum(k), with the dimensions in any order, and size 1 for those that an operand lacks."""
    letters = "t" + "".join(order)
    a, v = random("thqk"), random("thkd")

    def wide(tensor, own):
        missing = [letter for letter in letters if letter not in own]
        found = tensor[(...,) + (None,) * len(missing)]
        return found.permute([(own + "".join(missing)).index(letter) for letter in letters])

    first, second = wide(a, "thqk"), wide(v, "thkd")
    put_out = (first * second).sum(letters.index("k"))
    inside = tuple(() if letter == "q" else axes_of(letter)[0] for letter in letters)
    contraction = of_sum([valued(first), valued(second, inside)], len(letters), [letters.index("k")])
    check(contraction, a, v, put_out)


def test_pooling():
    """(softmax(w) * t).sum(1) has one row and no heads."""
    w, t = random("tk"), random("tkd")
    put_out = (w[..., None] * t).sum(1)
    contraction = of_sum([valued(w[..., None]), valued(t, axes_of("tkd"))], t.ndim, [1])
    check(contraction, w[:, None, None], t[:, None], put_out)


def test_weights_that_all_images_share():
    """A fixed mixing matrix, (q, k), times (t, k, d)."""
    a, v = random("qk"), random("tkd")
    put_out = a @ v
    wide = a[None, :, :, None], v[:, None]
    inside = (*axes_of("t"), (), *axes_of("kd"))
    contraction = of_sum([valued(wide[0]), valued(wide[1], inside)], 4, [2])
    layout = Layout.of(contraction, contraction.left, contraction.right)
    rows, laid = layout.grouped(wide[0], "THQK"), layout.grouped(wide[1], "THKD")
    torch.testing.assert_close(rows @ laid, layout.grouped(put_out, "THQD"))
    torch.testing.assert_close(layout.to_values(laid), wide[1])


def test_keys_that_are_channels():
    """Mixing the channels of each token is not attention between tokens."""
    a, v = random("tqk"), random("tkd")
    among = (*tokens((T,)), dimension(K, True), *tokens((D,)))
    for inside, over_channels in ((among, True), (axes_of("tkd"), False)):
        contraction = of_matmul(valued(a), valued(v, inside))
        assert Layout.of(contraction, *contraction[:2]).over_channels == over_channels
