"""Templates of pages and their parts."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from nemo_bench.report.texts import FOLDER, TEXTS


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(texts=TEXTS, style=(FOLDER / "style.css").read_text(encoding="utf-8"))
    return environment


def render(name: str, /, **values: Any) -> str:
    """Fills in a template, texts escaped where it is HTML; each knows :data:`TEXTS` and the style sheet."""
    return _environment().get_template(name).render(**values)
