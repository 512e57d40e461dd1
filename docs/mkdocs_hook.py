"""What the site needs beyond docs/: an MkDocs hook, see mkdocs.yml.

- Pages that lie elsewhere in the repository (`PAGES`), so that they read well there and here.
- Files that pages link to, such as recipes and results, copied below `repository/`.
- Formulas as MathML, so that no script has to be loaded.

Links are written for the repository; here they are translated to the site.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "recipes/README.md": "recipes.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
COPIES = "repository/"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^()\s#]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and the files that pages link to, and those that these link to."""
    waiting = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        target = site_path(path)
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            waiting += links(path)
    return files


def links(path: str) -> list[str]:
    """The files of the repository that a page links to, as paths from its root."""
    text = CODE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    folder = posixpath.dirname(path)
    linked = {posixpath.normpath(posixpath.join(folder, target)) for target in LINK.findall(text)}
    return sorted(target for target in linked if (ROOT / target).is_file())


def site_path(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path in PAGES:
        return PAGES[path]
    is_site = path.startswith("docs/") and not path.endswith(".py")
    return path.removeprefix("docs/") if is_site else COPIES + path


def repository_path(uri: str) -> str:
    """The other way round."""
    for path, page in PAGES.items():
        if uri == page:
            return path
    return uri.removeprefix(COPIES) if uri.startswith(COPIES) else f"docs/{uri}"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translates relative links, outside code."""
    here = page.file.src_uri
    folder = posixpath.dirname(repository_path(here))

    def translated(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / target).is_file():
            return match[0]  # MkDocs says what is wrong with it
        return posixpath.relpath(site_path(target), posixpath.dirname(here) or ".")

    pieces, end = [], 0
    for code in CODE.finditer(markdown):
        pieces += [LINK.sub(translated, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, LINK.sub(translated, markdown[end:])])


def on_page_content(content: str, **_) -> str:
    """Turns the formulas that arithmatex has marked into MathML."""

    def mathml(match: re.Match) -> str:
        return convert(html.unescape(match[3]), display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(mathml, content)
