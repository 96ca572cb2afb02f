"""Relevance follows the forward pass of models of all kinds; calls without a rule are named."""

import itertools
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from tests import models, oracle
from vitx import VitxError, capture, explain, explain_methods

IMAGES = models.FAMILIES["deit"].images(dtype=torch.float64)
WIDTH, HEADS, DEPTH = 48, 3, 3
WIDTHS, HEADS_EACH = (24, 48, 96, 192), (1, 2, 4, 8)  # of four stages


def carried(name, **options):
    """Return a timm model with random weights and 7 classes."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=models.CLASSES, **options)


def hugging_face(name, full=False):
    transformers = pytest.importorskip("transformers")
    small = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
    options = {"num_labels": models.CLASSES} | ({} if full else {"image_size": 64, **small})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForImageClassification")(
        getattr(transformers, f"{name}Config")(**options)
    )


def torchvision_swin():
    from torchvision.models import SwinTransformer

    torch.manual_seed(0)
    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=models.CLASSES)


# Models with what a plain Vision Transformer lacks: windows, shifts, merging, pooling, stems, branches,
# parallel attentions.
KINDS = {
    "Swin": (models.swin, 32, (16, 16)),
    "Swin-V2": (
        lambda: models.spread(
            carried("swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=24, num_heads=HEADS_EACH)
        ),
        64,
        (16, 16),
    ),
    "Hiera": (
        lambda: models.spread(carried("hiera_tiny_224", img_size=64, embed_dim=24, stages=(1, 2, 3, 2))),
        64,
        (16, 16),
    ),
    "SAM": (lambda: models.timm_model("samvit_base_patch16"), 32, (4, 4)),
    "PiT": (lambda: carried("pit_ti_224", img_size=64), 64, None),
    "PVT-v2": (lambda: carried("pvt_v2_b0"), 64, (16, 16)),
    "CaiT": (lambda: carried("cait_xxs24_224", img_size=32, patch_size=8, depth=3), 32, (4, 4)),
    "Twins": (
        lambda: carried("twins_svt_small", embed_dims=WIDTHS, num_heads=HEADS_EACH, depths=(2, 2, 2, 2)),
        64,
        (16, 16),
    ),
    "LeViT": (lambda: carried("levit_128s"), 224, (14, 14)),
    "MobileViT": (lambda: carried("mobilevit_xxs"), 64, None),
    "EfficientFormer": (
        lambda: carried("efficientformer_l1", embed_dims=WIDTHS, depths=(1, 1, 1, 3), num_vit=1),
        224,
        None,
    ),
    "ConViT": (
        lambda: carried("convit_tiny", img_size=64, depth=4, local_up_to_layer=3),
        64,
        (4, 4),
    ),
    "attentions side by side": (lambda: models.timm_model("vit_small_patch16_18x2_224"), 32, (4, 4)),
    "attention beside MLP": (
        lambda: carried("vit_tiny_patch16_224", img_size=32, patch_size=8, block_fn=parallel()),
        32,
        (4, 4),
    ),
    "DaViT": (
        lambda: carried("davit_tiny", embed_dims=WIDTHS, num_heads=HEADS_EACH, depths=(1, 1, 2, 1)),
        64,
        (16, 16),
    ),
    "EdgeNeXt": (lambda: carried("edgenext_xx_small"), 64, (16, 16)),
    "hf Swin": (lambda: hugging_face("Swin"), 64, (16, 16)),
    "hf Swin-V2": (lambda: hugging_face("Swinv2"), 64, (16, 16)),
    "hf SegFormer": (lambda: hugging_face("Segformer", full=True), 64, (16, 16)),
    "hf PVT-v2": (lambda: hugging_face("PvtV2", full=True), 64, (16, 16)),
    "torchvision Swin": (torchvision_swin, 64, (16, 16)),
    "differential attention": (lambda: models.timm_model("vit_dlittle_patch16_reg1_gap_256"), 32, (4, 4)),
    "BoTNet": (lambda: carried("botnet26t_256", img_size=128), 128, (8, 8)),
    "XCiT": (lambda: carried("xcit_nano_12_p16_224", embed_dim=48, depth=3, num_heads=3), 64, (4, 4)),
    "VOLO": (lambda: carried("volo_d1_224", img_size=64), 64, (8, 8)),
    "GC-ViT": (lambda: carried("gcvit_xxtiny", img_size=64), 64, (16, 16)),
}


def parallel():
    return timm.models.vision_transformer.ParallelScalingBlock


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_accounts_for_all_relevance(kind):
    build, size, grid = KINDS[kind]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    model, asked = build().eval(), {method: {} for method in ("grad_rollout", "gae", "evidence")}
    explanations = {"rollout": explain(model, images), **explain_methods(model, images, asked)}
    for method, found in explanations.items():
        assert (found.conservation - 1).abs().max() < 1e-3, method
        assert grid is None or tuple(found.maps.shape[1:]) == grid, method
        assert (found.maps.flatten(1).std(1) > 0).all(), method
    maps = explanations["rollout"].maps
    assert maps.min() >= -1e-6
    assert (maps.sum((1, 2)) <= 1 + 1e-3).all()


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


def wanted(method, **options):
    """Return the map of the plain model, computed from full matrices."""
    plain = vit("einsum with an ellipsis")
    seen = oracle.observe(plain, IMAGES)
    return oracle.maps_of(seen, method, 1, "token", **options)


@pytest.mark.parametrize("method", ["rollout", "grad_rollout"])
@pytest.mark.parametrize(
    "how",
    [
        *("fused", "einsum of a list", "einsum with an ellipsis", "einsum, values first"),
        "einsum, channels by two letters",
        *("bmm, heads in the batch", "baddbmm", "fused, heads in the batch", "fused, a window dimension"),
        *("out= and a buffer", "a softmax by hand", "a copy of A is kept, and one beside"),
    ],
)
def test_attention_however_it_is_written(how, method):
    for options in ({}, {"fusion": "max", "discard": 0.4}):
        named = {{"fusion": "head_fusion", "discard": "discard_ratio"}[k]: v for k, v in options.items()}
        found = explain(vit(how), IMAGES, method, **named)
        assert oracle.relative_error(found.maps, wanted(method, **options)) < 1e-9


def pooled_by_softmax(tokens):
    """Pool tokens as CCT does, with one weight for each token and no dimension of heads."""
    return torch.einsum("bn,bnd->bd", tokens.mean(2).softmax(1), tokens)


READS = {
    "token": (lambda tokens: tokens[:, 0], "token"),
    "the first of a cumulative sum": (lambda tokens: tokens.cumsum(1)[:, 0], "token"),
    "the last of a cumulative sum": (lambda tokens: tokens.cumsum(1)[:, -1], "all"),
    "patches": (lambda tokens: tokens[:, 1:].mean(1), "patches"),
    "all": (lambda tokens: tokens.mean(1), "all"),
    "sum of a stack": (
        lambda tokens: torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)]).sum(0),
        "token+patches",
    ),
    "sequences of one length": (
        lambda tokens: nn.utils.rnn.pad_sequence(list(tokens[:, 1:]), batch_first=True).mean(1),
        "patches",
    ),
}


@pytest.mark.parametrize("method", ["rollout", "grad_rollout"])
@pytest.mark.parametrize("name", READS)
def test_what_the_head_reads_is_seen(name, method):
    read, kind = READS[name]
    model = vit(read=read)
    slow = vit("einsum with an ellipsis", read)
    maps = oracle.maps_of(oracle.observe(slow, IMAGES), method, 1, kind)
    assert oracle.relative_error(explain(model, IMAGES, method).maps, maps) < 1e-9


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "gae", "evidence"])
def test_a_path_that_autograd_does_not_see_is_followed(method):
    found = explain(vit(read=lambda tokens: tokens.detach()[:, 0]), IMAGES, method, target=1)
    assert oracle.same(found, explain(vit(), IMAGES, method, target=1), 1e-9)


class Around(nn.Module):
    """A model between a function of the images and a function of the logits."""

    def __init__(self, before=lambda x: x, after=lambda x: x, inner=None):
        super().__init__()
        self.inner, self.before, self.after = inner or vit(), before, after

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


def test_a_softmax_over_tokens_pools_them():
    found = explain(vit(read=pooled_by_softmax), IMAGES)
    model = vit("einsum with an ellipsis")
    seen, tokens = oracle.observe(model, IMAGES), model.tokens(IMAGES)
    for image in range(2):
        layers = [oracle.fuse(a[image], "mean") for a in seen.attentions]
        row = (tokens[image].mean(1).softmax(0) @ oracle.rollout(layers)).detach()
        assert (found.maps[image].flatten() - row[1:]).abs().max() < 1e-9 * row.max()


def test_patches_that_overlap_are_cut_out_again():
    """The image is unfolded with padding and folded back, as T2T and VOLO do."""

    def around(x):
        patches = F.unfold(x, 3, padding=1, stride=1)
        return F.fold(patches, x.shape[2:], 3, padding=1) / 9

    found = explain(Around(around), IMAGES)
    assert torch.allclose(found.conservation, torch.ones(2, dtype=torch.float64))
    plain = explain(vit(), around(IMAGES)).maps
    assert torch.corrcoef(torch.stack([found.maps.flatten(), plain.flatten()]))[0, 1] > 0.9


def test_a_picture_that_is_turned_on_the_way_comes_out_right():
    turned = explain(Around(lambda x: x.transpose(2, 3).flip(3)), IMAGES).maps
    plain = explain(vit(), IMAGES.transpose(2, 3).flip(3)).maps
    assert torch.allclose(turned, plain.flip(2).transpose(1, 2), rtol=1e-9)


def test_padding_inside_the_model_moves_nothing():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit()

        def forward(self, x):
            return self.inner(F.pad(x, (8, 0, 8, 0)))

    small = IMAGES[:, :, 8:, 8:]
    found = explain(Padded(), small)
    plain = explain(vit(), F.pad(small, (8, 0, 8, 0))).maps[:, 1:, 1:]
    assert torch.allclose(found.maps, plain, rtol=1e-9)
    assert torch.allclose(found.conservation, torch.ones(2, dtype=torch.float64))


def test_two_models_share_what_is_read():
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = vit(), vit(read=lambda tokens: tokens.mean(1))

        def forward(self, x):
            with torch.no_grad():
                self.teacher = self.other(x.flip(3))
            return self.one(x) + self.other(x)

    model = Ensemble()
    half = (explain(model.one, IMAGES).maps + explain(model.other, IMAGES).maps) / 2
    assert torch.allclose(explain(model, IMAGES).maps, half, rtol=1e-9)


def test_crops_of_an_image_are_added():
    class Crops(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit()

        def forward(self, x):
            return self.inner(torch.cat([x, x.flip(3)])).view(2, len(x), -1).mean(0)

    found = explain(Crops(), IMAGES)
    flipped = explain(vit(), IMAGES.flip(3)).maps.flip(2)
    assert torch.allclose(found.maps, (explain(vit(), IMAGES).maps + flipped) / 2, rtol=1e-9)


class Foreign(torch.autograd.Function):
    """A function that leaves torch for NumPy."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(np.tanh(x.detach().numpy()))

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def residual(tokens, change):
    return tokens + change


