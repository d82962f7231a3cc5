"""What the site does to pages while it is built."""

from __future__ import annotations

import posixpath
import re

from pae.prompts import METHODS, PromptFamily

FAMILIES = "<!-- every family -->"  # in the place of their sections
UNMEASURED = "*Not measured yet.*"  # in the place of a block whose numbers do not exist
_IMAGE = re.compile(r"^!\[[^\]]*\]\((?P<path>[^)]+)\)$", re.MULTILINE)


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Put the sections of all prompt families in, and leave figures out that nobody could draw: on
    a page that says so, those without a file.

    On a page whose numbers are there, a figure that is missing stays an error.
    """
    markdown = markdown.replace(FAMILIES, families())
    if UNMEASURED not in markdown:
        return markdown

    def drawn(match: re.Match) -> str:
        folder = posixpath.dirname(page.file.src_uri)
        path = posixpath.normpath(posixpath.join(folder, match["path"]))
        return match[0] if files.get_file_from_path(path) else ""

    return _IMAGE.sub(drawn, markdown)


def families() -> str:
    """A section per file of registered prompt families: its docstring, and each class."""
    files: dict[str, list[type[PromptFamily]]] = {}
    for family in METHODS.values():
        files.setdefault(family.__module__, []).append(family)
    sections = []
    for module, found in sorted(files.items()):
        name = module.rpartition(".")[2].replace("_", "-").upper()
        sections.append(f"## {name}\n\n::: {module}")
        sections.append(
            "    options: {members: false, show_root_heading: false, show_root_toc_entry: false}\n"
        )
        for family in found:
            own = [n for n in vars(family) if n[0] != "_" and not hasattr(PromptFamily, n)]
            members = f"[{', '.join(own)}]" if own else "false"
            sections.append(f"::: pae.prompts.{family.__name__}")
            sections.append(f"    options: {{heading_level: 3, members: {members}}}\n")
    return "\n".join(sections)
