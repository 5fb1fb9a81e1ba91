"""The pages of the site that lie outside of docs/, and links between all of them: hooks of mkdocs, see mkdocs.yml."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    **{n: n for n in ("README.zh-CN.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/results.md")},
}
"""Pages of the repository by where they are on the site."""
_CODE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)\s*$)", re.S | re.M)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside of docs/."""
    from mkdocs.structure.files import File

    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to where pages are on the site. Files that it has not are named, not linked."""
    own = PurePosixPath(page.file.src_uri)
    source = next((s for s, place in OUTSIDE.items() if place == str(own)), f"docs/{own}")
    parts = _CODE.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(lambda m: _link(m, source, own), part) for i, part in enumerate(parts))


def _link(found: re.Match[str], source: str, own: PurePosixPath) -> str:
    text, target = found.groups()
    path, mark, anchor = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return found[0]
    named = os.path.normpath(PurePosixPath(source).parent / path)
    if named in OUTSIDE:
        place = OUTSIDE[named]
    elif named.startswith("docs/") and (ROOT / named).is_file():
        place = named.removeprefix("docs/")
    elif (ROOT / named).exists():
        return text if named in text else f"{text} (`{named}`)"
    else:
        return found[0]  # which the strict build refuses
    return f"[{text}]({os.path.relpath(place, own.parent)}{mark}{anchor})"
