"""Words of a vision-language model as the target, against the same scores written by hand."""

import pytest
import torch
from PIL import Image
from torch import nn

from tests import models, vision_language
from vitx import VitxError, explain, trace
from vitx.targets import answer, word

FAMILIES = [*vision_language.FAMILIES]
PICTURES = [Image.effect_noise(size, 80).convert("RGB") for size in [(40, 32), (32, 32)]]
DOG = vision_language.WORDS.index("dog")


def asked(name, *words, **options):
    options = {"prompt": "what is it", "processor": vision_language.processor(name), **options}
    return word(*(words or ("dog",)), **options)


def last(logits):
    return logits[:, -1, DOG]


@pytest.mark.parametrize("name", FAMILIES)
def test_is_the_logit_behind_the_prompt(name):
    """The relevance of image, text and constants sums to it; the maps are those of a target function."""
    model = vision_language.built(name)
    found = explain(model, PICTURES[:1], "evidence", target=asked(name))
    assert (found.conservation - 1).abs().max() < 1e-3
    share = found.logits[0].softmax(0)[DOG]
    assert found.captions[0] == f'"dog": {found.logits[0, DOG]:.2f} ({share:.0%})'
    assert (found.images.amin() < 0) == (found.mean[0] > 0)
    processor = vision_language.processor(name)
    text = f"{processor.image_token}\nwhat is it"
    if name.startswith("Qwen"):
        text = f"<|vision_start|>{processor.image_token}<|vision_end|>\nwhat is it"
    given = processor(images=[PICTURES[:1]], text=[text], return_tensors="pt")
    given = {name: one for name, one in given.items() if name != "labels"}
    wanted = explain(model, inputs=given, method="evidence", target=last)
    assert torch.allclose(found.maps, wanted.maps, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_several_pictures_of_one_prompt_have_a_map_each(name):
    found = explain(vision_language.built(name), PICTURES, target=asked(name))
    assert len(found.maps) == len(found.images) == len(found.captions) == 2
    assert found.picture().ndim == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_the_words_of_an_answer(name):
    """Each word is the most probable token at its place."""
    model, processor = vision_language.built(name), vision_language.processor(name)
    prompt = {"Qwen2-VL": "a cat"}.get(name, "what is it")
    found = explain(model, PICTURES[:1], "evidence", target=answer(prompt, processor, most_tokens=3))
    said = [processor.tokenizer.convert_tokens_to_ids(one.split('"')[1]) for one in found.captions]
    assert len(found.maps) == len(found.images) == len(said) >= 1
    for token, logits in zip(said, found.logits, strict=True):
        assert token == int(logits.argmax())


def test_several_words_have_maps_one_after_the_other():
    model = vision_language.built("LLaVA")
    found = explain(model, PICTURES, "evidence", target=asked("LLaVA", "dog", "cat"))
    for number, one in enumerate(["dog", "cat"]):
        wanted = explain(model, PICTURES, "evidence", target=asked("LLaVA", one))
        assert torch.allclose(found.maps[2 * number :][:2], wanted.maps, atol=1e-6)
    assert [one.split(":")[0] for one in found.captions] == ['"dog"', '"dog"', '"cat"', '"cat"']
    with pytest.raises(VitxError, match="a trace takes one question, found 2"):
        trace(model, PICTURES[:1], target=asked("LLaVA", "dog", "cat"))
    assert trace(model, PICTURES[:1], target=asked("LLaVA")).relevance


def test_prompts_of_several_lengths():
    """The word is read after the last token that is not padding."""
    _, given, _ = vision_language.FAMILIES["LLaVA"]
    ids = given["input_ids"]
    longer = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)
    other = torch.cat([ids, torch.tensor([[4, 5, 6]])], 1)
    both = {
        "pixel_values": given["pixel_values"].repeat(2, 1, 1, 1),
        "input_ids": torch.cat([longer, other]),
        "attention_mask": (torch.arange(ids.shape[1] + 3) < torch.tensor([[0], [3]]) + ids.shape[1]).long(),
    }
    model = vision_language.built("LLaVA")
    found = explain(model, inputs=both, method="evidence", target=word(DOG))
    for index, one in enumerate((ids, other)):
        alone = {"pixel_values": given["pixel_values"], "input_ids": one}
        wanted = explain(model, inputs=alone, method="evidence", target=word(DOG))
        assert torch.allclose(found.maps[index], wanted.maps[0], atol=1e-5)


