"""What a run costs before it starts: held against the memory that runs take, and said in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledits_min import LEdits
from ledits_min.app.cli.explain import plan_edit, without_weights
from ledits_min.config import SD15_UNET, SD15_VAE, SDXL_UNET, EditDefaults
from ledits_min.engine import budget
from ledits_min.engine.budget import (
    FRUGAL,
    Model,
    Plan,
    batch_limit,
    capacity,
    inverting,
    inverting_and_editing,
    seconds,
)
from ledits_min.engine.cost import unet_cost, vae_costs
from ledits_min.engine.cpu import computes_in_bfloat16
from ledits_min.engine.fast_networks import accelerate
from ledits_min.engine.plan import INVERSION, SOURCE, editing_phase, inversion_phase, one_pass_phase
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings
from ledits_min.p2p import Lending, token_mapper
from ledits_min.sega import Concept, ConceptTerm
from ledits_min.text import TextEncoderPair
from ledits_min.unet import UNet
from ledits_min.vae import VAE


def terms(*concepts: Concept) -> tuple[ConceptTerm, ...]:
    return tuple(concept.resolve(EditDefaults()) for concept in concepts)


def measured_peak(run: object) -> int:
    """Bytes alive at the worst moment of `run()`, as the CPU's allocator tells the profiler."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()  # type: ignore[operator]
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_memory_is_about_what_the_networks_take() -> None:
    """Within a factor: the CPU's kernels keep scratch space besides."""
    config = replace(SD15_UNET, block_out_channels=(64, 64, 64, 64), norm_num_groups=16, cross_attention_dim=32)
    coder = replace(SD15_VAE, block_out_channels=(32, 64, 64, 64), norm_num_groups=16)
    with torch.no_grad():
        unet, vae = accelerate(UNet(config)).eval(), accelerate(VAE(coder)).eval()
        x_t, t, context = torch.randn(1, 4, 32, 32), torch.tensor([5]), torch.randn(1, 77, 32)
        evaluating = measured_peak(lambda: unet(x_t, t, context))
        decoding = measured_peak(lambda: vae.decode(x_t))
        encoding = measured_peak(lambda: vae.encode(torch.zeros(1, 3, 256, 256)))
    encode, decode = vae_costs(coder, 32, 32)
    ratios = [
        4 * cost.values / measured
        for cost, measured in ((unet_cost(config, 32, 32), evaluating), (encode, encoding), (decode, decoding))
    ]
    assert all(0.7 < ratio < 1.4 for ratio in ratios), ratios


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["tiny", "SD 1.x", "SD 2.x", "SDXL"])
def test_the_peak_that_is_promised(checkpoints: ModuleType, tmp_path: Path, family: str, dtype: str) -> None:
    """Weights to the byte, text encoders and SDXL's float32 autoencoder included; the rest within a factor."""
    model = "tiny" if family == "tiny" else str(tmp_path / "model")
    if family != "tiny":
        checkpoints.write_family_folder(tmp_path / "model", family)
    start: dict[str, Any] = {"num_steps": 3, "skip": 1}
    edit = {
        "target": "", "guidance_scale": 7.5, "negative": "", "concepts": [Concept("hat", warmup_steps=0)],
        "momentum_scale": 0.0, "momentum_beta": 0.6, "output_size": "model",
    }  # fmt: skip
    side = 256
    shapes, device = without_weights(model, "cpu", dtype)
    latents = (side // shapes.vae.config.factor,) * 2
    plan = plan_edit(shapes, shapes.inversion_settings(**start), latents, edit, device)

    ledits = LEdits.from_pretrained(model, device="cpu", dtype=dtype)
    assert ledits.runner.model == shapes.runner.model
    text = ledits.text
    encoders = [text.first.model, text.second.model] if isinstance(text, TextEncoderPair) else [text.model]
    weights = sum(w.nbytes for network in (ledits.unet, ledits.vae, *encoders) for w in network.parameters())
    assert plan.costs.weights + plan.text == weights
    if dtype == "bfloat16":
        assert (ledits.runner.model.width, ledits.runner.model.vae_width) == (2, 4 if family == "SDXL" else 2)
        if not computes_in_bfloat16():
            pytest.skip("this CPU computes bfloat16 in float32, in memory of its own; by itself nobody asks it to")

    def run() -> None:
        black = torch.zeros(side, side, 3).byte().numpy()
        ledits.invert_and_edit(black, size=side, progress=False, **start, **edit)

    ratio = (plan.memory - weights) / measured_peak(run)
    print(f"{family}, {dtype}: besides the weights, {ratio:.2f} of the memory that was used had been planned")
    assert 0.6 < ratio < 1.6


def test_capacity_follows_the_room_there_is() -> None:
    costs = Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((64, 64))
    one = 2 * costs.unet.values
    assert [capacity(costs, room, 8) for room in (-1, one, 3 * one, 100 * one)] == [1, 1, 3, 8]


def test_the_size_that_fits_is_smaller_and_keeps_the_aspect() -> None:
    model = Model(SD15_UNET, SD15_VAE, 77, 2, 2)
    wanted = model.costs((48, 96)).working(1)
    assert model.largest_side((1024, 512), free=wanted) == 768
    assert model.largest_side((1024, 512), free=10**12) == 960
    assert model.largest_side((1024, 512), free=0) == 0


def test_a_plan_in_words() -> None:
    inversion, settings = InversionSettings(num_steps=20, skip=11), EditSettings(concepts=terms(Concept("hat")))
    phases = (
        inversion_phase(inversion, 1, 4),
        editing_phase("editing", inversion, settings, 1, 4),
    )
    lines = Plan(phases, Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((64, 64)), 1, 2).lines()
    assert lines[0].startswith("one evaluation: 800 GFLOP (conv 444, linear 230, attention 126), 52.5 MiB")
    assert lines[1] == "inverting: 9 evaluations in 3 calls of at most 3, 7.2 TFLOP (the published loop: 20)"
    assert '  step 0: 1 branch, ""' in lines
    assert '  steps 1 to 8: 2 branches, "", "hat"' in lines
    assert lines[-1].endswith("at the peak")

    together = one_pass_phase(inversion, settings, 1, 4)
    lines = Plan((together,), Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((64, 64)), 1, 2).lines()
    assert lines[1:5] == [
        "inverting and editing: 24 evaluations in 9 calls of at most 4, 19.2 TFLOP (the published loop: 47)",
        '  inverting, steps 0 to 8: 1 branch, ""',
        '  editing, step 1: 1 branch, "hat"',
        '  editing, steps 2 to 8: 2 branches, "", "hat"',
    ]


def test_a_plan_of_prompt_to_prompt_in_words() -> None:
    inversion, settings = InversionSettings(num_steps=20, skip=11, source="a cat"), EditSettings("a dog")
    lending = Lending(token_mapper([(1,)], [(2,)], 5), cross_steps=3, self_steps=1, self_tokens=16)
    phase = editing_phase("editing", inversion, settings, 1, 4, lending)
    costs = Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((64, 64))
    assert Plan((phase,), costs, 0, 1).lines()[1:5] == [
        "editing: 24 evaluations in 9 calls of at most 4, 19.2 TFLOP (the published loop: 36)",
        '  editing, steps 0 to 2: 2 branches, "a dog", ""',
        '  editing, steps 3 to 8: 2 branches, "", "a dog"',
        '  source, steps 0 to 2: 2 branches, "a cat", ""',
    ]
    assert {part: len(rows) for part, rows in phase.parts.items()} == {"editing": 18, SOURCE: 6}


# --- how large a call is worth --------------------------------------------------------------------------------------

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100's memory, on any device."""
    monkeypatch.setattr(budget, "total_memory", lambda device: 80 * 10**9)


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_in_one_pass_nearly_all_calls_are_alike(device: torch.device) -> None:
    """The paper's edit: the inversion's row of a step rides in the edit's call of that step."""
    inversion = InversionSettings(num_steps=100, skip=36)
    edit = EditSettings(concepts=terms(Concept("sunglasses"), Concept("smile")))
    costs = Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((64, 64))
    phase = inverting_and_editing(inversion, edit, 1, costs, device)
    assert phase.evaluations == 252
    assert phase.batches == ((4,),) * 60 + ((3,),) * 4
    asked = [max(row.step for row in group if row.reads == INVERSION) for group in phase.groups[:60]]
    assert all(step <= last <= step + 4 for step, last in enumerate(asked)), "the inversion runs far ahead"
    as_large_as_can_be = one_pass_phase(inversion, edit, 1, 64)
    assert as_large_as_can_be.evaluations == 252 and as_large_as_can_be.largest_batch == 64
    assert seconds(phase, costs, device) <= 1.0001 * seconds(as_large_as_can_be, costs, device)
    plans = [Plan((one,), costs, 1, 1) for one in (phase, as_large_as_can_be)]
    assert plans[0].memory < plans[1].memory - 40 * costs.width * costs.unet.values


@pytest.mark.usefixtures("roomy")
def test_an_h100_is_as_fast_as_measured() -> None:
    """On that machine: 0.71 s instead of 0.77."""
    inversion = InversionSettings(num_steps=100, skip=36)
    edit = EditSettings(concepts=terms(Concept("sunglasses"), Concept("smile")))
    costs = Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((64, 64))
    even, large = inverting_and_editing(inversion, edit, 1, costs, CUDA), one_pass_phase(inversion, edit, 1, 64)
    assert seconds(even, costs, CUDA) == pytest.approx(0.711, rel=0.01)
    assert seconds(large, costs, CUDA) == pytest.approx(0.767, rel=0.02)


@pytest.mark.usefixtures("roomy")
def test_an_inversion_alone_takes_calls_that_saturate() -> None:
    inversion = InversionSettings(num_steps=100, skip=36)
    for images in (1, 3):
        costs = Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((64, 64))
        assert inverting(inversion, images, costs, CUDA).batches == ((16,) * 4 * images,)
    # A larger network is busy with fewer, and a small one never.
    large = Model(SDXL_UNET, SD15_VAE, 77, 2, 2).costs((128, 128))
    assert inverting(inversion, 1, large, CUDA).largest_batch == 8
    small = Model(replace(SD15_UNET, block_out_channels=(64, 64, 64, 64)), SD15_VAE, 77, 2, 2).costs((16, 16))
    assert inverting(inversion, 1, small, CUDA).batches == ((64,),)


@pytest.mark.usefixtures("roomy")
@given(
    steps=st.integers(1, 12), images=st.integers(1, 9), concepts=st.integers(0, 3), cuda=st.booleans(),
    prompt=st.sampled_from(["", "a dog"]), side=st.sampled_from([8, 64, 128]),
)  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_whatever_the_calls_are_the_evaluations_are_the_same(
    steps: int, images: int, concepts: int, prompt: str, cuda: bool, side: int
) -> None:
    device, inversion = CUDA if cuda else CPU, InversionSettings(num_steps=steps, skip=0)
    wanted = EditSettings(prompt, concepts=terms(*(Concept(f"word {n}", warmup_steps=n) for n in range(concepts))))
    costs = Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((side, side))
    limit = batch_limit(costs, device)
    found = inverting(inversion, images, costs, device), inverting_and_editing(inversion, wanted, images, costs, device)
    largest = inversion_phase(inversion, images, limit), one_pass_phase(inversion, wanted, images, limit)
    for phase, other in zip(found, largest, strict=True):
        assert sorted(phase.rows) == sorted(other.rows)
        assert phase.largest_batch <= limit
        assert seconds(phase, costs, device) <= FRUGAL * seconds(other, costs, device) + 1e-9
