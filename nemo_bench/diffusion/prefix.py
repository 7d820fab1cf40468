"""Replays the first part of a pass of a network, so that later passes start at a value layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Prefix:
    """Outputs of a network's parts in a recorded pass, replayed up to a layer in later passes.

    The computation before a value layer stays the same as long as only its neurons and those of later layers change.
    Parts before the one with the layer are replayed, the rest is computed. ``parts`` are those of
    :meth:`nemo_bench.diffusion.families.Family.parts`, ``layers`` those at which passes will start; nothing is kept of
    the parts from the last of them on. A compiled network has no parts.
    """

    def __init__(self, parts: Mapping[str, nn.Module], layers: Iterable[str]) -> None:
        self._layers = tuple(layers)
        self._parts = dict(parts)
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
    """Rows of several outputs: tensors or tuples of them, with None for what a part does not give."""
    if isinstance(outputs[0], tuple):
        return tuple(_concatenated(each) for each in zip(*outputs, strict=True))
    return None if outputs[0] is None else torch.cat(list(outputs))


def _replay(output: Any, rows: Tensor, *_args: Any, **_options: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_replay(each, rows) for each in output)
    return None if output is None else output[rows]
