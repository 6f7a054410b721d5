"""The site of ``make docs``, as far as it can be checked without MkDocs: its navigation is whole, no link is dead."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
DOCS = ROOT / "docs"
IN_REPOSITORY = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), ROOT / "tests" / "reference" / "README.md"]


def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOK = _module(SITE["hooks"][0])
NAV = HOOK.pages(SITE["nav"])
_CODE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    """A page of the site as Markdown, made or read."""
    made = HOOK.made(page)
    return HOOK.rewritten((DOCS / page).read_text(encoding="utf-8") if made is None else made, page, NAV)


def links(markdown: str) -> list[tuple[str, str]]:
    """Path and anchor of every link and picture that stays in the repository; code is left out."""
    found = re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", re.sub(r"``?[^`\n]*``?", "code", _CODE.sub("", markdown)))
    return [(path, anchor) for path, anchor in found if ":" not in path]


def anchors(markdown: str) -> set[str]:
    """The places of a page that a link can name: headings as GitHub names them, and ``<a id=...>``."""
    bare = _CODE.sub("", markdown)
    headings = [
        re.sub(r"<[^>]+>|\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in re.findall(r"^#+ +(.*)$", bare, re.MULTILINE)
    ]
    named = {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
    return named | set(re.findall(r'<a id="([^"]+)">', bare))


def dead(markdown: str, path: Path) -> list[str]:
    """Links of a text at ``path`` that lead to no file, or to a place that a page does not have."""
    found = []
    for target, anchor in links(markdown):
        file = (path.parent / target).resolve() if target else path
        there = not target or (file.exists() and file.is_relative_to(ROOT))
        if there and anchor and file.suffix == ".md":
            there = anchor in anchors(file.read_text(encoding="utf-8") if target else markdown)
        found += [] if there else [f"{target}#{anchor}" if anchor else target]
    return found


@pytest.mark.parametrize("path", IN_REPOSITORY, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_in_the_repository(path: Path) -> None:
    assert not dead(path.read_text(encoding="utf-8"), path)


def test_every_page_of_the_navigation_is_there_once() -> None:
    assert len(NAV) == len(set(NAV))
    assert not [page for page in NAV if not (ROOT / HOOK.source(page)).exists()]
    assert all(text_of(page).strip() for page in NAV)


def test_every_page_and_example_is_in_the_navigation() -> None:
    files = {str(path.relative_to(ROOT)) for path in [*DOCS.rglob("*.md"), *(DOCS / "examples").glob("*.py")]}
    assert files | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {HOOK.source(page) for page in NAV}


def test_every_public_module_is_in_the_api() -> None:
    described = re.findall(r"^::: ([\w.]+)$", "\n".join(text_of(page) for page in NAV if page.startswith("api/")), re.M)
    files = [*(ROOT / "layers").glob("[!_]*.py"), *(ROOT / "nest_fn").glob("[!_]*.py")]
    packages = {path.parent for path in (ROOT / "nest_fn").glob("*/__init__.py") if not path.parent.is_symlink()}
    files += [path for package in packages for path in package.rglob("*.py")]
    wanted = {module for path in files for module in HOOK.modules(path)} - {"nest_fn.version"}
    assert len(wanted) > 50
    assert wanted <= set(described), f"not in mkdocs.yml: {sorted(wanted - set(described))}"
    assert len(described) == len(set(described))


def test_links_of_the_site_lead_to_its_pages() -> None:
    pages = set(NAV)
    pictures = {str(path.relative_to(DOCS)) for kind in ("png", "svg") for path in DOCS.rglob(f"*.{kind}")}
    for page in NAV:
        for target, _ in links(text_of(page)):
            place = (DOCS / page).parent.joinpath(target).resolve().relative_to(DOCS) if target else Path(page)
            assert str(place) in pages | pictures, f"{page}: {target}"


def test_the_face_is_listed_whole() -> None:
    face = (ROOT / "nest_fn" / "__init__.py").read_text(encoding="utf-8")
    names = re.findall(r'^    "(\w+)",$', face, flags=re.MULTILINE)
    listed = text_of("api/index.md")
    assert len(names) > 15
    assert not [name for name in names if f"`{name}`" not in listed]


def test_nothing_is_loaded_from_another_host() -> None:
    assert SITE["theme"]["name"] == "readthedocs" and SITE["theme"]["highlightjs"] is False
    assert HOOK.foreign('<script src="https://host/x.js"></script><link href="//host/x.css"><img src="http://h/x.png">')
    assert not HOOK.foreign('<script src="js/x.js"></script><a href="https://host/">text</a><img src="../x.png">')


def test_a_field_is_described_by_its_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    griffe = ModuleType("griffe")
    griffe.Extension = griffe.Attribute = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "griffe", griffe)
    comment_of = _module("docs/field_comments.py").comment_of
    assert comment_of("    width: int = 3  # bins") == "bins"
    assert comment_of('    name: str = "#"  # type: ignore[assignment]  # [B, T]  # Hz') == "[B, T]  # Hz"
    assert [comment_of(line) for line in ("x = 1", 'x = "# no"', "x = (", "x: int  # type: ignore[misc]")] == [""] * 4


@pytest.mark.parametrize("link", ["[a](none.md)", "[a](design.md#nowhere)", "[a](#nowhere)", "![a](none.png)"])
def test_rule_fires(link: str) -> None:
    assert dead(f"# Title\n\n{link}\n", DOCS / "page.md")


def test_rule_allows_what_resolves() -> None:
    text = "# A title: `x`!\n[a](design.md#one-page) [b](#a-title-x) [c](../README.md) [d](https://host/)\n`x[0](y)`\n"
    assert not dead(text, DOCS / "page.md")


def test_links_are_rewritten_outside_of_code() -> None:
    text = (
        "[a](docs/design.md#x) [b](nest_fn/model.py) [c](CHANGELOG.md) [d](https://host/docs/)\n```\n[a](docs/x)\n```\n"
    )
    wanted = "[a](design.md#x) [b](api/model.md) [c](changelog.md) [d](https://host/docs/)\n```\n[a](docs/x)\n```\n"
    assert HOOK.rewritten(text, "index.md", NAV) == wanted
    assert HOOK.rewritten("[a](../README.md)", "design.md", NAV) == "[a](index.md)"
