"""Templates of pages and their parts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nemo_bench.report.svg import PALETTE

FOLDER = Path(__file__).parent / "page"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(palette=PALETTE, style=(FOLDER / "style.css").read_text(encoding="utf-8"))
    return environment


def render(name: str, /, **values: Any) -> str:
    """HTML of a template; texts are escaped.

    Args:
        name: File in the folder of templates.
        values: What it shows; the colours and the style sheet are known to every template.
    """
    return _environment().get_template(name).render(**values)
