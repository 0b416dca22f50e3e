"""Recorded calls: what is replayed reads today's numbers, and what cannot be recorded runs as it always did."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ledits_min import Concept, LEdits
from ledits_min.engine import graphs
from ledits_min.engine.graphs import Graphed, Replay, use_graphs
from ledits_min.engine.maps import Recorder
from ledits_min.engine.overhead import Overhead
from ledits_min.errors import InputError
from ledits_min.p2p import AttentionControl

SAMPLE = Path(__file__).parents[2] / "weights/tiny/samples/portrait1.png"


class Tapes:
    """Records on any device: a replay does the recorded work again, on the recorded tensors, into the same results."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.looked_at = 0  # of the replays

    def __call__(self, call: Callable[[], list[Tensor]], pool: list[Any]) -> tuple[Replay, list[Tensor]]:
        outputs = call()
        self.recorded += 1
        for output in outputs:
            output.fill_(torch.nan)  # a recording computes nothing

        def replay() -> None:
            for output, again in zip(outputs, call(), strict=True):
                output.copy_(again)
            self.replayed += 1
            self.looked_at += len(outputs) > 1

        return replay, outputs


def network(
    x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor, attention: object = None
) -> Tensor:
    eps = x_t[inputs] * (steps + 1).view(-1, 1) - texts.view(-1, 1) + 0.5 * images.view(-1, 1)
    return eps if attention is None else -eps


