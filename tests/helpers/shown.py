"""Files that pages of the documentation show."""

from __future__ import annotations

import re
from pathlib import Path

_FILE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)


def write_shown(page: str, folder: Path) -> Path:
    """Writes the files that a page shows under their titles into a folder, and gives that folder.

    Args:
        page: Such as ``"howto/method.md"``.
        folder: Made if it is not there.
    """
    for name, content in _FILE.findall((Path(__file__).parents[2] / "docs" / page).read_text()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder
