"""The words of a vision-language model: one that it might say, and those that it did."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.given import Inputs
from vitx.models.isolation import untouched
from vitx.models.prediction import forward, refusals
from vitx.targets.outputs import main
from vitx.targets.question import Answers, Asked, Prepared, Question

_BEFORE = 16  # tokens of a prompt that tell how a word goes on from it
_IDS, _KEEP = "input_ids", "logits_to_keep"  # as models of transformers call them
_NEEDS = (
    "a word is asked of pictures and a prompt: give files or PIL images, and word(..., prompt=..., "
    'processor=...); or inputs={"pixel_values": ..., "input_ids": ...}'
)


def word(*words: str | int, prompt: str | None = None, processor: Any = None) -> "Word":
    """Asks which parts of the picture would make a vision-language model say a word.

    The score is the logit of the first token of the word where the model would say it: at the end of the
    prompt. Several pictures are those of one prompt, and have a map each.

    Args:
        *words: each a word, or a token id. Of several, each has its maps, one word after the other.
        prompt: what the model is asked; None: `vitx.explain` gets `inputs` that hold it.
        processor: of transformers, or with `inputs` a tokenizer; None: the one that was saved with the model.

    Returns:
        A value for `target=`.

    Raises:
        VitxError: There is no word. Once it is put to a model: this says no words, or does not know this one.
    """
    return Word(words, prompt, processor)


def answer(prompt: str | None = None, processor: Any = None, *, most_tokens: int = 20) -> "Answer":
    """Asks which parts of the picture made a vision-language model say what it says.

    It says its likeliest answer; each word has its maps, one word after the other, of the logit of its first
    token.

    Args:
        prompt: as for `word`.
        processor: as for `word`.
        most_tokens: how long the answer may be.

    Returns:
        A value for `target=`.

    Raises:
        VitxError: Once it is put to a model: this says nothing.
    """
    return Answer(prompt, processor, most_tokens)


class _Prompted(Question):
    """A question about what a model says of pictures and a prompt."""

    def __init__(self, prompt: str | None, processor: Any) -> None:
        self.prompt, self.processor = prompt, processor

    def prepare(self, model: nn.Module, images: Any) -> Prepared:
        """Prepares pictures together with the prompt."""
        from vitx.inputs.prepared import pictures_of
        from vitx.inputs.prompts import scale_of, with_prompt

        pictures = pictures_of(images)
        if pictures is None or self.prompt is None:
            raise VitxError(_NEEDS)
        processor = self._processor(model)
        return Prepared(with_prompt(model, processor, pictures, self.prompt), *scale_of(processor))

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Does nothing: its parts are put in its place."""
        raise NotImplementedError

    def _processor(self, model: nn.Module) -> Any:
        from vitx.inputs.prompts import saved_processor

        return saved_processor(model) if self.processor is None else self.processor

    def _tokenizer(self, model: nn.Module) -> Any:
        processor = self._processor(model)
        return getattr(processor, "tokenizer", processor)


class Word(_Prompted):
    """A word that a model might say next, see `word`."""

    def __init__(self, words: Sequence[str | int], prompt: str | None = None, processor: Any = None) -> None:
        if not words or not all(isinstance(one, (str, int)) and one != "" for one in words):
            raise VitxError(f"a word is a string or a token id, found {words}")
        super().__init__(prompt, processor)
        self.words = words

    def parts(self, model: nn.Module, images: Tensor, inputs: Inputs) -> tuple[Inputs, list[Question]]:
        """Finds the token of each word, and where it would be said."""
        ids = _ids(inputs)
        ends = [_end(row, inputs.others.get("attention_mask"), index) for index, row in enumerate(ids)]
        places, spots = [end - ids.shape[1] - 1 for end in ends], []
        for one in self.words:
            known = isinstance(one, int)
            rows = zip(ids, ends, strict=True)
            tokens = [one if known else self._token(model, row[:end], str(one)) for row, end in rows]
            spots.append(_Spot(places, [int(token) for token in tokens], f'"{one}"'))
        return _keeping(model, inputs, -min(places)), [*spots]

    def _token(self, model: nn.Module, before: Tensor, said: str) -> int:
        """Returns the first token of a word behind the end of a prompt."""
        tokenizer = self._tokenizer(model)

        def tokens(text: str) -> list[int]:
            found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return found

        end = before[-_BEFORE:].tolist()
        text = tokenizer.decode(end)
        apart = "" if text[-1:].isspace() or end[-1] in tokenizer.all_special_ids else " "
        start, whole = tokens(text), tokens(text + apart + said)
        goes_on = whole[: len(start)] == start and len(whole) > len(start)
        found = whole[len(start)] if goes_on else tokens(said)[0]
        if found == getattr(tokenizer, "unk_token_id", None):
            raise VitxError(f"the model knows no word {said!r}: its tokenizer has no token for it")
        return found


