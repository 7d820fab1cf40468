"""The page in a real browser: by mouse, by keyboard, from the address, on paper and without scripts."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from fake_results import METHODS, METRICS, MORE_METHODS, PROMPTS, SEEDS, change_file, write_fake_results
from nemo_bench.records.io import read_file
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import Summary
from nemo_bench.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ATTACK = (
    """<script>document.title = 'attacked'</script> golden </noscript> "harbor" 'nine' <img src=x onerror=alert(1)>"""
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = [("vm-01", ATTACK, "VM"), *PROMPTS[1:]]
    run = write_fake_results(tmp_path_factory.mktemp("results") / "default", ["planted", "sd14"], prompts)
    write_report(load_results(run))
    return run


class Reader:
    """Someone who reads a page, and what they see."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, file: Path, fragment: str = "") -> Reader:
        self.page.goto(file.as_uri() + fragment)
        return self

    def rows(self) -> list[tuple[str, str, str]]:
        """Group, model and method of every row of the leaderboard."""
        rows = self.page.locator("#board tbody tr:not([hidden])").evaluate_all(
            "rows => rows.map(row => [row.dataset.group, row.dataset.model, row.dataset.cell.split('__')[1]])"
        )
        return [tuple(row) for row in rows]

    def order(self) -> dict[str, str]:
        """Direction of every column that the leaderboard is sorted by."""
        found: dict[str, str] = self.page.locator("#board th:not([aria-sort=none])[aria-sort]").evaluate_all(
            "heads => Object.fromEntries(heads.map(head => [head.dataset.key, head.getAttribute('aria-sort')]))"
        )
        return found

    def cards(self) -> list[str]:
        """Ids of the prompts of the gallery."""
        texts: list[str] = self.page.locator(".card:not([hidden])").evaluate_all(
            "cards => cards.map(card => card.dataset.text.split(' ')[0])"
        )
        return texts


@pytest.fixture
def reader(browser: Browser, run: Path) -> Iterator[Reader]:
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(10_000)
    reader = Reader(page).open(run / "report.html")
    yield reader
    page.close()


def test_it_opens_with_the_first_group_and_a_silent_console(reader: Reader) -> None:
    assert reader.rows() == [("VM", model, method) for model in ("planted", "sd14") for method in METHODS]
    assert reader.order() == {}
    assert reader.cards() == [prompt for prompt, _, _ in PROMPTS]
    assert reader.page.locator("#count").inner_text() == "6 of 6 prompts"
    assert reader.page.title() == "default · nemo_bench"
    assert reader.complaints == []


def test_a_prompt_is_shown_as_it_is_and_never_run(reader: Reader) -> None:
    card = reader.page.locator(".card").first
    card.scroll_into_view_if_needed()
    card.locator(".strips").wait_for()
    assert card.locator("h3").inner_text() == ATTACK
    assert reader.page.locator("script").count() == 1
    assert not reader.page.locator("img[src=x]").count()
    card.get_by_role("button", name="Compare").click()
    assert reader.page.locator("#viewer-title").inner_text() == ATTACK
    assert reader.complaints == []


def test_strips_are_made_when_they_come_near(browser: Browser, tmp_path: Path) -> None:
    prompts = [(f"vm-{i:02d}", f"prompt {i}", "VM") for i in range(40)]
    run = write_fake_results(tmp_path / "long", prompts=prompts)
    write_report(load_results(run))
    reader = Reader(browser.new_page(viewport={"width": 1200, "height": 600})).open(run / "report.html")
    assert reader.page.locator(".strips").count() < 20
    reader.page.get_by_role("button", name="Show 16 more of 16").click()
    last = reader.page.locator(".card").last
    last.scroll_into_view_if_needed()
    last.locator(".strips img").first.wait_for()
    assert last.locator(".strips img").count() == len(METHODS) * (SEEDS + 1)
    assert reader.page.locator(".strips").count() < 40
    assert reader.complaints == []
    reader.page.close()


