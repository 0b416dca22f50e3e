"""The evaluator: whatever the batches are, a prediction lands with its row, and a flag with its evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ledits_min.engine.evaluate import Evaluator
from ledits_min.engine.plan import SOURCE, Phase, Row
from ledits_min.engine.retry import NotFinite
from ledits_min.p2p import AttentionControl

CPU = torch.device("cpu")
CAPACITIES = pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5, 16])


def numbered(x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor, *_: Any) -> Tensor:
    """What it was asked about, added to what it was asked with."""
    return x_t[inputs] + (100.0 * steps + 10000.0 * images + 1e6 * texts).view(-1, 1, 1, 1)


@CAPACITIES
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("texts", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_prediction_lands_with_its_row(steps: int, texts: int, images: int, capacity: int) -> None:
    """However many rows read the same x_t."""
    rows = tuple(Row(step, str(text)) for step in range(steps) for text in range(texts))
    phase = Phase("testing", (rows,), images, capacity, 0)
    shared = []

    def network(x_t: Tensor, inputs: Tensor, *more: Any) -> Tensor:
        assert len(x_t) <= len(inputs) <= capacity
        shared.append(len(inputs) - len(x_t))
        return numbered(x_t, inputs, *more)

    evaluate = Evaluator(network, phase, torch.arange(steps), CPU)
    x_t = torch.randn(steps, images, 3, 2, 2, dtype=torch.float64)
    of_step, of_image, of_text = (torch.arange(n, dtype=torch.float64) for n in (steps, images, texts))
    numbers = 100.0 * of_step.view(-1, 1, 1) + 10000.0 * of_image + 1e6 * of_text.view(-1, 1)
    wanted = (x_t[:, None] + numbers[..., None, None, None]).flatten(0, 1)
    torch.testing.assert_close(evaluate(x_t), wanted)
    evaluate.check()
    if images == 1 and capacity >= texts * steps:
        assert shared == [steps * (texts - 1)]


@CAPACITIES
@pytest.mark.parametrize("others", [0, 1, 3])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_pairs_are_called_beside_each_other_and_land_with_their_rows(images: int, others: int, capacity: int) -> None:
    lending = (Row(0, "0", SOURCE), Row(0, "1"), *(Row(0, str(2 + n)) for n in range(others)))
    phase = Phase("testing", (lending, (Row(1, "1"),)), images, capacity, 0)
    pairs: list[tuple[int, ...]] = []

    def network(
        x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor,
        attention: AttentionControl | None = None,
    ) -> Tensor:  # fmt: skip
        assert len(inputs) <= max(2, capacity)
        if attention is not None:
            assert torch.equal(attention.source, torch.arange(0, 2 * len(attention.source), 2))
            assert torch.equal(attention.target, attention.source + 1)
            paired = texts[attention.source], texts[attention.target], images[attention.source]
            assert torch.equal(images[attention.source], images[attention.target])
            pairs.extend(zip(*(column.tolist() for column in paired), strict=True))
        return numbered(x_t, inputs, steps, texts, images)

    evaluate = Evaluator(network, phase, torch.arange(2), CPU)
    x_t = torch.randn(2, images, 3, 2, 2, dtype=torch.float64)  # the source's and the edit's
    found = evaluate(x_t, lambda source, target: AttentionControl(source, target, None, 0))
    of_image = 10000.0 * torch.arange(images, dtype=torch.float64).view(-1, 1, 1, 1)
    wanted = [x_t[min(n, 1)] + of_image + 1e6 * n for n in range(2 + others)]
    torch.testing.assert_close(found, torch.stack(wanted))
    assert pairs == [(0, 1, image) for image in range(images)]
    torch.testing.assert_close(evaluate(x_t[1:]), (x_t[1] + of_image + 1e6 + 100.0)[None])


@pytest.mark.parametrize("capacity", [1, 2, 16])
def test_the_first_step_that_is_not_finite_is_named(capacity: int) -> None:
    """By predictions and by latents; nothing is looked at before it is asked for."""
    rows = tuple(Row(step, text) for step in range(4) for text in ("", "a hat"))
    phase = Phase("testing", (rows,), 2, capacity, 0)

    def network(x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor, *_: Any) -> Tensor:
        eps = numbered(x_t, inputs, steps, texts, images)
        eps[(steps == 2) & (texts == 1) & (images == 1), 0, 0, 0] = torch.nan
        return eps

    evaluate = Evaluator(network, phase, torch.tensor([801, 601, 401, 201]), CPU)
    evaluate(torch.zeros(4, 2, 1, 1, 1))
    with pytest.raises(NotFinite, match=r"^testing: the prediction for 'a hat' holds .* at step 2 \(t = 401\)$"):
        evaluate.check()
    with pytest.raises(NotFinite, match=r"^testing: the prediction for 'a hat' .* at step 2"):
        evaluate.check(torch.tensor([True, True, False, False]))
    with pytest.raises(NotFinite, match=r"^testing: the latents .* at step 1 \(t = 601\)$"):
        evaluate.check(torch.tensor([True, False, True, True]))
