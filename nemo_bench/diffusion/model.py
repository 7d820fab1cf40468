"""A diffusers pipeline whose networks are sampled here: encode, predict noise, generate, block neurons.

Example:
    >>> model = Diffusion.load("path/to/pipeline", steps=20, guidance=3.0)
    >>> with model.block(Neurons({"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [3]})):
    ...     images = model.generate("a red circle and a green star", range(4))
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from nemo_bench.diffusion.attention import Edit, cross_attentions, edit_attention
from nemo_bench.diffusion.families import Conditioning, family_of
from nemo_bench.diffusion.lora import Lora
from nemo_bench.diffusion.masks import NeuronMasks
from nemo_bench.diffusion.sampling import Generated, Rule, sample
from nemo_bench.diffusion.source import Source, without_advice, without_bars
from nemo_bench.errors import ConfigError, ModelError, NotFiniteError
from nemo_bench.records.data import Neurons

Layers = Literal["down+mid", "all"]
Measure = Literal["published", "current", "fixed"]
"""How noise differences are compared, all of SSIM or MS-SSIM. ``fixed``: data range 1, so a value depends on its pair
alone. ``current``: no range is given and torchmetrics takes it, at every scale, from all pairs compared at once, as the
public scripts of NeMo have it (Hintersdorf et al. 2024). ``published``: the same with the last scale averaged without
its border, as in torchmetrics 1.3.2, which those scripts pin."""
MEASURES: tuple[Measure, ...] = get_args(Measure)
GRADIENT_MEMORY = 4
"""A pass with gradients takes the memory of about so many plain ones."""
NO_SIGNAL = 1e-6
"""With less of the signal in the latents' variance they are noise alone."""
NOISE_STEPS = 50
"""Noise differences are taken at the first of so many DDIM steps (Hintersdorf et al. 2024)."""
_DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
"""Stable Diffusion's own settings, where a shipped scheduler has none; DDIM's defaults are made for pixels."""


