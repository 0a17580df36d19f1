"""The picture of what models answered: a prompt to a row, a model to a column, as text."""

import textwrap
from collections.abc import Sequence
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D

from cfsd.report.figures.look import INK, LINE, short
from cfsd.report.shown import AS_BASE, Answer, Item, Section

SIZE, LINE_INCHES, GAP = 9, 0.163, 0.16  # of text in points; of a line of it, and between rows, in inches
HEAD, LEFT, PROMPT, COLUMN = 0.34, 0.1, 1.75, 2.8  # inches
LETTERS = 15  # of text to an inch, so few that wide ones fit
MAX_COLUMNS, MAX_LINES = 4, 7
MAX_ROWS = 6
QUIET = "#59636e"


def shown_figure(section: Section) -> Figure:
    """Return some of the prompts with the answers of the base and of up to three variants; long ones are cut."""
    names = ["", *section.names[: MAX_COLUMNS - 1]]
    rows = [_cells(item, names) for item in _taken(section.items)]
    tall = [max(map(len, row)) * LINE_INCHES + GAP for row in rows]
    width, height = LEFT + PROMPT + COLUMN * len(names), HEAD + sum(tall)
    figure = Figure((width, height))
    lefts = [LEFT, *(LEFT + PROMPT + COLUMN * column for column in range(len(names)))]

    def write(row: Sequence[Sequence[str]], top: float, weight: str = "normal") -> None:
        for left, lines in zip(lefts, row, strict=True):
            quiet = left == LEFT or lines == [AS_BASE]
            figure.text(
                left / width, 1 - top / height, "\n".join(lines), va="top", size=SIZE, linespacing=1.3,
                color=QUIET if quiet else INK, parse_math=False, weight=weight,
            )  # fmt: skip

    write([[], *([_drawable(short(name or "base"))] for name in names)], 0.08, weight="bold")
    tops = [HEAD + sum(tall[:place]) for place in range(len(rows))]
    for row, top in zip(rows, tops, strict=True):
        figure.add_artist(Line2D([0.01, 0.99], [1 - (top - 0.06) / height] * 2, color=LINE, lw=0.6))
        write(row, top)
    return figure


def _taken(items: Sequence[Item]) -> list[Item]:
    """Return at most MAX_ROWS of the prompts, in their order, of every kind one at least."""
    by_kind = [[item for item in items if item.kind == kind] for kind in dict.fromkeys(item.kind for item in items)]
    first = [item for of_kind in by_kind for item in of_kind[:1]]
    taken = [*first, *(item for of_kind in by_kind for item in of_kind[1:])][:MAX_ROWS]
    return [item for item in items if any(item is other for other in taken)]


def _cells(item: Item, names: Sequence[str]) -> list[list[str]]:
    expected = f"(expected: {item.expected})" if item.expected else ""
    prompt = _wrapped(f"{item.prompt or f'({item.label()})'}\n{expected}", PROMPT, last=4)
    return [prompt, *(_answer(item.answers[name]) for name in names)]


def _answer(answer: Answer) -> list[str]:
    return [AS_BASE] if answer.note.startswith(AS_BASE) else _wrapped(answer.text() or "(nothing)", COLUMN)


def _wrapped(text: str, inches: float, last: int = 0) -> list[str]:
    """Return the lines of `text` that fit into `inches`; of too many the first ones, and the `last`."""
    letters = int((inches - 0.15) * LETTERS)
    paragraphs = [line for line in _drawable(text).splitlines() if line.strip()]
    lines = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, letters)]
    if len(lines) <= MAX_LINES:
        return lines
    first = MAX_LINES - last
    return [*lines[: first - 1], f"{lines[first - 1][: letters - 2]} …", *lines[len(lines) - last :]]


def _drawable(text: str) -> str:
    """Return `text` with a mark for every character that the font does not have."""
    return "".join(letter if letter == "\n" or _is_known(ord(letter)) else "\ufffd" for letter in text)


@cache
def _is_known(letter: int) -> bool:
    return bool(get_font(findfont("DejaVu Sans")).get_char_index(letter))
