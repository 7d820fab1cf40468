"""What families of transformers have in common: blocks in a row, positions, tokenizers that fill the text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from nemo_bench.diffusion.families.base import Conditioning, Family, Layers
from nemo_bench.diffusion.schedule import Flow, Schedule, check_flow
from nemo_bench.errors import ModelError

FLOW_MEASURES = (
    "flow matching: magnitudes are those of velocity differences, noise differences negated clean predictions at the "
    "signal-to-noise ratio of Stable Diffusion's first step, activations {}over tokens without padding; not comparable "
    "with other families"
)
"""How models of flow matching are measured, but for what activations are of."""
_BLOCK = re.compile(r"(?:single_)?transformer_blocks\.\d+")


class Transformer(Family):
    """A family whose network is a row of transformer blocks; by default it samples by flow matching."""

    pattern: ClassVar[str]  #: Module paths of the value projections of text.
    measures = FLOW_MEASURES.format("those of passes there, ")

    @override
    def check(self, pipeline: Any) -> None:
        pass

    @override
    def schedule(self, config: Mapping[str, Any], network: Mapping[str, Any]) -> Schedule:
        return Flow(config, self.positions(network))

    @override
    def check_schedule(self, config: Mapping[str, Any], steps: int, *, predicts: bool, where: str) -> None:
        check_flow(config, where=where)

    def positions(self, network: Mapping[str, Any]) -> int:
        """Image positions of the transformer, by its configuration."""
        _, height, width = self.latent_shape(network)
        patch = network["patch_size"]
        return (height // patch) * (width // patch)

    @override
    def latent_shape(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        return config["in_channels"], config["sample_size"], config["sample_size"]

    @override
    def empty(self, pipeline: Any, device: torch.device) -> Conditioning:
        return self.encode(pipeline, [""], device)

    def mask(self, pipeline: Any, texts: Sequence[str], like: Tensor) -> Tensor:
        """Which positions are tokens, (N, tokens), 1 or 0; padding is neither, and so are encoders that are absent."""
        mask = torch.zeros(like.shape[:2], device=like.device)
        for segment in self.segments(pipeline):
            length = segment.span.stop - segment.span.start
            found = getattr(pipeline, segment.tokenizer)(
                list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            # The two CLIPs of SD 3 share positions, and cut a text alike.
            mask[:, segment.span] = found.attention_mask.to(mask)
        return mask

    @override
    def value_layers(self, network: nn.Module, layers: Layers) -> dict[str, nn.Module]:
        found = {name: module for name, module in network.named_modules() if re.fullmatch(self.pattern, name)}
        if not found:
            raise ModelError(f"the {self.network} of this {self.pipeline_class} has no value layers of text")
        return found

    @override
    def attentions(self, network: nn.Module, blocks: str | tuple[str, ...] = "") -> dict[str, nn.Module]:
        # Each has one value projection of text.
        layers = [name.rpartition(".")[0] for name in self.value_layers(network, "all")]
        found = {name: network.get_submodule(name) for name in layers if name.startswith(blocks)}
        if not found:
            raise ModelError(f"no attention to text in {blocks} of this {self.pipeline_class}")
        return found

    @override
    def parts(self, network: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
        return {name: module for name, module in network.named_modules() if _BLOCK.fullmatch(name)}
