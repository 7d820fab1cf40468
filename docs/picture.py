"""Makes the pictures of the README and of the documentation from runs.

python docs/picture.py results/default docs/assets, after nemo-bench run and nemo-bench detect
python docs/picture.py results/all_methods docs/assets, after nemo-bench run experiment=all_methods strengths=false
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from PIL import Image
from playwright.sync_api import sync_playwright

from nemo_bench.records.results import load_results

METHODS = ("none", "random", "nemo")
SHOWN = {"VM": 5, "TM": 3}
"""Prompts shown of each kind, the first ones of the list."""


def draw_images(folder: Path, out: Path) -> None:
    """Draws training images, and the first image of each method.

    Args:
        folder: A finished run of the three methods on the embedded model.
        out: File to write.
    """
    rows: dict[str, list[Path]] = {}
    cells = {cell.method: cell for cell in load_results(folder).cells}
    for cell in (cells[name] for name in METHODS):
        of_kind = {kind: [prompt for prompt in cell.prompts if prompt.kind == kind] for kind in SHOWN}
        prompts = [prompt for kind, count in SHOWN.items() for prompt in of_kind[kind][:count]]
        rows["Training image"] = [prompt.references[0] for prompt in prompts]
        rows[cell.spec.title] = [next(iter(cell.outcomes[prompt.id].images.values())) for prompt in prompts]
    figure, axes = plt.subplots(len(rows), sum(SHOWN.values()), figsize=(10, 5.1), dpi=128)
    for axis, prompt in zip(axes[0], prompts, strict=True):
        axis.set_title(prompt.id, fontsize=11)
    for (label, files), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(label.replace(" ", "\n"), fontsize=11)
        for file, axis in zip(files, line, strict=True):
            axis.imshow(Image.open(file), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    figure.tight_layout(pad=0.6, w_pad=0.3, h_pad=0.3)
    figure.savefig(out)


def photograph(page: Path, out: Path, part: str | None = None) -> None:
    """Photographs a report in Chromium, which must be on the path.

    Args:
        page: A ``report.html``.
        out: File to write.
        part: CSS selector of the part shown; None for the head of the page.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1280, "height": 1000}, color_scheme="light")
        view.goto(page.resolve().as_uri(), wait_until="load")
        shot = view.locator(part).screenshot() if part else view.screenshot()
        browser.close()
    Image.open(io.BytesIO(shot)).convert("RGB").save(out, quality=80, method=6)


if __name__ == "__main__":
    run, assets = Path(sys.argv[1]), Path(sys.argv[2])
    if run.name == "all_methods":
        photograph(run / "report.html", assets / "tradeoff.webp", "#tradeoff-0-0")
    else:
        draw_images(run, assets / "before_after.webp")
        photograph(run / "report.html", assets / "report.webp")
        photograph(run / "detection.html", assets / "roc.webp", "svg")