class Answer(_Prompted):
    """The words that a model says, see `answer`."""

    def __init__(self, prompt: str | None = None, processor: Any = None, most_tokens: int = 20) -> None:
        super().__init__(prompt, processor)
        self.most_tokens = most_tokens

    def parts(self, model: nn.Module, images: Tensor, inputs: Inputs) -> tuple[Inputs, list[Question]]:
        """Lets the model answer, and finds the words of its answer."""
        ids = _ids(inputs)
        if len(ids) > 1:
            raise VitxError(f"an answer is explained to one prompt, found {len(ids)}")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise VitxError(
                f"{type(model).__name__} writes its answer apart from the prompt: ask for a word, by inputs= "
                "with its decoder_input_ids"
            )
        if (generate := getattr(model, "generate", None)) is None:
            raise VitxError(f"{type(model).__name__} says no words: it has no generate")
        from vitx.inputs.processors import quiet

        with untouched(model), torch.no_grad(), quiet(), refusals(images, inputs):
            made = generate(**inputs.of(images), max_new_tokens=self.most_tokens, do_sample=False)
        new = made[:, ids.shape[1] :] if made.shape[1] > ids.shape[1] else made
        words = _words(self._tokenizer(model), new[0].tolist())
        if not words:
            raise VitxError("the model says nothing to this prompt")
        count = new.shape[1]
        spots = [_Spot([at - count - 1], [int(new[0, at])], f'"{said}"') for at, said in words]
        return _keeping(model, _longer(model, inputs, ids, new), count + 1), [*spots]


class _Spot(Question):
    """A token at some place of the text."""

    def __init__(self, places: Sequence[int], tokens: Sequence[int], said: str) -> None:
        """Takes the place of each prompt, counted from its end, and the token that would follow."""
        self.places, self.tokens, self.said = places, tokens, said

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Reads the logit."""
        rows = range(len(self.places))

        def next_word(model: nn.Module, images: Tensor, inputs: Inputs) -> Tensor:
            logits = main(forward(model, images, inputs))
            if logits is None or logits.ndim != 3 or len(logits) != len(rows):
                found = "no logits" if logits is None else f"logits {tuple(logits.shape)}"
                raise VitxError(
                    f"{type(model).__name__} puts out {found}, and a word needs some of each token"
                )
            return torch.stack([logits[row, place] for row, place in zip(rows, self.places, strict=True)])

        def score(logits: Tensor) -> Tensor:
            outside = [token for token in self.tokens if not 0 <= token < logits.shape[1]]
            if outside:
                raise VitxError(f"token {outside[0]} is out of range: the model has {logits.shape[1]} tokens")
            return torch.stack([logits[row, token] for row, token in zip(rows, self.tokens, strict=True)])

        def answers(logits: Tensor) -> Answers:
            shares = [row.softmax(0)[token] for row, token in zip(logits, self.tokens, strict=True)]
            found = zip(score(logits), shares, strict=True)
            return Answers([f"{self.said}: {logit:.2f} ({share:.0%})" for logit, share in found])

        return Asked(images, score, next_word, answers=answers)


def _ids(inputs: Inputs) -> Tensor:
    ids = inputs.others.get(_IDS)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise VitxError(_NEEDS)
    return ids


def _end(row: Tensor, mask: Any, index: int) -> int:
    """Returns how many tokens there are up to the last one that is no padding."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return len(row)
    return int(mask[index].nonzero().max()) + 1


def _keeping(model: nn.Module, inputs: Inputs, count: int) -> Inputs:
    """Lets a model put out the logits of the last tokens alone, if it can: all of them need much memory."""
    if _KEEP in inspect.signature(model.forward).parameters and _KEEP not in inputs.others:
        return replace(inputs, others={**inputs.others, _KEEP: count})
    return inputs


def _longer(model: nn.Module, inputs: Inputs, ids: Tensor, new: Tensor) -> Inputs:
    """Returns the inputs with more tokens behind the prompt."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    # 1 stands for what is attended to, or in PaliGemma's types for the answer.
    ones = ["attention_mask", *(["token_type_ids"] if kind == "paligemma" else [])]
    others = dict(inputs.others)
    for name, one in inputs.others.items():
        if isinstance(one, Tensor) and one.shape == ids.shape:
            more = new if name == _IDS else torch.full_like(new, int(name in ones), dtype=one.dtype)
            others[name] = torch.cat([one, more.to(one.dtype)], 1)
    return replace(inputs, others=others)


def _words(tokenizer: Any, tokens: Sequence[int]) -> list[tuple[int, str]]:
    """Returns where words begin, and the words."""
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
