"""Draw how relevance goes back through one transformer block, with the numbers of a tiny model.

python docs/make_block_drawing.py

A ViT of two blocks learns, in a few seconds, to name the color of a square in noise. vitx explains one
picture by attention rollout. The drawing shows the relevance at each step of block 1, as read from the tape
of the pass.
"""

import base64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import vitx
from vitx.attribution.rollout import Rollouts
from vitx.tape.recorder import Recorder
from vitx.tape.relevance import Propagation
from vitx.tape.score import evenly
from vitx.tape.sums import Sum
from vitx.tape.tape import Tape

COLORS = {"red": (0.9, 0.2, 0.15), "green": (0.15, 0.7, 0.25), "blue": (0.2, 0.35, 0.95)}
COLORS |= {"yellow": (0.95, 0.8, 0.1)}
SIZE, PATCH = 32, 16
IMAGE = 2  # index among the test images: one in which all patches have a share


def squares(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images of noise with one square, in the middle of a patch, and the colors of the squares."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.25 + 0.5 * torch.rand(count, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(len(COLORS), (count,), generator=generator)
    places = torch.randint(4, (count,), generator=generator)
    for image, label, place in zip(images, labels, places.tolist(), strict=True):
        y, x = (PATCH * number + 4 for number in divmod(place, 2))
        image[:, y : y + 8, x : x + 8] = torch.tensor(list(COLORS.values()))[label][:, None, None]
    return images, labels


def untrained() -> Any:
    """Return a ViT of two blocks with random weights."""
    torch.manual_seed(1)
    options = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=len(COLORS), **options)


