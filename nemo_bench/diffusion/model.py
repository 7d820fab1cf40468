"""A diffusers pipeline with a sampling loop of our own: encode, predict noise, generate, block neurons.

Example:
    >>> model = Diffusion.load("path/to/pipeline", steps=20, guidance=3.0)
    >>> with model.block(Neurons({"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [3]})):
    ...     images = model.generate("a red circle and a green star", range(4))
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from nemo_bench.diffusion.attention import Edit, Layers, cross_attentions, edit_attention, value_layers
from nemo_bench.diffusion.families import Conditioning, family_of
from nemo_bench.diffusion.masks import NeuronMasks
from nemo_bench.diffusion.sampling import Generated, Rule, Sampling
from nemo_bench.diffusion.schedule import NO_SIGNAL, NOISE_STEPS, ddim
from nemo_bench.diffusion.similarity import Similarity
from nemo_bench.diffusion.source import Source, without_advice, without_bars
from nemo_bench.errors import ModelError, NotFiniteError
from nemo_bench.records.data import Neurons

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiffusionPipeline

GRADIENT_MEMORY = 4
"""Memory of a pass with gradients, in plain passes."""


class Diffusion(nn.Module):
    """A pipeline of Stable Diffusion 1.x, 2.x or XL whose value neurons can be blocked row by row.

    Args:
        pipeline: The pipeline; its networks become submodules, so that Lightning moves them.
        layers: Value layers that can be blocked.
        steps: DDIM steps of a generation.
        guidance: Scale of classifier-free guidance.
        similarity: Settings of the similarity of noise differences.
        compiled: Compile the UNet with torch.compile at its first pass.

    Attributes:
        scheduler: DDIM in the noise schedule of the pipeline's own scheduler, which stays as it is.
        row_passes: UNet passes made so far, one for each row; a forward or backward derivative counts as another pass.

    Raises:
        ModelError: The class of the pipeline is not supported, its UNet takes the guidance scale as an input, or there
            is no such value layer.
    """

    unet: Any

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        layers: Layers = "down+mid",
        steps: int = 50,
        guidance: float = 7.0,
        similarity: Similarity | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.family = family_of(type(pipeline).__name__)
        if pipeline.unet.config.get("time_cond_proj_dim") is not None:
            raise ModelError(
                "the UNet takes the scale of guidance as an input (as LCM distillations do); not supported"
            )
        self.pipeline = pipeline
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
        self.scheduler = ddim(pipeline.scheduler.config)
        self.steps = steps
        self.guidance = guidance
        self.similarity = similarity or Similarity()
        self.requires_grad_(False).eval()
        self.value_layers = value_layers(self.unet, layers)
        self.masks = NeuronMasks(self.value_layers, self.unet)
        self.text_projections = [
            projection for layer in cross_attentions(self.unet).values() for projection in (layer.to_k, layer.to_v)
        ]
        self.compiled = compiled
        if compiled:
            # A compiled network ignores hooks that are registered later, so the masks come first.
            self.unet.compile()
        self.row_passes = 0
        self._unconditional: Conditioning | None = None

    @classmethod
    def load(cls, source: Source | str, dtype: str = "float32", **options: Any) -> Diffusion:
        """Loads a model on the CPU, in float32, float16 or bfloat16, with arguments of :class:`Diffusion`.

        A source can be given by its path. Raises ModelError if it can't be loaded.
        """
        return cls((Source(source) if isinstance(source, str) else source).load(dtype), **options)

    @property
    def device(self) -> torch.device:
        """Device of the UNet."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the UNet."""
        return next(self.unet.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height of an image in pixels."""
        _, height, width = self.latent_shape
        return width * self.pipeline.vae_scale_factor, height * self.pipeline.vae_scale_factor

    @property
    def passes_per_image(self) -> int:
        """UNet passes of an image: the number of steps, twice as many under guidance."""
        return self.steps * (2 if self.guidance > 1 else 1)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encodes N prompts, truncated to the length of the tokenizer, to N rows."""
        return self._encode(texts, 0)

    def unconditional(self, rows: int) -> Conditioning:
        """The conditioning that guidance leads away from: the empty prompt, or zeros if the pipeline (SDXL) says so."""
        if self._unconditional is None or self._unconditional.text.device != self.device:
            self._unconditional = self._encode([""], 1)
        return self._unconditional.rows([0] * rows)

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], half: int) -> Conditioning:
        # Pipelines give conditional and unconditional text, then, if any, both pooled embeddings.
        with without_advice():
            encoded = self.pipeline.encode_prompt(
                prompt=list(texts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=half == 1
            )
        return Conditioning(*encoded[half::2])

    def truncated(self, text: str) -> bool:
        """Whether a prompt is longer than the input of a text encoder."""
        tokenizers = [part for name, part in self.pipeline.components.items() if name.startswith("tokenizer")]
        return any(len(t(text, truncation=False, verbose=False).input_ids) > t.model_max_length for t in tokenizers)

    def tokens(self, text: str) -> list[str]:
        """Tokens of a prompt for the (first) text encoder, from begin to end token without padding."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(text, truncation=True).input_ids
        return [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]

    def latents(self, seeds: Sequence[int]) -> Tensor:
        """Draws standard normal starting noise, (N, channels, height, width), from N seeds, 0 to 2^63 - 1.

        Each row has a CPU generator of its own, so that it is equal on every device and in every batch.
        """
        rows = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device, self.dtype)

    def timestep(self, step: int = 0) -> int:
        """Timestep of one of 50 DDIM steps, as published: 0 is the noisiest (981 for Stable Diffusion), -1 the last."""
        return self.timesteps(NOISE_STEPS)[step]

    def timesteps(self, steps: int | None = None) -> list[int]:
        """Timesteps of a number of DDIM steps, the noisiest first; None takes the steps of a generation."""
        timesteps: list[int] = self.scheduler_of(steps or self.steps).timesteps.tolist()
        return timesteps

    def scheduler_of(self, steps: int) -> DDIMScheduler:
        """A copy of the scheduler with a number of steps."""
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    @property
    def training_timesteps(self) -> int:
        """Number of noise levels in training."""
        return int(self.scheduler.config.num_train_timesteps)

    def signal(self, timestep: int) -> float:
        """Share of the signal in the variance of a latent at a timestep, in (0, 1); the rest is noise."""
        return float(self.scheduler.alphas_cumprod[timestep])

    def predict_noise(self, latents: Tensor, timestep: int, text: Conditioning) -> Tensor:
        """Predicts noise, float32, shaped as the latents, in one UNet pass.

        For v-prediction it is sqrt(abar) v + sqrt(1 - abar) x (Salimans and Ho 2022).

        Latents are noisy, (N, channels, height, width), the conditioning has N rows, and the timestep is one of
        training, 0 to 999.
        """
        return self.noise(self.predict_output(latents, timestep, text), timestep, latents)

    def predict_output(self, latents: Tensor, timestep: int, text: Conditioning) -> Tensor:
        """Predicts noise or velocity, the output of the network, with the arguments of :meth:`predict_noise`."""
        # A compiled network would be compiled again for each number, but not for each tensor.
        return self.network_output(latents, torch.tensor(timestep, device=self.device), text).float()

    def network_output(self, latents: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
        """Makes one UNet pass in its own dtype and counts it; the timestep is one for all rows or (N,)."""
        height, width = (side * self.pipeline.vae_scale_factor for side in latents.shape[2:])
        inputs = self.family.unet_inputs(text, (height, width))
        output: Tensor = self.unet(latents, timestep, **inputs, return_dict=False)[0]
        self.row_passes += len(latents)
        if output.requires_grad:
            output.register_hook(self._count_backward)
        if unpack_dual(output).tangent is not None:
            self.row_passes += len(latents)
        return output

    def _count_backward(self, gradient: Tensor) -> None:
        self.row_passes += len(gradient)

    def text_noise(self, latents: Tensor, timestep: int, text: Conditioning) -> Tensor:
        """Predicts text-conditional noise, conditional minus unconditional, in one pass (see :meth:`predict_noise`)."""
        # Gradients don't flow through tensors that were made in inference mode, but through copies.
        both = self.unconditional(len(text)).clone().followed_by(text.clone())
        unconditional, conditional = self.predict_noise(torch.cat([latents, latents]), timestep, both).chunk(2)
        return conditional - unconditional

    def noise(self, output: Tensor, timestep: int, latents: Tensor) -> Tensor:
        """Converts an output of the network, noise or velocity, to noise in float32; ``latents`` are its input."""
        of_output, of_latents = self._noise_weights(timestep)
        return of_output * output.float() + of_latents * latents.float()

    def prediction(self, noise: Tensor, timestep: int, latents: Tensor | None = None) -> Tensor:
        """Converts noise to an output of the network, noise or velocity, in float32: the inverse of :meth:`noise`.

        Without latents, converts a difference of predicted noises, in which they cancel out.
        """
        of_output, of_latents = self._noise_weights(timestep)
        return (noise if latents is None else noise - of_latents * latents.float()) / of_output

    def _noise_weights(self, timestep: int) -> tuple[float, float]:
        """Weights of output and latents whose sum is the predicted noise (Salimans and Ho 2022)."""
        if not self._predicts_velocity:
            return 1.0, 0.0
        alpha = self.signal(timestep)
        if alpha < NO_SIGNAL:
            raise NotFiniteError(
                f"at timestep {timestep} latents of this model are noise alone (its scheduler has zero terminal SNR), "
                "and no predicted noise follows from a velocity there; set rescale_betas_zero_snr=false and "
                "timestep_spacing=leading in the scheduler's configuration"
            )
        return alpha**0.5, (1 - alpha) ** 0.5

    @property
    def _predicts_velocity(self) -> bool:
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ModelError(f"prediction type '{kind}' is not supported; use a model with epsilon or v_prediction")
        return bool(kind == "v_prediction")

    def training_losses(self, clean: Tensor, timesteps: Tensor, noise: Tensor, text: Conditioning) -> Tensor:
        """The training loss of N rows, float32, (N,), with gradients: mean squared error of noise or velocity.

        Clean latents (see :meth:`encode_images`) and standard normal noise are float32, (N, channels, height, width),
        timesteps are (N,), 0 to :attr:`training_timesteps` - 1.
        """
        scheduler = self.scheduler
        noisy = scheduler.add_noise(clean, noise, timesteps).to(self.dtype)
        target = scheduler.get_velocity(clean, noise, timesteps) if self._predicts_velocity else noise
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
            posterior = vae.encode((2 * images - 1).to(self.device, vae.dtype)).latent_dist
            return self.family.scaled(vae.config, posterior.mode().float())

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

    def edit_attention(self, edit: Edit, blocks: str | tuple[str, ...] = "") -> AbstractContextManager[None]:
        """Edits the logits of cross-attention inside a context, in layers by the beginning of their module path.

        The edit is called in every UNet pass, once a layer, with all rows of the pass; see
        :func:`nemo_bench.diffusion.attention.conditional_rows`. Raises ModelError if there is no such layer, or the
        UNet is compiled.
        """
        if self.compiled:
            raise ModelError("model.compiled=True: a method that edits attention needs model.compiled=false")
        return edit_attention(cross_attentions(self.unet, blocks), edit)

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
