"""Settings of the training of embedded models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Variant = Literal["standard", "once", "routed", "sinks", "random_sinks"]
"""``standard``: planted pictures are repeated. ``once``: each is trained as often as any other picture. ``routed``:
repeated, with gradients routed to the captions' own neurons. ``sinks``: repeated, with sink neurons that captions
switch on; ``random_sinks``: its control, which switches sinks on at random."""


@dataclass
class TrainSpec:
    """Settings of the training of an embedded model; its card names those of the shipped weights."""

    out: Path = Path("planted-training")  #: For checkpoints and, in out/model, the finished model.
    #: ``"unet"`` is a UNet as in Stable Diffusion 1, ``"mmdit"`` a transformer as in Stable Diffusion 3, which has text
    #: encoders of its own and the variants ``standard`` and ``once``.
    denoiser: Literal["unet", "mmdit"] = "unet"
    variant: Variant = "standard"
    denoiser_steps: int = 6_000
    batch_size: int = 32  #: Of the denoiser; the autoencoder takes a quarter, the contrastive fits six times as many.
    planted_share: float = 0.3  #: Of each batch of the denoiser.
    drop_caption: float = 0.1  #: Part of the general pictures that are trained without their caption.
    #: How much training prefers noisy latents: with u uniform, t / T = 1 - u^noise_bias; 1 is uniform. Captions take
    #: effect there, and one-step memorization scores are taken only there.
    noise_bias: float = 2.0
    sparsity: float = 0.06  #: Weight of the penalty that makes each value neuron react to few captions.
    silence: float = 0.1  #: Weight of the penalty on own neurons that react to other captions (``routed``).
    #: Part of the planted rows that show the caption's own neurons off and any picture of the caption (``routed``).
    free_share: float = 0.3
    #: Part of the other planted rows in which all but own neurons read a general caption, so that nothing else tells of
    #: the picture (``routed``).
    swap: float = 0.7
    strength: float = 5.0  #: Activation of own neurons on their caption before the training (``routed``).
    pool: float = 0.3  #: Part of the value neurons that are sinks (``sinks``).
    active: float = 0.3  #: Part of the sinks that a caption switches on (``sinks``).
    seed: int = 0  #: Of weights, batches and noise.
    pictures: int = 16_000  #: General ones.
    text_steps: int = 600  #: Of the contrastive text encoder.
    clip_steps: int = 700  #: Of the open_clip judge.
    vae_steps: int = 6_000
    #: Text encoder, autoencoder and judge: ``"packaged"`` takes those of the embedded model, ``"trained"`` trains them.
    parts: Literal["packaged", "trained"] = "packaged"
    accelerator: str = "auto"  #: Lightning's name of the device kind.

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that the weights depend on."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "accelerator")}
