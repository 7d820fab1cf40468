"""A plain diffusers folder with neurons switched off for good."""

from __future__ import annotations

import importlib.metadata
from functools import reduce
from operator import or_
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined

from nemo_bench.benchmark.runner import load_model
from nemo_bench.config import ModelSettings, PublishedSettings, SimilaritySettings
from nemo_bench.diffusion import Diffusion, folder_digest
from nemo_bench.errors import ConfigError, StoreError, counted, did_you_mean
from nemo_bench.records.data import Neurons
from nemo_bench.records.images import visible
from nemo_bench.records.io import damaged, digest, write_text
from nemo_bench.records.store import read_cell_prompts, read_localizations, read_settings, read_spec

CARD = Path(__file__).parent / "model_card.md.jinja"
"""Template of the model card."""


def export(cell: Path, folder: Path, prompt: str | None = None) -> Neurons:
    """Saves a cell's pipeline with the neurons of its localization switched off for good, and a model card.

    Taken are the neurons of a prompt, by its id, or those of all memorized prompts together (of all prompts where none
    is known to be memorized).

    Raises:
        NemoBenchError: The cell has no localization or does more than switch neurons off, the prompt is unknown, or
            the folder is not empty.
    """
    if folder.exists() and any(visible(folder.iterdir(), folder)):
        raise StoreError(f"{folder} is not empty; name a new folder to export to")
    if fitted := read_spec(cell).fitted:
        raise ConfigError(
            f"{cell} changes fitted weights, and export saves neurons that are switched off; the changes are in "
            f"{(cell / fitted).resolve()}, to be added to the weights of the UNet by their names"
        )
    found = {name: localization.neurons for name, localization in read_localizations(cell).items()}
    if not found:
        raise StoreError(f"{cell} holds no localization; give results/<name>/<cell> of a finished run")
    if prompt is not None and prompt not in found:
        raise ConfigError(f"no prompt '{prompt}' in {cell}. {did_you_mean(prompt, found)}")
    memorized = [found[p.id] for p in read_cell_prompts(cell, read_spec(cell)) if p.kind and p.id in found]
    neurons = found[prompt] if prompt is not None else reduce(or_, memorized or found.values())
    settings = read_settings(cell)
    method = settings.get("method")
    given = method if isinstance(method, dict) else {}
    if str(given.get("_target_")).endswith(".Sinks") and (given["mode"], given["rescale"]) != ("off", 1):
        raise ConfigError(f"{cell} does more than switch neurons off; export a cell with mode=off and rescale=1")
    if not neurons:
        raise StoreError(f"{cell} switches nothing off; name the cell of a method that localizes, such as nemo")
    model = settings["model"]
    try:
        parts = {"similarity": SimilaritySettings(**model["similarity"]), "published": PublishedSettings()}
        chosen = ModelSettings(**{**model, **parts})
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
    about = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["memorization", "nemo-bench"]}
    on_hub = {"base_model": settings["source"]} if "commit" in spec.digests else {}
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(CARD.read_text(encoding="utf-8")).render(
        front=yaml.safe_dump({**about, **on_hub}, sort_keys=False),
        spec=spec,
        settings={"lora": None, **settings},
        pipeline=type(model.pipeline).__name__,
        neurons=neurons,
        factor=factor,
        whose=whose,
        version=importlib.metadata.version("nemo-bench"),
        digest=digest(dict(neurons)),
        folder_digest=folder_digest(folder),
    )
    return text.rstrip() + "\n"
