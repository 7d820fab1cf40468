"""A diffusers pipeline with a sampling loop of our own: encode, predict noise, generate, block neurons.

Example:
    >>> model = Diffusion.load("path/to/pipeline", steps=20, guidance=3.0)
    >>> with model.block(Neurons({"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [3]})):
    ...     images = model.generate("a red circle and a green star", range(4))
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from nemo_bench.diffusion.attention import Edit, edit_attention
from nemo_bench.diffusion.families import Conditioning, Layers, Segment, family_of
from nemo_bench.diffusion.flops import flops_of_pass
from nemo_bench.diffusion.masks import NeuronMasks
from nemo_bench.diffusion.prefix import Prefix
from nemo_bench.diffusion.sampling import Generated, Rule, Sampling
from nemo_bench.diffusion.schedule import NO_SIGNAL
from nemo_bench.diffusion.similarity import Similarity
from nemo_bench.diffusion.source import Source, without_advice, without_bars
from nemo_bench.errors import ModelError
from nemo_bench.records.data import Neurons

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

GRADIENT_MEMORY = 4
"""Memory of a pass with gradients, in plain passes."""


class Diffusion(nn.Module):
    """A diffusers pipeline whose value neurons can be blocked row by row.

    Args:
        pipeline: The pipeline; its networks become submodules, so that Lightning moves them.
        layers: Value layers that can be blocked, one of ``family.layers``; None for the first of them.
        steps: DDIM steps of a generation.
        guidance: Scale of classifier-free guidance.
        similarity: Settings of the similarity of noise differences.
        compiled: Compile the network with torch.compile at its first pass.
        settings: Of the family, such as ``tokens``; see the classes in ``nemo_bench.diffusion.families``.

    Attributes:
        family: What is particular to this kind of model.
        schedule: First-order steps in the noise schedule of the pipeline's own scheduler, which stays as it is.
        row_passes: Passes of the network made so far, one for each row; a forward or backward derivative counts as
            another pass.

    Raises:
        ModelError: The class of the pipeline is not supported, its UNet takes the guidance scale as an input, or its
            family has no such value layers or settings.
    """

    unet: Any  # of families with one

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        layers: Layers | None = None,
        steps: int = 50,
        guidance: float = 7.0,
        similarity: Similarity | None = None,
        compiled: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.family = family_of(type(pipeline).__name__, **settings)
        self.family.check(pipeline)
        self.pipeline = pipeline
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
        self.schedule = self.family.schedule(pipeline.scheduler.config, self.network.config)
        self.steps = steps
        self.guidance = guidance
        self.similarity = similarity or Similarity()
        self.requires_grad_(False).eval()
        self.value_layers = self.family.value_layers(self.network, self.family.chosen(layers))
        self.spans = {name: self.family.span(name) for name in self.value_layers}
        self.masks = NeuronMasks(self.value_layers, self.network, self.spans)
        self.text_projections = self.family.text_projections(self.network)
        self.stacked = self.family.stacked  # Whether both halves of guidance share a pass.
        self.compiled = compiled
        if compiled:
            # A compiled network ignores hooks that are registered later, so the masks come first.
            self.network.compile()
        self.row_passes = 0
        self._unconditional: Conditioning | None = None

    @classmethod
    def load(cls, source: Source | str, dtype: str = "float32", **options: Any) -> Diffusion:
        """Loads a model on the CPU, in float32, float16 or bfloat16, with arguments of :class:`Diffusion`.

        A source can be given by its path. Raises ModelError if it can't be loaded, and before weights load if its
        family has no such value layers or settings.
        """
        source = Source(source) if isinstance(source, str) else source
        own = inspect.signature(cls).parameters
        settings = {name: value for name, value in options.items() if name not in own}
        family_of(source.family.pipeline_class, **settings).chosen(options.get("layers"))
        return cls(source.load(dtype), **options)

    @property
    def network(self) -> Any:
        """The part of the pipeline that denoises: UNet or transformer."""
        return getattr(self, self.family.network)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network."""
        return next(self.network.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return self.family.latent_shape(self.network.config)

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height of an image in pixels."""
        _, height, width = self.latent_shape
        return width * self.pipeline.vae_scale_factor, height * self.pipeline.vae_scale_factor

    @property
    def passes_per_image(self) -> int:
        """Passes of an image: the number of steps, twice as many under guidance."""
        return self.steps * (2 if self.guidance > 1 else 1)

    @cached_property
    def flops_per_pass(self) -> int:
        """Floating point operations of a pass of one row, see :func:`nemo_bench.diffusion.flops.flops_of_pass`."""
        return flops_of_pass(self)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encodes N prompts, truncated to the length of the tokenizer, to N rows in the dtype of the network."""
        with torch.no_grad(), without_advice():
            return self.family.encode(self.pipeline, texts, self.device).to(self.dtype)

    def unconditional(self, rows: int) -> Conditioning:
        """The conditioning that guidance leads away from: the empty prompt, or zeros if the pipeline (SDXL) says so."""
        if self._unconditional is None or self._unconditional.text.device != self.device:
            with torch.no_grad(), without_advice():
                self._unconditional = self.family.empty(self.pipeline, self.device).to(self.dtype)
        return self._unconditional.rows([0] * rows)

    def forget(self) -> None:
        """Forgets what was derived from weights, for models whose weights have changed since."""
        self._unconditional = None

    def truncated(self, text: str) -> bool:
        """Whether a prompt is longer than the input of a text encoder."""
        text = text.lower().strip() if self.family.lowers else text
        return any(
            len(getattr(self.pipeline, name)(text, truncation=False, verbose=False).input_ids) > span.stop - span.start
            for name, span in self.family.segments(self.pipeline)
        )

    @property
    def begins(self) -> list[int]:
        """Positions of begin tokens in a text, none where its tokenizers have no such token."""
        return self.family.begins(self.pipeline)

    def tokens(self, text: str) -> list[str]:
        """Tokens of a prompt, from begin to end token without padding, by the first tokenizer, if there is any."""
        segments = self.family.segments(self.pipeline)
        return self._tokens(text, segments[0]) if segments else []

    def _tokens(self, text: str, segment: Segment) -> list[str]:
        tokenizer, span = getattr(self.pipeline, segment.tokenizer), segment.span
        text = text.lower().strip() if self.family.lowers else text
        ids = tokenizer(text, truncation=True, max_length=span.stop - span.start).input_ids
        return [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]

    def words(self, text: str) -> list[tuple[int, str]]:
        """Tokens of a prompt without begin, end and padding, each after its position in the encoded prompt.

        They are those of all tokenizers; of those that fill the same positions, of the first.
        """
        mask = self.encode([text]).mask
        found: dict[int, str] = {}
        for segment in reversed(self.family.segments(self.pipeline)):
            tokenizer, tokens = getattr(self.pipeline, segment.tokenizer), self._tokens(text, segment)
            # Sana puts its instruction before the prompt.
            before = 0 if mask is None else int(mask[0, segment.span].sum()) - len(tokens)
            first = segment.span.start + before
            found |= {
                first + number: token
                for number, token in enumerate(tokens)
                if (number, token) not in ((0, tokenizer.bos_token), (len(tokens) - 1, tokenizer.eos_token))
            }
        return sorted(found.items())

    def latents(self, seeds: Sequence[int]) -> Tensor:
        """Draws standard normal starting noise, (N, channels, height, width), from N seeds, 0 to 2^63 - 1.

        Each row has a CPU generator of its own, so that it is equal on every device and in every batch.
        """
        shape = self.latent_shape
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device, self.family.latent_dtype or self.dtype)

    def timestep(self, step: int = 0) -> float:
        """Timestep of one of 50 DDIM steps, as published: 0 is the noisiest (981 for Stable Diffusion), -1 the last."""
        return self.schedule.timestep(step)

    def timesteps(self, steps: int | None = None) -> list[float]:
        """Timesteps of a number of steps, the noisiest first; None takes the steps of a generation."""
        return self.schedule.timesteps(steps or self.steps)

    @property
    def scheduler(self) -> Any:
        """The diffusers scheduler of :attr:`schedule`."""
        return self.schedule.scheduler

    @property
    def training_timesteps(self) -> int:
        """Number of noise levels in training."""
        return self.schedule.training_timesteps

    def noisy_timesteps(self, earliest: int = 0) -> list[int]:
        """Timesteps of training from one on, without those at which latents are noise alone (zero terminal SNR)."""
        return [t for t in range(earliest, self.training_timesteps) if self.signal(t) >= NO_SIGNAL]

    def signal(self, timestep: float) -> float:
        """Share of the signal in the variance of a latent at a timestep, in (0, 1); the rest is noise."""
        return self.schedule.signal(timestep)

    def predict_noise(self, latents: Tensor, timestep: float, text: Conditioning) -> Tensor:
        """Predicts noise, float32, shaped as the latents, in one UNet pass.

        For v-prediction it is sqrt(abar) v + sqrt(1 - abar) x (Salimans and Ho 2022).

        Latents are noisy, (N, channels, height, width), the conditioning has N rows, and the timestep is one of
        training, 0 to 999.
        """
        return self.noise(self.predict_output(latents, timestep, text), timestep, latents)

    def predict_noises(self, latents: Tensor, timesteps: Sequence[int], text: Conditioning) -> Tensor:
        """Predicts noise as :meth:`predict_noise`, each row at a timestep of its own."""
        output = self.network_output(latents.to(self.dtype), torch.tensor(timesteps, device=self.device), text)
        rows = range(len(latents))
        return torch.cat([self.noise(output[[row]], timesteps[row], latents[[row]]) for row in rows])

    def predict_output(self, latents: Tensor, timestep: float, text: Conditioning) -> Tensor:
        """Predicts noise or velocity, the output of the network, with the arguments of :meth:`predict_noise`."""
        # A compiled network would be compiled again for each number, but not for each tensor.
        return self.network_output(latents, torch.tensor(timestep, device=self.device), text).float()

    def network_output(self, latents: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
        """Makes one pass of the network in its own dtype and counts it; the timestep is one for all rows or (N,)."""
        height, width = (side * self.pipeline.vae_scale_factor for side in latents.shape[2:])
        output = self.family.predict(self.network, latents, timestep, text, (height, width))
        self.row_passes += len(latents)
        if output.requires_grad:
            output.register_hook(self._count_backward)
        if unpack_dual(output).tangent is not None:
            self.row_passes += len(latents)
        return output

    def _count_backward(self, gradient: Tensor) -> None:
        self.row_passes += len(gradient)

    def text_noise(self, latents: Tensor, timestep: float, text: Conditioning) -> Tensor:
        """Predicts text-conditional noise, conditional minus unconditional, in one pass (see :meth:`predict_noise`)."""
        # Gradients don't flow through tensors that were made in inference mode, but through copies.
        both = self.unconditional(len(text)).clone().followed_by(text.clone())
        unconditional, conditional = self.predict_noise(torch.cat([latents, latents]), timestep, both).chunk(2)
        return conditional - unconditional

    def noise(self, output: Tensor, timestep: float, latents: Tensor) -> Tensor:
        """Converts an output of the network, noise or velocity, to noise in float32; ``latents`` are its input."""
        of_output, of_latents = self.schedule.noise_weights(timestep)
        return of_output * output.float() + of_latents * latents.float()

    def prediction(self, noise: Tensor, timestep: float, latents: Tensor | None = None) -> Tensor:
        """Converts noise to an output of the network, noise or velocity, in float32: the inverse of :meth:`noise`.

        Without latents, converts a difference of predicted noises, in which they cancel out.
        """
        of_output, of_latents = self.schedule.noise_weights(timestep)
        return (noise if latents is None else noise - of_latents * latents.float()) / of_output

    def training_losses(self, clean: Tensor, timesteps: Tensor, noise: Tensor, text: Conditioning) -> Tensor:
        """The training loss of N rows, float32, (N,), with gradients: mean squared error of noise or velocity.

        Clean latents (see :meth:`encode_images`) and standard normal noise are float32, (N, channels, height, width),
        timesteps are (N,), 0 to :attr:`training_timesteps` - 1.
        """
        noisy = self.schedule.noisy(clean, noise, timesteps).to(self.dtype)
        target = self.schedule.target(clean, noise, timesteps)
        return (self.network_output(noisy, timesteps, text).float() - target).square().flatten(1).mean(1)

    def generate(
        self,
        text: Conditioning | str,
        latents: Tensor | Sequence[int],
        unconditional: Conditioning | None = None,
        rule: Rule | None = None,
    ) -> Tensor:
        """Generates one image for each row, float32 in [0, 1], (N, 3, height, width); all nan for a failed image.

        Args:
            text: Conditioning of N rows, or one prompt for all of them.
            latents: Starting noise of N rows, or their seeds; see :meth:`latents`.
            unconditional: Conditioning of N rows that guidance leads away from; None for :meth:`unconditional`.
            rule: Gives the noise that each step removes, in place of guidance. Images for which it gives the noise
                under guidance are exactly those generated without it.

        Raises:
            ModelError: There is a rule, and the model generates without guidance.
        """
        return self.generate_checked(text, latents, unconditional, rule).images

    def generate_checked(
        self,
        text: Conditioning | str,
        latents: Tensor | Sequence[int],
        unconditional: Conditioning | None = None,
        rule: Rule | None = None,
    ) -> Generated:
        """Generates images as :meth:`generate`, and gives the reason for each image with infinite or nan values."""
        if not isinstance(latents, Tensor):
            latents = self.latents(latents)
        if isinstance(text, str):
            text = self.encode([text]).rows([0] * len(latents))
        return Sampling(self, text, latents, unconditional).run(rule)

    @property
    def decoding_dtype(self) -> torch.dtype:
        """Dtype of decoding: that of the autoencoder, or float32 if a half-precision autoencoder needs it."""
        dtype: torch.dtype = self.pipeline.vae.dtype
        return self.family.decoding_dtype(self.pipeline.vae.config, dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes clean latents to images, float32, (N, 3, height, width), 0 black and 1 white, not clamped.

        Gradients flow unless :attr:`decoding_dtype` differs from the model's dtype.
        """
        with self._autoencoder() as vae:
            unscaled = self.family.unscaled(vae.config, latents.to(vae.dtype))
            image: Tensor = vae.decode(unscaled, return_dict=False)[0]
        return image.float() / 2 + 0.5

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encodes images of :attr:`image_size`, 0 black and 1 white, to clean float32 latents: the encoder's means."""
        with self._autoencoder() as vae:
            latents = self.family.encode_images(vae, (2 * images - 1).to(self.device, vae.dtype))
            return self.family.scaled(vae.config, latents.float())

    @contextmanager
    def _autoencoder(self) -> Iterator[Any]:
        """The autoencoder in :attr:`decoding_dtype`."""
        vae, own = self.pipeline.vae, self.pipeline.vae.dtype
        if self.decoding_dtype == own:
            yield vae
            return
        vae.to(self.decoding_dtype)
        try:
            yield vae
        finally:
            vae.to(own)

    def block(
        self, neurons: Neurons | Sequence[Neurons], factor: float = 0.0, replayed: Collection[str] = ()
    ) -> AbstractContextManager[None]:
        """Multiplies value neurons by a factor inside a context; 0 switches them off (Hintersdorf et al. 2024).

        A set of neurons is for all rows, or each row has its own; a batch k times as long repeats them. Hooks of layers
        whose output a :class:`Prefix` replays do not fire.

        Raises:
            ModelError: A layer or index does not exist, blocks are nested, or a hook did not fire in a pass.
        """
        rows = [neurons] if isinstance(neurons, Neurons) else neurons
        return self.masks.scale(self.masks.factors(rows, factor), replayed)

    def prefix(self, layers: Collection[str]) -> Prefix:
        """A recorder of passes that will be replayed up to one of some value layers."""
        return Prefix(self.family.parts(self.network, list(layers)), layers)

    def edit_attention(self, edit: Edit, blocks: str | tuple[str, ...] = "") -> AbstractContextManager[None]:
        """Edits the logits of attention to text inside a context, in layers by the beginning of their module path.

        The edit is called in every pass, once a layer, with all rows of the pass; see
        :func:`nemo_bench.diffusion.attention.conditional_rows`. With joint attention it sees the logits of the
        picture's positions for those of the text; one softmax goes over these and the picture's own. The logits of all
        rows and heads of a layer are in memory at once. Raises ModelError if there is no such layer, or the network is
        compiled.
        """
        if self.compiled:
            raise ModelError("model.compiled=True: a method that edits attention needs model.compiled=false")
        layers = self.family.attentions(self.network, blocks)
        return self._editing(edit_attention(layers, edit, self.family.crossing(self.network.config)))

    @contextmanager
    def _editing(self, edited: AbstractContextManager[None]) -> Iterator[None]:
        """Keeps both halves of guidance in one pass, by which edits tell them apart."""
        before, self.stacked = self.stacked, True
        try:
            with edited:
                yield
        finally:
            self.stacked = before

    def state_digest(self) -> str:
        """Digest of all weights, 16 hexadecimal digits; it shows whether a method restored them."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()[:16]

    @torch.no_grad()
    def export(self, folder: Path | str, neurons: Neurons, factor: float = 0.0) -> None:
        """Saves a plain diffusers folder; in its weights rows (and biases) of neurons are multiplied by a factor."""
        self.masks.check(neurons)
        if mixed := [name for name in neurons if self.spans[name] != slice(None)]:
            raise ModelError(
                f"{mixed[0]} can't be exported: its weights serve the picture as well as the text; localize with "
                "model.layers=double"
            )
        originals: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for name, ids in neurons.items():
                for parameter in self.value_layers[name].parameters():
                    originals.append((parameter, parameter.clone()))
                    parameter[list(ids)] *= factor
            with without_bars():
                self.pipeline.save_pretrained(folder)
        finally:
            for parameter, original in originals:
                parameter.copy_(original)
