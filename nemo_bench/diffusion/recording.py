"""Cross-attention probabilities as detectors see them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nemo_bench.diffusion.model import Diffusion, value_layers


def cross_attention_layers(model: Diffusion) -> list[str]:
    """Module paths of all cross-attention layers, in network order: down, middle, up."""
    return [name.removesuffix(".to_v") for name in value_layers(model.unet, "all")]


class AttentionRecorder:
    """Keeps the cross-attention probabilities of the last UNet pass.

    What the layers give to the network is untouched, whatever kernel computes it: probabilities are computed a second
    time, and of chosen layers only.

    Args:
        model: The model.
        rows: Number N of last rows that are kept of a pass: of guided sampling the conditional half, which comes
            second.

    Attributes:
        wanted: Layers whose probabilities are kept, see :func:`cross_attention_layers`; may be changed between passes.
        maps: Probabilities by layer, float32, (N, heads, positions, tokens); they sum to 1 over tokens.
    """

    def __init__(self, model: Diffusion, rows: int) -> None:
        self.rows = rows
        self.wanted: Collection[str] = ()
        self.maps: dict[str, Tensor] = {}
        self._layers: dict[str, Any] = {name: model.unet.get_submodule(name) for name in cross_attention_layers(model)}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records while the context is open; afterwards the layers have the processors that they had."""
        processors = {name: layer.processor for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            layer.set_processor(_Recording(self, name, processors[name]))
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                layer.set_processor(processors[name])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps what there is while passes are made that nobody wants to see the attention of."""
        wanted, self.wanted = self.wanted, ()
        try:
            yield
        finally:
            self.wanted = wanted


class _Recording:
    """A processor that leaves the work to another one and looks at the same queries and keys."""

    def __init__(self, recorder: AttentionRecorder, name: str, inner: Any) -> None:
        self.recorder, self.name, self.inner = recorder, name, inner

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **options: Any
    ) -> Tensor:
        if self.name in self.recorder.wanted:
            rows = self.recorder.rows
            self.recorder.maps[self.name] = probabilities(attn, hidden_states[-rows:], encoder_hidden_states[-rows:])
        output: Tensor = self.inner(attn, hidden_states, encoder_hidden_states, *args, **options)
        return output


def probabilities(attn: Any, hidden: Tensor, text: Tensor) -> Tensor:
    """Cross-attention probabilities of a layer.

    Args:
        attn: An attention module of diffusers.
        hidden: Its input, (N, positions, channels).
        text: Hidden states of the text encoder, (N, tokens, channels).

    Returns:
        Probabilities over the tokens, float32, (N, heads, positions, tokens).
    """
    queries, keys = attn.head_to_batch_dim(attn.to_q(hidden)), attn.head_to_batch_dim(attn.to_k(text))
    return attn.get_attention_scores(queries, keys).float().unflatten(0, (len(hidden), attn.heads))
