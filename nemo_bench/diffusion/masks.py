"""Blocks value neurons row by row, with one permanent hook on each value layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from nemo_bench.errors import ModelError, did_you_mean
from nemo_bench.records.data import Neurons


class NeuronMasks:
    """Multiplies the output of every value neuron by a factor of its own in every row.

    The hooks are registered once and use tensors only: a network that is compiled afterwards has them in its graph, and
    is not compiled again for other neurons.

    Args:
        layers: Value projections of the network by module path, in network order.
        network: The network.
        spans: Positions of text in the output of a layer, by its path; other positions stay as they are.

    Attributes:
        widths: Number of neurons by layer, in network order.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], network: nn.Module, spans: Mapping[str, slice] | None = None
    ) -> None:
        self.widths = {name: int(layer.out_features) for name, layer in layers.items()}  # type: ignore[arg-type]
        self._layers = dict(layers)
        self._factors: dict[str, Tensor] = {}
        self._fired: dict[str, Tensor] = {}
        self._called = torch.zeros(())
        self._blocking = False
        network.register_forward_pre_hook(self._note_call)
        for name, layer in layers.items():
            layer.register_forward_hook(self._hook(name, (spans or {}).get(name, slice(None))))

    def _note_call(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._blocking:
            self._called.fill_(1)

    def _hook(self, name: str, span: slice) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def multiply(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self._blocking:
                return output
            self._fired[name].fill_(1)
            factors = self._factors[name]
            rows = len(factors)
            if rows > 1 and len(output) != rows:
                if len(output) % rows:
                    raise ModelError(f"{rows} neuron sets can't be shared out over a batch of {len(output)} rows")
                # Guidance stacks whole batches: all unconditional rows, then all conditional ones.
                factors = factors.repeat(len(output) // rows, 1)
            factors = factors[:, None].to(output.dtype)
            if span == slice(None):
                return output * factors
            before, text, after = output.tensor_split((span.start, span.stop), dim=1)
            return torch.cat([before, text * factors, after], 1)

        return multiply

    def check(self, neurons: Neurons) -> None:
        """Raises ModelError for a layer or an index that this model does not have."""
        check_neurons(neurons, self.widths)

    def factors(self, rows: Sequence[Neurons], factor: float = 0.0) -> dict[str, Tensor]:
        """Factors by layer, (rows, neurons): ``factor`` for the blocked neurons of each row, 1 for others."""
        numbers = {neurons: number for number, neurons in enumerate(dict.fromkeys(rows))}
        for neurons in numbers:
            self.check(neurons)
        widths = list(self.widths.values())
        starts = dict(zip(self.widths, accumulate([0, *widths]), strict=False))
        blocked = [
            (number, starts[name] + i)
            for neurons, number in numbers.items()
            for name, ids in neurons.items()
            for i in ids
        ]
        # All layers together, so that one copy to the device serves them all.
        factors = torch.ones(len(numbers), sum(widths))
        if blocked:
            factors[tuple(torch.tensor(blocked).T)] = factor
        index = torch.tensor([numbers[neurons] for neurons in rows])
        device = next(next(iter(self._layers.values())).parameters()).device
        return dict(zip(self.widths, factors[index].to(device).split(widths, dim=1), strict=True))

    @contextmanager
    def scale(self, factors: Mapping[str, Tensor], replayed: Collection[str] = ()) -> Iterator[None]:
        """Multiplies every neuron by its own factor inside the context; gradients reach the factors.

        Factors are (rows, neurons) by layer, on the layer's device; a batch k times as long repeats the rows. Raises
        ModelError if blocks are nested, or a hook of a layer that no :class:`Prefix` replays did not fire in a pass.
        """
        if self._blocking:
            raise ModelError("neurons are blocked already; close the first block before opening another")
        self._factors = dict(factors)
        self._fired = {name: torch.zeros((), device=values.device) for name, values in factors.items()}
        self._called = torch.zeros(())
        self._blocking = True
        try:
            yield
            fired = dict(zip(self._fired, torch.stack(list(self._fired.values())).tolist(), strict=True))
            silent = [name for name, has_fired in fired.items() if not has_fired and name not in replayed]
            if silent and self._called:
                msg = (
                    f"blocking had no effect in {len(silent)} of {len(fired)} value layers (first: {silent[0]}): "
                    "their hooks did not fire. Fused projections bypass them; call pipeline.unfuse_qkv_projections()"
                )
                raise ModelError(msg)
        finally:
            self._blocking = False


def check_neurons(neurons: Neurons, widths: Mapping[str, int]) -> None:
    """Raises ModelError for a layer or an index that a model with value layers of these widths does not have."""
    for name, ids in neurons.items():
        if name not in widths:
            raise ModelError(f"no value layer '{name}' in this model. {did_you_mean(name, widths)}")
        if ids[0] < 0 or ids[-1] >= widths[name]:
            raise ModelError(f"layer '{name}' has neurons 0 to {widths[name] - 1}, given {ids[0]} to {ids[-1]}")
