"""The model and the random number generators are restored, after success and after every kind of failure."""

import copy
import random
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from tests import models
from vitx import capture, explain
from vitx.errors import VitxError
from vitx.models.isolation import untouched

IMAGES = models.FAMILIES["deit"].images()
METHODS = ["rollout", "grad_rollout"]


class Boom(Exception):
    """An error that is raised on purpose."""


class Fragile(nn.Module):
    """A model with everything that could be left changed; it raises on demand."""

    def __init__(self):
        super().__init__()
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("absent", None)
        self.norm = nn.BatchNorm2d(3)
        self.vit = models.deit(drop_rate=0.1, drop_path_rate=0.1)
        self.raises = False

    def forward(self, images):
        self.written += 1
        self.replaced = self.replaced + 1
        noise = torch.rand(images.shape)
        logits = self.vit(self.norm(images) + 0.01 * noise)
        if self.raises:
            raise Boom
        return logits


def fragile():
    """Return a model that is half trained, half frozen in eval mode, with accumulated gradients."""
    model = Fragile().train()
    model.vit.patch_embed.requires_grad_(False).eval()
    model.vit.blocks[0].requires_grad_(False).eval()
    model.vit.blocks[2].attn.fused_attn = False
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and index % 2:
            parameter.grad = torch.randn_like(parameter)
    model.vit.blocks[1].register_forward_hook(lambda *_: None)
    model.vit.register_full_backward_hook(lambda *_: None)
    return model


def hooks(module):
    return {
        name: dict(value) for name, value in vars(module).items() if name.endswith(("_hooks", "_pre_hooks"))
    }


