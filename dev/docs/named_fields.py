"""An extension of griffe: in docstrings, what is said of arguments and fields by name becomes a list.

The docstrings of the library say `name: what it is.` in running lines. A name counts if it is a parameter of the
function, a field of the class, or an argument of the class's own functions.
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
    """Names of a class's attributes; a module has none that its functions speak of."""
    if not isinstance(owner, griffe.Class):
        return set()
    return {name for name, member in owner.members.items() if not member.is_alias and member.is_attribute}


def _rewrite(owner: griffe.Function | griffe.Class, names: set[str]) -> None:
    if owner.docstring is not None and names:
        owner.docstring.value = listed(owner.docstring.value, names)


def listed(text: str, names: set[str]) -> str:
    """`text` with every `name: ...` and `name, name: ...` of `names` as an item of a list."""
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
    # what follows the fields, such as "Raises ValueError if ...", is a paragraph of its own
    items, tail = [], ""
    for names, said in zip(rest[::2], rest[1::2], strict=True):
        said, _, after = _cut(said)
        code = ", ".join(f"`{name.strip()}`" for name in re.split(r", (?:and )?", names))
        items.append(f"- **{code}**: {' '.join(said.split())}")
        tail = after or tail
    parts = [head.strip(), "\n".join(items), tail.strip()]
    return "\n\n".join(part for part in parts if part)


def _cut(said: str) -> tuple[str, str, str]:
    """Where a line begins with Raises, Returns or Paper, or a sentence with Raises or Returns, the fields end."""
    match = re.search(r"(?:(?<=[.;)])\s+(?=(?:Raises|Returns|Times are) )|\n(?=Paper: ))", said)
    return (said, "", "") if match is None else (said[: match.start()], "\n", said[match.end() :])
