"""A hook of mkdocs that adds pages and images outside of docs/ to the site, under their path in the repository.

For example, `results/testbed/tables/tradeoff.md` becomes a page, and its relative links work. Links in pages of docs/
are relative to the repository (`../results/...`), so that they also work in a file browser; this hook turns them into
links between pages. A link to a file that is not part of the site is an error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"
PATTERNS = (
    *("results/**/*.md", "results/**/*.png", "speed/results/**/*.md", "speed/results/**/*.png"),
    *("adaskip/testbed/models/*/README.md", "adaskip/testbed/models/*/curve.svg"),
    *("dev/LOG.md", "CHANGELOG.md", "CONTRIBUTING.md"),
)
UNSAVED = ("results/testbed/runs/", "results/testbed/observations/measurements/", "results/runs/")
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's files to those of docs/."""
    for path in sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)}):
        uri = path.relative_to(ROOT).as_posix()
        if not uri.startswith(UNSAVED):
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    uri = page.file.src_uri
    from_docs = page.file.generated_by is None
    place = posixpath.dirname(DOCS + uri if from_docs else uri)

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(place, match["path"]))
        inside = target.removeprefix(DOCS)
        if files.get_file_from_path(inside) is None:
            raise PluginError(f"{uri} links to {match['path']}, which is not a page or image of the site ({target})")
        return posixpath.relpath(inside, posixpath.dirname(uri) or ".") + (match["anchor"] or "")

    return LINK.sub(rewritten, markdown)