BREAKS = {
    "whole numbers": (lambda x: residual(x, (8 * x).to(torch.int8).double()), "reached to"),
    "a spectrum": (lambda x: residual(x, torch.fft.fft(x).real), "reached real|reached fft"),
    "an unknown function": (lambda x: torch.linalg.qr(x.mT).Q.mT, "reached linalg_qr"),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8).dequantize().double(),
        "reached dequantize",
    ),
    "a function of one's own": (Foreign.apply, "does not come from the image|reached"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_no_rule_covers_is_said_by_name(name):
    call, sentence = BREAKS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(VitxError, match=sentence) as error:
            explain(vit(read=lambda tokens: call(tokens)[:, 0]), IMAGES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["grad_rollout", "gae"])
def test_what_torch_cannot_differentiate_is_said_by_name(method):
    """The linearized network needs no derivative of such a call; only the plain one does."""
    model = vit(read=lambda tokens: torch.special.bessel_j0(tokens)[:, 0])
    assert explain(model, IMAGES, method).maps.sum() > 0
    with pytest.raises(VitxError, match="the gradient reached special_bessel_j0, which torch cannot diff"):
        explain(model, IMAGES, method, gradient="plain")


@pytest.mark.parametrize("method", ["rollout", "grad_rollout"])
def test_what_torch_does_not_show_is_no_constant(method):
    """Next to a recorded path, it would otherwise pass for a constant of the model."""
    model = vit(read=lambda tokens: tokens[:, 0] + Foreign.apply(tokens)[:, 0])
    with pytest.raises(VitxError, match="reached code that torch does not show"):
        explain(model, IMAGES, method)


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "gae", "evidence"])
def test_a_scripted_module_is_followed(method):
    class Scripted(Vit):
        def __init__(self, script):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
            if script:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.inner = torch.jit.script(self.inner)

        def tokens(self, x):
            tokens = super().tokens(x)
            return tokens + self.inner(tokens)

    plain, scripted = (models.spread(Scripted(script)).double().eval() for script in (False, True))
    wanted = explain(plain, IMAGES, method, target=1)
    for _ in range(3):  # torch optimizes it after two runs
        found = explain(scripted, IMAGES, method, target=1)
        assert oracle.same(found, wanted, 1e-9)
        assert (found.conservation - 1).abs().max() < 1e-6


