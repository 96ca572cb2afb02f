"""Pages of one file: the templates that they are filled from, and pictures as a part of them."""

import base64
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template
    from PIL import Image


def template(package: str, folder: str, name: str) -> "Template":
    """Load a template of HTML that a package holds, in which a name without a value is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(package, folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


def data_uri(picture: "Image.Image", kind: str, **options: Any) -> str:
    """Encode a picture as Pillow's `kind`, with its options, into an address that holds all its bytes."""
    written = BytesIO()
    picture.save(written, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(written.getvalue()).decode()}"
