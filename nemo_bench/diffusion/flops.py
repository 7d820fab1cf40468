"""Floating point operations of a pass, counted without memory for weights."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nemo_bench.diffusion.families import Conditioning, Family

if TYPE_CHECKING:
    from nemo_bench.diffusion.model import Diffusion


def flops_of_pass(model: Diffusion) -> int:
    """Operations of a pass of one row by the network that denoises, a multiplication and an addition counted as two.

    Products of matrices, convolutions and attention are counted, as by :mod:`torch.utils.flop_counter`, in a network of
    the same configuration on the meta device: whatever the device, the precision, and the kernels in use.
    """
    text = model.encode([""])
    kind: Any = type(model.network)
    pooled, mask = (None if part is None else tuple(part.shape) for part in (text.pooled, text.mask))
    config = json.dumps({name: value for name, value in model.network.config.items() if not name.startswith("_")})
    shapes = (tuple(text.text.shape), pooled, mask)
    return count_flops(model.family, kind, config, model.latent_shape, model.image_size, shapes)


@cache
def count_flops(
    family: Family,
    kind: Any,
    config: str,
    latent: tuple[int, ...],
    image: tuple[int, int],
    text: tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None],
) -> int:
    """The same of a class of networks, remembered, since it takes seconds.

    Args:
        family: What the network is called with.
        kind: Its class.
        config: Its configuration, JSON.
        latent: Channels, height and width of a latent.
        image: Width and height of an image.
        text: Shapes of the parts of a :class:`Conditioning` of one row.
    """
    with torch.device("meta"):
        network = kind.from_config(json.loads(config)).eval()
        pooled, mask = (None if shape is None else torch.ones(shape) for shape in text[1:])
        whole = Conditioning(torch.ones(text[0]), pooled, mask)
        latents, timestep = torch.ones(1, *latent), torch.tensor(1.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        family.predict(network, latents, timestep, whole, image[::-1])
    return int(counter.get_total_flops())
