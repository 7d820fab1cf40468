"""A plain diffusers folder with neurons switched off for good."""

from __future__ import annotations

import importlib.metadata
from functools import reduce
from operator import or_
from pathlib import Path

import yaml

from nemo_bench.benchmark.runner import load_model
from nemo_bench.config import ModelSettings, SimilaritySettings
from nemo_bench.diffusion import Diffusion, folder_digest
from nemo_bench.errors import ConfigError, StoreError, counted, did_you_mean
from nemo_bench.records.data import Neurons
from nemo_bench.records.images import visible
from nemo_bench.records.io import damaged, digest, write_text
from nemo_bench.records.store import read_cell_prompts, read_localizations, read_settings, read_spec


def export(cell: Path, folder: Path, prompt: str | None = None) -> Neurons:
    """Saves a cell's pipeline with the neurons of its localization switched off for good, and a model card.

    Args:
        cell: A cell's folder.
        folder: Where the plain diffusers folder goes; must not hold anything yet.
        prompt: Id of the prompt whose neurons are taken; None takes those of all memorized prompts together, or of
            all prompts where none is known to be memorized.

    Returns:
        What was switched off.

    Raises:
        NemoBenchError: The cell has no localization, the prompt is unknown, or the folder is not empty.
    """
    if folder.exists() and any(visible(folder.iterdir(), folder)):
        raise StoreError(f"{folder} is not empty; name a new folder to export to")
    found = {name: localization.neurons for name, localization in read_localizations(cell).items()}
    if not found:
        raise StoreError(f"{cell} holds no localization; give results/<name>/<cell> of a finished run")
    if prompt is not None and prompt not in found:
        raise ConfigError(f"no prompt '{prompt}' in {cell}. {did_you_mean(prompt, found)}")
    memorized = [found[p.id] for p in read_cell_prompts(cell, read_spec(cell)) if p.kind and p.id in found]
    neurons = found[prompt] if prompt is not None else reduce(or_, memorized or found.values())
    if not neurons:
        raise StoreError(f"{cell} switches nothing off; name the cell of a method that localizes, such as nemo")
    settings = read_settings(cell)
    model = settings["model"]
    try:
        chosen = ModelSettings(**{**model, "similarity": SimilaritySettings(**model["similarity"])})
        factor = float(settings["method"].get("factor", 0.0))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(cell / "env.json", f"settings that can't be read: {error}") from error
    loaded = load_model(chosen)
    loaded.export(folder, neurons, factor)
    whose = f"prompt `{prompt}`" if prompt is not None else f"{counted(len(memorized or found), 'prompt')} together"
    write_text(folder / "README.md", _card(cell, folder, loaded, neurons, factor, whose))
    return neurons


def _card(cell: Path, folder: Path, model: Diffusion, neurons: Neurons, factor: float, whose: str) -> str:
    """The model card of an exported pipeline."""
    spec, settings = read_spec(cell), read_settings(cell)["model"]
    kind, digests = type(model.pipeline).__name__, spec.digests
    on_hub = "commit" in digests
    about = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["memorization", "nemo-bench"]}
    front = yaml.safe_dump({**about, **({"base_model": settings["source"]} if on_hub else {})}, sort_keys=False)
    given = {
        "Base model": f"`{settings['source']}`" + (f", commit `{digests['commit']}`" if on_hub else ""),
        "Listed as": settings["summary"],
        "LoRA, fused": f"`{settings['lora']}`, scale {settings['lora_scale']}" if settings.get("lora") else "",
        "Digest of the base model's weights": f"`{digests['model']}`",
        "Method": spec.title,
        "Sampled in the run by": f"DDIM, {settings['steps']} steps, guidance {settings['guidance']:g}",
        "From cell": f"`{spec.cell}` of nemo-bench {importlib.metadata.version('nemo-bench')}",
        "Neurons of": whose,
        "Outputs multiplied by": f"{factor:g}",
        "Digest of the neurons": f"`{digest(dict(neurons))}`",
        "Digest of this folder": f"`{folder_digest(folder)}`, without this card",
    }
    facts = "".join(f"| {name} | {value} |\n" for name, value in given.items() if value)
    layers = "".join(f"| `{name}` | {len(ids)} | {', '.join(map(str, ids))} |\n" for name, ids in neurons.items())
    citations = "".join(f"```bibtex\n{text.strip()}\n```\n\n" for text in spec.citations.values())
    return (
        f"""---
{front}---

# {spec.model} with {neurons.count} value neurons switched off

A copy of the base model in which value neurons of cross-attention layers are switched off for good: their weights are
multiplied, nothing else differs. It is meant for research on memorization. What else changes was measured on the
prompts of one run only, and some memorized prompts may still be generated.

| | |
| --- | --- |
{facts}
The licence of the base model holds for this one too; see the base model's own card.

## Use

```python
from diffusers import {kind}

pipeline = {kind}.from_pretrained("path/to/this/folder")
```

## Switched off

| layer | number | neurons |
| --- | --- | --- |
{layers}
{citations}""".rstrip()
        + "\n"
    )
