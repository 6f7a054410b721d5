"""Shows the comment beside a field (its unit, axes or choices) in the API: an extension of Griffe (``mkdocs.yml``)."""

from __future__ import annotations

import io
import re
import tokenize
from typing import Any

import griffe

_FOR_TOOLS = re.compile(r"#\s*(type: ignore|noqa|fmt:)\S*\s*")


def comment_of(line: str) -> str:
    """``x: int = 3  # type: ignore[assignment]  # bins -> bins``."""
    try:
        tokens = [token.string for token in tokenize.generate_tokens(io.StringIO(line.strip()).readline)]
    except tokenize.TokenError:  # the line opens a bracket
        return ""
    comments = [token for token in tokens if token.startswith("#")]
    return _FOR_TOOLS.sub("", comments[0]).removeprefix("#").strip() if comments else ""


class FieldComments(griffe.Extension):
    """An attribute without a docstring is described by the comment that ends its line."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Griffe has read an attribute."""
        if attr.docstring is None and attr.lines:
            text = comment_of(attr.lines[-1])
            if text:
                attr.docstring = griffe.Docstring(_literal(text), lineno=attr.lineno, parent=attr)


def _literal(text: str) -> str:
    """A comment is no Markdown: what would be read as such is shown as it stands."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
