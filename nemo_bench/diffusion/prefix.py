"""Keeping what a UNet computes before a layer, so that later passes can start there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Prefix:
    """Outputs of a UNet's parts in one recorded pass, replayed up to a layer in later passes.

    What comes before a value layer does not change when only neurons of that layer or of later ones are switched. Parts
    are the input convolution and the resnets, attentions and samplers of the blocks; those before the part that holds
    the layer give what they gave, the rest is computed.

    Args:
        unet: A diffusers UNet, not compiled.
        layers: Value layers before which passes will start.
    """

    def __init__(self, unet: nn.Module, layers: Iterable[str]) -> None:
        sections = {"down_blocks", "mid_block", *(layer.split(".")[0] for layer in layers)}
        self._parts = {name: part for name, part in unet.named_modules() if _is_part(name, sections)}
        self._outputs: dict[str, Any] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the passes made while the context is open; their rows follow one another."""
        recorded: dict[str, list[Any]] = {}
        hooks = [
            part.register_forward_hook(lambda _m, _a, output, n=name: recorded.setdefault(n, []).append(output))
            for name, part in self._parts.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._outputs = {name: _join(outputs) for name, outputs in recorded.items()}

    def skips(self, part: str, layer: str) -> bool:
        """Whether a module is not called when all that comes before a value layer is replayed."""
        return any(part.startswith(f"{name}.") for name in self._before(layer))

    def _before(self, layer: str) -> list[str]:
        names = list(self._outputs)
        holder = next(i for i, name in enumerate(names) if layer.startswith(f"{name}."))
        return names[:holder]

    @contextmanager
    def replaying(self, layer: str, rows: Sequence[int]) -> Iterator[None]:
        """Replays all that comes before a layer.

        Args:
            layer: Module path of one of the value layers.
            rows: Recorded row of each row of the passes to come.
        """
        index = torch.tensor(rows)
        names = self._before(layer)
        for name in names:
            self._parts[name].forward = partial(_replay, self._outputs[name], index)
        try:
            yield
        finally:
            for name in names:
                del self._parts[name].forward


def _is_part(name: str, sections: Collection[str]) -> bool:
    section, *rest = name.split(".")
    # mid_block.resnets.0, but down_blocks.1.resnets.0
    return name == "conv_in" or (section in sections and len(rest) == (2 if section == "mid_block" else 3))


def _join(outputs: Sequence[Any]) -> Any:
    """Rows of several outputs one after another; diffusers' attentions give tuples of one tensor."""
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(list(tensors)) for tensors in zip(*outputs, strict=True))
    return torch.cat(list(outputs))


def _replay(output: Any, rows: Tensor, *_args: Any, **_options: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(tensor[rows] for tensor in output)
    return output[rows]
