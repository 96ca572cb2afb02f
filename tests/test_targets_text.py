"""The similarity to a text as the target, against the same score written by hand."""

import pytest
import torch
from torch import nn

import vitx
from tests import models, texts
from tests.modules import Around
from vitx import VitxError, explain
from vitx.targets import text

IMAGES = models.FAMILIES["deit"].images()
IDS = torch.tensor([[1, 4, word, 2, *[0] * 12] for word in (5, 6, 7)])
KINDS = ["CLIP", "Siglip", "open_clip", "Aimv2"]


def features(model, kind, **given):
    """Return the features of images or of token ids, as the library computes them."""
    if kind == "open_clip":
        return (
            model.encode_image(given["pixel_values"])
            if "pixel_values" in given
            else model.encode_text(given["input_ids"])
        )
    what = "image" if "pixel_values" in given else "text"
    found = getattr(model, f"get_{what}_features")(**given)
    return found if isinstance(found, torch.Tensor) else found.pooler_output


class ByHand(nn.Module):
    """A model that outputs the similarities of images and texts."""

    def __init__(self, kind):
        super().__init__()
        self.clip, self.kind = texts.built(kind), kind
        with torch.no_grad():
            found = features(self.clip, kind, input_ids=IDS)
        self.texts = found / found.norm(dim=1, keepdim=True)

    def forward(self, images):
        found = features(self.clip, self.kind, pixel_values=images)
        return found / found.norm(dim=1, keepdim=True) @ self.texts.T


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "evidence"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_a_wrapper_puts_out(kind, method):
    model = texts.built(kind)
    found = explain(model, IMAGES, method, target=text(IDS))
    assert found.maps.shape == (6, 4, 4)
    for number in range(3):
        wanted = explain(ByHand(kind), IMAGES, method, target=number)
        assert torch.allclose(found.maps[number::3], wanted.maps, atol=1e-6)
        scale = model.logit_scale.exp()
        logits = wanted.logits * scale + (getattr(model, "logit_bias", None) or 0)
        assert torch.allclose(found.logits[number::3], logits, atol=1e-5)
    against = explain(model, IMAGES, method, target=text(IDS[0], against=IDS[2]))
    wanted = explain(ByHand(kind), IMAGES, method, target=lambda logits: logits[:, 0] - logits[:, 2])
    assert torch.allclose(against.maps, wanted.maps, atol=1e-6)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Blip"])
def test_similarities_are_those_of_the_model(kind):
    model = texts.built(kind)
    found = explain(model, IMAGES, target=text(IDS)).logits[::3]
    with torch.no_grad():
        wanted = model(pixel_values=IMAGES, input_ids=IDS).logits_per_image
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_text_is_words_or_token_ids_or_features():
    model, tokenizer = texts.built("CLIP"), texts.tokenizer()
    with torch.no_grad():
        row = model.get_text_features(torch.tensor([[4, 5]])).pooler_output
    asked = [text("a cat", tokenizer=tokenizer), text(torch.tensor([[4, 5]])), text(row), text([row[0]])]
    first, *others = [explain(model, IMAGES, "evidence", target=one).maps for one in asked]
    assert all(torch.allclose(first, other, atol=1e-6) for other in others)
    parts = model.vision_model, model.visual_projection
    tower = Around(lambda vision, projection, x: projection(vision(x).pooler_output), *parts)
    assert torch.allclose(explain(tower, IMAGES, "evidence", target=text(row)).maps, first, atol=1e-6)


def test_a_model_inside_another_is_found():
    wanted = explain(texts.built("CLIP"), IMAGES, target=text(IDS[0])).maps
    assert torch.equal(
        explain(nn.ModuleList([texts.built("CLIP")]), IMAGES, target=text(IDS[0])).maps, wanted
    )


def test_texts_of_siglip_are_padded_as_in_its_training():
    """SigLIP pools the last token, so that padding matters."""
    model, tokenizer = texts.built("Siglip"), texts.tokenizer()
    found = explain(model, IMAGES, target=text("a cat", tokenizer=tokenizer))
    wanted = explain(model, IMAGES, target=text(torch.tensor([[4, 5] + [0] * 14])))
    assert torch.equal(found.logits, wanted.logits)


def test_patches_of_siglip_2():
    model = texts.built("Siglip2")
    given = {
        "pixel_values": torch.randn(2, 8, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)),
        "pixel_attention_mask": torch.ones(2, 8, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[2, 4], [4, 2]]),
    }
    found = explain(model, inputs=given, target=text(IDS))
    assert found.maps.shape == (6, 4, 4)
    alone = explain(model, inputs={k: v[1:] for k, v in given.items()}, target=text(IDS[1]))
    assert torch.allclose(found.maps[4, :4, :2], alone.maps[0], atol=1e-6)
    with torch.no_grad():
        wanted = model(**given, input_ids=IDS).logits_per_image
    assert torch.allclose(found.logits[::3], wanted, atol=1e-5)


