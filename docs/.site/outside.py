"""Links from the documentation to files of the repository. In the site they lead to copies of these files.

So the same Markdown works in the repository and in the site, and ``mkdocs build --strict`` reports every dead link.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parents[2]
_COPIES = "repository"
_LINK = re.compile(r"\]\((\.\./[^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page links to."""
    wanted = {target for page in files.documentation_pages() for target in _outside(page)}
    for target in sorted(wanted):
        if (_ROOT / target).is_file():
            # As text, so that a browser shows the file and MkDocs does not render Markdown as a page.
            files.append(File.generated(config, f"{_COPIES}/{target}.txt", abs_src_path=str(_ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point those links to the copies. A dead link stays as it is, so that MkDocs reports it."""

    def replace(match: re.Match[str]) -> str:
        target = _target(page.file.src_uri, match[1])
        if target is None or not (_ROOT / target).is_file():
            return match[0]
        return f"]({posixpath.relpath(f'{_COPIES}/{target}.txt', posixpath.dirname(page.file.src_uri) or '.')})"

    return _LINK.sub(replace, markdown)


def _outside(page: File) -> set[str]:
    targets = (_target(page.src_uri, match[1]) for match in _LINK.finditer(page.content_string))
    return {target for target in targets if target is not None}


def _target(page: str, link: str) -> str | None:
    """Return the path in the repository of a link that leaves docs/, or ``None`` if it does not."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith(("docs/", "../")) else path
