"""Tokenizers of the world's words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from nemo_bench.planted.world import vocabulary

TOKENS = 16
"""Length of every tokenized caption with start, end and padding."""


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each word of the world, which spells out any other text."""
    merges = _merges(vocabulary())
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def build_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer with one token for each word of the world, which spells out any other text in ASCII."""
    signs = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [("\u2581" + word, -1.0) for word in vocabulary() if len(word) > 1]
    pieces += [(sign, -8.0) for sign in signs] + [("\u2581" + sign, -8.0) for sign in signs]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges up to whole words; ties go by the alphabet (the library's trainer breaks them at random)."""
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for split in splits for pair in pairwise(split))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for split in splits:
            for place in range(len(split) - 2, -1, -1):
                if tuple(split[place : place + 2]) == best:
                    split[place : place + 2] = ["".join(best)]


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids of N texts, padded and cut to (N, 16)."""
    options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    ids: Tensor = tokenizer(list(texts), **options).input_ids
    return ids
