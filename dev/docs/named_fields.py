"""An extension of griffe that turns descriptions of arguments and fields in docstrings into lists.

The docstrings of the library have `name: description.` in running text. A name is recognised if it is a parameter of
the function, a field of the class, or a parameter of a method of the class.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class NamedFields(griffe.Extension):
    """Rewrites the docstrings of functions and classes as Markdown."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        _rewrite(func, {parameter.name.lstrip("*") for parameter in func.parameters} | _fields_of(func.parent))

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        _rewrite(cls, _fields_of(cls))


def _fields_of(owner: Any) -> set[str]:
    """Names of the attributes of a class; empty for a module."""
    if not isinstance(owner, griffe.Class):
        return set()
    return {name for name, member in owner.members.items() if not member.is_alias and member.is_attribute}


def _rewrite(owner: griffe.Function | griffe.Class, names: set[str]) -> None:
    if owner.docstring is not None and names:
        owner.docstring.value = listed(owner.docstring.value, names)


def listed(text: str, names: set[str]) -> str:
    """`text` in which every `name: ...` and `name, name: ...` of `names` is a list item."""
    one = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    item = re.compile(rf"(?:^|(?<=[.;)]\s))((?:{one})(?:, (?:and )?(?:{one}))*):\s", re.MULTILINE)
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        indented = paragraph.startswith("    ")
        paragraphs.append(paragraph if indented else _with_items(paragraph, item))
    return "\n\n".join(paragraphs)


def _with_items(paragraph: str, item: re.Pattern[str]) -> str:
    head, *rest = item.split(paragraph)
    if not rest:
        return paragraph
    # text after the fields, such as "Raises ValueError if ...", becomes a separate paragraph
    items, tail = [], ""
    for names, said in zip(rest[::2], rest[1::2], strict=True):
        said, _, after = _cut(said)
        code = ", ".join(f"`{name.strip()}`" for name in re.split(r", (?:and )?", names))
        items.append(f"- **{code}**: {' '.join(said.split())}")
        tail = after or tail
    parts = [head.strip(), "\n".join(items), tail.strip()]
    return "\n\n".join(part for part in parts if part)


def _cut(said: str) -> tuple[str, str, str]:
    """Split where the fields end: at a line beginning with Paper, or a sentence beginning with Raises or Returns."""
    match = re.search(r"(?:(?<=[.;)])\s+(?=(?:Raises|Returns|Times are) )|\n(?=Paper: ))", said)
    return (said, "", "") if match is None else (said[: match.start()], "\n", said[match.end() :])
