"""Show the doctests of docstrings as code: mkdocstrings looks for `Examples:`, but they say `Example:`."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """An extension that renames the section of each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of a module, class or function."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
