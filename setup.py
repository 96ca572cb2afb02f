"""The description of vitx on a package index, where relative links of the README lead nowhere.

All other settings are in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

ADDRESS = ""  # of the repository once it is known, as https://github.com/OWNER/vitx
_LINK = re.compile(r"(?P<picture>!?)(?P<text>\[[^]]*\])\((?!https?:|#)(?P<path>[^)]+)\)")


def description(address: str = ADDRESS) -> str:
    """Returns the README, with absolute links and pictures where the address is known."""
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    if not address:
        return readme

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}{link['text']}({address}/{kind}/main/{link['path']})"

    return _LINK.sub(absolute, readme)


if __name__ == "__main__":
    setup(long_description=description(), long_description_content_type="text/markdown")