def state(model):
    """Return everything that must not change, by value and by identity."""
    return {
        "flags": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "parameters": [id(p) for p in model.parameters()],
        "parameter values": copy.deepcopy([p.detach() for p in model.parameters()]),
        "gradients": [id(p.grad) for p in model.parameters()],
        "gradient values": copy.deepcopy([p.grad for p in model.parameters()]),
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "buffer values": copy.deepcopy([b for _, b in model.named_buffers()]),
        "buffer slots": [dict.fromkeys(m._buffers) for m in model.modules()],
        "hooks": [hooks(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "fused": [getattr(module, "fused_attn", None) for module in model.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_same(before, after):
    for name, value in before.items():
        other = after[name]
        if name.endswith("values"):
            for first, second in zip(value, other, strict=True):
                assert (first is None) == (second is None), name
                assert first is None or torch.equal(first, second), name
        elif name == "rng":
            assert torch.equal(value, other)
        else:
            assert value == other, name


@contextmanager
def unchanged(model):
    """Assert that the model is in the end as it was at the beginning."""
    before = state(model)
    yield
    assert_same(before, state(model))


def raising(logits):
    raise Boom


@pytest.mark.parametrize("method", METHODS)
class TestExplain:
    def test_after_success(self, method):
        model = fragile()
        with unchanged(model):
            explain(model, IMAGES, method)

    def test_after_an_exception_in_the_forward_pass(self, method):
        model = fragile()
        model.raises = True
        with unchanged(model), pytest.raises(Boom):
            explain(model, IMAGES, method)

    def test_after_an_exception_in_a_layer(self, method):
        """Half of the model has run by then."""
        model = fragile()
        model.vit.blocks[1].register_forward_pre_hook(lambda *_: raising(None))
        with unchanged(model), pytest.raises(Boom):
            explain(model, IMAGES, method)

    def test_after_a_refusal(self, method):
        model = fragile()
        for wrong, sentence in (({"start_layer": 9}, "start_layer"), ({"target": 99}, "out of range")):
            with unchanged(model), pytest.raises(ValueError, match=sentence):
                explain(model, IMAGES, method, **wrong)

    def test_after_success_with_grads_that_are_none(self, method):
        model = models.deit().train()
        with unchanged(model):
            explain(model, IMAGES, method)
        assert all(p.grad is None for p in model.parameters())

    def test_overridden_train_and_eval(self, method):
        """The model keeps its backbone in eval mode by itself, and counts calls of `train`."""

        class Stubborn(nn.Module):
            def __init__(self):
                super().__init__()
                self.vit = models.deit()
                self.calls = 0

            def train(self, mode=True):
                self.calls += 1
                super().train(mode)
                self.vit.blocks.eval()
                return self

            def eval(self):
                raise Boom

            def forward(self, images):
                assert not any(module.training for module in self.modules())
                return self.vit(images)

        model = Stubborn().train()
        with unchanged(model):
            explain(model, IMAGES, method)
        assert model.calls == 1

    def test_random_numbers_go_on_as_if_nothing_happened(self, method):
        model = fragile()
        torch.manual_seed(3)
        wanted = torch.rand(4)
        torch.manual_seed(3)
        explain(model, IMAGES, method)
        assert torch.equal(torch.rand(4), wanted)

    def test_no_mode_is_left_on(self, method):
        model = fragile()
        model.raises = True
        with pytest.raises(Boom):
            explain(model, IMAGES, method)
        assert torch.overrides._len_torch_function_stack() == 0
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()

    def test_the_next_training_step_is_the_same(self, method):
        """It is equal to the last bit, with dropout, drop path and BatchNorm."""

        def step(model):
            torch.manual_seed(5)
            loss = model(IMAGES).square().mean()
            loss.backward()
            return [p.grad for p in model.parameters() if p.grad is not None]

        torch.manual_seed(1)
        explained = fragile()
        torch.manual_seed(1)
        plain = fragile()
        explain(explained, IMAGES, method)
        assert all(map(torch.equal, step(explained), step(plain)))

    def test_in_the_middle_of_a_step(self, method):
        """The model is explained between the forward and the backward pass of a loss."""
        model, other = models.deit(), models.deit()
        loss, wanted = model(IMAGES).square().mean(), other(IMAGES).square().mean()
        explain(model, IMAGES, method)
        loss.backward()
        wanted.backward()
        for first, second in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(first.grad, second.grad)


def test_after_an_exception_in_a_target():
    model = fragile()
    with unchanged(model), pytest.raises(VitxError, match="Boom"):
        explain(model, IMAGES, "grad_rollout", target=raising)


def test_a_target_that_draws_random_numbers():
    model = fragile()
    with unchanged(model):
        explain(model, IMAGES, "grad_rollout", target=lambda logits: logits[:, 0] * torch.rand(2))


def test_nothing_keeps_the_graph_alive():
    """The result holds no tensor that keeps the graph of autograd alive."""
    found = explain(models.built("deit"), IMAGES, "grad_rollout")
    assert found.maps.grad_fn is None
    assert found.logits.grad_fn is None


def test_capture_leaves_the_model_as_it_was():
    model = models.deit().train()
    model.register_forward_hook(lambda *_: raising(None))
    with unchanged(model), pytest.raises(Boom), capture(model, gradients=True):
        model(IMAGES)
    assert torch.overrides._len_torch_function_stack() == 0


class TestUntouched:
    def test_no_parameter_requires_a_gradient_inside(self):
        model = fragile()
        before = [p.requires_grad for p in model.parameters()]
        with untouched(model):
            assert not any(p.requires_grad for p in model.parameters())
        assert [p.requires_grad for p in model.parameters()] == before
        assert 0 < sum(before) < len(before)

    def test_eval_mode_inside(self):
        model = fragile()
        with untouched(model):
            assert not any(module.training for module in model.modules())
        assert model.training

    def test_a_buffer_that_becomes_none(self):
        model = fragile()
        with unchanged(model), untouched(model):
            model.written = None

    def test_a_buffer_that_was_none(self):
        model = fragile()
        with untouched(model):
            model.absent = torch.ones(2)
        assert model.absent is None

    def test_a_buffer_that_is_new(self):
        """For example, a model may cache its position table in the first pass."""
        model = fragile()
        with untouched(model):
            model.register_buffer("cache", torch.ones(2))
        assert "cache" not in model._buffers

    def test_batch_norm_statistics(self):
        model = nn.BatchNorm1d(3)
        with untouched(model):
            model.train()
            model(torch.randn(8, 3) + 5)
        assert torch.equal(model.running_mean, torch.zeros(3))
        assert model.num_batches_tracked == 0

    def test_a_model_without_tensors(self):
        before = torch.get_rng_state()
        with untouched(nn.Identity()):
            torch.rand(3)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        "buffer",
        [
            torch.eye(3).to_sparse(),
            torch.eye(3).to_sparse_csr(),
            torch.eye(3).to_mkldnn(),
            torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
            torch.empty(3, device="meta"),
            nn.UninitializedBuffer(),
        ],
        ids=["coo", "csr", "mkldnn", "nested", "meta", "lazy"],
    )
    def test_a_buffer_that_cannot_be_compared(self, buffer):
        model = nn.Module()
        model.register_buffer("buffer", buffer)
        with untouched(model):
            pass
        assert model.buffer is buffer

    def test_a_buffer_that_grows(self):
        model = fragile()
        with unchanged(model), untouched(model):
            model.written.resize_(5).fill_(1)

    def test_a_buffer_with_nan_is_not_written_into(self):
        """A graph that saved it could no longer go backward."""
        model = nn.Module()
        model.register_buffer("buffer", torch.tensor([1.0, torch.nan]))
        version = model.buffer._version
        with untouched(model):
            pass
        assert model.buffer._version == version

    @pytest.mark.filterwarnings("ignore:`torch.jit")
    @pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2, 3))])
    def test_the_buffers_of_compiled_code(self, compiled):
        model = compiled(nn.BatchNorm1d(3).eval())
        with untouched(model):
            model.running_mean += 1
        assert torch.equal(model.running_mean, torch.zeros(3))

    def test_a_layer_without_weights_yet(self):
        with untouched(nn.LazyLinear(3)):
            pass

    def test_generators_outside_of_torch(self):
        random.seed(3)
        np.random.seed(3)
        wanted = random.random(), np.random.rand()
        random.seed(3)
        np.random.seed(3)
        with untouched(nn.Identity()):
            random.random()
            np.random.rand()
        assert (random.random(), np.random.rand()) == wanted

    def test_one_thread_at_a_time(self):
        """Otherwise, the flags that one thread has set would count as the model's own in another one."""
        model = nn.Dropout()
        inside, seen = threading.Event(), []

        def other():
            with untouched(model):
                seen.append(inside.is_set())

        with untouched(model):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join(0.1)
            inside.set()
        thread.join()
        assert seen == [True]
        assert model.training
