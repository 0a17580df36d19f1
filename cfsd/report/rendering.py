"""Pages: how a template beside this file becomes one file that loads nothing from anywhere."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cfsd.report.markdown import cell, fenced, plain
from cfsd.report.table import number, shown

MARKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write `template`, filled with `values`, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rendered(template, **values), encoding="utf-8")


def rendered(template: str, **values: Any) -> str:
    """Return `template` filled with `values`; in HTML all texts are escaped but those marked as markup."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number, "shown": shown, "visible": _visible, "clip": _clip, "whole": _whole, "cell": cell,
        "token": _token, "plain": plain, "fenced": fenced,
    }  # fmt: skip
    return environment.get_template(template).render(**values)


def _visible(text: str) -> str:
    """Return `text` with control characters as pictures of themselves, so that no page swallows them."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)


def _token(text: str) -> str:
    """Return a token with marks in place of spaces and ends of lines, of which many tokens consist."""
    return _visible(text.translate(MARKS))


def _clip(text: str, start: int, end: int) -> str:
    """Return at most `start` first and `end` last characters of `text`."""
    return text if len(text) <= start + end + 5 else f"{text[:start]} […] {text[len(text) - end :]}"


def _whole(count: int) -> str:
    return f"{count:,}"
