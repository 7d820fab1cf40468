"""The page in a real browser: sorting, groups and filters, from the address and by hand."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fake_results import METHODS, PROMPTS, write_fake_results
from nemo_bench.report import load_results, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000",
)  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")


class Board(HTMLParser):
    """What a reader sees: rows of the leaderboard, sorted header, cards, checked switches, and whether it is hidden."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.rows: list[tuple[str, str]] = []
        self.sorted: dict[str, str] = {}
        self.cards: list[str] = []
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        a = {key: value or "" for key, value in attrs}
        if tag == "tr" and "data-cell" in a and "hidden" not in a:
            self.rows.append((a["data-group"], a["data-cell"].split("__")[1]))
        if a.get("aria-sort", "none") != "none":
            self.sorted[a["data-key"]] = a["aria-sort"]
        if tag == "article" and "hidden" not in a:
            self.cards.append(a["data-text"].split()[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = [("vm-01", "<script>alert(1)</script> golden harbor", "VM"), *PROMPTS[1:]]
    run = write_fake_results(tmp_path_factory.mktemp("results") / "default", prompts=prompts)
    write_report(run)
    return run


def browse(page: Path, fragment: str = "") -> tuple[str, list[str]]:
    """The document after scripts ran, and what went to the console."""
    assert CHROMIUM
    profile = page.parent / "profile"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def with_script(run: Path, tmp_path: Path, script: str) -> Path:
    page = tmp_path / "page.html"
    text = (run / "report.html").read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return page


def test_it_opens_with_the_first_group_and_a_silent_console(run: Path) -> None:
    dom, console = browse(run / "report.html")
    assert console == []
    board = Board(dom)
    assert board.rows == [("VM", method) for method in METHODS]
    assert board.sorted == {}
    assert board.cards == [prompt for prompt, _, _ in PROMPTS]
    assert "6 of 6 prompts" in dom


def test_the_address_decides_group_order_and_filter(run: Path) -> None:
    dom, console = browse(run / "report.html", "#group=TM&sort=ssim&q=CASE+vintage&kind=TM")
    assert console == []
    board = Board(dom)
    cells = sorted(load_results(run).cells, key=lambda cell: cell.aggregates["TM"]["ssim"].mean)
    assert board.rows == [("TM", cell.method) for cell in cells]
    assert board.sorted == {"ssim": "ascending"}
    assert board.cards == ["tm-01"]
    assert "1 of 6 prompts" in dom


def test_what_is_missing_sorts_last_and_what_is_larger_first_where_it_is_better(run: Path, tmp_path: Path) -> None:
    script = """
      const order = sort => { location.hash = "#group=all&sort=" + sort; window.dispatchEvent(new Event("hashchange"));
        return [...document.querySelectorAll("#board tbody tr")].map(row => row.querySelector(`[data-key=${sort}]`)
          .dataset.value); };
      document.title = JSON.stringify([order("ssim"), order("alignment")]);
    """
    dom, _ = browse(with_script(run, tmp_path, script))
    title = re.search(r"<title>(.*)</title>", dom)
    assert title
    ssim, alignment = (re.findall(r'"([^"]*)"', part) for part in title[1].split("],["))
    assert ssim[-3:] == ["", "", ""]
    assert [float(v) for v in ssim[:-3]] == sorted(float(v) for v in ssim[:-3])
    assert [float(v) for v in alignment] == sorted((float(v) for v in alignment), reverse=True)


def test_headers_switches_and_search_work_by_hand(run: Path, tmp_path: Path) -> None:
    script = """
      const header = document.querySelector("th[data-key=memorization] button");
      header.click(); header.click();
      document.querySelector("input[name=group][value=general]").click();
      document.querySelector("input[name=kind][value=VM]").click();
      const search = document.getElementById("search");
      search.value = "alert"; search.dispatchEvent(new Event("input"));
      document.title = location.hash;
    """
    dom, console = browse(with_script(run, tmp_path, script))
    assert console == []
    board = Board(dom)
    cells = sorted(load_results(run).cells, key=lambda cell: -cell.aggregates["general"]["memorization"].mean)
    assert board.rows == [("general", cell.method) for cell in cells]
    assert board.sorted == {"memorization": "descending"}
    assert board.cards == ["vm-01"]
    assert "#sort=memorization&amp;dir=descending&amp;group=general&amp;kind=VM&amp;q=alert</title>" in dom


def test_the_page_may_not_reach_the_network(run: Path, tmp_path: Path) -> None:
    script = 'document.body.append(Object.assign(new Image(), { src: "https://nemo-bench.invalid/a.png" }));'
    _, console = browse(with_script(run, tmp_path, script))
    assert any("Content Security Policy" in line for line in console)