def trained() -> Any:
    """Return the ViT after it has learned to name the color."""
    model = untrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels = squares(300 * 64, seed=0)
    for batch, wanted in zip(images.split(64), labels.split(64), strict=True):
        F.cross_entropy(model(batch), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
    images, labels = squares(200, seed=1)
    right = (model.eval()(images).argmax(1) == labels).float().mean()
    assert right > 0.99, f"the model did not learn: it names {right:.0%}"
    return model.double()


@dataclass
class Steps:
    """The relevance of one image at each step: (4,) for logits, (tokens,) for tokens.

    Attributes:
        logits: at the logits, where it starts.
        after_2: at the output of block 2.
        after_1: at the output of block 1.
        between: between the attention and the MLP of block 1.
        taken: the relevance that each token receives through the attention of block 1.
        before_1: at the input of block 1.
        attention: A of block 1, averaged over the heads, (tokens, tokens).
        maps: at the patches, from `vitx.explain`.
    """

    logits: Tensor
    after_2: Tensor
    after_1: Tensor
    between: Tensor
    taken: Tensor
    before_1: Tensor
    attention: Tensor
    maps: Tensor


def followed(model: Any, image: Tensor) -> Steps:
    """Follow the relevance of one image, (1, 3, H, W), from the logits to the pixels."""
    tape = Tape(model)
    recorder = Recorder(tape)
    recorder.begin(image)
    with torch.no_grad(), recorder.recording():
        logits = model(image)
    end, start = recorder.get(logits), evenly(logits)
    assert end is not None
    (first,) = tape.layers[0].attentions
    values_read = first.inputs[0]  # (1, heads, tokens, channels)
    sums = [step for step in tape.steps if isinstance(step, Sum)]
    assert len(sums) == 4, "each of the two blocks adds its attention and its MLP to the stream"
    around_attention, around_mlp, _, last = sums
    assert around_attention.stream is not None
    values = {
        "before_1": around_attention.stream,
        "between": around_attention.outputs[0],
        "after_1": around_mlp.outputs[0],
        "after_2": last.outputs[0],
    }
    found = Propagation(tape, Rollouts("mean", 0.0, 0)).run({end: start}, [*values.values(), values_read])
    steps = Steps(
        logits=start[0],
        taken=found.passed[values_read][0].sum((0, 2)),
        attention=first.weights.matrix()[0].mean(0),
        maps=vitx.explain(model, image, "rollout").maps[0].flatten(),
        **{name: found.passed[value][0].sum(1) for name, value in values.items()},
    )
    check(steps)
    return steps


def check(steps: Steps) -> None:
    """Check that each step follows the rule of attention rollout, and that relevance sums to 1."""
    for whole in (steps.logits, steps.after_2, steps.after_1, steps.between, steps.before_1):
        torch.testing.assert_close(whole.sum(), whole.new_tensor(1.0))
    for half in (steps.between / 2, steps.taken):
        torch.testing.assert_close(half.sum(), half.new_tensor(0.5))
    torch.testing.assert_close(steps.between, steps.after_1)
    torch.testing.assert_close(steps.taken, steps.between / 2 @ steps.attention)
    torch.testing.assert_close(steps.before_1, steps.between / 2 + steps.taken)
    torch.testing.assert_close(steps.maps, steps.before_1[1:])


WIDTH, HEIGHT = 720, 1010
COLUMNS = (270, 350, 430, 510, 590)
TOTAL = 676  # x of the sums
STYLE = """
  text { font-family: system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; font-size: 15px }
  .small { font-size: 13.5px } .title { font-size: 19px; font-weight: 600 } .bold { font-weight: 600 }
  .mid { text-anchor: middle } .end { text-anchor: end } .sharp { image-rendering: pixelated }
  .card { fill: #fcfcfb } .ink { fill: #1f1d1a } .soft { fill: #66625b } .on { fill: #ffffff }
  .box { fill: #ffffff; stroke: #b9b4aa } .own { stroke: #66625b; stroke-dasharray: 4 3; fill: none }
  .flow { stroke: #d9480f; fill: none } .heat { fill: #d9480f } .zone { fill: #efece6 }
  .clear { paint-order: stroke; stroke-width: 4px; stroke: #fcfcfb }
  @media (prefers-color-scheme: dark) {
    .card { fill: #1d1e22 } .ink { fill: #f1efea } .soft { fill: #b3aea4 }
    .box { fill: #27282d; stroke: #6a675f } .own { stroke: #b3aea4 }
    .flow { stroke: #ff8a4c } .heat { fill: #e8590c } .zone { fill: #2a2b31 }
    .clear { stroke: #1d1e22 }
  }
"""


def number(value: float) -> str:
    """Format a share with two decimals."""
    return f"{value:.2f}"


def text(x: float, y: float, words: str, kind: str = "ink") -> str:
    """Draw one line of text."""
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def label(y: float, title: str, *lines: str) -> str:
    """Draw the description of a step in the left column."""
    rest = [text(18, y + 19 * (place + 1), line, "soft small") for place, line in enumerate(lines)]
    return "".join([text(18, y, title, "ink bold"), *rest])


def row(y: float, values: Tensor, columns: tuple[int, ...] = COLUMNS) -> str:
    """Draw the relevance of tokens as boxes: the more relevance, the stronger the color."""
    drawn = []
    for x, value in zip(columns, values.tolist(), strict=True):
        box = f'x="{x - 32}" y="{y - 18}" width="64" height="36" rx="7"'
        drawn.append(f'<rect {box} class="box"/><rect {box} class="heat" opacity="{value**0.7:.3f}"/>')
        drawn.append(text(x, y + 5, number(value), "mid " + ("on bold" if value > 0.4 else "ink")))
    return "".join(drawn)


def flow(x1: float, y1: float, x2: float, y2: float, value: float, bend: float = 0) -> str:
    """Draw the flow of relevance from one place to another: the more relevance, the broader the line."""
    if value < 0.002:
        return ""
    width = max(1.2, 16 * value)
    opacity = 0.35 + 0.45 * min(1, 2 * value)
    middle = (y1 + y2) / 2
    path = f"M{x1},{y1} C{x1 + bend},{middle} {x2 + bend},{middle} {x2},{y2}"
    return f'<path d="{path}" class="flow" stroke-width="{width:.1f}" opacity="{opacity:.2f}"/>'


def total(y: float, *words: str) -> str:
    """Draw the sum of a row."""
    return "".join(text(TOTAL, y + 5 + 19 * place, line, "mid ink bold") for place, line in enumerate(words))


def pixels(image: Tensor) -> str:
    """Return the picture as a data URL of a PNG, to embed in the SVG."""
    file = BytesIO()
    shown = (image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(np.ascontiguousarray(shown)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def head(steps: Steps) -> str:
    """Draw the path from the logits to the output of block 1."""
    logits = (200, 270, 340, 410)
    drawn = [flow(x, 116, COLUMNS[0], 180, value) for x, value in zip(logits, steps.logits, strict=True)]
    drawn += ['<rect x="230" y="234" width="400" height="46" rx="9" class="zone"/>']
    drawn += [flow(COLUMNS[0], 216, x, 298, value) for x, value in zip(COLUMNS, steps.after_1, strict=True)]
    drawn += [label(254, "block 2", "the same steps as block 1")]
    drawn += [row(98, steps.logits, logits), row(198, steps.after_2), row(316, steps.after_1)]
    drawn += [label(94, "the logits", "1, shared evenly")]
    drawn += [label(178, "tokens after block 2", "the head reads the", "class token alone")]
    drawn += [label(312, "tokens after block 1")]
    names = ("class", "patch 1", "patch 2", "patch 3", "patch 4")
    drawn += [text(x, 172, name, "soft small mid") for x, name in zip(COLUMNS[1:], names[1:], strict=True)]
    drawn += [text(COLUMNS[0] - 37, 203, names[0], "soft small end")]
    return "".join([*drawn, total(98, "1.00"), total(198, "1.00"), total(316, "1.00")])


def block(steps: Steps) -> str:
    """Draw the path through block 1: MLP and residual, then attention and residual."""
    drawn = []
    for x, value in zip(COLUMNS, (steps.after_1 / 2).tolist(), strict=True):
        drawn += [flow(x - 12, 334, x - 12, 412, value), flow(x + 12, 334, x + 12, 412, value)]
        drawn += [f'<rect x="{x - 2}" y="358" width="38" height="26" rx="5" class="box"/>']
        drawn += [text(x + 17, 376, "MLP", "soft mid small")]
    drawn += [
        label(
            358,
            "MLP and its residual",
            "half through the MLP, half",
            "past it: both lead to the",
            "same token",
        )
    ]
    drawn += [row(430, steps.between), total(430, "1.00")]
    drawn += ['<rect x="230" y="520" width="400" height="138" rx="9" class="zone"/>']
    half = (steps.between / 2).tolist()
    for x, value in zip(COLUMNS, half, strict=True):
        drawn += [flow(x - 28, 448, x - 28, 742, value), flow(x + 8, 448, x + 8, 552, value)]
    for query, (x, share) in enumerate(zip(COLUMNS, half, strict=True)):
        for key, other in enumerate(COLUMNS):
            drawn += [flow(x + 8, 552, other + 8, 640, share * float(steps.attention[query, key]))]
    for x, value, taken in zip(COLUMNS, half, steps.taken.tolist(), strict=True):
        drawn += [flow(x + 8, 640, x + 8, 742, taken)]
        for y, other in ((492, value), (700, taken)):
            drawn += [text(x - 9, y, number(value), "ink small mid clear")]
            drawn += [text(x + 28, y, number(other), "ink small mid clear")]
    drawn += [label(462, "attention's residual", "each token keeps half ...")]
    drawn += [
        label(
            560,
            "attention A",
            "... and the other half goes",
            "to the tokens that it",
            "attends to, in shares of A",
        )
    ]
    drawn += [label(692, "both halves, added")]
    drawn += [label(756, "tokens before block 1", "kept + received"), row(760, steps.before_1)]
    drawn += [total(492, "0.50", "+ 0.50"), total(700, "0.50", "+ 0.50"), total(760, "1.00")]
    return "".join(drawn)


def picture(steps: Steps, image: Tensor) -> str:
    """Draw the path from the input of block 1 to the pixels."""
    source, drawn = pixels(image), []
    for place, x in enumerate(COLUMNS[1:]):
        drawn += [flow(x, 778, x, 812, float(steps.maps[place]))]
        down, right = divmod(place, 2)
        view = f"{right * PATCH} {down * PATCH} {PATCH} {PATCH}"
        drawn += [
            f'<svg x="{x - 32}" y="812" width="64" height="64" viewBox="{view}">'
            f'<image href="{source}" width="{SIZE}" height="{SIZE}" class="sharp"/></svg>'
        ]
        drawn += [text(x, 896, number(float(steps.maps[place])), "mid ink bold")]
    own = float(steps.before_1[0])
    drawn += [flow(COLUMNS[0], 778, COLUMNS[0], 812, own)]
    drawn += [f'<rect x="{COLUMNS[0] - 32}" y="812" width="64" height="64" rx="7" class="own"/>']
    drawn += [
        text(COLUMNS[0], 840, "no", "mid soft small"),
        text(COLUMNS[0], 858, "pixels", "mid soft small"),
    ]
    drawn += [text(COLUMNS[0], 896, number(own), "mid ink bold")]
    drawn += [
        label(
            830,
            "the pixels",
            "the shares of the four",
            "patches are the map; the",
            "class token is the model's",
        )
    ]
    drawn += [text(18, 906, "own, and its share ends here", "soft small"), total(891, "1.00")]
    seen = number(float(steps.maps.sum()))
    whole = f"conservation: {number(own)} at the class token + {seen} at the pixels = 1.00"
    return "".join([*drawn, text(WIDTH / 2, 950, whole, "mid ink bold")])


def main() -> None:
    """Write docs/block.svg."""
    torch.set_num_threads(1)  # more threads change the rounding of sums, and so the learned weights
    model = trained()
    image = squares(IMAGE + 1, seed=1)[0][IMAGE:].double()
    steps = followed(model, image)
    foot = "Real numbers, rounded, of a tiny ViT that names the color of a square. Method: attention rollout."
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">',
        "<title>Relevance on its way back through one transformer block</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" class="card"/>',
        text(18, 36, "Relevance on its way back through one block", "ink title"),
        text(18, 58, "from the logits, at the top, to the pixels; the broader a line, the more", "soft"),
        text(TOTAL, 58, "sum", "mid soft"),
        head(steps),
        block(steps),
        picture(steps, image),
        text(WIDTH / 2, 980, foot, "mid soft small"),
        "</svg>",
    ]
    (Path(__file__).parent / "block.svg").write_text("\n".join(parts) + "\n", "utf-8")


if __name__ == "__main__":
    main()
