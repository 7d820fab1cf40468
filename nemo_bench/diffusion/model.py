"""A thin wrapper over a diffusers pipeline: encode, predict noise, generate, block neurons.

Example:
    >>> model = Diffusion.load("path/to/pipeline", steps=20, guidance=3.0)
    >>> text = model.encode(["a red circle and a green star"])
    >>> with model.block(Neurons({"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [3]})):
    ...     image = model.generate(text, model.latents([0]))
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from nemo_bench.diffusion.masks import NeuronMasks
from nemo_bench.errors import ModelError
from nemo_bench.types import Neurons, digest

Layers = Literal["down+mid", "all"]
NOISE_STEPS = 50
"""Noise differences are taken at the first of so many DDIM steps (Hintersdorf et al. 2024)."""
_PART = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


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


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    Attributes:
        text: Last hidden states of the text encoder, (N, tokens, channels).
    """

    text: Tensor

    def __len__(self) -> int:
        return len(self.text)

    def rows(self, index: Sequence[int]) -> Conditioning:
        """The conditioning of some rows, in the order given; a row may be taken several times."""
        return Conditioning(self.text[list(index)])


class Diffusion(nn.Module):
    """A Stable Diffusion pipeline whose value neurons can be switched off row by row.

    Args:
        pipeline: The pipeline; its networks become submodules, so that Lightning moves them.
        layers: Which cross-attention value layers can be blocked: ``"down+mid"`` as published, or ``"all"``.
        steps: DDIM steps of a generation.
        guidance: Scale of classifier-free guidance while generating.
        similarity: How noise differences are compared.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        *,
        layers: Layers = "down+mid",
        steps: int = 50,
        guidance: float = 7.0,
        similarity: Similarity | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.vae, self.text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
        self.pipeline = pipeline
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        self.steps, self.guidance = steps, guidance
        self.similarity = similarity or Similarity()
        self.requires_grad_(False).eval()
        self.value_layers = value_layers(self.unet, layers)
        self.masks = NeuronMasks(self.value_layers)
        self._unconditional: Conditioning | None = None

    @classmethod
    def load(
        cls,
        source: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        local_files_only: bool = False,
        **options: Any,
    ) -> Diffusion:
        """Loads a pipeline folder or a hub id.

        Args:
            source: Folder with a ``model_index.json``, or a hub id.
            revision: Commit or tag of a hub id.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
            local_files_only: Never ask the hub, take what is cached.
            options: See :class:`Diffusion`.

        Returns:
            The wrapped pipeline, on the CPU.

        Raises:
            ModelError: The source can't be loaded.
        """
        folder = is_folder(source)
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                source,
                revision=revision,
                dtype=getattr(torch, dtype),
                safety_checker=None,
                requires_safety_checker=False,
                local_files_only=local_files_only or folder,
                use_safetensors=True,
                low_cpu_mem_usage=find_spec("accelerate") is not None,
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            msg = f"model '{source}' can't be loaded ({error}); give a folder with a model_index.json or a hub id"
            raise ModelError(msg) from error
        return cls(pipeline, **options)

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

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encodes prompts, cut at the tokenizer's length.

        Args:
            texts: N prompts; an empty text is the unconditional one.

        Returns:
            Conditioning of N rows.
        """
        text, _ = self.pipeline.encode_prompt(list(texts), self.device, 1, do_classifier_free_guidance=False)
        return Conditioning(text)

    def truncated(self, text: str) -> bool:
        """Whether a prompt is longer than the text encoder reads."""
        tokenizer = self.pipeline.tokenizer
        return len(tokenizer(text, truncation=False, verbose=False).input_ids) > tokenizer.model_max_length

    def latents(self, seeds: Sequence[int]) -> Tensor:
        """Starting noise, each row from a CPU generator of its own, so equal on every device and in every batch.

        Args:
            seeds: N seeds, 0 to 2^63 - 1.

        Returns:
            Standard normal noise, (N, channels, height, width).
        """
        rows = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device, self.dtype)

    def first_timestep(self) -> int:
        """Timestep of the first of 50 DDIM steps, as published, however many generate (981 for Stable Diffusion)."""
        self.pipeline.scheduler.set_timesteps(NOISE_STEPS)
        return int(self.pipeline.scheduler.timesteps[0])

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
        scheduler = self.pipeline.scheduler
        output = self.unet(latents, timestep, encoder_hidden_states=text.text).sample.float()
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            return output
        if kind != "v_prediction":
            raise ModelError(f"prediction type '{kind}' is not supported; use a model with epsilon or v_prediction")
        alpha = scheduler.alphas_cumprod[timestep].to(output)
        return alpha.sqrt() * output + (1 - alpha).sqrt() * latents.float()

    def generate(self, text: Conditioning, latents: Tensor) -> Tensor:
        """Generates one image per row.

        Args:
            text: Conditioning of N rows.
            latents: Starting noise of N rows.

        Returns:
            Images in [0, 1], float32, (N, 3, height, width).
        """
        if self._unconditional is None or self._unconditional.text.device != self.device:
            self._unconditional = self.encode([""])
        images: Tensor = self.pipeline(
            prompt_embeds=text.text,
            negative_prompt_embeds=self._unconditional.rows([0] * len(text)).text,
            latents=latents,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            output_type="pt",
        ).images
        return images.float().clamp(0, 1)

    @property
    def passes_per_image(self) -> int:
        """UNet passes of one sample that an image costs: the steps, twice with guidance."""
        return self.steps * (2 if self.guidance > 1 else 1)

    def block(self, neurons: Neurons | Sequence[Neurons], factor: float = 0.0) -> AbstractContextManager[None]:
        """Switches value neurons off while the context is open.

        Args:
            neurons: One set for all rows, or one per row of the coming batches.
            factor: What their outputs are multiplied by.

        Raises:
            ModelError: See :meth:`NeuronMasks.block`.
        """
        return self.masks.block([neurons] if isinstance(neurons, Neurons) else neurons, factor)

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
            self.pipeline.save_pretrained(folder)
        finally:
            for parameter, original in kept:
                parameter.copy_(original)