def test_a_tokenizer_of_open_clip():
    model = texts.built("open_clip")
    found = explain(
        model, IMAGES, target=text("a cat", tokenizer=lambda words: IDS[:1].expand(len(words), -1))
    )
    assert torch.equal(found.maps, explain(model, IMAGES, target=text(IDS[0])).maps)


def test_the_tokenizer_that_was_saved_with_the_model(tmp_path):
    model, tokenizer = texts.built("CLIP"), texts.tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    wanted = explain(model, IMAGES, target=text("a dog", tokenizer=tokenizer)).logits
    assert torch.allclose(explain(loaded, IMAGES, target=text("a dog")).logits, wanted, atol=1e-6)


def test_captions_are_similarities_and_their_softmax():
    model, tokenizer = texts.built("CLIP"), texts.tokenizer()
    found = explain(model, IMAGES, target=text("a cat", "a dog", tokenizer=tokenizer))
    similar = found.logits[0] / model.logit_scale.exp()
    assert found.captions[0] == f"a cat: {similar[0]:.3f} ({found.logits[0].softmax(0)[0]:.0%})"
    assert found.captions[3].startswith("a dog: ")
    assert explain(model, IMAGES, target=text("a cat", tokenizer=tokenizer)).captions[0][-1] != ")"
    against = explain(model, IMAGES[:1], target=text("a cat", against="a wolf", tokenizer=tokenizer))
    assert against.captions[0].startswith("a cat, not a wolf: ")
    assert found.picture().ndim == 3


@pytest.mark.parametrize("method", ["rollout", "evidence"])
def test_one_map_for_each_picture(method):
    """Each picture has the map of its nearest text, or of its own text."""
    model = texts.built("CLIP")
    every = explain(model, IMAGES, method, target=text(IDS))
    nearest = explain(model, IMAGES, method, target=text(IDS, maps="nearest"))
    own = explain(model, IMAGES, method, target=text(IDS[1:], maps="own"))
    for image in range(2):
        best = int(every.logits[3 * image].argmax())
        assert torch.allclose(nearest.maps[image], every.maps[3 * image + best], atol=1e-6)
        assert nearest.captions[image].startswith(f"text {best + 1}: ")
        assert torch.allclose(own.maps[image], every.maps[4 * image + 1], atol=1e-6)
    assert own.logits.shape == (2, 1)


def test_the_text_tower_runs_once_and_leaves_no_gradient():
    model, calls = texts.built("CLIP"), []
    handle = model.text_model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    try:
        explain(model, IMAGES, "evidence", target=text(IDS[0]))
    finally:
        handle.remove()
    assert calls == [False]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: text(), "give at least one text, and at most one against it, found 0 and 0"),
        (lambda: text("a cat", against=["a", "b"]), "found 1 and 2"),
        (
            lambda: text("a", maps="best"),
            'maps must be "all", "nearest", "own" or the index of a text, found',
        ),
        (lambda: text("a", "b", maps=2), "or the index of a text, found 2"),
        (lambda: text("a", "b", maps=-1), "or the index of a text, found -1"),
        (lambda: explain(texts.built("CLIP"), IMAGES, target=text(IDS, maps="own")), "3 texts for 2 images"),
        (lambda: text(3), "a text is a string, token ids or features, found int"),
        (lambda: explain(texts.built("CLIP"), IMAGES, target=text("a cat")), "no tokenizer was saved with"),
        (lambda: explain(models.built("deit"), IMAGES, target=text("a")), "Transformer has no text tower"),
        (
            lambda: explain(texts.built("CLIP"), IMAGES, target=text(torch.rand(1, 7))),
            "the features of the images have size 24, and the others 7: they are from different",
        ),
        (
            lambda: explain(texts.built("CLIP"), IMAGES, target=text(torch.tensor([[1, 99, 2]]))),
            r"the text tower refused token ids of shape \(1, 3\)",
        ),
        (
            lambda: explain(texts.built("CLIP"), torch.rand(1, 3, 40, 40), target=text(IDS[0])),
            r"refused images of shape \(1, 3, 40, 40\)",
        ),
        (lambda: explain(texts.built("CLIP"), IMAGES, "legrad", target=text(IDS[0])), "legrad"),
        (
            lambda: explain(texts.built("CLIP"), IMAGES),
            r"also takes text.*or use a target such as vitx.targets.t",
        ),
    ],
)
def test_says_what_is_wrong(ask, sentence):
    with pytest.raises(VitxError, match=sentence):
        ask()


def test_is_a_target_of_several_methods():
    model, target = texts.built("CLIP"), text(IDS[:2])
    for name, found in vitx.explain_methods(model, IMAGES, ["rollout", "evidence"], target=target).items():
        alone = explain(model, IMAGES, name, target=target)
        assert torch.allclose(found.maps, alone.maps, rtol=0, atol=1e-7)
        assert found.captions == alone.captions
