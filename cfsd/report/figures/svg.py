"""How a figure becomes part of a page: an SVG element, drawn by matplotlib without pyplot."""

import io
import re
from collections.abc import Mapping
from html import escape

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from cfsd.report.figures.look import INK, LINE


def embedded(sections: Mapping[str, Mapping[str, Figure]]) -> dict[str, dict[str, Markup]]:
    """Return the figures of each section of a page as SVG, which a template may trust."""
    return {
        section: {name: Markup(svg_of(f, f"{section} {name}", f"{section}: {name}")) for name, f in figures.items()}
        for section, figures in sections.items()
    }


def svg_of(figure: Figure, name: str, description: str) -> str:
    """Return `figure` as an SVG element for a page; `name` keeps its ids apart from those of other figures.

    Text stays text, and its colour is the page's. Nothing in it refers to anything outside.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, rest = text.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    width = figure.get_figwidth() * 96  # CSS pixels per inch
    head = f'<svg {view[0]} role="img" style="max-width:{width:.0f}px"><title>{escape(description)}</title>'
    return head + rest.replace(INK, "currentColor").replace(LINE, "var(--line)")
