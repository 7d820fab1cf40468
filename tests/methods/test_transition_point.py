from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_bench import Diffusion
from nemo_bench.diffusion import Conditioning, Step
from nemo_bench.methods import Batch, DynamicTransition, Method, StaticTransition
from nemo_bench.records.data import Neurons, Prompt


def scales(
    method: Method, curves: list[list[float]], timesteps: list[int] | None = None, model: Diffusion | None = None
) -> list[list[float]]:
    """The scales of guidance that a method applies in steps of which the magnitudes are given, by image."""
    rows, found = len(curves), []
    prompts, neurons = (Prompt("p", "text"),) * rows, (Neurons(),) * rows
    batch = Batch(prompts, Conditioning(torch.zeros(rows, 1, 1)), torch.zeros(rows, 1), tuple(range(rows)), neurons)
    with method.apply(model, batch) as changed:  # type: ignore[arg-type]
        assert changed.rule
        for number, timestep in enumerate(timesteps or range(len(curves[0]), 0, -1)):
            zero = torch.zeros(rows, 1, 1, 1)
            added = torch.tensor([curve[number] for curve in curves])[:, None, None, None]
            noise = changed.rule(Step(number, timestep, 7.5, zero, zero, added))
            found.append([round(scale, 4) for scale in (noise / added).flatten().tolist()])
    return found


def test_static_transition_switches_at_its_timestep(planted: Diffusion) -> None:
    found = scales(StaticTransition(500, before=-2.0), [[1.0] * 4], [981, 501, 500, 21], planted)
    assert found == [[-2.0], [-2.0], [7.5], [7.5]]


def test_dynamic_transition_switches_one_step_after_the_first_minimum_for_good() -> None:
    # Falls to 2, rises: on at the rise; the second minimum changes nothing.
    falling, flat = [4.0, 2.0, 3.0, 1.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0]
    assert scales(DynamicTransition(), [falling]) == [[0.0], [0.0], [7.5], [7.5], [7.5]]
    assert scales(DynamicTransition(), [flat]) == [[0.0]] * 5
    assert scales(DynamicTransition(before=1.0), [flat, falling]) == [[1, 1], [1, 1], [1, 7.5], [1, 7.5], [1, 7.5]]


@given(st.lists(st.floats(0.5, 9), min_size=3, max_size=9))
def test_dynamic_transition_is_the_rule_of_the_paper(curve: list[float]) -> None:
    curve = torch.tensor(curve).tolist()
    minima = [j for j in range(2, len(curve)) if curve[j] > curve[j - 1] and curve[j - 2] > curve[j - 1]]
    start = minima[0] if minima else len(curve)
    assert scales(DynamicTransition(), [curve]) == [[0.0]] * start + [[7.5]] * (len(curve) - start)


def test_images_of_a_batch_switch_on_their_own(planted: Diffusion) -> None:
    text, latents = planted.encode(["a small red fox", "the golden harbor podcast"]), planted.latents([0, 1])
    neurons, prompts = (Neurons(),) * 2, (Prompt("a", "a"), Prompt("b", "b"))

    def images(rows: list[int]) -> torch.Tensor:
        batch = Batch(
            tuple(prompts[r] for r in rows),
            text.rows(rows),
            latents[rows],
            tuple(rows),
            tuple(neurons[r] for r in rows),
        )
        with DynamicTransition().apply(planted, batch) as changed:
            return changed.generate_checked(planted).images

    torch.testing.assert_close(images([0, 1]), torch.cat([images([0]), images([1])]), rtol=0, atol=1e-3)
