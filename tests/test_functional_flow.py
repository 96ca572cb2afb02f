"""Attention flow, compared with other solvers of maximum flow on graphs that are built edge by edge."""

import itertools
from fractions import Fraction

import networkx
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import functional as transforms

from tests import models, oracle
from vitx import VitxError, attention_flow, explain
from vitx.functional import flow, tiles


def mixed(layers, fusion="mean"):
    """Return rownorm(W + I), (N, N), for each layer, (H, N, N)."""
    summed = [oracle.fuse(layer.double(), fusion) + torch.eye(layer.shape[-1]) for layer in layers]
    return [(matrix / matrix.sum(1, keepdim=True)).numpy() for matrix in summed]


def edges_of(matrices, readout, sink):
    """Return (tail, head, capacity) for each edge of the whole graph."""
    depth, tokens = len(matrices), range(len(readout))
    edges = [("source", (depth, i), readout[i]) for i in tokens]
    for level, matrix in enumerate(matrices):
        for i, j in itertools.product(tokens, tokens):
            edges.append(((level + 1, i), (level, j), matrix[i][j]))
    return [(tail, "sink" if head == (0, sink) else head, capacity) for tail, head, capacity in edges]


def by_networkx(matrices, readout, sink, number=float):
    graph = networkx.DiGraph()
    for tail, head, capacity in edges_of(matrices, readout, sink):
        graph.add_edge(tail, head, capacity=number(capacity))
    return networkx.maximum_flow_value(graph, "source", "sink")


def by_smallest_cut(matrices, readout, sink):
    """Return the smallest cut, which is the largest flow: try every set of nodes on the source's side."""
    edges = [edge for edge in edges_of(matrices, readout, sink) if edge[1] == "sink" or edge[1][0] != 0]
    inner = sorted({node for edge in edges for node in edge[:2]} - {"source", "sink"})
    sides = np.array(list(itertools.product([False, True], repeat=len(inner))))
    side = {node: sides[:, k] for k, node in enumerate(inner)} | {
        "source": np.ones(len(sides), bool),
        "sink": np.zeros(len(sides), bool),
    }
    return sum(capacity * (side[tail] & ~side[head]) for tail, head, capacity in edges).min()


def random_layers(layers, tokens, sharpness=2.0, batch=1, heads=2):
    scores = sharpness * torch.randn(layers, batch, heads, tokens, tokens, dtype=torch.float64)
    return list(scores.softmax(-1))


def random_readouts(tokens):
    one_hot = torch.zeros(tokens, dtype=torch.float64)
    one_hot[0] = 1
    two = one_hot.clone()
    two[:2] = 0.5
    average = torch.full((tokens,), 1 / tokens, dtype=torch.float64)
    pooled = (2 * torch.randn(tokens, dtype=torch.float64)).softmax(0)
    return {"token": one_hot, "two": two, "average": average, "pooled": pooled, "large": 3 * pooled}


READOUTS = ["token", "two", "average", "pooled", "large"]


class TestByHand:
    def test_two_layers(self):
        """All attention is on token 1 in the first layer and on token 2 in the last."""
        first, last = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
        first[..., 1] = 1
        last[..., 2] = 1
        # The class token sends a half to itself and a half to token 2. Each of these passes on up to a half
        # to token 1 and up to a half to itself.
        assert attention_flow([first, last]).tolist() == [[0.5, 1, 0.5]]

    def test_one_layer(self):
        """Each token passes on its readout weight, or as much as the edge can carry."""
        layer = torch.tensor([[0.5, 0.5], [0.0, 1.0]])[None, None]  # M: .75 .25 / 0 1
        found = attention_flow([layer], readout=torch.tensor([0.4, 0.6]))
        assert torch.allclose(found, torch.tensor([[0.4, 0.85]]))

    def test_every_token_but_one_is_cut_off(self):
        assert attention_flow([torch.eye(3)[None, None]] * 4).tolist() == [[1, 0, 0]]

    def test_a_read_out_of_nothing(self):
        assert attention_flow([torch.eye(3)[None, None]], readout=torch.zeros(3)).tolist() == [[0, 0, 0]]