def test_headers_sort_by_mouse_and_by_keyboard(reader: Reader, run: Path) -> None:
    cells = load_results(run).cells
    header = reader.page.locator("th[data-key=ssim] button")
    header.click()
    worst = sorted(cells, key=lambda cell: cell.summary.aggregates["VM"]["ssim"].mean)
    assert reader.rows() == [("VM", cell.model, cell.method) for cell in worst]
    assert reader.order() == {"ssim": "ascending"}
    header.press("Enter")
    assert reader.rows() == [("VM", cell.model, cell.method) for cell in worst[::-1]]
    assert reader.order() == {"ssim": "descending"}
    reader.page.keyboard.press("Tab")
    reader.page.keyboard.press("Tab")
    reader.page.keyboard.press("Space")
    assert reader.order() == {"alignment": "descending"}


def test_what_is_missing_sorts_last(reader: Reader) -> None:
    reader.page.get_by_role("radio", name="all", exact=True).check(force=True)
    for _ in range(2):
        reader.page.locator("th[data-key=ssim] button").click()
        values = reader.page.locator("#board tbody tr td[data-key=ssim]").evaluate_all(
            "cells => cells.map(cell => cell.dataset.value)"
        )
        empty = values.index("")
        assert empty > 0
        assert not any(values[empty:])


def test_switches_and_fields_filter(reader: Reader) -> None:
    page = reader.page
    page.locator("#leaderboard").get_by_role("radio", name="TM").check(force=True)
    page.get_by_role("radio", name="sd14").check(force=True)
    page.get_by_placeholder("Filter methods").fill("nemo")
    assert reader.rows() == [("TM", "sd14", "nemo")]
    page.locator("#prompts").get_by_role("radio", name="general").check(force=True)
    page.get_by_placeholder("Search prompts").fill("DAWN mountain")
    assert reader.cards() == ["general-02"]
    assert page.locator("#count").inner_text() == "1 of 6 prompts"
    page.locator(".card:not([hidden]) .strips").wait_for()
    assert page.locator(".card:not([hidden]) .strips tbody tr:visible").count() == 1
    page.get_by_placeholder("Search prompts").fill("nowhere to be found")
    assert reader.cards() == []
    assert page.locator("#nothing").is_visible()


def test_the_address_holds_what_was_chosen(reader: Reader, run: Path) -> None:
    page = reader.page
    page.locator("#leaderboard").get_by_role("radio", name="TM").check(force=True)
    page.locator("th[data-key=memorization] button").click()
    page.get_by_placeholder("Search prompts").fill("case vintage")
    page.wait_for_url("**q=case*")
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    assert {group for group, _, _ in reader.rows()} == {"TM"}
    assert reader.order() == {"memorization": "ascending"}
    assert reader.cards() == ["tm-01"]
    assert page.get_by_placeholder("Search prompts").input_value() == "case vintage"


def test_small_numbers_are_one_of_three(reader: Reader) -> None:
    cell = reader.page.locator("#board tr[data-cell*=__nemo__]:not([hidden]) td[data-key=ssim]").first
    for name, words in (("interval", " to "), ("median", "median "), ("against none", "better")):
        reader.page.get_by_role("radio", name=name).check(force=True)
        small = cell.locator("small:visible")
        assert small.count() == 1
        assert words in small.inner_text()


def test_prompts_can_be_put_in_order_of_their_worst(reader: Reader, run: Path) -> None:
    cell = load_results(run).cells[2]
    reader.page.locator("#order").select_option(label=f"worst SSIM to training image first: {cell.label}")
    means = cell.prompt_means("ssim", ["VM", "TM"])
    worst = sorted(means, key=lambda name: -means[name])
    assert reader.cards()[: len(worst)] == worst
    reader.page.locator("#order").select_option(index=0)
    assert reader.cards() == [prompt for prompt, _, _ in PROMPTS]


