"""Links from the documentation to files of the repository: in the site they lead to copies.

So the same Markdown works in the repository and in the site, and ``mkdocs build --strict`` sees every dead link.
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
    """Adds every file that a page links to outside of docs/."""
    wanted = {target for page in files.documentation_pages() for target in _outside(page)}
    for target in sorted(wanted):
        if (_ROOT / target).is_file():
            # As text whatever it is: a browser shows it, and MkDocs does not take Markdown for a page.
            files.append(File.generated(config, f"{_COPIES}/{target}.txt", abs_src_path=str(_ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads those links to the copies. A link to what is not there stays, and is MkDocs' to complain of."""

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
    """The path in the repository of a link that leaves docs/; None for one that does not."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith(("docs/", "../")) else path
