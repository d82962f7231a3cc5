"""What the site does to pages while it is built."""

from __future__ import annotations

import posixpath
import re

UNMEASURED = "*Not measured yet.*"  # in the place of a block whose numbers do not exist
_IMAGE = re.compile(r"^!\[[^\]]*\]\((?P<path>[^)]+)\)$", re.MULTILINE)


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Leave figures out that nobody could draw: on a page that says so, those without a file.

    On a page whose numbers are there, a figure that is missing stays an error.
    """
    if UNMEASURED not in markdown:
        return markdown

    def drawn(match: re.Match) -> str:
        folder = posixpath.dirname(page.file.src_uri)
        path = posixpath.normpath(posixpath.join(folder, match["path"]))
        return match[0] if files.get_file_from_path(path) else ""

    return _IMAGE.sub(drawn, markdown)
