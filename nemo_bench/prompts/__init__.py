"""Prompts: published and own lists with their reference images; tasks for the predict loops are in ``data``."""

from nemo_bench.prompts.readers import is_prompt_source, read_links, read_prompts, read_rows
from nemo_bench.prompts.references import (
    MANIFEST,
    check_references,
    dead_references,
    read_manifest,
    references_digest,
)
from nemo_bench.records.data import prompts_digest

__all__ = [
    "MANIFEST",
    "check_references",
    "dead_references",
    "is_prompt_source",
    "prompts_digest",
    "read_links",
    "read_manifest",
    "read_prompts",
    "read_rows",
    "references_digest",
]