class TestAgainstOtherSolvers:
    @pytest.mark.parametrize("fusion", ["mean", "max", "min"])
    @pytest.mark.parametrize("readout", READOUTS)
    def test_networkx(self, readout, fusion):
        layers, weights = random_layers(3, 5), random_readouts(5)[readout]
        found = attention_flow(layers, head_fusion=fusion, readout=weights)
        matrices = mixed([layer[0] for layer in layers], fusion)
        wanted = [by_networkx(matrices, weights.tolist(), sink) for sink in range(5)]
        assert found.dtype == torch.float64
        assert found[0].tolist() == pytest.approx(wanted, abs=1e-8)

    @pytest.mark.parametrize("readout", READOUTS)
    @pytest.mark.parametrize(("depth", "tokens"), [(1, 4), (2, 4), (3, 3), (4, 3)])
    def test_every_cut(self, readout, depth, tokens):
        layers, weights = random_layers(depth, tokens), random_readouts(tokens)[readout]
        matrices = mixed([layer[0] for layer in layers])
        wanted = [by_smallest_cut(matrices, weights.tolist(), sink) for sink in range(tokens)]
        assert attention_flow(layers, readout=weights)[0].tolist() == pytest.approx(wanted, abs=1e-8)


class TestPrecision:
    @pytest.mark.parametrize("units", [2**5, 2**12, 2**30])
    def test_half_a_unit_for_each_edge(self, units, monkeypatch):
        """Compare with exact fractions. With coarse units, the error shows, and stays within its bound."""
        monkeypatch.setattr(flow, "_UNITS", units)
        matrices, readout = mixed([layer[0] for layer in random_layers(3, 4)]), random_readouts(4)["pooled"]
        found = flow.largest_flows(matrices, readout.numpy(), range(4))
        exact = [by_networkx(matrices, readout.tolist(), sink, Fraction) for sink in range(4)]
        errors = [abs(Fraction(value) - wanted) for value, wanted in zip(found, exact, strict=True)]
        edges = len(edges_of(matrices, readout, 0))
        assert 0 < max(errors) <= Fraction(edges, 2 * units)

    def test_sums_beyond_int32(self):
        """If the readout is far above 1, the limit is what the tokens can pass on, 64 in all."""
        layer = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
        layer[..., 0] = 1
        found = attention_flow([layer] * 2, readout=torch.full((64,), 1e6))
        wanted = torch.full((64,), 0.5, dtype=torch.float64)
        wanted[0] = 1 + 63 / 2
        assert torch.allclose(found[0], wanted)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_gives_float32(self, dtype):
        layers = [layer.to(dtype) for layer in random_layers(2, 5)]
        found = attention_flow(layers)
        assert found.dtype == torch.float32
        assert torch.equal(found, attention_flow([layer.float() for layer in layers]))


def count_graphs(monkeypatch):
    kept, build = [], flow._graph
    monkeypatch.setattr(flow, "_graph", lambda *args: kept.append(args[2]) or build(*args))
    return kept


class TestFewerEdges:
    @pytest.mark.parametrize("readout", READOUTS)
    @pytest.mark.parametrize("sharpness", [0.1, 2, 4])
    def test_the_values_are_those_of_the_whole_graph(self, sharpness, readout, monkeypatch):
        layers, weights = random_layers(6, 30, sharpness, batch=2), random_readouts(30)[readout]
        monkeypatch.setattr(flow, "_KEPT", ())
        whole = attention_flow(layers, readout=weights)
        for kept in ((2,), (4, 10)):
            monkeypatch.setattr(flow, "_KEPT", kept)
            assert torch.equal(attention_flow(layers, readout=weights), whole)
        matrices = [mixed([layer[image] for layer in layers]) for image in range(2)]
        bounds = torch.tensor(np.stack([m[0].sum(0) for m in matrices])).clamp(max=weights.sum().item())
        assert (whole <= bounds + 1e-7).all()

    def test_the_whole_graph_is_left_alone_where_it_is_not_needed(self, monkeypatch):
        monkeypatch.setattr(flow, "_KEPT", (4, 12))
        kept = count_graphs(monkeypatch)
        attention_flow(random_layers(8, 30, 2))
        assert kept
        assert 30 not in kept

    def test_it_is_used_where_it_is_needed(self, monkeypatch):
        kept = count_graphs(monkeypatch)
        attention_flow(random_layers(2, 20, 2))
        assert kept == [16, 20]


# Readouts of one token, of two, of all patches, and from attention pooling.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit", {}),
        ("deit", {"head_fusion": "max", "start_layer": 1}),
        ("distilled deit", {"head_fusion": "min"}),
        ("average pooling", {}),
        ("siglip", {"head_fusion": "max"}),
    ],
)
def test_explain_against_networkx(name, options):
    family, fusion = models.FAMILIES[name], options.get("head_fusion", "mean")
    images = family.images()
    found = explain(models.built(name), images, "flow", **options)
    seen = oracle.observe(models.built(name, torch.float64), images.double(), 0)
    layers = seen.attentions[options.get("start_layer", 0) :]
    assert found.target is None
    assert found.maps.shape == (2, *family.grid)
    for image in range(2):
        matrices = mixed([layer[image] for layer in layers], fusion)
        readout = oracle.readout_weights(
            family.readout, family.prefix, len(matrices[0]), seen.pooling, image, fusion
        )
        readout /= readout.sum()
        for patch in range(image, 16, 5):
            wanted = by_networkx(matrices, readout.tolist(), family.prefix + patch)
            assert found.maps[image].flatten()[patch].item() == pytest.approx(wanted, abs=2e-5)


