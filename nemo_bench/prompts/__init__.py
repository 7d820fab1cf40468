"""Prompts: reading published and own lists, and sharing them out to the predict loops."""

from nemo_bench.prompts.data import ImageTask, PromptDataModule, PromptTask, seeds_of
from nemo_bench.prompts.readers import prompts_digest, read_prompts, read_rows

__all__ = ["ImageTask", "PromptDataModule", "PromptTask", "prompts_digest", "read_prompts", "read_rows", "seeds_of"]
