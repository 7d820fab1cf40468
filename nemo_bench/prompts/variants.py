"""Variants of prompts: paraphrases, translations, and general prompts that resemble a memorized one."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_bench.errors import PromptError, did_you_mean
from nemo_bench.records.data import Prompt


def with_originals(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of a run, variants with the training images of the prompts that they vary.

    Those that a list names for a variant itself stay. Neighbours get none: they describe another picture.

    Raises:
        PromptError: A variant varies none of the prompts, or another variant.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    originals = [prompt.id for prompt in prompts if not prompt.axis]
    complete = []
    for prompt in prompts:
        if prompt.variant_of is None:
            complete.append(prompt)
            continue
        if prompt.variant_of not in by_id:
            hint = did_you_mean(prompt.variant_of, originals)
            raise PromptError(
                f"'{prompt.id}' is a {prompt.axis} of '{prompt.variant_of}', which is no prompt of the run. {hint} "
                "Name the list of that prompt in prompts.files as well."
            )
        original = by_id[prompt.variant_of]
        if original.axis:
            msg = f"'{prompt.id}' is a {prompt.axis} of '{original.id}', itself a {original.axis}"
            raise PromptError(f"{msg}; name the prompt that it varies, '{original.variant_of}'")
        if prompt.axis != "neighbour" and not (prompt.references or prompt.damaged_references):
            files = {name: getattr(original, name) for name in ("references", "dead_references", "damaged_references")}
            prompt = prompt._replace(**files)
        complete.append(prompt)
    return complete
