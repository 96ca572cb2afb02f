"""The words of a vision-language model: words that it might say, and those of its answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.inputs.prepared import pictures_of
from vitx.inputs.processors import quiet, saved_processor, scale_of, with_prompt
from vitx.models.given import Inputs, parameters_of
from vitx.models.isolation import untouched
from vitx.models.outputs import main
from vitx.models.prediction import check_range, forward, refusals
from vitx.targets.question import Answers, Asked, Prepared, Question

_BEFORE = 16  # last tokens of a prompt, which decide how the word after it is tokenized
_IDS, _KEEP, _LABELS = "input_ids", "logits_to_keep", "labels"  # the names in transformers
_NO_LABEL = -100  # the label of tokens that are not learned
_NEEDS = (
    "a word needs pictures and a prompt: give files or PIL images, and word(..., prompt=..., "
    'processor=...); or inputs={"pixel_values": ..., "input_ids": ...}, named as in training batches'
)


class Prompted(Question):
    """A question about the words of a vision-language model, which is put to the model in `parts`."""

    prompt: str | None
    processor: Any

    def prepare(self, model: nn.Module, images: Any) -> Prepared:
        """Prepare pictures together with the prompt."""
        pictures = pictures_of(images)
        if pictures is None or self.prompt is None:
            raise VitxError(_NEEDS)
        processor = self._processor(model)
        return Prepared(with_prompt(model, processor, pictures, self.prompt), *scale_of(processor))

    def _processor(self, model: nn.Module) -> Any:
        return saved_processor(model) if self.processor is None else self.processor

    def _tokenizer(self, model: nn.Module) -> Any:
        processor = self._processor(model)
        return getattr(processor, "tokenizer", processor)


class Word(Prompted):
    """A word that a vision-language model might say, and which parts of the picture would make it do so.

    The score is the logit of the first token of the word where the model would say it: at the end of the
    prompt or, during training, where the `labels` begin. Several pictures in one prompt get a map each.

    Args:
        *words: words or token ids. Each has its own maps, one word after the other.
        prompt: the question to the model; None if it is in the `inputs` of `vitx.explain`.
        processor: from transformers, or a tokenizer with `inputs`; None for the one saved with the model.
    """

    def __init__(self, *words: str | int, prompt: str | None = None, processor: Any = None) -> None:
        if not words or not all(isinstance(one, (str, int)) and one != "" for one in words):
            raise VitxError(f"a word is a string or a token id, found {words}")
        self.words, self.prompt, self.processor = words, prompt, processor

    def one_each(self) -> "Word":
        """Return this question; raise a VitxError if it asks for several words."""
        if len(self.words) > 1:
            raise VitxError(f"training shows one map per image: give one word, found {self.words}")
        return self

    def parts(self, model: nn.Module, images: Tensor, inputs: Inputs) -> tuple[Inputs, list[Question]]:
        """Return one question per word: about its first token, where the model would say it."""
        ids = _ids(inputs)
        ends = _ends(inputs, ids)
        prompts = [row[:end] for row, end in zip(ids, ends, strict=True)]
        places, spots = [end - ids.shape[1] - 1 for end in ends], list[Question]()
        for said in self.words:
            tokens = [said if isinstance(said, int) else self._token(model, row, said) for row in prompts]
            spots.append(_Spot(places, tokens, f'"{said}"'))
        return _keeping(model, _unlabeled(inputs), -min(places)), spots

    def _token(self, model: nn.Module, before: Tensor, said: str) -> int:
        """Return the first token of a word that follows a prompt."""
        tokenizer, end = self._tokenizer(model), before[-_BEFORE:].tolist()
        text = tokenizer.decode(end)
        apart = "" if text[-1:].isspace() or end[-1] in tokenizer.all_special_ids else " "
        texts = text, text + apart + said, said
        start, whole, alone = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in texts)
        goes_on = whole[: len(start)] == start and len(whole) > len(start)
        found: int = whole[len(start)] if goes_on else alone[0]
        if found == getattr(tokenizer, "unk_token_id", None):
            raise VitxError(f"unknown word {said!r}: the model's tokenizer has no token for it")
        return found


class Answer(Prompted):
    """The answer of a vision-language model, and which parts of the picture made it say each word.

    Each word of the answer has its own maps, one word after the other, for the logit of its first token.

    Args:
        prompt: as for `word`.
        processor: as for `word`.
        most_tokens: the maximum length of the answer, which is decoded without sampling.
    """

    def __init__(self, prompt: str | None = None, processor: Any = None, *, most_tokens: int = 20) -> None:
        self.prompt, self.processor, self.most_tokens = prompt, processor, most_tokens

    def one_each(self) -> "Answer":
        """Raise a VitxError: there is one map per word."""
        raise VitxError("an answer has a map for each of its words: ask for one word during training")

    def parts(self, model: nn.Module, images: Tensor, inputs: Inputs) -> tuple[Inputs, list[Question]]:
        """Let the model answer, and return one question per word of the answer."""
        ids = _ids(inputs)
        if len(ids) > 1:
            raise VitxError(f"an answer can be explained for one prompt at a time, found {len(ids)}")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            said = f"{type(model).__name__} writes its answer apart from the prompt"
            raise VitxError(f"{said}: ask for a word instead, with decoder_input_ids in inputs=")
        if (generate := getattr(_speaker(model), "generate", None)) is None:
            raise VitxError(f"{type(model).__name__} cannot answer a prompt: it has no generate()")
        inputs = _unlabeled(inputs)
        with untouched(model), torch.no_grad(), quiet(), refusals(images, inputs):
            made = generate(**inputs.of(images), max_new_tokens=self.most_tokens, do_sample=False)
        new = made[:, ids.shape[1] :] if made.shape[1] > ids.shape[1] else made
        words = _words(self._tokenizer(model), new[0].tolist())
        if not words:
            raise VitxError("the model says nothing to this prompt")
        count = new.shape[1]
        spots = [_Spot([at - count - 1], [int(new[0, at])], f'"{said}"') for at, said in words]
        return _keeping(model, _longer(model, inputs, ids, new), count + 1), [*spots]


word, answer = Word, Answer


@dataclass(eq=False)
class _Spot(Question):
    """The logit of a token at a position in the text."""

    places: Sequence[int]  # position in each row of ids, counted from its end
    tokens: Sequence[int]  # the next token to ask about, in each row
    said: str  # its name in captions

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Ask for the logit."""

        def next_word(model: nn.Module, images: Tensor, inputs: Inputs) -> Tensor:
            speaker = _speaker(model)
            logits = main(forward(speaker, images, inputs))
            if logits is None or logits.ndim != 3 or len(logits) != len(self.places):
                found = "no logits" if logits is None else f"logits {tuple(logits.shape)}"
                raise VitxError(
                    f"{type(speaker).__name__} returns {found}, but a word needs logits of each token"
                )
            return logits[range(len(logits)), self.places]

        def answers(logits: Tensor) -> Answers:
            check_range("token", torch.tensor(self.tokens, device="cpu"), "tokens", logits.shape[1])
            asked = range(len(logits)), self.tokens
            scores, shares = logits[asked], logits.softmax(1)[asked]
            found = zip(scores, shares, strict=True)
            return Answers(scores, [f"{self.said}: {logit:.2f} ({share:.0%})" for logit, share in found])

        return Asked(images, answers, next_word)


