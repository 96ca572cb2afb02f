"""Add files outside `docs/` to the site, so that relative links work there and on a code host.

A hook of mkdocs. The files in `PAGES` become pages; any other file is copied to the folder `repository`.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "benchmarks/RESULTS.md": "results_in_full.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([\w./-]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files in `PAGES`, and the files that pages link to."""
    root = Path(config.config_file_path).parent
    pages = {page.src_uri: page.content_string for page in files.documentation_pages()}
    named = {f"docs/{uri}": text for uri, text in pages.items() if "/" not in uri}
    named |= {name: (root / name).read_text("utf-8") for name in PAGES}
    linked = {_place(name, link) for name, text in named.items() for link in _LINK.findall(text)}
    for name in sorted(linked - set(PAGES)):
        if not name.startswith("docs/") and (root / name).is_file():
            files.append(File.generated(config, _on_site(name), content=(root / name).read_bytes()))
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_pointed(named[name], name, files)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links of a page of `docs/` to the site."""
    uri = page.file.src_uri
    return markdown if "/" in uri or uri in PAGES.values() else _pointed(markdown, f"docs/{uri}", files)


def _pointed(markdown: str, name: str, files: Files) -> str:
    """Point links to their places on the site; mkdocs warns about those that lead nowhere."""

    def there(link: re.Match[str]) -> str:
        place = _on_site(_place(name, link[1]))
        known = place in PAGES.values() or files.get_file_from_path(place)
        return place if known else link[0]

    return _LINK.sub(there, markdown)


def _place(name: str, link: str) -> str:
    """Return the path in the repository that a link in a file leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _on_site(name: str) -> str:
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return PAGES.get(name, f"repository/{name}.txt")  # browsers show text, and do not download it