def test_a_word_goes_on_from_the_prompt():
    """A space precedes the word, except after a line break."""

    class Letters:
        """A tokenizer in which each letter is a token, and " d" is one, too."""

        all_special_ids, unk_token_id = (), None

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(one) for one in text.replace(" d", "D")]}

        def decode(self, ids):
            return "".join(map(chr, ids))

    asked = word("dog", processor=Letters())
    model = vision_language.built("LLaVA")
    assert asked._token(model, torch.tensor([*map(ord, "A:")]), "dog") == ord("D")
    assert asked._token(model, torch.tensor([*map(ord, "A:\n")]), "dog") == ord("d")


def test_the_processor_that_was_saved_with_the_model(tmp_path):
    model = vision_language.built("LLaVA")
    model.save_pretrained(tmp_path)
    vision_language.processor("LLaVA").save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    found = explain(loaded, PICTURES[0], "evidence", target=word("dog", prompt="what is it"))
    wanted = explain(model, PICTURES[0], "evidence", target=asked("LLaVA"))
    assert torch.allclose(found.maps, wanted.maps, atol=1e-5)


def test_a_chat_template_is_followed():
    processor = vision_language._processor_of_llava()
    processor.chat_template = (
        "{% for m in messages %}{% for c in m.content %}"
        "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endfor %} a it is"
    )
    model = vision_language.built("LLaVA")
    found = explain(model, PICTURES[0], target=word("dog", prompt="what is it", processor=processor))
    wanted = explain(model, PICTURES[0], target=asked("LLaVA", prompt="<image> what is it a it is"))
    assert torch.equal(found.logits, wanted.logits)


def test_leaves_no_trace():
    model = vision_language.built("LLaVA").train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    try:
        asks = answer("what is it", vision_language.processor("LLaVA"), most_tokens=2)
        explain(model, PICTURES[0], target=asks)
        assert all(part.training for part in model.modules())
        assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    finally:
        model.eval()


def test_a_model_that_writes_apart_from_the_prompt():
    model = NoWords()
    model.config = type("Config", (), {"is_encoder_decoder": True})
    with pytest.raises(VitxError, match="NoWords writes its answer apart from the prompt: ask for a word"):
        explain(model, inputs=GIVEN, target=answer())


class NoWords(nn.Module):
    """A model that takes words, but outputs class scores."""

    def __init__(self):
        super().__init__()
        self.vit = models.built("deit")

    def forward(self, pixel_values, input_ids):
        return self.vit(pixel_values)


GIVEN = vision_language.FAMILIES["LLaVA"][1]


@pytest.mark.parametrize(
    ("images", "target", "sentence"),
    [
        (PICTURES, word("dog"), "a word needs pictures and a prompt"),
        (GIVEN["pixel_values"], asked("LLaVA"), "a word needs pictures and a prompt"),
        (PICTURES, word("dog", prompt="what"), "no processor was saved with the model"),
        (PICTURES, asked("LLaVA", "wolf"), "unknown word 'wolf'"),
        (PICTURES, asked("LLaVA", 99), "token 99 is out of range: the model has tokens 0 to 63"),
        (PICTURES, asked("LLaVA", prompt="<image> it"), "LlavaProcessor refused 2 pictures"),
    ],
)
def test_says_what_is_wrong(images, target, sentence):
    with pytest.raises(VitxError, match=sentence):
        explain(vision_language.built("LLaVA"), images, target=target)


def test_a_model_that_says_no_words():
    with pytest.raises(VitxError, match=r"returns logits \(1, 7\), but a word needs logits of"):
        explain(NoWords(), inputs=GIVEN, target=word(3))
    with pytest.raises(VitxError, match="NoWords cannot answer a prompt"):
        explain(NoWords(), inputs=GIVEN, target=answer())


@pytest.mark.parametrize("words", [(), (["dog"],), ("",)])
def test_a_word_is_a_word(words):
    with pytest.raises(VitxError, match="a word is a string or a token id"):
        word(*words)