def test_explain_is_attention_flow_of_the_patches():
    images = models.FAMILIES["deit"].images()
    seen = oracle.observe(models.built("deit", torch.float64), images.double(), 0)
    found = explain(models.built("deit", torch.float64), images.double(), "flow")
    assert torch.allclose(found.maps.flatten(1), attention_flow(seen.attentions)[:, 1:], atol=1e-7)


def test_tiles(monkeypatch):
    images = models.FAMILIES["deit"].images()
    whole = explain(models.built("deit without fused attention"), images, "flow")
    monkeypatch.setattr(tiles, "_room", lambda device: 200)
    monkeypatch.setattr(tiles, "_FEWEST_ROWS", 4)
    tiled = explain(models.built("deit without fused attention"), images, "flow")
    assert torch.allclose(tiled.maps, whole.maps, atol=1e-6)


def test_it_writes_nothing_where_there_is_no_terminal(capsys):
    attention_flow(random_layers(2, 5))
    assert capsys.readouterr() == ("", "")


def test_inputs_are_not_changed_and_need_no_gradient():
    layers = random_layers(2, 5)
    copies = [layer.clone() for layer in layers]
    layers[0].requires_grad_()
    assert not attention_flow(layers).requires_grad
    assert all(map(torch.equal, layers, copies))


class TestBadInput:
    SQUARE = torch.full((2, 3, 4, 4), 0.25)

    @pytest.mark.parametrize(
        ("attentions", "options", "sentence"),
        [
            ([], {}, "attentions is empty"),
            ([SQUARE, SQUARE[:1]], {}, r"found \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"),
            ([SQUARE], {"head_fusion": "median"}, "found 'median'"),
            ([SQUARE], {"readout": torch.ones(3)}, r"\(4,\) or \(2, 4\), found \(3,\)"),
            ([SQUARE], {"readout": torch.tensor([1, -0.5, 0, 0])}, "the read-out must be at least 0.*-0.5"),
            ([SQUARE, SQUARE - 0.5], {}, "the attention must be at least 0 to be a capacity.*found -0.25"),
        ],
    )
    def test_refused(self, attentions, options, sentence):
        with pytest.raises(VitxError, match=sentence):
            attention_flow(attentions, **options)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value):
        layer = self.SQUARE.clone()
        layer[1, 0, 2, 3] = value
        found = attention_flow([self.SQUARE, layer])
        assert found[0].isfinite().all()
        assert found[1].isnan().all()

    def test_explain_says_which_images(self):
        images = models.FAMILIES["deit"].images().clone()
        images[1, 0, 0, 0] = float("nan")
        with pytest.raises(VitxError, match=r"the flow maps of images \[1\] are not finite"):
            explain(models.built("deit"), images, "flow")

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"head_fusion": "median"}, "head_fusion must be one of mean, max, min, found 'median'"),
            ({"start_layer": 3}, "start_layer must be from 0 to 2"),
            (
                {"discard_ratio": 0.5},
                "flow has no option 'discard_ratio': its options are head_fusion, start",
            ),
        ],
    )
    def test_options(self, options, sentence):
        with pytest.raises(VitxError, match=sentence):
            explain(models.built("deit"), models.FAMILIES["deit"].images(), "flow", **options)


def test_real_weights(assets, monkeypatch):
    """At full size, the shortcut is exact, and most patches reach their bound."""
    model = timm.create_model("deit_tiny_patch16_224")
    model.load_state_dict(load_file(assets / "deit_tiny_patch16_224.safetensors"))
    picture = Image.open(sorted((assets / "imagenet-val").glob("*.JPEG"))[4]).convert("RGB")
    squashed = transforms.to_tensor(picture.resize((224, 224), Image.Resampling.BICUBIC))
    image = transforms.normalize(squashed, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None]
    matrices = mixed([layer[0] for layer in oracle.observe(model, image).attentions])
    readout, sinks = np.eye(197)[0], range(1, 197, 6)
    found = np.array(list(flow.largest_flows(matrices, readout, sinks)))
    monkeypatch.setattr(flow, "_KEPT", ())
    assert list(flow.largest_flows(matrices, readout, sinks)) == found.tolist()
    bounds = np.minimum(1, matrices[0].sum(0))[sinks]
    assert (found <= bounds + 1e-6).all()
    assert np.isclose(found, bounds, atol=1e-6).mean() > 0.9