def test_images_of_a_seed_are_compared_by_keyboard(reader: Reader) -> None:
    page, viewer = reader.page, reader.page.locator("#viewer")
    button = page.locator(".card").first.get_by_role("button", name="Compare")
    button.focus()
    page.keyboard.press("Enter")
    names = viewer.locator("figcaption strong").all_inner_texts()
    assert names[0] == "Training image"
    assert names[1:] == [f"{title} · {model}" for model in ("planted", "sd14") for title in METHODS.values()]
    assert "SSIM to training image" in viewer.locator("figcaption small").nth(1).inner_text()
    seed = page.locator("#viewer-seed")
    assert seed.inner_text() == f"1 of {SEEDS}"
    page.keyboard.press("ArrowRight")
    assert seed.inner_text() == f"2 of {SEEDS}"
    page.keyboard.press("ArrowDown")
    assert page.locator("#viewer-title").inner_text() == PROMPTS[1][1]
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    focused = page.evaluate("document.activeElement.closest('.card').dataset.text.split(' ')[0]")
    assert focused == PROMPTS[1][0]
    assert reader.complaints == []


def test_an_image_that_is_clicked_opens_its_seed(reader: Reader) -> None:
    card = reader.page.locator(".card").nth(1)
    card.scroll_into_view_if_needed()
    card.locator(".row img").nth(2).click()
    assert reader.page.locator("#viewer-seed").inner_text() == f"3 of {SEEDS}"
    reader.page.get_by_role("button", name="Close").click()
    assert not reader.page.locator("#viewer").is_visible()


def test_address_of_a_prompt_and_seed_opens_its_images(reader: Reader, run: Path) -> None:
    reader.page.goto("about:blank")
    reader.page.goto(f"{(run / 'report.html').as_uri()}#prompt=tm-01&seed=2")
    assert reader.page.locator("#viewer-title").inner_text() == PROMPTS[2][1]
    assert reader.page.locator("#viewer-seed").inner_text() == f"2 of {SEEDS}"
    reader.page.keyboard.press("ArrowRight")
    reader.page.wait_for_url("**#prompt=tm-01&seed=3")
    reader.page.keyboard.press("Escape")
    reader.page.wait_for_url("**#prompt=tm-01")
    assert reader.complaints == []


def test_links_of_prompts_and_figures_are_their_addresses(reader: Reader) -> None:
    page = reader.page
    page.locator("#examples a").first.click()
    page.wait_for_url("**#prompt=*")
    page.locator(".card").nth(3).get_by_role("link").first.click()
    page.wait_for_url("**#prompt=tm-02")
    figure = page.locator(".figures figure[id]").first
    figure.get_by_role("link").first.click()
    page.wait_for_url(f"**#{figure.get_attribute('id')}")


def test_worst_and_best_prompts_come_first(reader: Reader, run: Path) -> None:
    sections = reader.page.locator("main > section").evaluate_all("all => all.map(section => section.id)")
    assert sections[:2] == ["examples", "leaderboard"]
    assert sections.index("prompts") < sections.index("models") < sections.index("presets")
    cells = {
        cell.name: cell for cell in load_results(run).cells if cell.model == "planted" and cell.summary.unmitigated
    }
    means = {name: cell.prompt_means("ssim", ["VM", "TM"]) for name, cell in cells.items()}
    best = min(means, key=lambda name: sum(means[name].values()))
    order = sorted(means[best], key=lambda prompt: -means[best][prompt])
    shown = reader.page.locator(".examples").first.locator("figcaption a").all_inner_texts()
    assert shown == [f"Worst, {p}" for p in order[:2]] + [f"Best, {p}" for p in order[:1:-1]]


