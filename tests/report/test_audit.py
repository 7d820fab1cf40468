"""Audits on the page and in the terminal."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from rich.table import Table

from fake_results import METRICS
from nemo_bench.records.io import write_json
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import Agreement, Audit, Diagnosis, Inverted, Paired, SearchResult, Spread
from nemo_bench.report import write_report
from nemo_bench.report.audit import audits_of
from nemo_bench.report.terminal import terminal_audits
from tags import Tags


def scores(prompt: float, found: float) -> dict[str, dict[str, dict[str, float]]]:
    means = {state: {"mean": mean, "low": 0.0, "high": 1.0} for state, mean in (("prompt", prompt), ("found", found))}
    return {"ssim": means}


def test_an_audit_is_on_the_page_and_in_the_terminal(default: Path) -> None:
    (cell,) = default.glob("*__nemo__*")
    (cell / "audit").mkdir()
    Image.new("RGB", (64, 32)).save(cell / "audit" / "sheet.png")
    search = SearchResult(
        prompt="vm-01", source="vm-01", text="golden harbor", group="memorized", sheet="audit/sheet.png",
        scores={"ssim": {"found": 0.8}},
    )  # fmt: skip
    audit = Audit(
        id="a", settings={"start": "prompt", "steps": 50, "samples": 8, "rate": 0.1, "images": 4},
        states={"prompt": "the prompt", "found": "the embedding found"}, metrics={"ssim": METRICS["ssim"]},
        groups={"memorized": 6, "control": 6}, scores={"memorized": scores(0.1, 0.8), "control": scores(0.0, 0.25)},
        failed={"memorized": 1},
        compared={"ssim": Paired(difference=0.55, low=0.4, high=0.7, p=0.03125, prompts=6)},
        verdict={"ssim": "hidden"}, searches=[search], cost={},
    )  # fmt: skip
    write_json(cell / "audit.json", [audit])
    results = load_results(default)
    (shown,) = audits_of(results)
    assert shown.title == "NeMo: 50 steps of 8 samples at rate 0.1 from the prompt, 4 images each"
    assert list(shown.rows) == [
        ("SSIM to training image", ["0.10", "0.80", "0.00", "0.25", "+0.55 [+0.40, +0.70]", "0.031"])
    ]
    says, failed = shown.sentences
    assert says == (
        "SSIM to training image: 10% of the images of a prompt, 80% with the embedding found, 25% of controls. "
        "Training images come back: the method hides them and does not remove them."
    )
    assert failed.endswith("are left out: 1.")
    table, *texts = terminal_audits([shown])
    assert isinstance(table, Table)
    assert str(table.title).endswith("(6 training images, 6 controls)")
    assert texts == [f"{says}\n", f"{failed}\n"]
    page = Tags(write_report(results).read_text(encoding="utf-8"))
    assert shown.title in page.text
    assert says in page.text
    assert "Pictures of 1 of 1 searches" in page.text
    assert "Picture and images of vm-01" in [image["alt"] for image in page.all("img")]


def test_inversions_and_many_searches_are_told_in_words(default: Path) -> None:
    (cell,) = default.glob("*__nemo__*")
    spread = Spread(embeddings=3, mean=4.0, low=3.0, median=4.0, high=5.0, cosine=0.5)
    diagnosis = Diagnosis(
        spread={"found": spread, "starts": spread},
        activations={"a": {"found": 0.5, "memorized": 1.0}, "b": {"found": 1.0, "memorized": 2.0}},
        agreement={"ff": Agreement(iou=0.25, random=0.005, share=0.01, empty=0)},
    )
    search = SearchResult(
        prompt="vm-01", source="vm-01", text="golden harbor", group="memorized", sheet="audit/none.png",
        scores={"ssim": {"found": 0.8}}, diagnosis=diagnosis,
    )  # fmt: skip
    settings = {"audit": "inversion", "steps": 2000, "samples": 16, "rate": 0.1, "starts": 3}
    controls = Inverted(pictures=2, reached=0)
    audit = Audit(
        id="a", settings=settings, states={"prompt": "a", "found": "b"}, metrics={"ssim": METRICS["ssim"]},
        groups={"memorized": 2}, scores={"memorized": scores(0.1, 0.8)}, failed={"memorized": 0}, compared={},
        verdict={"ssim": "no controls"}, searches=[search], cost={},
        inverted={"memorized": Inverted(pictures=2, reached=2, median=0.0125), "control": controls},
        inverted_auc=1.0,
    )  # fmt: skip
    write_json(cell / "audit.json", [audit])
    (shown,) = audits_of(load_results(default))
    assert shown.title == "NeMo: inversion in at most 2000 steps of 16 samples at rate 0.1"
    found, inverted, searches = shown.sentences
    assert "80% with the noise and tokens found" in found
    assert inverted == (
        "InvMM: 2 of 2 pictures of memorized prompts replicated (median divergence 0.013); 0 of 2 pictures of controls "
        "replicated. Memorized pictures come before controls with AUC 1.00."
    )
    assert searches == (
        "3 searches from random numbers for 1 picture. Mean distance of embeddings: what they found 4.0 (cosine 0.50), "
        "their starts 4.0 (cosine 0.50). Of activations, in units of their norm: what they found 0.75, memorized "
        "prompts 1.50. Wanda's weights, 1.0% of each layer: intersection over union 0.25, 0.005 for random ones."
    )
    page = write_report(load_results(default)).read_text(encoding="utf-8")
    assert "An Inversion-based Measure of Memorization" in page
    assert "Finding {DoRI}" not in page


def test_a_run_without_audits_has_no_section_of_them(page: str) -> None:
    assert "audit" not in {attributes.get("id") for attributes in Tags(page).all("section")}