def test_tokens_that_are_merged_share_what_they_became():
    """The last token is merged into the first patch before any attention, as in token merging."""

    class Merging(Vit):
        def __init__(self, size):
            super().__init__()
            self.size = size

        def tokens(self, x):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            target = torch.zeros(len(x), 1, WIDTH, dtype=torch.long)
            merged = tokens[:, :-1].scatter_reduce(1, target, tokens[:, -1:], reduce=self.size)
            return merged + self.layers[0](self.norms[0](merged))

    for how in ("mean", "sum"):
        model = models.spread(Merging(how)).double().eval()
        model.read = lambda tokens: tokens.mean(1)
        found = explain(model, IMAGES)
        assert torch.allclose(found.maps[:, 0, 0], found.maps[:, 3, 3], rtol=1e-12)
        assert torch.allclose(found.maps.sum((1, 2)), torch.ones(2, dtype=torch.float64))


def test_a_call_without_a_rule_that_nothing_reads_is_no_error():
    class Curious(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit()

        def forward(self, x):
            self.seen = torch.special.bessel_j0(x).detach().median()
            return self.inner(x)

    assert torch.allclose(explain(Curious(), IMAGES).maps, explain(vit(), IMAGES).maps)


@pytest.mark.parametrize(
    "after",
    [
        lambda x: x,
        lambda x: x.relu(),
        lambda x: x * x.sigmoid(),
        lambda x: torch.cat([x, x], 1).mean(1, True),
    ],
)
def test_linear_attention_is_refused(after):
    """It is refused however its output is used."""

    def read(tokens):
        return after(tokens.relu() @ (tokens.mT @ tokens)).mean(1)

    with pytest.raises(VitxError, match="linear attention"):
        explain(vit(read=read), IMAGES)


class Cascade(nn.Module):
    """Two attentions, the second of which gets the output of the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attention("fused"), Attention("fused")

    def forward(self, x):
        return self.second(self.first(x))


def test_an_attention_that_feeds_another_is_multiplied_by_it():
    model = Vit()
    model.layers[1] = Cascade()
    model = models.spread(model).double().eval()
    with capture(model) as trace:
        model(IMAGES)
    first, inner, outer, last = (a.mean(1) for a in trace.attentions())
    found = torch.eye(17, dtype=torch.float64)[:1].expand(len(IMAGES), 1, -1)
    found = (found + found @ last) / 2
    found = (found + found @ outer @ inner) / 2
    found = (found + found @ first) / 2
    assert torch.allclose(explain(model, IMAGES).maps.flatten(1), found[:, 0, 1:], atol=1e-12)


class Overlap(Cascade):
    """Two attentions beside each other, the second of which leaves the class token out."""

    def forward(self, x):
        return self.first(x) + F.pad(self.second(x[:, 1:]), (0, 0, 1, 0))


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (Cascade, "one attention inside a residual feeds another, so their heads cannot be fused"),
        (Overlap, "parallel attentions have some, but not all, of their queries in common"),
    ],
)
def test_attentions_that_are_no_heads_of_one_layer_are_refused(part, sentence):
    model = Vit()
    model.layers[1] = part()
    with pytest.raises(VitxError, match=f"{sentence}.*: take rollout with head_fusion='mean'"):
        explain(models.spread(model).double().eval(), IMAGES, "grad_rollout")


def test_the_output_is_the_same_to_the_last_bit():
    for method in ("rollout", "grad_rollout"):
        for name in ("deit without fused attention", "beit", "hf vit, eager"):
            model, images = models.built(name), models.FAMILIES[name].images()
            with torch.no_grad():
                plain = model(images)
            logits = plain if isinstance(plain, torch.Tensor) else plain.logits
            assert torch.equal(explain(model, images, method).logits, logits)


@pytest.mark.parametrize("size", [3, 1])
def test_a_transposed_convolution_shares_among_what_reaches_each_pixel(size):
    """It has two groups. A size of 3 overlaps, as in decoders and FPNs; a size of 1 misses pixels."""
    torch.manual_seed(0)

    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit()
            self.up = nn.ConvTranspose2d(WIDTH, 4, size, 2, size // 2, output_padding=1, groups=2).double()

        def forward(self, x):
            tokens = self.inner.tokens(x)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
            return self.up(tokens).flatten(1)

    reach = np.zeros((8, 8, 4, 4))  # 1 where an output pixel comes from a token
    for r, c, down, right in itertools.product(range(4), range(4), range(size), range(size)):
        y, x = 2 * r + down - size // 2, 2 * c + right - size // 2
        if 0 <= y < 8 and 0 <= x < 8:
            reach[y, x, r, c] = 1
    share = reach / reach.sum((2, 3), keepdims=True).clip(1)
    row = torch.from_numpy(share.sum((0, 1)) / 64).flatten()
    assert share.sum() == (64 if size == 3 else 16)
    seen = oracle.observe(vit("einsum with an ellipsis"), IMAGES)
    for image, found in enumerate(explain(Up(), IMAGES).maps):
        rollout = oracle.rollout([oracle.fuse(a[image], "mean") for a in seen.attentions])
        read = torch.cat([torch.zeros(1, dtype=torch.float64), row])
        assert (found.flatten() - (read @ rollout)[1:]).abs().max() < 1e-9


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "evidence"])
def test_flex_attention_is_refused_in_a_sentence(method):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    class Flex(Attention):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(flex.flex_attention(q, k, v).transpose(1, 2).flatten(2))

    model = Vit()
    model.layers = nn.ModuleList(Flex("flex") for _ in range(DEPTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(VitxError, match=r"(?i)flex.?attention") as error:
            explain(model, IMAGES.float(), method)
    assert "\n" not in str(error.value)


BY_NAME = {
    "mean": lambda x: torch.mean(input=x, dim=1, keepdim=True) + 0 * x,
    "where": lambda x: torch.where(torch.ones_like(x).bool(), input=x, other=-x),
    "cat": lambda x: torch.cat(tensors=[x, x], dim=1),
    "linear": lambda x: F.linear(input=x, weight=torch.eye(WIDTH, dtype=x.dtype)),
    "add": lambda x: torch.add(input=x, other=x, alpha=2),
    "mul": lambda x: torch.mul(x, other=x.sigmoid()),
    "matmul": lambda x: torch.matmul(input=x, other=torch.eye(WIDTH, dtype=x.dtype)),
    "pad": lambda x: F.pad(input=x, pad=(0, 0, 0, 1)),
    "conv1d": lambda x: F.conv1d(input=x.mT, weight=torch.eye(WIDTH, dtype=x.dtype)[:, :, None]).mT,
    "softmax": lambda x: torch.softmax(input=x, dim=-1),
    "layer_norm": lambda x: F.layer_norm(input=x, normalized_shape=(WIDTH,)),
    "gelu": lambda x: F.gelu(input=x),
    "transpose": lambda x: torch.transpose(input=x, dim0=0, dim1=1).transpose(0, 1),
    "addmm": lambda x: torch.addmm(
        input=torch.zeros(WIDTH, dtype=x.dtype), mat1=x.flatten(0, 1), mat2=torch.eye(WIDTH, dtype=x.dtype)
    ).view_as(x),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_NAME)
def test_operands_given_by_name(name):
    found = explain_methods(
        vit(read=lambda x: BY_NAME[name](x)[:, 0]), IMAGES, ["rollout", "evidence"], target=0
    )
    assert all((one.conservation - 1).abs().max() < 1e-6 for one in found.values())
