"""Reads pages of HTML."""

from __future__ import annotations

from html.parser import HTMLParser


class Tags(HTMLParser):
    """All tags of a page, and the text outside of style and script.

    Args:
        page: HTML.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._raw = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._raw else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all tags of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]
