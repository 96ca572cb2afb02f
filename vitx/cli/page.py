"""What all pages share: the templates, and how what changes with a slider is told to them."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vitx.cli.embedding import Shown, filter_table
from vitx.pictures.render import OVERLAY_STRENGTH


def fill(template: str, **values: Any) -> str:
    """Fills a template of the folder `pages`, and returns HTML."""
    templates = Environment(
        loader=PackageLoader("vitx.cli", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tables = {colormap: filter_table(colormap) for colormap in values["colormaps"]}
    page = templates.get_template(f"{template}.html.jinja")
    return page.render(tables=tables, strength=OVERLAY_STRENGTH, **values)


def beside(shown: Shown) -> list[list[Any]]:
    """Returns what stands beside each frame: the caption, whether it is right, and which maps are flat."""
    flat = [[place for place, of in enumerate(map_) if of] for map_ in zip(*shown.flat.values(), strict=True)]
    captions = zip(shown.said, flat, strict=True)
    return [[str(caption), caption.right, *places] for caption, places in captions]
