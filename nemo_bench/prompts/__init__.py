"""Prompts: published and own lists with their reference images; tasks of the predict loops are in ``tasks``."""

from nemo_bench.prompts.readers import is_prompt_source, read_links, read_prompts, read_rows
from nemo_bench.prompts.references import (
    MANIFEST,
    check_references,
    dead_references,
    read_manifest,
    references_digest,
)
from nemo_bench.prompts.variants import with_originals

__all__ = [
    "MANIFEST",
    "check_references",
    "dead_references",
    "is_prompt_source",
    "read_links",
    "read_manifest",
    "read_prompts",
    "read_rows",
    "references_digest",
    "with_originals",
]
