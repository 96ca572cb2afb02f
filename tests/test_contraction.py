"""Products that are summed, however they are written: laid out as matrices, against einsum, and back."""

import itertools

import pytest
import torch

from vitx.tape.axes import dimension, tokens
from vitx.tape.contraction import Layout, of_matmul, of_sum
from vitx.tape.values import Value

T, H, Q, K, D = 2, 3, 4, 5, 6
SIZES = {"t": T, "h": H, "q": Q, "k": K, "d": D}
CHANNELS = "hd"


def random(letters):
    return torch.randn([SIZES[letter] for letter in letters], dtype=torch.float64)


def axes_of(letters):
    return tuple(dimension(SIZES[letter], letter in CHANNELS) for letter in letters)


def valued(tensor):
    return tensor, Value(0, tensor.shape)


def check(contraction, pair, value_axes, a, v, put_out, weights_first=True):
    """Compares with A as (t, h, q, k), values as (t, h, k, d), and the product as the model has it."""
    operands = [(contraction.left, pair[0]), (contraction.right, pair[1])]
    (weights, as_a), (values, as_v) = operands if weights_first else operands[::-1]
    layout = Layout.of(contraction, weights, values, value_axes)
    assert layout.heads == a.shape[1]
    laid = layout.weights(weights.aligned(as_a)), layout.values(values.aligned(as_v)), layout.outputs(put_out)
    torch.testing.assert_close(laid[0], a)
    torch.testing.assert_close(laid[1], v)
    torch.testing.assert_close(laid[2], a @ v)
    torch.testing.assert_close(layout.of_values(laid[1], values), as_v)


@pytest.mark.parametrize("weights_first", [True, False])
def test_matmul(weights_first):
    """(..., q, k) times (..., k, d); or values^T A^T, as of LeViT."""
    a, v = random("thqk"), random("thkd")
    if weights_first:
        contraction = of_matmul(valued(a), valued(v), (T, H, Q, D))
        check(contraction, (a, v), axes_of("thkd"), a, v, a @ v)
        return
    contraction = of_matmul(valued(v.mT), valued(a.mT), (T, H, D, Q))
    check(contraction, (v.mT, a.mT), axes_of("thdk"), a, v, v.mT @ a.mT, weights_first=False)


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
    contraction = of_matmul(valued(a), valued(b), wanted.shape, over_batch=over_batch)
    product = contraction.left.aligned(a) * contraction.right.aligned(b)
    torch.testing.assert_close(product.sum(contraction.summed), wanted)
    assert contraction.aligned_out == list(product.sum(contraction.summed, keepdim=True).shape)
    for operand, tensor in ((contraction.left, a), (contraction.right, b)):
        assert [operand.shape[place] for place in operand.places] == list(tensor.shape)


def test_heads_folded_into_the_batch():
    a, v = random("thqk"), random("thkd")
    folded = a.flatten(0, 1), v.flatten(0, 1)
    contraction = of_matmul(*map(valued, folded), (T * H, Q, D))
    inside = ((*tokens((T,))[0], *dimension(H, True)), *axes_of("kd"))
    check(contraction, folded, inside, a, v, folded[0] @ folded[1])


def test_heads_before_windows_in_the_batch():
    a, v = random("thqk"), random("thkd")
    folded = [x.transpose(0, 1).flatten(0, 1) for x in (a, v)]
    contraction = of_matmul(*map(valued, folded), (H * T, Q, D))
    inside = ((*dimension(H, True), *tokens((T,))[0]), *axes_of("kd"))
    check(contraction, folded, inside, a, v, folded[0] @ folded[1])


@pytest.mark.parametrize("order", list(itertools.permutations("hqkd")))
def test_a_product_that_is_summed(order):
    """(a * v).sum(k), with dimensions in any order, size 1 where an operand has none."""
    letters = "t" + "".join(order)
    a, v = random("thqk"), random("thkd")

    def wide(tensor, own):
        missing = [letter for letter in letters if letter not in own]
        found = tensor[(...,) + (None,) * len(missing)]
        return found.permute([(own + "".join(missing)).index(letter) for letter in letters])

    first, second = wide(a, "thqk"), wide(v, "thkd")
    put_out = (first * second).sum(letters.index("k"))
    shape = [SIZES[letter] for letter in letters]
    contraction = of_sum([valued(first), valued(second)], shape, [letters.index("k")], put_out.shape)
    inside = tuple(() if letter == "q" else axes_of(letter)[0] for letter in letters)
    check(contraction, (first, second), inside, a, v, put_out)


def test_pooling():
    """(softmax(w) * t).sum(1): one row, and no head."""
    w, t = random("tk"), random("tkd")
    put_out = (w[..., None] * t).sum(1)
    contraction = of_sum([valued(w[..., None]), valued(t)], t.shape, [1], put_out.shape)
    check(contraction, (w[..., None], t), axes_of("tkd"), w[:, None, None], t[:, None], put_out)


def test_weights_that_all_images_share():
    """A fixed mixing matrix, (q, k), times (t, k, d)."""
    a, v = random("qk"), random("tkd")
    put_out = a @ v
    wide = a[None, :, :, None], v[:, None]
    contraction = of_sum([valued(part) for part in wide], (T, Q, K, D), [2], put_out.shape)
    layout = Layout.of(contraction, contraction.left, contraction.right, (*axes_of("t"), (), *axes_of("kd")))
    rows = layout.weights(contraction.left.aligned(wide[0]))
    laid = layout.values(contraction.right.aligned(wide[1]))
    torch.testing.assert_close(rows @ laid, layout.outputs(put_out))
    torch.testing.assert_close(layout.of_values(laid, contraction.right), wide[1])


def test_keys_that_are_channels():
    """What mixes the channels of each token is no attention between tokens."""
    a, v = random("tqk"), random("tkd")
    contraction = of_matmul(valued(a), valued(v), (T, Q, D))
    among = (*tokens((T,)), dimension(K, True), *tokens((D,)))
    assert Layout.of(contraction, contraction.left, contraction.right, among).over_channels
    assert not Layout.of(contraction, contraction.left, contraction.right, axes_of("tkd")).over_channels
