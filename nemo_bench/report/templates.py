"""Templates of pages and their parts."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nemo_bench.report.texts import FOLDER, TEXTS


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(texts=TEXTS, style=(FOLDER / "style.css").read_text(encoding="utf-8"))
    return environment


def render(name: str, /, **values: Any) -> str:
    """HTML of a template, with texts escaped; the style sheet and :data:`TEXTS` are known to every template."""
    return _environment().get_template(name).render(**values)
