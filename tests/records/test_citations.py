"""Every citation is an entry of the BibTeX file, and every entry is cited."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest

import nemo_bench
from nemo_bench import detectors, methods
from nemo_bench.records.citations import cite

TEXT = (resources.files("nemo_bench.records") / "citations.bib").read_text(encoding="utf-8")
KEYS = re.findall(r"^@\w+\{(\w+),", TEXT, re.MULTILINE)


@pytest.mark.parametrize("package", [methods, detectors])
def test_citation_of_a_method_or_detector_is_an_entry_or_empty(package: ModuleType) -> None:
    cited = {name: getattr(getattr(package, name), "citation", "") for name in package.__all__}
    assert any(cited.values())
    assert set(cited.values()) <= {"", *map(cite, KEYS)}


def test_every_entry_is_cited() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(nemo_bench.__file__).parent.rglob("*.py"))
    assert len(KEYS) == len(set(KEYS))
    assert set(re.findall(r'\bcite\("(\w+)"\)', source)) == set(KEYS)
