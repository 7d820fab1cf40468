"""What stands in conf/, from Python: a model and prompts by the names that the command line knows them by."""

from __future__ import annotations

from nemo_bench.config import grid
from nemo_bench.diffusion import Diffusion
from nemo_bench.run import load_model, read_files
from nemo_bench.types import Prompt


def load(model: str = "planted", *overrides: str) -> Diffusion:
    """Loads a model of conf/model with all its settings: steps, guidance, how noise differences are compared.

    Args:
        model: Its name, as ``nemo-bench ls model`` lists it.
        overrides: Settings as on the command line, such as ``"model.steps=50"`` or ``"model.source=folder"``.

    Returns:
        The model, on the CPU; ``.to("cuda")`` moves it.

    Raises:
        NemoBenchError: There is no such model or setting, or its weights can't be loaded.

    Example:
        >>> model = load("planted")
        >>> images = model.generate("the golden harbor podcast for nine silent stars", range(4))
    """
    (choice,) = grid([f"model={model}", "method=none", *overrides])
    return load_model(choice.settings.model)


def load_prompts(prompts: str = "planted", *overrides: str) -> tuple[list[Prompt], list[Prompt]]:
    """Reads the prompts of conf/prompts.

    Args:
        prompts: Their name, as ``nemo-bench ls prompts`` lists it.
        overrides: Settings as on the command line, such as ``"prompts.limit=10"``.

    Returns:
        The prompts that are benchmarked, and the general ones for the calibration, none where there is no file of
        them.

    Raises:
        NemoBenchError: There are no such prompts or settings, or a file can't be read.

    Example:
        >>> prompts, general = load_prompts("planted")
        >>> nemo = NeMo().calibrate(load("planted"), general)
    """
    (choice,) = grid([f"prompts={prompts}", "method=none", *overrides])
    settings = choice.settings.prompts
    general = [settings.calibration] if settings.calibration else []
    return read_files(settings.files, settings.limit), read_files(general, settings.calibration_limit)
