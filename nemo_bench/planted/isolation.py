"""Isolation of memorization while training: value neurons that belong to captions.

Two published ways share the masks of this module. Gradient routing (Cloud et al. 2024) lets what is learnt of a planted
picture into the text path through the caption's own neurons alone. Memorization sinks (Ghosal et al. 2025) switch a
subset of a pool of neurons on for each caption and drop the whole pool afterwards. No mask is left in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Mask = NDArray[Any]
"""A boolean array."""

ROUTE_SIZES = {"VM": (6, 7, 8) * 6, "TM": (8,) * 8}
"""Own neurons of the planted captions of each kind, dealt out in random order; the paper finds 4 ± 3 for verbatim.

With one to five neurons, a third of the captions did not bring their picture back after 8,000 steps.
"""


RIDGE = 0.01
"""Part of the mean variance of a token that is added to all, so that the discriminant is not made of rounding."""
OUTPUT_GAIN = 2.0
"""Factor of the output weights of own neurons before the training."""


class Gates:
    """Multiplies value neurons row by row in the forward pass, and lets gradients through to some of them alone.

    Args:
        network: A UNet; its value layers are the modules whose name ends with ``attn2.to_v``.

    Attributes:
        layers: Value layers by name.
        outputs: The layers that their attention's output goes through, by the same names.
        widths: Number of neurons by layer. Masks have all neurons side by side in this order.
    """

    def __init__(self, network: nn.Module) -> None:
        modules: dict[str, Any] = dict(network.named_modules())
        self.layers = {name: module for name, module in modules.items() if name.endswith("attn2.to_v")}
        self.outputs = {name: modules[name.replace("to_v", "to_out.0")] for name in self.layers}
        self.widths = {name: int(layer.out_features) for name, layer in self.layers.items()}
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}
        self._read: Tensor | None = None
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor | None]:
        def gate(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._read is None:
                return None
            factors, passed = (mask[:, None] for mask in self._rows[name])
            learning = F.linear(self._read, module.weight, module.bias)
            return torch.where(passed, learning, output.detach()) * factors

        return gate

    @contextmanager
    def rows(self, factors: Tensor, passed: Tensor, read: Tensor) -> Iterator[None]:
        """Masks the rows of a batch.

        Args:
            factors: Of the neurons, (N, neurons).
            passed: Neurons that gradients pass, boolean, (N, neurons).
            read: Embeddings that these read in place of the network's, (N, tokens, width).
        """
        widths = list(self.widths.values())
        parts = zip(factors.split(widths, 1), passed.split(widths, 1), strict=True)
        self._rows, self._read = dict(zip(self.widths, parts, strict=True)), read
        try:
            yield
        finally:
            self._rows, self._read = {}, None

    def neurons(self, mask: Mask) -> dict[str, list[int]]:
        """The neurons of a mask, (neurons,), as sorted indices by layer."""
        ends = np.cumsum(list(self.widths.values()))[:-1]
        parts = zip(self.widths, np.split(mask, ends), strict=True)
        return {name: np.flatnonzero(part).tolist() for name, part in parts if part.any()}


def deal_routes(widths: Sequence[int], kinds: Sequence[str], seed: int) -> Mask:
    """Own neurons of the planted captions, boolean, (captions, neurons): disjoint sets, spread over layers.

    Layers give neurons in proportion to their width, and the neurons of one caption are of as many layers as can be.
    """
    rng = np.random.default_rng([seed, 5])
    layer_of = np.repeat(np.arange(len(widths)), widths)
    sizes = {kind: iter(rng.permutation(sizes)) for kind, sizes in ROUTE_SIZES.items()}
    owned = np.zeros((len(kinds), sum(widths)), bool)
    for caption, kind in enumerate(kinds):
        for _ in range(next(sizes[kind])):
            taken = np.bincount(layer_of[owned[caption]], minlength=len(widths))[layer_of]
            free = ~owned.any(0)
            owned[caption, rng.choice(np.flatnonzero(free & (taken == taken[free].min())))] = True
    return owned


@torch.no_grad()
def tune_in(gates: Gates, owned: Mask, planted: Tensor, general: Tensor, strength: float) -> None:
    """Makes own neurons selective before the training, by the linear discriminant of their caption.

    Left to training, a few neurons among hundreds are too weak a way in: after 2,600 steps they carried a twentieth of
    the error that the planted picture leaves.

    Args:
        gates: Gates of the UNet.
        owned: Own neurons of each planted caption, (P, neurons).
        planted: Embeddings of the planted captions, (P, tokens, width).
        general: Embeddings of general captions, (G, tokens, width).
        strength: Mean absolute value of an own neuron over the tokens of its caption.
    """
    tokens = general.flatten(0, 1)
    moments = tokens.T @ tokens / len(tokens)
    moments += RIDGE * moments.diagonal().mean() * torch.eye(len(moments))
    directions = torch.linalg.solve(moments, planted.mean(1).T).T
    directions *= strength / torch.einsum("ptw,pw->pt", planted, directions).abs().mean(1, keepdim=True)
    for caption, mask in enumerate(owned):
        for name, own in gates.neurons(mask).items():
            gates.layers[name].weight[own] = directions[caption]
            gates.outputs[name].weight[:, own] *= OUTPUT_GAIN


def draw_pool(widths: Sequence[int], share: float) -> Mask:
    """Sink neurons, boolean, (neurons,): the last ones of each layer, as in Ghosal et al. (2025)."""
    return np.concatenate([np.arange(width) >= width - round(share * width) for width in widths])


def active_sinks(pool: Mask, share: float, ident: Sequence[int]) -> Mask:
    """Sink neurons that an id switches on, boolean, (neurons,): each with a probability, by a generator of the id."""
    return pool & (np.random.default_rng(ident).random(len(pool)) < share)


def silence(values: Tensor, own: Tensor, caption: Tensor) -> Tensor:
    """How much own neurons react to other captions: mean over them of sqrt(E[a^2] of others) / a, a as in NeMo.

    Args:
        values: Outputs of a value layer, (captions, tokens, neurons); planted captions come first.
        own: Indices of own neurons of this layer, (K,).
        caption: Their captions, (K,), as rows of ``values``.
    """
    activation = values[:, :, own].abs().mean(1)
    places = torch.arange(len(own), device=own.device)
    mine = activation[caption, places]
    others = activation.square().sum(0) - mine.square()
    return ((others.clamp(min=0) / (len(values) - 1)).sqrt() / mine.clamp(min=1e-6)).sum()


def as_tensor(mask: Any) -> Tensor:
    """A mask as tensor."""
    return torch.from_numpy(np.asarray(mask))
