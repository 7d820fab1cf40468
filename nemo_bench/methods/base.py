"""The base class of mitigations, and the batches that they change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from nemo_bench.diffusion import UNETS, Conditioning, Diffusion, Generated, Rule, TokenizerFiles
from nemo_bench.errors import ModelError
from nemo_bench.localization import PAPER, SEEDS, Calibration, Protocol
from nemo_bench.methods.descent import check_precision
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.ranges import Checked

if TYPE_CHECKING:
    from typing_extensions import Self

Need = Literal["guidance", "gradients", "uncompiled"]
"""See :attr:`Method.needs`."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run gives a method before its first batch."""

    prompts: Sequence[Prompt] = ()  #: All prompts of the cell, without variants.
    #: Activation statistics and memorization threshold, for methods with ``needs_calibration``.
    calibration: Calibration | None = None
    #: Localizations of :attr:`Method.source` by prompt id, without prompts that it failed for.
    source_localizations: Mapping[str, Localization] = field(default_factory=dict)
    source_prompts: Sequence[Prompt] = ()  #: Prompts that the source localized.
    batch_size: int = 32  #: Rows in a UNet pass at most; changes results by rounding only.
    fitted: Path | None = None  #: Safetensors file of what a :class:`FittedMethod` changed.


class Fit(ABC):
    """A fit of the weights of a network by AdamW, with torch's defaults but for the rate.

    Args:
        network: The network; all of its weights are fitted.
        updates: Number of updates.
        rate: Learning rate.
    """

    def __init__(self, network: nn.Module, updates: int, rate: float) -> None:
        self.network = network
        self.updates = updates
        self.rate = rate

    @abstractmethod
    def gradients(self, number: int) -> list[Tensor]:
        """Gradients of an update, numbered from 0, one for each weight in the order of ``network.parameters()``.

        They depend on the number and the present weights alone, so that an interrupted fit can go on.
        """


@dataclass(frozen=True)
class Batch:
    """Images about to be generated, one per row."""

    prompts: tuple[Prompt, ...]  #: Prompt of each row.
    text: Conditioning  #: Conditioning of each row.
    latents: Tensor  #: Starting noise of each row.
    #: Seed of the starting noise of each row, from which all random choices for an image follow.
    seeds: tuple[int, ...]
    neurons: tuple[Neurons, ...]  #: Localized neurons of the prompt of each row.
    #: Conditioning that guidance leads away from, of each row; None for the model's own.
    unconditional: Conditioning | None = None
    notes: tuple[Mapping[str, Any], ...] = ()  #: Entries for the record of each image; empty for none.
    rule: Rule | None = None  #: Gives the noise of each step in place of guidance; None leaves guidance as it is.

    def rows(self, rows: Sequence[int]) -> Batch:
        """Selects rows that no method has changed yet, in the order given; a row may be repeated."""
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in rows),
            text=self.text.rows(rows),
            latents=self.latents[list(rows)],
            seeds=tuple(self.seeds[row] for row in rows),
            neurons=tuple(self.neurons[row] for row in rows),
        )

    def generate_checked(self, model: Diffusion) -> Generated:
        """Generates the images while the method is applied; see :meth:`Diffusion.generate_checked`."""
        return model.generate_checked(self.text, self.latents, self.unconditional, self.rule)


