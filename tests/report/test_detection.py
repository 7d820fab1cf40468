"""Table, page and JSON of detectors."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from nemo_bench.errors import StoreError
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import read_file, write_json
from nemo_bench.records.results import load_detections
from nemo_bench.records.schema import DetectionRecord, DetectionTable, Roc, Spec, Summary
from nemo_bench.records.store import Store, write_prompts
from nemo_bench.report.detection import write_detection
from nemo_bench.report.terminal import terminal_detection

PROMPTS = [Prompt("vm-01", "a golden harbor", "VM"), Prompt("tm-01", "a mug", "TM"), Prompt("general-01", "a dawn")]


def write_detector(run: Path, name: str, title: str, scores: list[float | None], auc: float | None) -> Path:
    """Writes the cell of a detector; a score that is None failed."""
    store = Store(run / f"planted__{name}__three")
    settings = {"model": {"steps": 3, "similarity": {"sigma": 1.5}}, "detector": {"steps": 1}}
    spec = Spec(
        task="detect", stages=["detect"], model="planted", detector=name, prompts="three", title=title,
        settings=settings, digests={"prompts": "0" * 16},
    )  # fmt: skip
    store.open(spec, is_named=True)
    write_prompts(store.folder, PROMPTS)
    records = [
        DetectionRecord(
            id=prompt.id,
            prompt=prompt.id,
            score=score,
            failed="not finite" if score is None else None,
            details={"tokens": [["golden</w>", 2.0], ["harbor</w>", 1.0]]},
        )
        for prompt, score in zip(PROMPTS, scores, strict=True)
    ]
    store.writer(DetectionRecord)(records)
    store.finish(DetectionRecord, [record.id for record in records])
    numbers = dict.fromkeys(("tpr_at_1_fpr_below", "tpr_at_1_fpr_nearest", "tpr_at_1_fpr_first"), 0.5)
    roc = {
        name: Roc(
            title=title, auc=auc, auc_low=auc / 2, auc_high=1.0, average_precision=0.7, best_accuracy=0.8, **numbers,
            memorized=2, other=1, curve=[[0.0, 0.0], [0.0, auc], [1.0, 1.0]], kinds={"VM": auc},
        )
    } if auc is not None else {}  # fmt: skip
    counts = {"prompts": len(PROMPTS), "failed": scores.count(None), "seeds": 4}
    cost = {"detect_seconds_per_prompt": 0.25, "detect_row_passes_per_prompt": 12.0}
    write_json(store.folder / "metrics.json", Summary(detection=roc, counts=counts, cost=cost))
    return store.folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_detector(tmp_path, "noise", "Noise magnitude", [3.0, 2.0, 1.0], 1.0)
    write_detector(tmp_path, "tokens", "Token significance", [3.0, 1.0, 2.0], 0.5)
    write_detector(tmp_path, "failing", "Failing", [3.0, None, 2.0], 0.75)
    return tmp_path


def test_detectors_come_best_first_and_those_with_failures_last(run: Path) -> None:
    detectors = load_detections(run)
    assert [detector.label for detector in detectors] == ["Noise magnitude", "Token significance", "Failing"]
    assert detectors[2].failed == 1
    assert detectors[2].scores(memorized=True) == [3.0]
    assert detectors[0].scores(memorized=False) == [1.0]


def test_json_page_markdown_and_terminal_show_the_same_numbers(run: Path) -> None:
    detectors = load_detections(run)
    page = write_detection(detectors).read_text(encoding="utf-8")
    rows = read_file(run / "detection.json", DetectionTable).detectors
    assert [(row.label, row.failed, row.seeds, row.prompts) for row in rows] == [
        ("Noise magnitude", 0, 4, 3), ("Token significance", 0, 4, 3), ("Failing", 1, 4, 3)
    ]  # fmt: skip
    assert [row.roc and row.roc.auc for row in rows] == [1.0, 0.5, 0.75]
    markdown = (run / "detection.md").read_text(encoding="utf-8")
    console = Console(file=io.StringIO(), width=200)
    console.print(*terminal_detection(detectors))
    terminal = console.file.getvalue()  # type: ignore[attr-defined]
    for text in (page, markdown, terminal):
        assert "planted · three: 2 memorized and 1 other prompts" in text or "planted · three</a>" in text
        assert "0.500 0.25–1.00" in text
        assert "1 of 3" in text
    assert "| Token significance | 0.500 0.25–1.00 | 0.500 | – | 0.500 |" in markdown
    assert page.count("<svg") == 1
    assert "golden" in page
    assert 'title="not finite">failed' in page


def test_detectors_of_prompts_of_one_sort_have_scores_and_no_curves(tmp_path: Path) -> None:
    write_detector(tmp_path, "noise", "Noise magnitude", [3.0, 2.0, 1.0], None)
    page = write_detection(load_detections(tmp_path)).read_text(encoding="utf-8")
    assert "No ROC curves" in page
    (row,) = read_file(tmp_path / "detection.json", DetectionTable).detectors
    assert row.roc is None
    assert row.title == "Noise magnitude"


def test_missing_records_and_a_run_without_detectors_are_errors(run: Path, tmp_path: Path) -> None:
    (file,) = run.glob("*__noise__*/records/detect.0.jsonl")
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    with pytest.raises(StoreError, match="2 of 3 records are missing; the same nemo-bench detect makes them again"):
        load_detections(run)
    with pytest.raises(StoreError, match="holds no finished detector"):
        load_detections(tmp_path / "nowhere")
