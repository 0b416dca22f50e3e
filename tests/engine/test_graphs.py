"""Recorded calls: what is replayed reads today's numbers, and what cannot be recorded runs as it always did."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ledits_min import Concept, LEdits
from ledits_min.engine import graphs
from ledits_min.engine.graphs import Graphed, Replay, use_graphs
from ledits_min.engine.preparation import Preparation
from ledits_min.errors import InputError

SAMPLE = Path(__file__).parents[2] / "weights/tiny/samples/portrait1.png"


class Tapes:
    """Records on any device: a replay does the recorded work again, on the recorded tensors, into the same result."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        output = call()
        self.recorded += 1
        output.fill_(torch.nan)  # a recording computes nothing

        def replay() -> None:
            output.copy_(call())
            self.replayed += 1

        return replay, output


def network(x_t: Tensor, steps: Tensor, texts: Tensor) -> Tensor:
    return x_t * (steps + 1).view(-1, 1) - texts.view(-1, 1)


def test_sharing_inputs_is_part_of_a_size() -> None:
    tapes = Tapes()
    graphed = Graphed(lambda x_t, inputs: x_t[inputs] * 2.0, Preparation(), tapes)
    one, two = torch.randn(1, 5), torch.randn(2, 5)
    both, own = torch.zeros(2, dtype=torch.int64), torch.arange(2)
    for _ in range(3):
        assert torch.equal(graphed(one, both), 2.0 * one.expand(2, 5))
        assert torch.equal(graphed(two, own), 2.0 * two)
    assert (tapes.recorded, tapes.replayed) == (2, 4)


def test_a_size_is_plain_once_then_recorded_then_replayed() -> None:
    tapes, calls = Tapes(), []

    def counted(x_t: Tensor, *numbers: Tensor) -> Tensor:
        calls.append(len(x_t))
        return network(x_t, *numbers)

    preparation = Preparation()
    graphed, kept = Graphed(counted, preparation, tapes), []
    for step, size in enumerate([3, 3, 2, 3, 2, 2, 1, 3]):
        x_t, steps, texts = torch.randn(size, 5), torch.full((size,), step), torch.arange(size)
        kept.append((graphed(x_t, steps, texts), network(x_t, steps, texts)))
    assert all(torch.equal(*pair) for pair in kept), "a result was written over, or an input not read again"
    assert (tapes.recorded, tapes.replayed) == (2, 5)
    assert calls.count(1) == 1
    assert preparation.take()["record"] > 0.0


@pytest.mark.parametrize(("error", "says"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "3 evaluations a call .* not enough memory"),
    (RuntimeError("operation not permitted when stream is capturing\nlong story"), "not permitted when .* capturing$"),
])  # fmt: skip
def test_what_cannot_be_recorded_runs_plainly_and_says_so_once(error: Exception, says: str) -> None:
    def failing(call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        raise error

    graphed = Graphed(network, Preparation(), failing)
    numbers = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    x_t = torch.randn(3, 4)
    assert torch.equal(graphed(x_t, *numbers), network(x_t, *numbers))
    with pytest.warns(UserWarning, match=says):
        assert torch.equal(graphed(x_t, *numbers), network(x_t, *numbers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(graphed(x_t + 1, *numbers), network(x_t + 1, *numbers))


@pytest.mark.parametrize("mode", ["on", "", "1"])
def test_an_unknown_mode_is_refused(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDITS_GRAPHS", mode)
    with pytest.raises(InputError, match="it must be 'auto' or 'off'"):
        use_graphs(torch.device("cpu"))


def test_graphs_are_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_graphs(torch.device("cuda")) and not use_graphs(torch.device("cpu"))
    monkeypatch.setenv("LEDITS_GRAPHS", "off")
    assert not use_graphs(torch.device("cuda"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_edit_through_graphs_is_the_plain_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU through tapes; the real ones where there is a CUDA device."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("CUDA graphs want a CUDA device, and there is none")
    ledits = LEdits.from_pretrained("tiny", device=device, dtype="float32")

    def edited() -> Tensor:
        inversion = ledits.invert([SAMPLE, SAMPLE], seed=[1, 2], num_steps=8, skip=2, progress=False)
        concepts = [Concept("sunglasses", guidance_scale=3.0), Concept("smile", warmup_steps=3, cooldown_steps=5)]
        return ledits.edit(inversion, concepts=concepts, progress=False).latents

    monkeypatch.setenv("LEDITS_GRAPHS", "off")
    plain = edited()
    monkeypatch.setenv("LEDITS_GRAPHS", "auto")
    if device == "cpu":
        tapes = Tapes()
        monkeypatch.setattr("ledits_min.engine.runner.use_graphs", lambda device: True)
        monkeypatch.setattr(
            "ledits_min.engine.runner.Graphed", lambda network, preparation: Graphed(network, preparation, tapes)
        )
    assert torch.equal(edited(), plain)
    if device == "cpu":
        assert tapes.replayed > tapes.recorded > 0
    assert graphs.use_graphs(torch.device(device)) == (device == "cuda")