def _speaker(model: nn.Module) -> nn.Module:
    """Return the first part of a model with a `generate` method, as in transformers; else the model."""
    return next((part for part in model.modules() if callable(getattr(part, "generate", None))), model)


def _ids(inputs: Inputs) -> Tensor:
    ids = inputs.others.get(_IDS)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise VitxError(_NEEDS)
    return ids


def _ends(inputs: Inputs, ids: Tensor) -> list[int]:
    """Return the length of each prompt: up to the first token that is learned, else up to the padding."""
    labels, mask = (inputs.others.get(name) for name in (_LABELS, "attention_mask"))
    ends = [ids.shape[1]] * len(ids)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        ends = [int(row.nonzero().max()) + 1 for row in mask]
    if isinstance(labels, Tensor):
        learned = [(row != _NO_LABEL).nonzero() for row in labels]  # a row learned as a whole has no prompt
        ends = [int(one[0]) or end if len(one) else end for one, end in zip(learned, ends, strict=True)]
    return ends


def _unlabeled(inputs: Inputs) -> Inputs:
    return replace(inputs, others={name: one for name, one in inputs.others.items() if name != _LABELS})


def _keeping(model: nn.Module, inputs: Inputs, count: int) -> Inputs:
    """Ask for the logits of the last tokens only, if the model can do that: all of them take much memory."""
    kept = {_KEEP: count} if _KEEP in parameters_of(_speaker(model).forward) else {}
    return replace(inputs, others={**kept, **inputs.others})


def _longer(model: nn.Module, inputs: Inputs, ids: Tensor, new: Tensor) -> Inputs:
    """Return the inputs with more tokens after the prompt."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    # 1 marks tokens that are attended to or, in PaliGemma's token types, tokens of the answer.
    ones = ["attention_mask", *(["token_type_ids"] if kind == "paligemma" else [])]
    others = dict(inputs.others)
    for name, one in inputs.others.items():
        if isinstance(one, Tensor) and one.shape == ids.shape:
            more = new if name == _IDS else torch.full_like(new, name in ones)
            others[name] = torch.cat([one, more.to(one.dtype)], 1)
    return replace(inputs, others=others)


def _words(tokenizer: Any, tokens: Sequence[int]) -> list[tuple[int, str]]:
    """Return words, each with the index of its first token."""
    found: list[tuple[int, str]] = []
    text = ""
    for place, token in enumerate(tokens):
        longer = tokenizer.decode(tokens[: place + 1], skip_special_tokens=True)
        piece, text_before, text = longer[len(text) :], text, longer
        if not piece.strip() or token in tokenizer.all_special_ids:
            continue
        if not found or piece[0].isspace() or text_before[-1:].isspace():
            found.append((place, piece.strip()))
        else:
            found[-1] = (found[-1][0], found[-1][1] + piece.strip())
    return found