def numbers(size: int, step: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """inputs, steps, texts and images of `size` evaluations."""
    return torch.arange(size), torch.full((size,), step), torch.arange(size), torch.arange(size) % 2


def test_sharing_inputs_is_part_of_a_size() -> None:
    tapes = Tapes()
    graphed = Graphed(network, Overhead(), tapes)
    one, two = torch.randn(1, 5), torch.randn(2, 5)
    own = numbers(2)
    both = torch.zeros(2, dtype=torch.int64), *own[1:]
    for _ in range(3):
        assert torch.equal(graphed(one, *both), network(one, *both))
        assert torch.equal(graphed(two, *own), network(two, *own))
    assert (tapes.recorded, tapes.replayed) == (2, 4)


def test_controlled_attention_is_never_recorded() -> None:
    """It differs from step to step, and a recording of its size must not answer for it."""
    tapes, control = Tapes(), AttentionControl(torch.tensor([0]), torch.tensor([1]), None, 0)
    graphed, call = Graphed(network, Overhead(), tapes), (torch.randn(2, 5), *numbers(2))
    for _ in range(3):
        assert torch.equal(graphed(*call), network(*call))
        assert torch.equal(graphed(*call, attention=control), -network(*call))
    assert (tapes.recorded, tapes.replayed) == (1, 2)


def looking(control: AttentionControl | None = None, rows: int = 2, seed: int = 0) -> Recorder:
    tokens = torch.rand(rows, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
    return Recorder(torch.arange(rows), tokens, frozenset([0, 2]), control=control)


def looked_at(
    x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor, attention: Any = None
) -> Tensor:
    """`network`, whose maps are of what it reads."""
    if attention is not None:
        for layer in attention.layers:
            attention.seen.append(x_t[inputs][attention.rows].sum() * attention.tokens.float() + layer)
    return network(x_t, inputs, steps, texts, images)


def test_what_is_seen_of_the_attention_comes_back_from_a_replay() -> None:
    """Today's maps, of today's rows and tokens, which stay when the next replay comes."""
    tapes = Tapes()
    graphed, kept = Graphed(looked_at, Overhead(), tapes), []
    for step in range(4):
        call = torch.randn(3, 5), *numbers(3, step)
        for rows in (None, 2, 1):
            found, wanted = (None if rows is None else looking(rows=rows, seed=step) for _ in range(2))
            pair = graphed(*call, attention=found), looked_at(*call, attention=wanted)
            kept += [pair] if found is None or wanted is None else [pair, *zip(found.seen, wanted.seen, strict=True)]
    assert len(kept) == 4 * 7 and all(torch.equal(*pair) for pair in kept)
    assert (tapes.recorded, tapes.replayed, tapes.looked_at) == (3, 9, 6)


def test_attention_that_is_controlled_and_seen_is_never_recorded() -> None:
    tapes, control = Tapes(), AttentionControl(torch.tensor([0]), torch.tensor([1]), None, 0)
    graphed, call = Graphed(looked_at, Overhead(), tapes), (torch.randn(2, 5), *numbers(2))
    for _ in range(3):
        recorder = looking(control)
        graphed(*call, attention=recorder)
        assert len(recorder.seen) == 2
    assert tapes.recorded == 0


def test_a_size_is_plain_once_then_recorded_then_replayed() -> None:
    tapes, calls = Tapes(), []

    def counted(*call: Any) -> Tensor:
        calls.append(len(call[0]))
        return network(*call)

    overhead = Overhead()
    graphed, kept = Graphed(counted, overhead, tapes), []
    for step, size in enumerate([3, 3, 2, 3, 2, 2, 1, 3]):
        call = torch.randn(size, 5), *numbers(size, step)
        kept.append((graphed(*call), network(*call)))
    assert all(torch.equal(*pair) for pair in kept), "a result was written over, or an input not read again"
    assert (tapes.recorded, tapes.replayed) == (2, 5)
    assert calls.count(1) == 1
    assert overhead.take()["record"] > 0.0


@pytest.mark.parametrize(("error", "says"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "3 evaluations per call .* not enough memory"),
    (RuntimeError("operation not permitted when stream is capturing\nlong story"), "not permitted when .* capturing$"),
])  # fmt: skip
def test_what_cannot_be_recorded_runs_plainly_and_says_so_once(error: Exception, says: str) -> None:
    def failing(call: Callable[[], list[Tensor]], pool: list[Any]) -> tuple[Replay, list[Tensor]]:
        raise error

    graphed = Graphed(network, Overhead(), failing)
    call, later = (torch.randn(3, 4), *numbers(3)), (torch.randn(3, 4), *numbers(3))
    assert torch.equal(graphed(*call), network(*call))
    with pytest.warns(UserWarning, match=says):
        assert torch.equal(graphed(*call), network(*call))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(graphed(*later), network(*later))


@pytest.mark.parametrize("mode", ["on", "", "1"])
def test_an_unknown_mode_is_refused(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDITS_GRAPHS", mode)
    with pytest.raises(InputError, match="it must be 'auto' or 'off'"):
        use_graphs(torch.device("cpu"))


def test_graphs_are_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_graphs(torch.device("cuda")) and not use_graphs(torch.device("cpu"))
    monkeypatch.setenv("LEDITS_GRAPHS", "off")
    assert not use_graphs(torch.device("cuda"))


@pytest.mark.parametrize("mask", ["percentile", "both"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_edit_through_graphs_is_the_plain_one(device: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU through tapes; the real ones where there is a CUDA device."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("CUDA graphs want a CUDA device, and there is none")
    ledits = LEdits.from_pretrained("tiny", device=device, dtype="float32")

    def edited() -> Tensor:
        inversion = ledits.invert([SAMPLE, SAMPLE], seed=[1, 2], num_steps=8, skip=2, progress=False)
        concepts = [
            Concept("sunglasses", guidance_scale=3.0, mask=mask),
            Concept("smile", warmup_steps=3, cooldown_steps=5),
        ]
        return ledits.edit(inversion, concepts=concepts, progress=False).latents

    monkeypatch.setenv("LEDITS_GRAPHS", "off")
    plain = edited()
    monkeypatch.setenv("LEDITS_GRAPHS", "auto")
    if device == "cpu":
        tapes = Tapes()
        monkeypatch.setattr("ledits_min.engine.runner.use_graphs", lambda device: True)
        monkeypatch.setattr(
            "ledits_min.engine.runner.Graphed", lambda network, overhead: Graphed(network, overhead, tapes)
        )
    assert torch.equal(edited(), plain)
    if device == "cpu":
        assert tapes.replayed > tapes.recorded > 0 and (tapes.looked_at > 0) == (mask == "both")
    assert graphs.use_graphs(torch.device(device)) == (device == "cuda")