@dataclass(frozen=True)
class Similarity:
    """How noise differences are compared; small latents need other settings than Stable Diffusion's.

    Attributes:
        sigma: Standard deviation of the Gaussian window, in latent pixels.
        betas: Weights of the scales of MS-SSIM, or empty for single-scale SSIM. The published settings are sigma 1.5
            (a window of 11) and betas (0.33, 0.33, 0.33) (Hintersdorf et al. 2024, appendix).
    """

    sigma: float = 1.5
    betas: tuple[float, ...] = (0.33, 0.33, 0.33)

    @property
    def kernel(self) -> int:
        """Side of the window that torchmetrics takes for this sigma, in latent pixels."""
        return 2 * int(3.5 * self.sigma + 0.5) + 1

    def fits(self, side: int, measure: Measure = "fixed") -> bool:
        """Whether latents with this shorter side can be compared."""
        border, scales = self.kernel // 2, max(1, len(self.betas))
        sides = [side // 2**scale for scale in range(scales)]
        # Contrast leaves the border out, the last scale only as published; what is mirrored there must be inside.
        cropped = sides if measure == "published" else sides[:-1]
        if not border or sides[-1] <= border or any(each <= 2 * border for each in cropped):
            return False
        # torchmetrics asks for more than there must be.
        return not self.betas or (side >= 2**scales and side // max(1, scales - 1) ** 2 >= self.kernel)

    def check(self, size: Sequence[int], measure: Measure = "fixed") -> None:
        """Looks whether latents of a size can be compared.

        Args:
            size: Height and width of a latent.
            measure: How they are compared.

        Raises:
            ConfigError: They are too small; the message has the values that fit.
        """
        side = min(size)
        if self.fits(side, measure):
            return
        if self.kernel == 1:
            msg = (
                f"model.similarity.sigma={self.sigma:g}: a window of one pixel compares nothing; expected 0.15 or more"
            )
            raise ConfigError(msg)
        fewer = [replace(self, betas=self.betas[:scales]) for scales in range(len(self.betas) - 1, -1, -1)]
        narrower = [replace(self, sigma=tenths / 10) for tenths in range(int(self.sigma * 10), 0, -1)]
        values = [f"betas={list(kind.betas)}" for kind in fewer if kind.fits(side, measure)][:1]
        values += [f"sigma={kind.sigma}" for kind in narrower if kind.fits(side, measure)][:1]
        least = next(each for each in count(1) if self.fits(each, measure))
        scales = f"{len(self.betas)} scales of MS-SSIM" if self.betas else "SSIM"
        settings = " or ".join(f"model.similarity.{value}".replace(" ", "") for value in values)
        raise ConfigError(
            f"latents of {size[0]}x{size[1]} are too small for model.similarity: {scales} with sigma={self.sigma:g} (a "
            f"window of {self.kernel}), compared as '{measure}', need sides of {least} or more; "
            + (f"set {settings}, which fit" if settings else "no window fits; take a model with larger latents")
        )


class Diffusion(nn.Module):
    """A pipeline of Stable Diffusion 1.x, 2.x or XL whose value neurons can be switched off row by row.

    Args:
        pipeline: The pipeline; its networks become submodules, so that Lightning moves them.
        layers: Which cross-attention value layers can be blocked: ``"down+mid"`` as published, or ``"all"``.
        steps: DDIM steps of a generation.
        guidance: Scale of classifier-free guidance while generating.
        similarity: How noise differences are compared.
        compiled: Compile the UNet with torch.compile at its first pass.

    Attributes:
        scheduler: DDIM in the noise schedule of the pipeline's own scheduler, which stays as it was.
        row_passes: UNet passes of one sample made so far; a derivative of a pass, forward or backward, counts as
            another one.

    Raises:
        ModelError: The pipeline is of another class, its UNet takes the scale of guidance as an input, or there is no
            such value layer.
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
        self.steps, self.guidance = steps, guidance
        self.similarity = similarity or Similarity()
        self.requires_grad_(False).eval()
        self.value_layers = value_layers(self.unet, layers)
        self.masks = NeuronMasks(self.value_layers, self.unet)
        self.text_projections = [
            projection for layer in cross_attentions(self.unet).values() for projection in (layer.to_k, layer.to_v)
        ]
        self.compiled = compiled
        if compiled:
            # Hooks that a network gets after it was compiled are ignored, so the masks come first.
            self.unet.compile()
        self.row_passes = 0
        self._unconditional: Conditioning | None = None

    @classmethod
    def load(
        cls,
        source: str,
        *,
        revision: str | None = None,
        config: str | None = None,
        dtype: str = "float32",
        local_files_only: bool = False,
        variant: str | None = None,
        lora: Lora | None = None,
        **options: Any,
    ) -> Diffusion:
        """Loads a pipeline folder, a hub id or a single file.

        Args:
            source: Folder with a ``model_index.json``, a hub id, or a ``.safetensors`` file.
            revision: Commit, tag or branch of a hub id.
            config: For a single file, folder or hub id of a pipeline like it.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
            local_files_only: Never ask the hub, take what is cached.
            variant: Form of the weights, see :class:`Source`.
            lora: Added to the weights.
            options: See :class:`Diffusion`.

        Returns:
            The wrapped pipeline, on the CPU.

        Raises:
            ModelError: The source can't be loaded, see :class:`Source`.
        """
        return cls(Source(source, revision, config, local_files_only, variant, lora).load(dtype), **options)

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the UNet."""
        return next(self.unet.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encodes prompts, cut at the tokenizer's length.

        Args:
            texts: N prompts.

        Returns:
            Conditioning of N rows.
        """
        return self._encode(texts, 0)

    def unconditional(self, rows: int) -> Conditioning:
        """What guidance leads away from: the empty prompt or, where the pipeline says so (SDXL), zeros.

        Args:
            rows: Number N of rows.

        Returns:
            Conditioning of N rows.
        """
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
        """Whether a prompt is longer than a text encoder reads."""
        tokenizers = [part for name, part in self.pipeline.components.items() if name.startswith("tokenizer")]
        return any(len(t(text, truncation=False, verbose=False).input_ids) > t.model_max_length for t in tokenizers)

    def latents(self, seeds: Sequence[int]) -> Tensor:
        """Starting noise, each row from a CPU generator of its own, so equal on every device and in every batch.

        Args:
            seeds: N seeds, 0 to 2^63 - 1.

        Returns:
            Standard normal noise, (N, channels, height, width).
        """
        rows = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device, self.dtype)

    def tokens(self, text: str) -> list[str]:
        """Tokens that a prompt is read as by the (first) text encoder, from its begin to its end token, no padding."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(text, truncation=True).input_ids
        return [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]

    def timestep(self, step: int = 0) -> int:
        """Timestep of one of 50 DDIM steps, as published, however many generate.

        Args:
            step: Number of the step from 0, the noisiest (981 for Stable Diffusion); below 0 from the last.
        """
        return self.timesteps(NOISE_STEPS)[step]

    def timesteps(self, steps: int | None = None) -> list[int]:
        """Timesteps of so many DDIM steps, or of a generation, the noisiest first."""
        timesteps: list[int] = self.scheduler_of(steps or self.steps).timesteps.tolist()
        return timesteps

    def scheduler_of(self, steps: int) -> DDIMScheduler:
        """A copy of the scheduler, set to so many steps."""
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def signal(self, timestep: int) -> float:
        """Share of the signal in the variance of a latent at a timestep, in (0, 1); the rest is noise."""
        return float(self.scheduler.alphas_cumprod[timestep])

    def predict_noise(self, latents: Tensor, timestep: int, text: Conditioning) -> Tensor:
        """One UNet pass, converted to predicted noise whatever the network predicts.

        Args:
            latents: Noisy latents, (N, channels, height, width).
            timestep: Training timestep, 0 to 999.
            text: Conditioning of N rows.

        Returns:
            Predicted noise in float32, shaped as the latents. For v-prediction it is
            sqrt(abar) v + sqrt(1 - abar) x (Salimans and Ho 2022).

        Raises:
            ModelError: The scheduler's prediction type is neither epsilon nor v_prediction.
        """
        return self.noise(self.predict_output(latents, timestep, text), timestep, latents)

    def predict_output(self, latents: Tensor, timestep: int, text: Conditioning) -> Tensor:
        """One UNet pass as the network gives it, noise or velocity; see :meth:`predict_noise` for the arguments.

        Returns:
            Predicted noise or velocity in float32, shaped as the latents.
        """
        # A number would be a constant of a compiled network, which would be compiled again for each.
        return self.network_output(latents, torch.tensor(timestep, device=self.device), text).float()

    def network_output(self, latents: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
        """One UNet pass in its own number format; the pass is counted.

        Args:
            latents: Noisy latents, (N, channels, height, width).
            timestep: Training timestep, one for all rows or (N,), on the model's device.
            text: Conditioning of N rows.

        Returns:
            Predicted noise or velocity, shaped as the latents.
        """
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

    def training_losses(self, clean: Tensor, timesteps: Tensor, noise: Tensor, text: Conditioning) -> Tensor:
        """What training made small: squared error of what the network predicts, be it noise or velocity.

        Args:
            clean: Latents of pictures, float32, (N, channels, height, width); see :meth:`encode_images`.
            timesteps: Training timesteps, (N,), 0 to :attr:`training_timesteps` - 1.
            noise: Standard normal noise, float32, shaped as the latents.
            text: Conditioning of N rows.

        Returns:
            Mean over the elements of each row, float32, (N,); gradients go through it.

        Raises:
            ModelError: The scheduler's prediction type is neither epsilon nor v_prediction.
        """
        scheduler = self.scheduler
        noisy = scheduler.add_noise(clean, noise, timesteps).to(self.dtype)
        target = scheduler.get_velocity(clean, noise, timesteps) if self._predicts_velocity else noise
        return (self.network_output(noisy, timesteps, text).float() - target).square().flatten(1).mean(1)

    @property
    def training_timesteps(self) -> int:
        """Number of noise levels that the model was trained on."""
        return int(self.scheduler.config.num_train_timesteps)

    def text_noise(self, latents: Tensor, timestep: int, text: Conditioning) -> Tensor:
        """What a prompt adds to the predicted noise: conditional minus unconditional, of one UNet pass for both.

        Args:
            latents: See :meth:`predict_noise`.
            timestep: Likewise.
            text: Likewise.

        Returns:
            The difference in float32, shaped as the latents.
        """
        # Copies, since what was made in inference mode takes no part in gradients.
        both = self.unconditional(len(text)).clone().followed_by(text.clone())
        unconditional, conditional = self.predict_noise(torch.cat([latents, latents]), timestep, both).chunk(2)
        return conditional - unconditional

    def noise(self, output: Tensor, timestep: int, latents: Tensor) -> Tensor:
        """The noise behind what the network predicted, noise or velocity.

        Args:
            output: What it predicted, shaped as the latents.
            timestep: Training timestep, 0 to 999.
            latents: What it was predicted from.

        Returns:
            Float32, shaped as the latents.
        """
        own, of_latents = self._noise_weights(timestep)
        return own * output.float() + of_latents * latents.float()

    def prediction(self, noise: Tensor, timestep: int, latents: Tensor | None = None) -> Tensor:
        """What the network itself predicted, noise or velocity, behind predicted noise.

        Args:
            noise: Predicted noise, or a difference of such.
            timestep: Training timestep, 0 to 999.
            latents: What it was predicted from, shaped as the noise; None for a difference, where they cancel out.

        Returns:
            Float32, shaped as the noise.
        """
        own, of_latents = self._noise_weights(timestep)
        return (noise if latents is None else noise - of_latents * latents.float()) / own

    def _noise_weights(self, timestep: int) -> tuple[float, float]:
        """What output and latents are multiplied by to sum up to the noise predicted (Salimans and Ho 2022)."""
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

    def edit_attention(self, edit: Edit, blocks: str | tuple[str, ...] = "") -> AbstractContextManager[None]:
        """Edits the logits of cross-attention while the context is open.

        Args:
            edit: Called in every UNet pass, once a layer; it sees the rows of the pass, see
                :func:`nemo_bench.diffusion.attention.conditional_rows`.
            blocks: Beginning of the paths of the layers, such as ``"down_blocks.0."``, or several; all where empty.

        Raises:
            ModelError: There is no such layer, or the UNet is compiled.
        """
        if self.compiled:
            raise ModelError("model.compiled=True: a method that edits attention needs model.compiled=false")
        return edit_attention(cross_attentions(self.unet, blocks), edit)

    def generate(
        self,
        text: Conditioning | str,
        latents: Tensor | Sequence[int],
        unconditional: Conditioning | None = None,
        rule: Rule | None = None,
    ) -> Tensor:
        """Generates one image per row.

        Args:
            text: Conditioning of N rows, or one prompt for all of them.
            latents: Starting noise of N rows, or their seeds; see :meth:`latents`.
            unconditional: What guidance leads away from, of N rows; None for :meth:`unconditional`.
            rule: Gives, once a step for all images, the noise that is taken off in place of that under guidance.
                Images for which it gives what guidance gives anyway are exactly those generated without it.

        Returns:
            Images in [0, 1], float32, (N, 3, height, width); nan throughout where an image failed, see
            :meth:`generate_checked`.

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
        """Generates one image per row, and says of each whether its latents and its pixels were finite.

        Args:
            text: See :meth:`generate`.
            latents: Likewise.
            unconditional: Likewise.
            rule: Likewise.

        Returns:
            The images, and why those failed that did.

        Raises:
            ModelError: See :meth:`generate`.
        """
        if not isinstance(latents, Tensor):
            latents = self.latents(latents)
        if isinstance(text, str):
            text = self.encode([text]).rows([0] * len(latents))
        return sample(self, text, latents, unconditional, rule)

    @property
    def decoding_dtype(self) -> torch.dtype:
        """Number format that images are decoded in: float32 where the autoencoder asks for it in half precision."""
        dtype: torch.dtype = self.pipeline.vae.dtype
        return self.family.decoding_dtype(self.pipeline.vae.config, dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of clean latents; gradients go through it, but where :attr:`decoding_dtype` is not that of the model.

        Args:
            latents: (N, channels, height, width).

        Returns:
            Float32, (N, 3, height, width), 0 black and 1 white; values beyond are not cut off.
        """
        with self._autoencoder() as vae:
            unscaled = self.family.unscaled(vae.config, latents.to(vae.dtype))
            image: Tensor = vae.decode(unscaled, return_dict=False)[0]
        return image.float() / 2 + 0.5

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Clean latents of images: the means that the autoencoder gives.

        Args:
            images: (N, 3, height, width), 0 black and 1 white, of the size of :attr:`image_size`.

        Returns:
            Float32, (N, channels, height, width) of a latent.
        """
        with self._autoencoder() as vae:
            posterior = vae.encode((2 * images - 1).to(self.device, vae.dtype)).latent_dist
            return self.family.scaled(vae.config, posterior.mode().float())

    @contextmanager
    def _autoencoder(self) -> Iterator[Any]:
        """The autoencoder in the number format that it works in."""
        vae, own = self.pipeline.vae, self.pipeline.vae.dtype
        if self.decoding_dtype == own:
            yield vae
            return
        vae.to(self.decoding_dtype)
        try:
            yield vae
        finally:
            vae.to(own)

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height of an image in pixels."""
        _, height, width = self.latent_shape
        return width * self.pipeline.vae_scale_factor, height * self.pipeline.vae_scale_factor

    @property
    def passes_per_image(self) -> int:
        """UNet passes of one sample that an image costs: the steps, twice with guidance."""
        return self.steps * (2 if self.guidance > 1 else 1)

    def block(
        self, neurons: Neurons | Sequence[Neurons], factor: float = 0.0, replayed: Collection[str] = ()
    ) -> AbstractContextManager[None]:
        """Switches value neurons off while the context is open.

        Args:
            neurons: One set for all rows, or one per row of the coming batches.
            factor: What their outputs are multiplied by.
            replayed: Value layers that a :class:`Prefix` replays.

        Raises:
            ModelError: See :meth:`NeuronMasks.block`.
        """
        return self.masks.block([neurons] if isinstance(neurons, Neurons) else neurons, factor, replayed)

    def state_digest(self) -> str:
        """Hash of all weights as they are now; a method that leaves a trace changes it."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()[:16]

    @torch.no_grad()
    def export(self, folder: Path | str, neurons: Neurons, factor: float = 0.0) -> None:
        """Saves the pipeline with neurons blocked for good: their weight rows (and biases) are multiplied.

        Args:
            folder: Where the plain diffusers folder is written.
            neurons: What is blocked.
            factor: What they are multiplied by; 0 switches off.

        Raises:
            ModelError: A layer or index does not exist.
        """
        self.masks.check(neurons)
        kept: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for name, ids in neurons.items():
                for parameter in self.value_layers[name].parameters():
                    kept.append((parameter, parameter.clone()))
                    parameter[list(ids)] *= factor
            with without_bars():
                self.pipeline.save_pretrained(folder)
        finally:
            for parameter, original in kept:
                parameter.copy_(original)


def ddim(shipped: Mapping[str, Any]) -> DDIMScheduler:
    """The DDIM scheduler of a model, whatever sampler it is shipped with.

    Args:
        shipped: Configuration of the shipped scheduler: noise schedule, prediction type and spacing of timesteps stay.
    """
    unset = {*shipped.get("_use_default_values", ()), "_use_default_values"}
    return DDIMScheduler.from_config({**_DDIM, **{k: v for k, v in shipped.items() if k not in unset}})


def value_layers(unet: nn.Module, layers: Layers = "down+mid") -> dict[str, nn.Module]:
    """The cross-attention value projections of a UNet by module path, in network order.

    Args:
        unet: A diffusers UNet.
        layers: ``"down+mid"``, as published, or ``"all"``.

    Raises:
        ModelError: There is none.
    """
    blocks = "" if layers == "all" else ("down_blocks.", "mid_block.")
    return {f"{name}.to_v": layer.to_v for name, layer in cross_attentions(unet, blocks).items()}
