"""Checks the built site in a browser: contrast and names by axe, and the search; ``python docs/check_site.py SITE``.

Each page is opened from disk and from a server, in the light and the dark scheme. Needs Chromium, and
``pip install -e ".[dev]"``.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, TimeoutError, sync_playwright

PAGES = ("index.html", "howto/nemo.html", "reference/choices.html")
"""Prose and a table, code, cards with cross-references: every form that a page of the site has."""


class Handler(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Address of the site on a server of this process."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def problems(page: Page, address: str) -> list[str]:
    """What axe finds on the pages, and a search that finds nothing."""
    found = []
    for name in PAGES:
        page.goto(f"{address}/{name}")
        page.wait_for_load_state("load")
        for violation in Axe().run(page).response["violations"]:
            nodes = [node["html"][:160] for node in violation["nodes"]]
            found.append(f"{address}/{name}: {violation['help']} ({len(nodes)} times, first {nodes[0]})")
    page.locator("input.md-search__input").click()
    page.keyboard.type("bootstrap")
    try:
        page.locator(".md-search-result__item").first.wait_for(timeout=20_000)
    except TimeoutError:
        found.append(f"{address}/{PAGES[-1]}: the search finds nothing")
    return found


def main(site: Path) -> int:
    """Prints what is wrong with a built site; the exit status is 1 where anything is."""
    found = []
    with served(site) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for address in (site.resolve().as_uri(), server):
            for scheme in ("light", "dark"):
                context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
                found += [f"{scheme}: {problem}" for problem in problems(context.new_page(), address)]
                context.close()
        browser.close()
    print("\n".join(found) or f"{len(PAGES)} pages, from disk and served, light and dark: nothing to mend")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
