from __future__ import annotations

from collections import Counter
from unittest.mock import MagicMock

import pytest
import torch

from batches import batch_of
from nemo_bench import Diffusion
from nemo_bench.methods import EmbeddingNoise, RandomNumbers, RandomTokens, RepeatedWords
from nemo_bench.methods.perturbed_prompts import Insertion
from tiny_transformers import TRANSFORMERS, tiny_transformer

INSERTIONS = (RandomTokens, RandomNumbers, RepeatedWords)


@pytest.mark.parametrize("kind", INSERTIONS)
@pytest.mark.parametrize("times", [0, 1, 6])
def test_words_are_inserted_and_the_prompt_stays(tiny: Diffusion, kind: type[Insertion], times: int) -> None:
    for seed in range(20):
        words = kind(times).perturbed(tiny, "red sun map", seed).split(" ")
        assert len(words) == 3 + times if kind is not RandomTokens else len(words) >= 3 + times
        rest = iter(words)
        assert all(word in rest for word in ("red", "sun", "map")), words


def test_repeated_words_are_those_of_the_prompt(tiny: Diffusion) -> None:
    drawn = Counter(
        word for seed in range(300) for word in RepeatedWords(1).perturbed(tiny, "red sun map", seed).split(" ")
    )
    assert set(drawn) == {"red", "sun", "map"}
    assert all(abs(count - 400) < 50 for count in drawn.values())


def test_numbers_are_drawn_from_the_published_range_and_every_gap(tiny: Diffusion) -> None:
    prompts = [RandomNumbers(1).perturbed(tiny, "red sun", seed).split(" ") for seed in range(300)]
    numbers = [int(word) for words in prompts for word in words if word.isdigit()]
    assert len(numbers) == 300
    assert 0 <= min(numbers) < 3000
    assert 97_000 < max(numbers) < 100_000
    gaps = Counter(next(i for i, word in enumerate(words) if word.isdigit()) for words in prompts)
    assert all(abs(gaps[gap] - 100) < 30 for gap in range(3))


@pytest.mark.parametrize(("size", "limit"), [(49408, 49400), (702, 700)])
def test_tokens_are_drawn_from_the_published_range_within_the_vocabulary(
    tiny: Diffusion, monkeypatch: pytest.MonkeyPatch, size: int, limit: int
) -> None:
    tokenizer = MagicMock(all_special_ids=[size - 2, size - 1], decode=lambda ids: str(*ids))
    tokenizer.__len__.return_value = size
    monkeypatch.setattr(tiny.pipeline, "tokenizer", tokenizer)
    drawn = [int(RandomTokens(1).perturbed(tiny, "", seed)) for seed in range(400)]
    assert 0 <= min(drawn) < 0.03 * limit
    assert 0.97 * limit < max(drawn) < limit


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_no_special_token_is_drawn_in_any_family(name: str) -> None:
    model = tiny_transformer(name)
    tokenizer = getattr(model.pipeline, model.family.segments(model.pipeline)[0].tokenizer)
    special = {tokenizer.decode([number]) for number in tokenizer.all_special_ids}
    drawn = {RandomTokens(1).perturbed(model, "", seed) for seed in range(300)}
    assert len(drawn) > 30
    assert not {word.strip() for word in drawn} & special


@pytest.mark.parametrize("kind", INSERTIONS)
def test_draws_follow_from_the_image_alone(tiny: Diffusion, kind: type[Insertion]) -> None:
    together = batch_of(tiny, [(0, 5), (0, 6)], ["red sun map"])
    with kind().apply(tiny, together) as changed:
        for row in range(2):
            with kind().apply(tiny, together.rows([row])) as alone:
                torch.testing.assert_close(changed.text.text[[row]], alone.text.text)
        assert not torch.allclose(changed.text.text[0], changed.text.text[1])
        texts = [note["text"] for note in changed.notes]
        assert texts == [kind().perturbed(tiny, "red sun map", seed) for seed in together.seeds]
        assert torch.equal(changed.text.text, tiny.encode(texts).text)
    assert kind(seed=1).perturbed(tiny, "red sun map", 5) != kind(seed=0).perturbed(tiny, "red sun map", 5)


@pytest.mark.parametrize("both", [True, False])
def test_noise_on_embeddings_has_its_scale(tiny: Diffusion, both: bool) -> None:
    batch = batch_of(tiny, [(0, seed) for seed in range(64)])
    with EmbeddingNoise(0.5, both).apply(tiny, batch) as changed:
        noise = changed.text.text - batch.text.text
        assert float(noise.std()) == pytest.approx(0.5, rel=0.05)
        assert not torch.allclose(noise[0], noise[1])
        assert (changed.unconditional is not None) == both
        if changed.unconditional is not None:
            other = changed.unconditional.text - tiny.unconditional(64).text
            assert float(other.std()) == pytest.approx(0.5, rel=0.05)
            assert abs(float((other * noise).mean())) < 0.02


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_relative_noise_leaves_what_the_network_does_not_see(name: str) -> None:
    """Padding that is masked, and zeros that widen CLIP's states; what CLIP and T5 give has each its own scale."""
    model = tiny_transformer(name)
    batch = batch_of(model, [(number, 0) for number in range(16)])
    with EmbeddingNoise(0.5, relative=True).apply(model, batch) as changed:
        noise, text = changed.text.text - batch.text.text, batch.text.text
        assert changed.unconditional is not None
        assert torch.equal(changed.text.text == text, ~model.family.used(batch.text))
    assert changed.text.pooled is batch.text.pooled
    padding = torch.zeros_like(text) if batch.text.mask is None else (1 - batch.text.mask)[..., None].expand_as(text)
    if name in ("pixart", "sana"):
        assert not noise[padding.bool()].any()
    else:
        assert noise[padding.bool()].any()  # which the network sees
    for segment in model.family.segments(model.pipeline):
        seen = [values[values != 0] for values in (noise[:, segment.span], text[:, segment.span])]
        if name == "sd3" and segment.span.start == 0:
            assert not noise[:, segment.span, 40:].any()
        elif name in ("sd3", "flux"):
            assert float(seen[0].std() / seen[1].std()) == pytest.approx(0.5, rel=0.1)
