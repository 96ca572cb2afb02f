"""What all pages share: the templates, and the colours that they share."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vitx.cli.embedding import filter_table
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
