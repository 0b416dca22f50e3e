"""The embedded model's sample edit on a GPU, with and without kernels: latents compared, and both timed."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ledits_min import Concept, LEdits
from ledits_min.engine import ops
from ledits_min.engine.ops import EditSteps
from ledits_min.guidance import EditSettings

SAMPLE = Path(__file__).parents[2] / "weights/tiny/samples/portrait1.png"
TOLERANCE = {"float32": 1e-2, "float16": 0.3}  # a mask may move by a position, and the steps behind it amplify that


def load(dtype: str) -> LEdits:
    """The embedded model in channels-last memory, which the norm's kernel wants."""
    ledits = LEdits.from_pretrained("tiny", device="cuda", dtype=dtype)
    for network in (ledits.unet, ledits.vae):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ledits


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_edit_with_and_without_kernels(gpu: ModuleType, benchmark: Any, dtype: str) -> None:
    """Both start from the same inversion, made without kernels; a kernel's own rounding is all that differs."""
    ledits = load(dtype)
    with gpu.kernels("torch"):
        inversion = ledits.invert(SAMPLE, progress=False)

    def edit() -> torch.Tensor:
        return ledits.edit(inversion, concepts=[Concept("sunglasses")], progress=False).latents

    latents, seconds = {}, {}
    for side in ("torch", "triton"):
        with gpu.kernels(side):
            edit()
            started = time.perf_counter()
            latents[side] = edit()
            seconds[side] = round(time.perf_counter() - started, 4)
    off = gpu.difference(latents["triton"], latents["torch"])
    largest = float((latents["triton"] - latents["torch"]).abs().max())
    print(f"\nlatents with and without kernels, {dtype}: {off:.3g} relative, {largest:.3g} at most; {seconds} s")
    benchmark.extra_info |= {"difference": off, "largest": largest, "seconds": seconds, **gpu.conditions()}
    with gpu.kernels("triton"):
        benchmark.pedantic(edit, rounds=3)
    assert off < TOLERANCE[dtype]


def test_edit_through_the_step_kernel(gpu: ModuleType, inputs: ModuleType, benchmark: Any) -> None:
    """The whole loop on `ops.sega_step`: the network without kernels, so that only the step differs."""
    ledits = load("float32")
    asked = EditSettings(concepts=(inputs.term("sunglasses", warmup_steps=1),))
    with gpu.kernels("torch"), torch.no_grad():
        inversion = ledits.invert(SAMPLE, progress=False)
        contexts = {text: ledits.text.encode([text]).tokens for text in ("", "sunglasses")}
    schedule = inversion.settings.make_schedule()
    steps = EditSteps(schedule.levels(inversion.settings.eta), asked)
    residuals = inversion.residuals.cuda().contiguous()
    assert inversion.settings.schedule.prediction_type == "epsilon"

    def edit(side: str) -> torch.Tensor:
        state = ops.start(steps, inversion.x_T.cuda())
        for i, t in enumerate(schedule.timesteps.cuda()):
            with gpu.kernels("torch"):
                branches = torch.stack([
                    ledits.unet(state.x_t, t.expand(1), contexts[text]) for text in asked.texts(i)
                ])  # fmt: skip
            with gpu.kernels(side):
                ops.sega_step(steps, state, branches, residuals, i)
        return state.x_t

    with torch.no_grad():
        plain, kernel = edit("torch"), edit("triton")
        off = gpu.difference(kernel, plain)
        print(f"\nlatents with and without the step's kernel: {off:.3g} relative")
        benchmark.extra_info |= {"difference": off, **gpu.conditions()}
        benchmark.pedantic(edit, ("triton",), rounds=3)
    assert off < TOLERANCE["float32"]
