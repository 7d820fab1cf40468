"""Padding fix: the encoded prompt without the copies of its end that pad it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Conditioning, Diffusion, TokenizerFiles
from nemo_bench.errors import ModelError
from nemo_bench.methods.base import Batch, Method, Setup
from nemo_bench.records.citations import cite
from nemo_bench.records.ranges import Share

Change = Literal[
    "pad_and_end",
    "pad",
    "part",
    "zero_pad",
    "zero_end",
    "zero_end_pad",
    "zero_prompt",
    "prompt_by_end",
    "pad_by_end",
    "prompt_pad_by_end",
    "prompt_end_by_pad",
]
"""See :attr:`PaddingFix.change`."""
REPADDED = ("pad_and_end", "pad")  # Changes that encode the prompt with another padding token.


@dataclass(eq=False)
class PaddingFix(Method):
    """Encodes prompts with another padding token, and sets the embedding of the end token to 0 (Kim and No 2026).

    Stable Diffusion 1.x pads with its end token, so a prompt comes with dozens of nearly equal embeddings of its end;
    by the source these, and not those of its words, bring the training image back. The text encoder is causal, so that
    the padding changes nothing before itself. The other changes are the source's ablations. It compares images with
    those of the unchanged prompt (``change`` metrics here), not with the training image. A 0 is not "no token": its
    logit is 0, and it still takes attention. Notes have the number of padding tokens; a prompt that fills the input has
    none, and changes of the padding leave it as it is.

    A tokenizer that lacks ``token`` is a ModelError, and so is one that pads with it already where that leaves no
    change (``"pad"``; ``"pad_and_end"`` is ``"zero_end"`` there): before weights load where the files of the tokenizer
    tell, else once the model is loaded.

    The embedded model has 16 tokens, of which a caption leaves about half to the padding; there the words carry much of
    the memory, as ``"zero_prompt"`` shows.
    """

    title = "Padding fix"
    summary = "the prompt padded by another token, its end set to 0"
    touches = "encoded prompt"
    sourcing = "public code and abstract; paper second hand"
    citation = cite("kim2026memorization")
    families = frozenset({"StableDiffusionPipeline"})
    limits = "changes the padding of the only text encoder"

    #: What is changed, of the start, the prompt's words, the first end token and the padding after it.
    #: ``"pad_and_end"``: padding by ``token``, then the end set to 0 (the method); ``"pad"``: without the latter.
    #: ``"part"``: the first ``share`` of the padding set to 0. ``"zero_pad"``, ``"zero_end"``, ``"zero_end_pad"``,
    #: ``"zero_prompt"``: the padding, the end, both or the words set to 0. ``"prompt_by_end"``, ``"pad_by_end"``,
    #: ``"prompt_pad_by_end"``: words, padding or both replaced by the end. ``"prompt_end_by_pad"``: words and end
    #: replaced by the mean of the padding.
    change: Change = "pad_and_end"
    share: Share = 0.7  #: Of the padding, with ``change="part"``; published: 0.7 and 0.4.
    token: str = "!"  #: Padding token; Stable Diffusion 2.x has this one already, where ``"pad"`` is an error.
    #: Whether the empty prompt is padded with ``token`` as well, ``"changed"``, as in the public code, whose end token
    #: is not set to 0; or stays the model's ``"own"``.
    unconditional: Literal["changed", "own"] = "changed"

    @override
    def setup(self, model: Diffusion, setup: Setup) -> None:
        super().setup(model, setup)
        tokenizer = model.pipeline.tokenizer
        if self.change in REPADDED:
            self._check_token(tokenizer.get_vocab(), tokenizer.pad_token)

    @override
    def check_tokenizer(self, tokenizer: TokenizerFiles) -> None:
        if self.change in REPADDED:
            self._check_token(tokenizer.vocabulary, tokenizer.padding)

    def _check_token(self, vocabulary: Collection[str] | None, padding: str | None) -> None:
        if vocabulary is not None and self.token not in vocabulary:
            raise ModelError(
                f"the tokenizer has no token {self.token!r}; set token to one that it has, or leave this out"
            )
        if self.change == "pad" and padding == self.token:
            raise ModelError(f"this model pads with {self.token!r} already, so change=pad is no change; leave it out")

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        repads = self.change in REPADDED
        ends = [len(model.tokens(prompt.text)) - 1 for prompt in batch.prompts]
        text = self._repadded(model, [prompt.text for prompt in batch.prompts]) if repads else batch.text
        rows = [changed(row, end, self.change, self.share) for row, end in zip(text.text, ends, strict=True)]
        empty = None
        if repads and self.unconditional == "changed":
            empty = self._repadded(model, [""]).rows([0] * len(rows))
        notes = tuple({"padding": text.text.shape[1] - 1 - end} for end in ends)
        yield replace(batch, text=replace(text, text=torch.stack(rows)), unconditional=empty, notes=notes)

    @torch.no_grad()
    def _repadded(self, model: Diffusion, texts: Sequence[str]) -> Conditioning:
        """Encodes texts as the pipeline does, with another padding token; the shared tokenizer stays as it is."""
        tokenizer = model.pipeline.tokenizer
        options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        ids = tokenizer([*texts], return_tensors="pt", **options).input_ids
        lengths = torch.tensor([len(model.tokens(text)) for text in texts])
        is_padding = torch.arange(ids.shape[1]) >= lengths[:, None]
        ids[is_padding] = tokenizer.convert_tokens_to_ids(self.token)
        encoder = model.pipeline.text_encoder
        return Conditioning(encoder(ids.to(model.device))[0].to(encoder.dtype))


def changed(text: Tensor, end: int, change: Change, share: float = 0.7) -> Tensor:
    """Sets or replaces parts of an encoded prompt; see :attr:`PaddingFix.change`.

    Args:
        text: Hidden states, (tokens, channels).
        end: Position of the first end token; the padding comes after it.
        change: What is changed.
        share: Of the padding that ``"part"`` sets to 0.

    Returns:
        A changed copy.
    """
    padding = text[end + 1 :]
    part = slice(end + 1, end + 1 + int(share * len(padding)))
    words, ending, rest = slice(1, end), slice(end, end + 1), slice(end + 1, None)
    places = {
        "pad_and_end": ending,
        "pad": slice(0),
        "part": part,
        "zero_pad": rest,
        "zero_end": ending,
        "zero_end_pad": slice(end, None),
        "zero_prompt": words,
        "prompt_by_end": words,
        "pad_by_end": rest,
        "prompt_pad_by_end": slice(1, None),
        "prompt_end_by_pad": slice(1, end + 1),
    }
    new = text.clone()
    if change.endswith("by_end"):
        new[places[change]] = text[end]
    elif change == "prompt_end_by_pad":
        if len(padding):
            new[places[change]] = padding.mean(0)
    else:
        new[places[change]] = 0
    return new
