"""How this library's docstrings become Markdown, for the API pages.

They are written to be read in an editor: `Numerics: text` is a paragraph with a name, an entry of a
list may name several arguments or go on at its own indentation, and `<a, b>` is a product. Google
style, as its parser takes it, reads the first as the title of a box, breaks the second, and a
browser swallows the third.
"""

from __future__ import annotations

import re

import griffe

# sections whose entries are "name: text"
_LISTS = ("Args", "Attributes", "Raises")
_SECTIONS = (*_LISTS, "Returns", "Yields", "Examples")
_NAMED = re.compile(r"(?P<name>[A-Z][a-z]+(?: [a-z]+)?): +(?P<text>\S.*)")
_ENTRY = re.compile(r"(?P<names>[\w*.]+(?:, [\w*.]+)*): ")
_NEXT_ENTRY = re.compile(r"(?<=\.) (?=[a-z]\w*(?:, [a-z]\w*)*: )")
_TAG = re.compile(r"(`[^`]*`)|<(?=[a-zA-Z/])")


def as_markdown(docstring: str, returns: str | None = None) -> str:
    """`docstring`, cleaned of its indentation, with named paragraphs and whole entries.

    Args:
        returns: the annotation of what is returned, put in front of its description: the parser
            would take for a type whatever stands before the first colon.
    """
    first, *rest = docstring.splitlines()
    lines = [_escaped(first)]
    section = None  # heading of the list that a line belongs to
    named = False  # inside a named paragraph
    for line in rest:
        text, margin = line.strip(), len(line) - len(line.lstrip())
        if section or margin < 4:  # elsewhere it is code
            line, text = _escaped(line), _escaped(text)
        if margin == 0 and text:
            section = text[:-1] if text.endswith(":") and text[:-1] in _SECTIONS else None
            match = _NAMED.fullmatch(text)
            named = bool(match)
            if match:
                lines += ["", f"**{match['name']}:** {match['text']}"]
                continue
        named = named and bool(text)
        if named:
            lines.append(text)
        elif section in _LISTS and margin == 4:
            lines += _entries(text, section)
        elif returns and lines[-1] == "Returns:":
            lines.append(f"    {returns}: {text}")
        else:
            lines.append(line)
    return "\n".join(lines)


def _entries(text: str, section: str) -> list[str]:
    """The entries in one line of a list; without a name, it goes on with the one before."""
    if not _ENTRY.match(text):
        return [f"        {text}"]
    found = _NEXT_ENTRY.split(text) if section != "Raises" else [text]
    if section == "Attributes":  # there the parser takes a name for all up to the first space
        found = [
            _ENTRY.sub(lambda m: m[0].replace(", ", ",\N{NO-BREAK SPACE}"), e, count=1)
            for e in found
        ]
    return [f"    {entry}" for entry in found]


def _escaped(text: str) -> str:
    return _TAG.sub(lambda match: match[1] or "&lt;", text)


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is collected."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            returns = str(obj.returns) if obj.is_function and obj.returns else None
            obj.docstring.value = as_markdown(obj.docstring.value, returns)
