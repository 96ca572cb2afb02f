"""Maps do not depend on how a model runs: modes of autograd, precision, wrappers, compilation."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from tests import models
from tests.modules import Around
from tests.oracle import same
from vitx import VitxError, explain

METHODS = ["rollout", "grad_rollout"]
IMAGES = models.FAMILIES["deit"].images()


def reference(method):
    return explain(models.built("deit"), IMAGES, method, target=2)


@pytest.mark.parametrize("method", METHODS)
class TestSettings:
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_under_gradient_modes(self, method, context):
        with context():
            images = IMAGES.clone()
            found = explain(models.built("deit"), images, method, target=2)
            assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
            assert torch.is_grad_enabled() == (context is torch.enable_grad)
        assert not found.maps.is_inference()
        assert same(found, reference(method), 1e-7)

    def test_a_model_made_in_inference_mode(self, method):
        """Its weights are inference tensors, which autograd refuses to save."""
        with torch.inference_mode():
            model = models.deit().eval()
        assert same(explain(model, IMAGES, method, target=2), reference(method), 1e-6)

    @pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
    def test_no_gradient_inside(self, method, inside):
        def without(vit, images):
            with inside():
                return vit(images).detach()

        assert same(
            explain(Around(without, models.built("deit")), IMAGES, method, target=2), reference(method), 1e-6
        )

    @pytest.mark.parametrize("frozen", [False, True])
    def test_traced(self, method, frozen):
        model = models.deit().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, IMAGES, check_trace=False)
            traced = torch.jit.freeze(traced) if frozen else traced
        for _ in range(3):
            assert same(explain(traced, IMAGES, method, target=2), reference(method), 1e-6)

    def test_exported(self, method):
        exported = torch.export.export(models.deit().eval(), (IMAGES,)).module()
        assert same(explain(exported, IMAGES, method, target=2), reference(method), 1e-6)

    @pytest.mark.parametrize("name", ["deit", "deit without fused attention", "torchvision", "hf vit, eager"])
    def test_under_autocast(self, method, name):
        model, images = models.built(name), models.FAMILIES[name].images()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = explain(model, images, method, target=2)
            assert torch.is_autocast_enabled("cpu")
        assert found.maps.dtype == torch.float32
        assert same(found, explain(model, images, method, target=2), 0.2)

    def test_the_maths_is_not_autocast(self, method):
        """The model leaves autocast, so that only vitx's own products could run in bf16."""

        def precisely(vit, images):
            with torch.autocast("cpu", enabled=False):
                return vit(images)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = explain(Around(precisely, models.built("deit")), IMAGES, method, target=2)
        assert same(found, reference(method), 1e-6)

    @pytest.mark.parametrize("name", ["deit", "deit without fused attention", "torchvision", "hf vit, eager"])
    def test_bf16_model(self, method, name):
        model, images = models.FAMILIES[name].build().bfloat16(), models.FAMILIES[name].images()
        found = explain(model, images.bfloat16(), method, target=2)
        assert found.maps.dtype == found.logits.dtype == torch.float32
        assert same(found, explain(models.built(name), images, method, target=2), 0.2)

    @pytest.mark.parametrize("name", ["deit", "deit without fused attention", "torchvision", "hf vit, eager"])
    @pytest.mark.parametrize("head_too", [False, True])
    def test_frozen(self, method, name, head_too):
        model = models.FAMILIES[name].build().requires_grad_(False)
        if not head_too:
            list(model.children())[-1].requires_grad_(True)
        images = models.FAMILIES[name].images()
        found = explain(model, images, method, target=2)
        # Without gradients, PyTorch may choose another kernel, which rounds differently.
        assert same(found, explain(models.built(name), images, method, target=2), 1e-5)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_activation_checkpointing(self, method, frozen):
        model = models.checkpointed(models.deit()).train()
        model.requires_grad_(not frozen)
        assert same(explain(model, IMAGES, method, target=2), reference(method), 1e-5)

    def test_partly_frozen_activation_checkpointing(self, method):
        """The first blocks need no gradient; the others do."""
        model = models.checkpointed(models.deit())
        model.requires_grad_(False)
        model.blocks[2].requires_grad_(True)
        assert same(explain(model, IMAGES, method, target=2), reference(method), 1e-5)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_reentrant_checkpointing(self, method, frozen):
        def run(block, tokens):
            return checkpoint(block, tokens, use_reentrant=True)

        model = models.deit().requires_grad_(not frozen)
        model.blocks = nn.Sequential(*[Around(run, block) for block in model.blocks])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert same(explain(model, IMAGES, method, target=2), reference(method), 1e-6)

    @pytest.mark.parametrize("wrap", ["attribute", "sequential", "data parallel"])
    def test_wrapped(self, method, wrap):
        class Task(nn.Module):
            """A wrapper that is written like a LightningModule."""

            def __init__(self):
                super().__init__()
                self.model = models.built("deit")
                self.loss = nn.CrossEntropyLoss()

            def forward(self, images):
                return self.model(images)

        built = models.built("deit")
        wrapped = {
            "attribute": Task,
            "sequential": lambda: nn.Sequential(nn.Identity(), built),
            "data parallel": lambda: nn.DataParallel(built),
        }[wrap]()
        assert same(explain(wrapped, IMAGES, method, target=2), reference(method), 1e-7)