def test_a_table_is_downloaded_as_it_is_shown(reader: Reader, run: Path, tmp_path: Path) -> None:
    reader.page.locator("#leaderboard").get_by_role("radio", name="TM").check(force=True)
    with reader.page.expect_download() as download:
        reader.page.locator("#leaderboard").get_by_role("button", name="Download CSV").click()
    download.value.save_as(tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    expected = [cell.summary.aggregates["TM"]["ssim"].mean for cell in load_results(run).cells]
    assert [float(row["SSIM to training image"]) for row in rows] == expected
    assert {row["Group"] for row in rows} == {"TM"}


def test_a_figure_is_downloaded_as_svg_and_png(reader: Reader, tmp_path: Path) -> None:
    figure = reader.page.locator(".figures figure[id]").first
    for name in ("SVG", "PNG"):
        with reader.page.expect_download() as download:
            figure.get_by_role("button", name=name).click()
        assert download.value.suggested_filename == f"{figure.get_attribute('id')}.{name.lower()}"
        download.value.save_as(tmp_path / name)
    assert "var(" not in (tmp_path / "SVG").read_text(encoding="utf-8")
    with Image.open(tmp_path / "PNG") as picture:
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height) or ()) > 10
    assert reader.complaints == []


def test_page_of_42_prompts_and_5_methods_stays_short_on_a_phone(browser: Browser, tmp_path: Path) -> None:
    prompts = [(f"vm-{i:02d}", f"prompt {i}", "VM") for i in range(42)]
    run = write_fake_results(tmp_path / "long", prompts=prompts, methods=MORE_METHODS)
    write_report(load_results(run))
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto((run / "report.html").as_uri())
    page.locator(".card").first.scroll_into_view_if_needed()
    page.locator(".strips").first.wait_for()
    assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight < 15000]") == [
        390,
        True,
    ]
    page.close()


def test_citations_are_copied(browser: Browser, run: Path) -> None:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto((run / "report.html").as_uri())
    page.get_by_text("in BibTeX").click()
    page.get_by_role("button", name="Copy citations").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#bibtex").inner_text()
    assert page.locator("#bibtex").inner_text().startswith("@inproceedings{hintersdorf2024nemo")
    context.close()


def test_the_first_key_leads_past_the_head_and_focus_is_seen(reader: Reader) -> None:
    reader.page.keyboard.press("Tab")
    assert reader.page.evaluate("document.activeElement.className") == "skip"
    assert reader.page.locator(".skip").bounding_box()["y"] >= 0  # type: ignore[index]
    reader.page.keyboard.press("Enter")
    reader.page.wait_for_url("**#leaderboard")
    reader.page.keyboard.press("Tab")
    outline = "getComputedStyle(document.activeElement.closest('label') ?? document.activeElement).outlineStyle"
    assert reader.page.evaluate(outline) == "solid"


@pytest.mark.parametrize("width", [390, 820, 1000, 1360])
def test_no_width_makes_the_page_scroll_sideways(browser: Browser, run: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto((run / "report.html").as_uri())
    page.locator("#prompts").scroll_into_view_if_needed()
    page.locator(".strips").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_a_wide_table_scrolls_in_one_place_under_its_first_column(browser: Browser, run: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto((run / "report.html").as_uri())
    page.locator("#prompts").scroll_into_view_if_needed()
    page.locator(".strips").first.wait_for()
    scrolling = """[...document.querySelectorAll("body *")].filter(e => {
        const style = getComputedStyle(e), has = way => /auto|scroll/.test(style["overflow" + way]);
        return has("X") && e.scrollWidth > e.clientWidth || has("Y") && e.scrollHeight > e.clientHeight;
    }).map(e => e.tagName + "." + e.className)"""
    assert set(page.evaluate(scrolling)) <= {"DIV.scroll", "DIV.examples", "DIV.figures", "NAV."}
    assert page.evaluate("document.querySelectorAll('.scroll .scroll').length") == 0
    page.set_viewport_size({"width": 390, "height": 800})
    for table in ("#board", "#presets table"):
        first = page.locator(f"{table} tbody tr:not([hidden]) th").first
        before = first.bounding_box()
        page.locator(f".scroll:has(> {table.split()[-1]})").first.evaluate("e => { e.scrollLeft = 60; }")
        assert first.bounding_box() == before
    page.close()


def test_all_prompts_together_are_shown_on_demand_with_what_they_mix(reader: Reader) -> None:
    meaning = reader.page.locator("#group-meaning")
    assert meaning.inner_text() == "VM, 2 prompts: verbatim"
    reader.page.locator("#leaderboard").get_by_role("radio", name="all", exact=True).check(force=True)
    assert meaning.inner_text() == "all, 6 prompts: VM, TM and general mixed"


def test_dark_and_light_differ_in_colour_only(browser: Browser, run: Path) -> None:
    seen: list[Any] = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 800})  # type: ignore[arg-type]
        page.goto((run / "report.html").as_uri())
        seen.append(page.evaluate("[getComputedStyle(document.body).backgroundColor, document.body.offsetHeight]"))
        page.close()
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] == seen[1][1]


