"""The pages of the site that are no file of ``docs/``: a hook of MkDocs (``mkdocs.yml``, ``make docs``).

The README and its neighbours at the root, the examples and the API are made here, each at the place that the
navigation gives it; and links, written to work in the repository, are rewritten to lead to these pages.
"""

from __future__ import annotations

import ast
import logging
import os.path
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
KEYS = "config_keys.md"
_FENCED = re.compile(r"(^```.*?^```$)", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)([^)\s]*\))")
_LOADS = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=["'](?:https?:)?//[^>]*>""")
_IMPORTS = re.compile(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""")


def pages(nav: Any) -> list[str]:
    """Every page of a navigation, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [page for child in (nav.values() if isinstance(nav, dict) else nav) for page in pages(child)]


def made(page: str) -> str | None:
    """The Markdown of a page that is made here, its links as the repository has them; None for a file of ``docs/``."""
    if page in FROM_ROOT:
        return (ROOT / FROM_ROOT[page]).read_text(encoding="utf-8")
    if page == KEYS:
        return _config_keys()
    if page == "api/index.md":
        return _public_names()
    if page.startswith("api/"):
        return "\n".join(f"::: {module}" for module in modules(ROOT / source(page)))
    if page.startswith("examples/"):
        return _example(ROOT / source(page))
    return None


def source(page: str) -> str:
    """Where in the repository a page comes from: ``api/layers/linear.md -> layers/linear.py``."""
    if page in FROM_ROOT:
        return FROM_ROOT[page]
    if page == KEYS:
        return "nest_fn/config/keys.py"
    if page.startswith("examples/"):
        return f"docs/{page.removesuffix('.md')}.py"
    if not page.startswith("api/"):
        return f"docs/{page}"
    place = page.removeprefix("api/").removesuffix(".md")
    place = place if place.split("/")[0] in ("layers", "train") else f"nest_fn/{place}"
    return "nest_fn/__init__.py" if place == "nest_fn/index" else place if (ROOT / place).is_dir() else f"{place}.py"


def modules(path: Path) -> list[str]:
    """A module's import name; of a package, its own and those of all the modules in it."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return [name if name.startswith("nest_fn.") else f"nest_fn.{name}" for name in names]


def _example(path: Path) -> str:
    """An example's docstring as text, and the script whole below it."""
    code = path.read_text(encoding="utf-8")
    tree = ast.parse(code)
    text, rest = ast.get_docstring(tree), code.splitlines()[tree.body[0].end_lineno :]
    body = "\n".join(rest).strip()
    return f"# {path.name}\n\n{text}\n\n```python\n{body}\n```\n"


def _config_keys() -> str:
    """Every key of a config, as ``nest-fn config keys --markdown`` prints them."""
    from nest_fn.config.keys import all_keys, as_markdown

    text = (
        "Defaults are those of NEST-Large; `nest-fn config show nest_small` prints the values of a preset, and "
        "`nest-fn config keys PATTERN` searches this list."
    )
    return f"# Configuration keys\n\n{text}\n\n{as_markdown(all_keys())}"


def _public_names() -> str:
    """The names of ``import nest_fn``, each with a link to where it is described."""
    tree = ast.parse((ROOT / "nest_fn" / "__init__.py").read_text(encoding="utf-8"))
    lines = ["# Names of `nest_fn`", "", "| `from nest_fn import` | is described in |", "|---|---|"]
    homes: dict[str, str] = {}
    for node in ast.walk(tree):  # the imports for type checkers name them all
        if isinstance(node, ast.ImportFrom) and node.module not in (None, "__future__", "typing", "version"):
            module = node.module if node.level == 0 else f"nest_fn.{node.module}"
            homes |= {alias.name: module for alias in node.names if module.startswith("nest_fn.")}
    for name, home in sorted(homes.items(), key=lambda pair: pair[0].lower()):
        lines.append(f"| [`{name}`][{home}.{name}] | [`{home}`][{home}] |")
    return "\n".join(lines)


def rewritten(markdown: str, page: str, nav: list[str]) -> str:
    """A page's links to files of the repository as links to their pages; code blocks stay as they are."""
    pages_of = {source(other): other for other in nav}
    here = PurePosixPath(source(page)).parent

    def lead(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if ":" in target:  # another host, an address
            return match.group()
        wanted = os.path.normpath(here / target)
        place = pages_of.get(wanted, wanted.removeprefix("docs/") if wanted.startswith("docs/") else None)
        return (
            match.group() if place is None else f"{before}{os.path.relpath(place, PurePosixPath(page).parent)}{after}"
        )

    pieces = _FENCED.split(markdown)
    return "".join(piece if _FENCED.fullmatch(piece) else _LINK.sub(lead, piece) for piece in pieces)


def foreign(html: str) -> list[str]:
    """What a page would load from another host when it is looked at."""
    return [tag for tag in _LOADS.findall(html) if 'rel="canonical"' not in tag]


def on_files(files: Any, config: Any) -> Any:
    """MkDocs asks for the site's files: those of ``docs/`` and what is made here."""
    from mkdocs.structure.files import File

    for page in pages(config["nav"]):
        text = made(page)
        if text is not None:
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """MkDocs asks for a page's text before it is rendered."""
    return rewritten(markdown, page.file.src_uri, pages(config["nav"]))


def on_post_build(config: Any) -> None:
    """Count the pages; none of them may load anything from another host."""
    from mkdocs.exceptions import PluginError

    site = Path(config["site_dir"])
    written = sorted(site.rglob("*.html"))
    wrong = [f"{path.relative_to(site)}: {tag}" for path in written for tag in foreign(path.read_text("utf-8"))]
    wrong += [str(path.relative_to(site)) for path in site.rglob("*.css") if _IMPORTS.search(path.read_text("utf-8"))]
    if wrong:
        raise PluginError("loads from another host: " + "; ".join(wrong[:5]))
    logging.getLogger("mkdocs.hooks").info("%d pages, from %s", len(written), site / "index.html")