@pytest.mark.parametrize("run_before", [False, True], ids=["fresh", "already run"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("form", ["torch.compile", "model.compile"])
def test_compiled(form, backend, run_before):
    torch._dynamo.reset()
    model = models.deit().eval()
    if form == "torch.compile":
        model = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    if run_before:
        with torch.no_grad():
            model(IMAGES)
    for method in METHODS:
        assert same(explain(model, IMAGES, method, target=2), reference(method))
    if run_before:
        # It is still compiled: no new graph is made for the same input.
        torch._dynamo.utils.counters.clear()
        with torch.no_grad():
            model(IMAGES)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "gae"])
@pytest.mark.parametrize("build", [models.deit, models.swin, models.FAMILIES["siglip"].build])
def test_another_default_device(build, method):
    """What vitx creates lies with the model, or on the CPU, not where factories of torch put tensors."""
    model, images = build().eval(), torch.rand(2, 3, 32, 32)
    wanted = explain(model, images, method, target=0).maps
    with torch.device("meta"):
        assert torch.equal(explain(model, images, method, target=0).maps, wanted)


class OneByOne(nn.Module):
    """A model that runs its images one after another."""

    def __init__(self):
        super().__init__()
        self.model = models.built("deit")

    def forward(self, images):
        return torch.cat([self.model(image[None]) for image in images])


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "gae", "evidence"])
def test_layers_of_images_that_run_one_by_one_are_numbered_alike(method):
    maps = [
        explain(m, IMAGES, method, target=2, start_layer=1).maps for m in (models.built("deit"), OneByOne())
    ]
    assert torch.allclose(*maps, rtol=0, atol=1e-6)
    with pytest.raises(VitxError, match="the model has 3 layers"):
        explain(OneByOne(), IMAGES, method, target=2, start_layer=3)


class GivenWeights(nn.Module):
    """A model whose weights are swapped in for each pass, and that does not hold them itself."""

    def __init__(self, model):
        super().__init__()
        self.skeleton = [model]
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def forward(self, images):
        return functional_call(self.skeleton[0], self.weights, (images,))


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "gae", "evidence"])
@pytest.mark.parametrize("build", [models.deit, models.swin])
def test_weights_that_are_swapped_in(build, method):
    """They count as learned where they contract channels, as in the layer that merges patches."""
    model, images = build().eval(), torch.rand(2, 3, 32, 32)
    maps = [explain(one, images, method, target=2).maps for one in (model, GivenWeights(model))]
    assert torch.allclose(*maps, rtol=0, atol=1e-5)


def test_a_batch_of_weights():
    """An ensemble runs by vmap over stacked weights."""
    members = [models.deit().eval() for _ in range(2)]
    stacked = {
        name: torch.stack([dict(m.named_parameters())[name] for m in members])
        for name, _ in members[0].named_parameters()
    }

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.member = members[0]

        def forward(self, images):
            run = torch.vmap(lambda weights: functional_call(self.member, weights, (images,)))
            return run(stacked).mean(0)

    class Plain(nn.Module):
        def forward(self, images):
            return (members[0](images) + members[1](images)) / 2

    maps = [explain(one, IMAGES, "rollout", target=2).maps for one in (Plain(), Ensemble().eval())]
    assert torch.allclose(*maps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_with_views_of_the_output_of_the_kernel(method):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 24, 8, 8), nn.Linear(24, 5)
            self.attention = nn.MultiheadAttention(24, 3, batch_first=True)

        def forward(self, images):
            x = self.embed(images).flatten(2).mT
            return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))

    model = Net().eval()
    with torch.no_grad():
        graph = make_fx(model)(IMAGES)
    maps = [explain(one, IMAGES, method, target=2).maps for one in (model, graph)]
    assert torch.allclose(*maps, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gradient", ["linearised", "plain"])
def test_a_table_that_a_traced_program_holds(gradient, frozen):
    """No value leaves torch, though torch asks the modes of Python when TorchScript calls."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = models.deit()

        def forward(self, images):
            table = 1 + torch.arange(self.vit.embed_dim) / self.vit.embed_dim
            x = self.vit.forward_features(images)
            return self.vit.forward_head(x * table)

    model = Net().eval()
    traced = torch.jit.trace(model, IMAGES)
    traced = torch.jit.freeze(traced) if frozen else traced
    maps = [explain(one, IMAGES, "grad_rollout", target=2, gradient=gradient).maps for one in (model, traced)]
    assert torch.allclose(*maps, rtol=0, atol=1e-6)