def value_layers(unet: nn.Module, layers: Layers = "down+mid") -> dict[str, nn.Module]:
    """The cross-attention value projections of a UNet by module path, in network order.

    Args:
        unet: A diffusers UNet.
        layers: ``"down+mid"``, as published, or ``"all"``.

    Raises:
        ModelError: There is none.
    """
    found = [(name, module) for name, module in unet.named_modules() if name.endswith("attn2.to_v")]
    wanted = [(n, m) for n, m in found if layers == "all" or not n.startswith("up_blocks")]
    if not wanted:
        raise ModelError(f"the UNet has no cross-attention value layer in its {layers} blocks")

    def order(name: str) -> list[int]:
        return [_PART.get(name.split(".")[0], 3), *map(int, re.findall(r"\d+", name))]

    return dict(sorted(wanted, key=lambda item: order(item[0])))


def is_folder(source: str) -> bool:
    """Whether a model source is a folder rather than a hub id; a path that does not exist is an error.

    Raises:
        ModelError: It looks like a path and is no pipeline folder.
    """
    path = Path(source)
    if (path / "model_index.json").is_file():
        return True
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"model '{source}' is no pipeline folder: there is no model_index.json in it")
    return False


def source_digest(source: str, revision: str | None = None) -> str:
    """Content digest of a pipeline folder, or the digest of hub id and revision; loads nothing.

    Args:
        source: Folder or hub id.
        revision: Commit or tag of a hub id.

    Returns:
        16 hexadecimal digits.

    Raises:
        ModelError: The folder is no pipeline.
    """
    if not is_folder(source):
        return digest([source, revision])
    return folder_digest(Path(source))


def folder_digest(folder: Path) -> str:
    """Content digest of the settings and weights in a folder, 16 hexadecimal digits."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in {".json", ".safetensors", ".bin", ".txt"})
    return digest([[p.relative_to(folder).as_posix(), _file_digest(p)] for p in files])


def _file_digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()
