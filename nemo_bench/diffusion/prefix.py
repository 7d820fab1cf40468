"""Replays the first part of a UNet pass, so that later passes start at a value layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Prefix:
    """Outputs of a UNet's parts in a recorded pass, replayed up to a layer in later passes.

    The computation before a value layer stays the same as long as only its neurons and those of later layers change.
    Parts are the input convolution and the resnets, attentions and samplers of the blocks. Parts before the one with
    the layer are replayed, the rest is computed. ``layers`` are those at which passes will start; nothing is kept of
    the parts from the last of them on. A compiled UNet has no parts.
    """

    def __init__(self, unet: nn.Module, layers: Iterable[str]) -> None:
        self._layers = tuple(layers)
        sections = {"down_blocks", "mid_block", *(layer.split(".")[0] for layer in self._layers)}
        self._parts = {}
        for name, module in unet.named_modules():
            section, *rest = name.split(".")
            # mid_block.resnets.0, but down_blocks.1.resnets.0
            depth = 2 if section == "mid_block" else 3
            if name == "conv_in" or (section in sections and len(rest) == depth):
                self._parts[name] = module
        self._order: list[str] = []
        self._outputs: dict[str, Any] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the passes inside the context; their rows are concatenated."""
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
        self._order = list(recorded)
        replayed = max((self._before(layer) for layer in self._layers), key=len, default=[])
        self._outputs = {name: _concatenated(recorded[name]) for name in replayed}

    def skips(self, module: str, layer: str) -> bool:
        """Whether a module is not called when passes start at a value layer; both are module paths."""
        return any(module.startswith(f"{name}.") for name in self._before(layer))

    def _before(self, layer: str) -> list[str]:
        containing = next(i for i, name in enumerate(self._order) if layer.startswith(f"{name}."))
        return self._order[:containing]

    @contextmanager
    def replaying(self, layer: str, rows: Sequence[int]) -> Iterator[None]:
        """Replays the computation before a value layer inside the context, with the recorded row of each row."""
        index = torch.tensor(rows)
        names = self._before(layer)
        for name in names:
            self._parts[name].forward = partial(_replay, self._outputs[name], index)
        try:
            yield
        finally:
            for name in names:
                del self._parts[name].forward


def _concatenated(outputs: Sequence[Any]) -> Any:
    """Rows of several outputs; attentions of diffusers give tuples of one tensor."""
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(list(tensors)) for tensors in zip(*outputs, strict=True))
    return torch.cat(list(outputs))


def _replay(output: Any, rows: Tensor, *_args: Any, **_options: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(tensor[rows] for tensor in output)
    return output[rows]
