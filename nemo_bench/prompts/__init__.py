"""Prompts: reading published and own lists, and sharing them out to the predict loops."""

from nemo_bench.prompts.data import PromptDataModule
from nemo_bench.prompts.manifest import MANIFEST, read_manifest
from nemo_bench.prompts.readers import (
    check_references,
    dead_references,
    read_links,
    read_prompts,
    read_rows,
    references_digest,
)
from nemo_bench.prompts.tasks import ImageTask, PromptTask, seeds_of
from nemo_bench.records.io import prompts_digest

__all__ = [
    "MANIFEST",
    "ImageTask",
    "PromptDataModule",
    "PromptTask",
    "check_references",
    "dead_references",
    "prompts_digest",
    "read_links",
    "read_manifest",
    "read_prompts",
    "read_rows",
    "references_digest",
    "seeds_of",
]
