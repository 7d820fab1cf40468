"""Switching value neurons off, row by row, by one permanent hook per value layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nemo_bench.errors import ModelError, did_you_mean
from nemo_bench.records.data import Neurons


class NeuronMasks:
    """A factor for every neuron of every row, multiplied onto the outputs of the value layers.

    The hooks are registered once and deal in tensors only: a network that is compiled afterwards has them in its graph,
    and blocking other neurons does not compile it again. Several neuron sets can share a batch.

    Args:
        layers: Value projections by module path, in network order.
        network: The network that they are in.
    """

    def __init__(self, layers: Mapping[str, nn.Module], network: nn.Module) -> None:
        self.widths = {name: int(layer.out_features) for name, layer in layers.items()}  # type: ignore[arg-type]
        self._layers = dict(layers)
        self._factors: dict[str, Tensor] = {}
        self._fired: dict[str, Tensor] = {}
        self._called = torch.zeros(())
        self._blocking = False
        network.register_forward_pre_hook(self._note_call)
        for name, layer in layers.items():
            layer.register_forward_hook(self._hook(name))

    def _note_call(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._blocking:
            self._called.fill_(1)

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def multiply(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self._blocking:
                return output
            self._fired[name].fill_(1)
            factors = self._factors[name]
            rows = len(factors)
            if rows > 1 and len(output) != rows:
                if len(output) % rows:
                    msg = f"{rows} neuron sets can't be shared out over a batch of {len(output)} rows"
                    raise ModelError(msg)
                # With guidance, whole batches are stacked: all unconditional rows, then all conditional ones.
                factors = factors.repeat(len(output) // rows, 1)
            return output * factors[:, None].to(output.dtype)

        return multiply

    def check(self, neurons: Neurons) -> None:
        """Raises ModelError where a layer or an index is not in this model."""
        for name, ids in neurons.items():
            if name not in self.widths:
                raise ModelError(f"no value layer '{name}' in this model. {did_you_mean(name, self.widths)}")
            if ids[0] < 0 or ids[-1] >= self.widths[name]:
                msg = f"layer '{name}' has neurons 0 to {self.widths[name] - 1}, given {ids[0]} to {ids[-1]}"
                raise ModelError(msg)

    def factors(self, rows: Sequence[Neurons], factor: float = 0.0) -> dict[str, Tensor]:
        """What each neuron of each row is multiplied by where some neurons are blocked.

        Args:
            rows: One set for each row.
            factor: For blocked neurons; others have 1.

        Returns:
            For every layer (rows, neurons), on the layer's device.

        Raises:
            ModelError: A layer or index does not exist.
        """
        sets = list(dict.fromkeys(rows))
        for neurons in sets:
            self.check(neurons)
        place = {neurons: number for number, neurons in enumerate(sets)}
        index = torch.tensor([place[neurons] for neurons in rows])
        scales = {}
        for name, width in self.widths.items():
            factors = torch.ones(len(sets), width)
            for number, neurons in enumerate(sets):
                factors[number, list(neurons.get(name, ()))] = factor
            scales[name] = factors[index].to(next(self._layers[name].parameters()).device)
        return scales

    @contextmanager
    def block(self, rows: Sequence[Neurons], factor: float = 0.0, replayed: Collection[str] = ()) -> Iterator[None]:
        """Multiplies the given neurons by a factor while the context is open.

        Args:
            rows: One set for all rows, or one per row of the coming batches (a batch k times as long repeats them).
            factor: What the outputs are multiplied by; 0 switches off (Hintersdorf et al. 2024, section 3).
            replayed: Layers that need not fire, since :class:`Prefix` replays what they led to.

        Raises:
            ModelError: A layer or index does not exist, blocks are nested, or a hook did not fire in a pass.
        """
        with self.scale(self.factors(rows, factor), replayed):
            yield

    @contextmanager
    def scale(self, factors: Mapping[str, Tensor], replayed: Collection[str] = ()) -> Iterator[None]:
        """Multiplies all neurons by factors of their own while the context is open; gradients reach the factors.

        Args:
            factors: For every layer (rows, neurons), on its device; a batch k times as long repeats the rows.
            replayed: See :meth:`block`.

        Raises:
            ModelError: Blocks are nested, or a hook did not fire in a pass.
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
            silent = [name for name, seen in fired.items() if not seen and name not in replayed]
            if silent and self._called:
                msg = (
                    f"blocking had no effect in {len(silent)} of {len(fired)} value layers (first: {silent[0]}): "
                    "their hooks did not fire. Fused projections bypass them; call pipeline.unfuse_qkv_projections()"
                )
                raise ModelError(msg)
        finally:
            self._blocking = False
