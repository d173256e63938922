"""A hook of mkdocs for links from pages to files outside docs/.

They lead into the repository, or are shown as paths where it has no URL.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_log = get_plugin_logger("site_links")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """mkdocs calls it with the source of each page."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    return rewritten(markdown, folder, config.repo_url or "")


def rewritten(markdown: str, folder: str, repo_url: str) -> str:
    """A page of that folder with its links into the repository; one to a file that does not exist
    is logged as a warning.
    """

    def replacement(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["target"]))
        if path.startswith("docs/"):
            return link[0]
        if not (ROOT / path).exists():
            _log.warning("%s links to '%s', which does not exist", folder, path)
        if not repo_url:
            text = link["text"].strip("`")
            return f"`{path}`" if text in (path, posixpath.basename(path)) else f"{link['text']} (`{path}`)"
        return f"[{link['text']}]({repo_url.rstrip('/')}/blob/main/{path}{link['anchor'] or ''})"

    return _LINK.sub(replacement, markdown)
