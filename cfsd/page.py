"""Pages: how a template beside this file becomes one HTML file that loads nothing from anywhere."""

from pathlib import Path
from typing import Any

from cfsd.table import number, shown


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write `template`, filled with `values`, to `path`; all texts are escaped but those marked as markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "shown": shown, "visible": _visible, "clip": _clip, "whole": _whole}
    page = environment.get_template(template).render(**values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _visible(text: str) -> str:
    """Return `text` with control characters as pictures of themselves, so that no page swallows them."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)


def _clip(text: str, start: int, end: int) -> str:
    """Return at most `start` first and `end` last characters of `text`."""
    return text if len(text) <= start + end + 5 else f"{text[:start]} […] {text[len(text) - end :]}"


def _whole(count: int) -> str:
    return f"{count:,}"