class Method(Checked, ABC):
    """A mitigation: set up once, it localizes neurons for a prompt (optional) and changes how a batch is generated.

    Constructors raise a ConfigError for an argument outside the range in its annotation.
    """

    title: str  #: Name in tables; an object replaces it where its settings make it another method.
    summary: ClassVar[str]  #: One line for ``nemo-bench ls``.
    touches: ClassVar[str] = ""  #: Part of the model or its input that it changes.
    citation: ClassVar[str] = ""  #: BibTeX of the source, empty for a control of our own.
    sourcing: ClassVar[str] = ""  #: Parts of the source that we could read.
    localizes: ClassVar[bool] = False  #: Whether :meth:`localize` returns neurons.
    needs_calibration: ClassVar[bool] = False  #: Whether localizing needs a calibration.
    makes_passes: ClassVar[bool] = False  #: Whether it makes UNet passes of its own during setup or while applied.
    families: ClassVar[frozenset[str]] = UNETS  #: Classes of pipelines that it works with.
    #: Why it does not work with the others.
    limits: ClassVar[str] = "published for UNets of Stable Diffusion, and not carried over to transformers"
    #: Requirements on the model: ``"guidance"`` while generating, ``"gradients"``, an ``"uncompiled"`` UNet.
    needs: ClassVar[frozenset[Need]] = frozenset()
    #: Whether it changes neurons or weights of the network alone, so that an audit can search for an embedding that
    #: brings a training image back.
    auditable: ClassVar[bool] = False
    #: Whether it treats all prompts alike, by the localizations of memorized prompts; those may be of another list,
    #: ``prompts.shared_from``.
    pools: ClassVar[bool] = False
    memorization_threshold: float | None = None  #: A threshold of its own, or None for the calibrated one.
    noise_protocol: Protocol = PAPER  #: How it takes noise differences.
    source: Method | None = None  #: Another method whose localizations this one starts from, or None.
    calibration: Calibration | None = None  #: The calibration, from :meth:`setup` or :meth:`calibrate`.
    batch_size: int = 32  #: Rows in a UNet pass at most, from :meth:`setup`.

    @property
    def calibrates_threshold(self) -> bool:
        """Whether the calibration must include a threshold."""
        return self.memorization_threshold is None

    def check(self, family: str, guidance: float, dtype: str, *, compiled: bool = False) -> None:
        """Raises ModelError, before weights load, where a model does not suit.

        Args:
            family: Class of the pipeline.
            guidance: Guidance scale while generating.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
            compiled: Whether the UNet is compiled.
        """
        if family not in self.families:
            made_for = ", ".join(sorted(self.families))
            msg = f"{self.title} is made for {made_for} ({self.limits}), given a {family}"
            raise ModelError(f"{msg}; leave this method out for it")
        if "guidance" in self.needs and guidance <= 1:
            msg = f"{self.title} changes guidance, given model.guidance={guidance:g}"
            raise ModelError(f"{msg}; give model.guidance above 1, or leave this method out")
        if "gradients" in self.needs:
            check_precision(self.title, dtype)
        if compiled and "uncompiled" in self.needs:
            msg = f"{self.title} works inside of the UNet, which can't be reached once it is compiled"
            raise ModelError(f"{msg}; set model.compiled=false, or leave this method out")

    def check_tokenizer(self, tokenizer: TokenizerFiles) -> None:  # most take any
        """Raises ModelError, before weights load, where the model's tokenizer does not suit, as far as files tell."""

    def check_source(self, prompts: Sequence[Prompt], source_prompts: Sequence[Prompt]) -> None:  # most take any
        """Raises ConfigError, before weights load, where the prompts that :attr:`source` localizes do not suffice."""

    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        """Content behind settings, such as the digest of a file, for the hash of a cell; read before weights load.

        Returns:
            Values by setting, which they replace in the hash; empty unless overridden.

        Raises:
            NemoBenchError: A file can't be read, or does not cover these prompts, all of the cell.
        """
        return {}

    def setup(self, model: Diffusion, setup: Setup) -> None:
        """Stores what a run gives, and measures what all prompts share; called once, before the first batch."""
        self.calibration = setup.calibration
        self.batch_size = setup.batch_size

    def calibrate(self, model: Diffusion, prompts: Sequence[Prompt], seeds: int = SEEDS) -> Self:
        """Measures a calibration in memory, in the method's own protocol; see :meth:`Calibration.measured`.

        Args:
            model: The model, nothing blocked.
            prompts: Prompts that are not memorized, at least two.
            seeds: Seeds a prompt, at least two.

        Returns:
            The method itself, ready to localize.
        """
        self.calibration = Calibration.measured(model, prompts, seeds, self.noise_protocol, self.batch_size)
        return self

    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        """Finds the neurons to block for a prompt, on a model with nothing blocked.

        Args:
            model: The model.
            prompt: The prompt.
            latents: Starting noise of the seeds to localize on, (S, channels, height, width); None for the noise of a
                run with ten seeds.

        Returns:
            The localization; empty unless overridden.
        """
        return Localization()

    def prepare_prompts(self, model: Diffusion, prompts: Sequence[Prompt]) -> None:  # most share nothing
        """Measures what all images of a prompt share; called before every batch, it does nothing for known prompts."""

    @abstractmethod
    def apply(self, model: Diffusion, batch: Batch) -> AbstractContextManager[Batch]:
        """Applies the mitigation to a batch, and gives the one to generate from; on exit the model is as it was."""


class FittedMethod(Method):
    """A method that edits weights which it fits first, once for all images of a cell; a run keeps them."""

    @abstractmethod
    def fit(self, model: Diffusion, setup: Setup) -> Fit:
        """Prepares the fit; it comes before :meth:`setup`, which gets the file of the weights."""

    def least_passes(self, prompts: Sequence[Prompt], image: int) -> int:
        """UNet passes of one sample that the fit takes at least, for a dry run; 0 unless overridden.

        Args:
            prompts: All prompts of the cell.
            image: Passes of an image without any mitigation.
        """
        return 0
