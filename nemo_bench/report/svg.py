"""How figures look: inline SVG that follows the colours of the page around it.

Axes and text are drawn in a stand-in colour that becomes ``currentColor``, so a figure reads on light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

import matplotlib.style
from matplotlib.figure import Figure

from nemo_bench.records.results import CellResults
from nemo_bench.report.texts import FOLDER, TEXTS

INK = "#010203"
"""Stands for the colour of text."""
_COLORS = (INK, *TEXTS["palette"].values())
_MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))
_STYLE = FOLDER / "figures.mplstyle"
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_RULES = (
    (r"<style.*?</style>", ""),
    (r"<!--.*?-->\s*", ""),
    (r'\bid="', r'id="{name}-'),
    (r'xlink:href="#', r'href="#{name}-'),
    (r"url\(#", r"url(#{name}-"),
)
"""Rewrites so that figures share a page: no style for everything, ids of their own."""


@dataclass(frozen=True)
class Look:
    """Colour and marker (matplotlib's) and the marker as a character."""

    color: str
    marker: str
    glyph: str

    @property
    def css(self) -> str:
        """The colour on the page, which defines one variable for each name of the palette."""
        return _page_colors(self.color)


def looks(cells: Iterable[CellResults]) -> dict[str, Look]:
    """The look of every method with its settings, by :attr:`CellResults.short`, in order of appearance."""
    return {name: nth_look(i) for i, name in enumerate(dict.fromkeys(cell.short for cell in cells))}


def nth_look(number: int) -> Look:
    """The look of the first, second, ... of things drawn together; the first 30 differ."""
    return Look(_COLORS[number % len(_COLORS)], *_MARKERS[number % len(_MARKERS)])


@contextmanager
def style() -> Iterator[None]:
    """Figures made inside look alike, whatever the user's own matplotlib settings are."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an SVG element; its name is unique on the page, its label tells those who can't see it what it is."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_METADATA)
    text = buffer.getvalue().decode()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    for pattern, put in _RULES:
        body = re.sub(pattern, put.format(name=name), body, flags=re.DOTALL)
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{_page_colors(body.strip())}'


def _page_colors(text: str) -> str:
    for name, color in TEXTS["palette"].items():
        text = text.replace(color, f"var(--{name})")
    return text.replace(INK, "currentColor")
