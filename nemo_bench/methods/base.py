"""What a mitigation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from nemo_bench.diffusion import FAMILIES, Conditioning, Diffusion, Generated, Rule
from nemo_bench.errors import ModelError
from nemo_bench.localization import PAPER, SEEDS, Calibration, Protocol
from nemo_bench.methods.descent import check_precision
from nemo_bench.records.data import Localization, Neurons, Prompt

if TYPE_CHECKING:
    from typing_extensions import Self


Need = Literal["guidance", "gradients", "uncompiled"]
"""See :attr:`Method.needs`."""


@dataclass(frozen=True)
class Batch:
    """Images about to be generated, one per row.

    Attributes:
        prompts: Prompt of each row.
        text: Conditioning of each row.
        latents: Starting noise of each row.
        seeds: Seed of the starting noise of each row; what a method draws for an image follows from it.
        neurons: What localizing found for the prompt of each row.
        unconditional: What guidance leads away from, of each row, or None for the model's own.
        notes: What a method has to tell of each row, for the records; empty where it has nothing to tell.
        rule: Gives the noise of each step in place of guidance; None leaves guidance as it is.
    """

    prompts: tuple[Prompt, ...]
    text: Conditioning
    latents: Tensor
    seeds: tuple[int, ...]
    neurons: tuple[Neurons, ...]
    unconditional: Conditioning | None = None
    notes: tuple[Mapping[str, Any], ...] = ()
    rule: Rule | None = None

    def generate_checked(self, model: Diffusion) -> Generated:
        """Generates the images; see :meth:`Diffusion.generate_checked`.

        Args:
            model: The model, as the method that gave this batch has opened it.
        """
        return model.generate_checked(self.text, self.latents, self.unconditional, self.rule)


class Method(ABC):
    """A mitigation: optionally localizes neurons for a prompt, and changes how a batch is generated.

    Attributes:
        title: Name in tables; of an object another one than its class's where settings make it something else.
        summary: One line for ``nemo-bench ls``.
        touches: What it changes of the model or its input.
        citation: BibTeX of the source, empty for a control of our own.
        sourcing: What we were able to read of the source.
        needs_calibration: Whether :attr:`calibration` must be set before localizing.
        makes_passes: Whether it makes UNet passes of its own where it is prepared or applied.
        families: Classes of pipelines that it is made for.
        needs: What it needs of the model: ``"guidance"`` while generating, ``"gradients"``, or an
            ``"uncompiled"`` UNet.
        auditable: Whether it changes nothing but neurons or weights of the network, so that an audit can search for
            an embedding that brings a training image back.
        threshold: A memorization threshold of its own, or None for the calibrated one.
        protocol: How it takes noise differences.
        source: Another method whose localization this one starts from, or None.
        pools: Whether it does the same for all prompts, by what :attr:`source` found for memorized ones; those may be
            of another list, ``prompts.shared_from``.
        calibration: Statistics and threshold of the model, set by the run or by :meth:`calibrate`.
        found: What :attr:`source` found, by prompt id, set by :meth:`fit`.
        batch_size: Rows in a UNet pass at most while localizing, set by the run; changes results by rounding only.
    """

    title: str
    summary: ClassVar[str]
    touches: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    sourcing: ClassVar[str] = ""
    needs_calibration: ClassVar[bool] = False
    makes_passes: ClassVar[bool] = False
    families: ClassVar[frozenset[str]] = frozenset(FAMILIES)
    needs: ClassVar[frozenset[Need]] = frozenset()
    auditable: ClassVar[bool] = False
    pools: ClassVar[bool] = False
    threshold: float | None = None
    protocol: Protocol = PAPER
    source: Method | None = None
    calibration: Calibration | None = None
    found: Mapping[str, Localization] = {}
    batch_size: int = 32

    def check(self, family: str, guidance: float, dtype: str, *, compiled: bool = False) -> None:
        """Looks whether a model suits, before its weights load.

        Args:
            family: Class of the pipeline.
            guidance: Scale of guidance while generating.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
            compiled: Whether the UNet is compiled.

        Raises:
            ModelError: It does not.
        """
        if family not in self.families:
            made_for = ", ".join(sorted(self.families))
            raise ModelError(f"{self.title} is made for {made_for}, given a {family}; leave this method out for it")
        if "guidance" in self.needs and guidance <= 1:
            msg = f"{self.title} changes guidance, given model.guidance={guidance:g}"
            raise ModelError(f"{msg}; give model.guidance above 1, or leave this method out")
        if "gradients" in self.needs:
            check_precision(self.title, dtype)
        if compiled and "uncompiled" in self.needs:
            msg = f"{self.title} works inside of the UNet, which can't be reached once it is compiled"
            raise ModelError(f"{msg}; set model.compiled=false, or leave this method out")

    @property
    def calibrates_threshold(self) -> bool:
        """Whether it takes a threshold from general prompts, since none of its own takes the place."""
        return self.threshold is None

    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        """What settings refer to, such as the file behind a path; called before any weights load.

        Args:
            prompts: All prompts.

        Returns:
            By setting, what decides the result and takes the setting's place in the hash of the cell, such as the
            digest of a file; empty unless overridden.

        Raises:
            NemoBenchError: It can't be read, or does not serve these prompts.
        """
        return {}

    def check_source(  # noqa: B027 # most take any
        self, prompts: Sequence[Prompt], source_prompts: Sequence[Prompt]
    ) -> None:
        """Makes sure that :attr:`source` is asked for prompts that will do; called before any weights load.

        Args:
            prompts: The prompts of this method.
            source_prompts: The prompts that the source localizes.

        Raises:
            ConfigError: They will not.
        """

    def fit(self, found: Mapping[str, Localization], widths: Mapping[str, int], prompts: Sequence[Prompt] = ()) -> None:
        """Takes in what :attr:`source` found, before the first prompt is localized.

        Args:
            found: Localizations by prompt id.
            widths: Number of neurons of every layer of the model, in network order.
            prompts: The prompts that were localized.
        """
        self.found = found

    def prepare(self, model: Diffusion, prompts: Sequence[Prompt]) -> None:  # noqa: B027 # most share nothing
        """Measures what all prompts share; called before every batch, it has nothing left to do after the first.

        Args:
            model: The model.
            prompts: All prompts.
        """

    def prepare_prompts(self, model: Diffusion, prompts: Sequence[Prompt]) -> None:  # noqa: B027 # most share nothing
        """Finds what all images of a prompt share; called before every batch, with nothing left for prompts seen.

        Args:
            model: The model.
            prompts: Prompts of the batch.
        """

    def calibrate(self, model: Diffusion, prompts: Sequence[Prompt], seeds: int = SEEDS) -> Self:
        """Measures on general prompts, in the method's own protocol, what localizing compares with.

        Args:
            model: The model, nothing blocked.
            prompts: Prompts that are not memorized.
            seeds: Seeds a prompt.

        Returns:
            The method itself, with :attr:`calibration` set; see :meth:`Calibration.measured`.

        Raises:
            ConfigError: There are fewer than two prompts or seeds.
        """
        self.calibration = Calibration.measured(model, prompts, seeds, self.protocol, self.batch_size)
        return self

    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        """Finds the neurons to block for a prompt.

        Args:
            model: The model, nothing blocked.
            prompt: The prompt.
            latents: Starting noise of the seeds to localize on, (S, channels, height, width); None for the noise that
                a run with ten seeds draws for this prompt.

        Returns:
            The localization; empty unless overridden.
        """
        return Localization()

    @abstractmethod
    def apply(self, model: Diffusion, batch: Batch) -> AbstractContextManager[Batch]:
        """Opens the mitigation for one batch; on exit the model is as it was.

        Args:
            model: The model.
            batch: What would be generated without mitigation.

        Returns:
            Context manager that gives the batch to generate from.
        """
