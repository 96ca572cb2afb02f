"""Brings what pages link to outside `docs/` to the site: relative links work there and on a code host.

A hook of mkdocs. The README and its like become pages, any other file a copy in the folder `repository`.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_FROM_ROOT = re.compile(r"(?<=\]\()(?!https?:|#)")  # where a link begins, in a page that lies beside `docs/`
_LINK = re.compile(r"(?<=\]\()\.\./([\w./]+)")  # as ../configs/demo.yaml, in a page that lies in docs/ itself


def on_files(files: Files, config: Any) -> Files:
    """Adds the README and its like, and the files that pages link to."""
    root = Path(config.config_file_path).parent
    for name, page in PAGES.items():
        content = _FROM_ROOT.sub("../", (root / name).read_text("utf-8")).replace("](../docs/", "](")
        files.append(File.generated(config, page, content=content))
    linked = {name for page in _pages(files) for name in _LINK.findall(page.content_string)}
    for name in sorted(linked - set(PAGES)):
        if (root / name).is_file():
            files.append(File.generated(config, _place(name), content=(root / name).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points the links there; one to a file that does not exist stays as it is, and mkdocs complains."""

    def there(link: re.Match[str]) -> str:
        return _place(link[1]) if files.get_file_from_path(_place(link[1])) else link[0]

    return _LINK.sub(there, markdown) if "/" not in page.file.src_uri else markdown


def _pages(files: Files) -> list[File]:
    return [page for page in files.documentation_pages() if "/" not in page.src_uri]


def _place(name: str) -> str:
    return PAGES.get(name, f"repository/{name}.txt")  # text is shown, not downloaded