def test_without_scripts_everything_is_there_to_read(browser: Browser, run: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto((run / "report.html").as_uri())
    assert page.locator("#board tbody tr").count() == 2 * len(METHODS) * 4
    assert page.locator(".strips tbody tr").count() == 2 * len(METHODS) * len(PROMPTS)
    assert page.locator(".strips img").first.is_visible()
    assert page.locator(".card h3").first.text_content() == ATTACK
    assert not page.locator("#search").is_visible()
    page.close()


def test_paper_gets_every_group_and_the_strips_of_what_is_shown(reader: Reader, tmp_path: Path) -> None:
    reader.page.get_by_placeholder("Search prompts").fill("lighthouse")
    reader.page.emulate_media(media="print")
    reader.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(reader.rows()) == 2 * len(METHODS) * 3
    assert {group for group, _, _ in reader.rows()} == {"VM", "TM", "general"}
    assert reader.page.locator(".card:visible .strips").count() == 1
    assert not reader.page.locator("nav").is_visible()
    reader.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert len(reader.rows()) == 2 * len(METHODS)
    reader.page.pdf(path=tmp_path / "report.pdf")
    assert os.path.getsize(tmp_path / "report.pdf") > 10_000


def test_many_columns_show_the_leading_ones_first(browser: Browser, tmp_path: Path) -> None:
    run = write_fake_results(tmp_path / "many", prompts=PROMPTS[:1])
    for path in run.glob("*/metrics.json"):
        summary = read_file(path, Summary)
        extra = {f"ssim_{i}": METRICS["ssim"].model_copy(update={"title": f"SSIM {i}"}) for i in range(4)}
        aggregates = {group: {**row, **dict.fromkeys(extra, row["ssim"])} for group, row in summary.aggregates.items()}
        change_file(path, Summary, metrics={**summary.metrics, **extra}, aggregates=aggregates)
    write_report(load_results(run))
    reader = Reader(browser.new_page()).open(run / "report.html")
    head = reader.page.locator("#board thead th:not([hidden])")
    main = ["method", "group", "ssim", "alignment", "diversity", "fid", "memorization"]
    keys = "heads => heads.map(head => head.dataset.key)"
    assert sorted(head.evaluate_all(keys)) == sorted(main)
    reader.page.get_by_role("radio", name="memorization").check(force=True)
    assert head.evaluate_all(keys) == ["method", "group", "ssim", "ssim_nearest", *extra]
    assert reader.page.locator("#board tbody tr:not([hidden])").first.locator("td:visible").count() == 6
    reader.page.close()


def test_the_page_may_not_reach_the_network(reader: Reader) -> None:
    reader.page.evaluate(
        "document.body.append(Object.assign(new Image(), { src: 'https://nemo-bench.invalid/a.png' }))"
    )
    reader.page.wait_for_timeout(200)
    assert any("Content Security Policy" in words for words in reader.complaints)


def test_a_script_that_is_not_the_page_s_own_does_not_run(browser: Browser, run: Path, tmp_path: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(text.replace("</body>", "<script>document.title = 'x'</script></body>"))
    reader = Reader(browser.new_page()).open(tmp_path / "page.html")
    assert reader.page.title() == "default · nemo_bench"
    assert any("Content Security Policy" in words for words in reader.complaints)
    reader.page.close()
