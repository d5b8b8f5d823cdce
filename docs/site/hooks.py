"""What the site needs beyond docs/: the repository's other texts, and the files that pages link to.

A page of the site keeps its place in the repository (docs/data.md, README.md) as its source, so the links that
hold there hold here, and every text exists once. Where a link leads to code or a folder, a page that shows it is made.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\]\(([^)#\s]+)")


class Shown(File):
    """A file or folder of the repository as a page: code in a box, a folder as a list."""

    def __init__(self, path: str, config: MkDocsConfig) -> None:
        super().__init__(
            path, None, config.site_dir, config.use_directory_urls,
            dest_uri=f"{path}/index.html", inclusion=InclusionLevel.NOT_IN_NAV,
        )  # fmt: skip
        self.generated_by = "hooks"
        place = ROOT / path
        if place.is_dir():
            found = sorted(p.name for p in place.iterdir() if p.is_file() and not p.name.startswith("."))
            body = "\n".join(f"- [{name}]({Path(path).name}/{name})" for name in found)
        else:
            language = {".py": "python", ".yaml": "yaml", ".toml": "toml"}.get(place.suffix, "text")
            body = f"````{language}\n{place.read_text(encoding='utf-8')}\n````"
        self._content = f"---\ntitle: {path}\nsearch: {{exclude: true}}\nhide: [toc]\n---\n\n# {path}\n\n{body}\n"

    def is_documentation_page(self) -> bool:
        """A page, whatever the name ends in."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Give the pages their places in the repository as sources, and add what they link to."""
    pages = Files([_moved(file, config) for file in files if not file.inclusion.is_excluded()])
    for name in TEXTS:
        dest = "index.html" if name == "README.md" else f"{Path(name).stem.lower()}/index.html"
        pages.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=dest))
    wanted = [page for page in pages if page.src_uri.endswith(".md")]
    while wanted:  # a folder links to its files
        page = wanted.pop()
        for link in LINK.findall(page.content_string):
            path = _inside((ROOT / page.src_uri).parent / link)
            if path and not pages.get_file_from_path(path):
                wanted.append(Shown(path, config))
                pages.append(wanted[-1])
    return pages


def _moved(file: File, config: MkDocsConfig) -> File:
    """A file of docs/ under its path in the repository, written to where it was; the theme's as they are."""
    if file.src_dir != config.docs_dir:
        return file
    return File(f"docs/{file.src_uri}", str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=file.dest_uri)


def _inside(path: Path) -> str:
    """The path in the repository of what is there; empty for links elsewhere."""
    found = path.resolve()
    return found.relative_to(ROOT).as_posix() if found.exists() and found.is_relative_to(ROOT) else ""
