"""Text that a model or a user may have written, in Markdown: it is shown, and does nothing."""

import re

ACTING = re.compile(  # an escape, HTML, links and images, definitions of links, bare addresses
    r"\\|<(?=[A-Za-z/!?])|\](?=[(\[:])|(?<=:)/(?=/)|(?<=www)\."
)


def inert(text: str) -> str:
    """Return `text` without links, images and HTML: what would act is shown as it is. Plain words stay as they are."""
    return ACTING.sub(r"\\\g<0>", text)


def plain(text: str) -> str:
    """Return `text` as one line that Markdown shows and does not obey."""
    return inert(" ".join(text.split()))


def cell(text: str) -> str:
    """Return `text` so that it stays in one cell of a table, and does nothing there."""
    return plain(text).replace("|", "\\|")


def row(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(map(cell, cells))} |"


def fenced(text: str, language: str = "") -> str:
    """Return `text` as a block of code, whose fence is longer than any within it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
