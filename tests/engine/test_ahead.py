"""Compiling ahead: under way while the weights load, awaited before a network is called, and no harm where it fails."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ledits_min import LEdits, pipeline
from ledits_min.engine import networks, ops
from ledits_min.engine.ahead import Ahead

SAMPLE = Path(__file__).parents[2] / "weights/tiny/samples/portrait1.png"
QUICK: dict[str, Any] = {"num_steps": 2, "skip": 0, "size": 64, "progress": False}


def test_it_is_under_way_while_weights_load_and_awaited_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, order = threading.Event(), threading.Event(), list[str]()
    build = networks.build_networks

    def compiling() -> None:
        begun.set()
        assert go_on.wait(60)
        order.append("compiled")

    def loading(*arguments: Any) -> Any:
        assert begun.wait(60), "it begins when everything is loaded"
        order.append("loaded")
        return build(*arguments)

    monkeypatch.setattr(pipeline, "kernel_calls", lambda *model: [compiling])
    monkeypatch.setattr(pipeline, "build_networks", loading)
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    for layer in (ledits.unet.conv_in, ledits.vae.encoder.conv_in):
        layer.register_forward_pre_hook(lambda *_: order.append("called"))
    run = threading.Thread(target=lambda: ledits.invert(SAMPLE, **QUICK))
    run.start()
    run.join(0.2)
    assert order == ["loaded"], "a network is called before its kernels are there"
    go_on.set()
    run.join()
    assert order[:3] == ["loaded", "compiled", "called"]


def test_what_fails_is_said_once_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise RuntimeError("ptxas is missing\na long story")

    expected = LEdits.from_pretrained("tiny", device="cpu", dtype="float32").invert(SAMPLE, **QUICK)
    monkeypatch.setattr(pipeline, "kernel_calls", lambda *model: [failing, lambda: None, failing])
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    with pytest.warns(UserWarning, match="2 kernels were not compiled ahead.*: ptxas is missing$"):
        found = ledits.invert(SAMPLE, **QUICK)
    assert torch.equal(found.residuals, expected.residuals)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* compiled ahead")
        ledits.invert(SAMPLE, **QUICK)


def test_jobs_run_side_by_side() -> None:
    meeting = threading.Barrier(2)
    jobs = Ahead([lambda: meeting.wait(60)] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jobs.wait()
        jobs.wait()


@pytest.mark.parametrize(("device", "mode", "some"), [
    ("cuda", "auto", True), ("cuda", "triton", True), ("cuda", "torch", False), ("cpu", "auto", False),
])  # fmt: skip
def test_only_what_will_be_used_is_compiled(
    device: str, mode: str, some: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("LEDITS_KERNELS", mode)
    found = ops.kernel_calls(torch.device(device), torch.float16, (320, 640, 1280, 1280), 32, (4, 64, 64))
    assert len(found) == (8 if some else 0)


def test_each_call_runs() -> None:
    """Through the interpreter, or on a CUDA device: what is compiled ahead is called as a kernel is called."""
    pytest.importorskip("triton")
    from ledits_min.kernels import variants

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for call in variants.calls(device, torch.float32, (32, 64), 8, (4, 8, 8)):
        call()
