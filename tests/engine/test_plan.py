"""What a run will evaluate, and what it costs: plain arithmetic, held against the networks themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ledits_min import LEdits
from ledits_min.app.cli.explain import plan_edit, without_weights
from ledits_min.config import SD15_UNET, SD15_VAE, EditDefaults, UNetConfig
from ledits_min.engine.cost import unet_cost, vae_costs
from ledits_min.engine.plan import (
    Model,
    Plan,
    capacity,
    editing_phase,
    inversion_phase,
    one_pass_phase,
    ranges,
    split_evenly,
)
from ledits_min.sega import Concept, ConceptTerm
from ledits_min.text import TextEncoderPair
from ledits_min.unet import UNet
from ledits_min.vae import VAE

SD21_UNET = replace(
    SD15_UNET, num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
)
SDXL_UNET = replace(
    SD21_UNET,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    num_attention_heads=(5, 10, 20),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


def terms(*concepts: Concept) -> list[ConceptTerm]:
    return [concept.resolve(EditDefaults()) for concept in concepts]


@given(total=st.integers(1, 500), most=st.integers(1, 100))
def test_parts_are_few_and_even(total: int, most: int) -> None:
    parts = split_evenly(total, most)
    assert sum(parts) == total
    assert len(parts) == -(-total // most)
    assert max(parts) <= most
    assert max(parts) - min(parts) <= 1
    assert split_evenly(total - parts[0], most) == parts[1:] if len(parts) > 1 else True


def test_the_papers_edit_takes_254_evaluations() -> None:
    """100 steps, skip 36, two concepts, empty prompts: both concepts sit out their warm-up step."""
    inverting = inversion_phase(64, "", 3.5, images=1, capacity=8, num_steps=100)
    concepts = terms(Concept("sunglasses"), Concept("smile"))
    editing = editing_phase("editing", 64, "", "", 15.0, concepts, 0.0, images=1, capacity=8)
    assert inverting.evaluations + editing.evaluations == 254
    assert inverting.naive + editing.naive == 100 + 64 * 4
    assert inverting.batches == ((8,) * 8,)
    assert editing.batches == ((1,), *((3,),) * 63)
    assert list(ranges(editing.rows)) == [(0, 0, ("",)), (1, 63, ("", "sunglasses", "smile"))]
    costs = Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((64, 64))
    plan = Plan((inverting, editing), costs, 1, 1)
    assert plan.flop / 1e12 == pytest.approx(204 + 3.6, rel=0.01)


def test_equal_texts_are_one_branch_and_idle_concepts_none() -> None:
    late = Concept("hat", warmup_steps=2, cooldown_steps=4)
    found = list(ranges(editing_phase("editing", 6, "", "hat", 15.0, terms(late), 0.0, 1, 8).rows))
    assert found == [(0, 5, ("", "hat"))]
    found = list(ranges(editing_phase("editing", 6, "", "", 15.0, terms(late), 0.0, 1, 8).rows))
    assert found == [(0, 1, ("",)), (2, 3, ("", "hat")), (4, 5, ("",))]
    found = list(ranges(editing_phase("editing", 6, "", "", 15.0, terms(late), 0.3, 1, 8).rows))
    assert found == [(0, 3, ("", "hat")), (4, 5, ("",))]  # momentum gathers during the warm-up


def test_in_one_pass_calls_are_full_and_nothing_is_evaluated_twice() -> None:
    """20 steps, skip 7, two concepts, empty prompts, room for four: the inversion fills up the edit's calls."""
    concepts = terms(Concept("sunglasses"), Concept("smile"))
    phase = one_pass_phase(13, "", 3.5, "", "", 15.0, concepts, 0.0, images=1, capacity=4, num_steps=20)
    # Step 0 is the inversion's own; at step 1 x_t still is, so only the concepts are asked about.
    assert phase.parts == {
        "inverting": tuple((step, "") for step in range(13)),
        "editing": (
            *((1, text) for text in ("sunglasses", "smile")),
            *((step, text) for step in range(2, 13) for text in ("", "sunglasses", "smile")),
        ),
    }
    assert phase.evaluations == 13 + 2 + 11 * 3
    assert phase.naive == 20 + 13 * 4
    assert phase.batches == ((4,),) * 9 + ((3,),) * 4
    assert [step for step, _ in phase.groups[0]] == [0, 1, 2, 3]


WITH_PROMPTS = st.sampled_from(["", "a cat", "hat"])


@given(
    steps=st.integers(1, 9),
    source=WITH_PROMPTS,
    source_guidance_scale=st.sampled_from([0.0, 1.0, 3.5]),
    negative=WITH_PROMPTS,
    target=WITH_PROMPTS,
    guidance_scale=st.sampled_from([0.0, 1.0, 3.5]),
    live=st.sampled_from([(), (Concept("hat"),), (Concept("hat", warmup_steps=4), Concept("smile", warmup_steps=2))]),
    momentum_scale=st.sampled_from([0.0, 0.3]),
    images=st.integers(1, 5),
    capacity=st.integers(1, 30),
)
def test_one_pass_is_both_phases_in_an_order_that_works(
    steps: int,
    source: str,
    source_guidance_scale: float,
    live: tuple[Concept, ...],
    images: int,
    capacity: int,
    **edit: Any,
) -> None:
    edit |= {"terms": [term for term in terms(*live) if not term.is_noop(base=edit["negative"])]}
    inverting = inversion_phase(steps, source, source_guidance_scale, images, capacity, steps)
    editing = editing_phase("editing", steps, **edit, images=images, capacity=capacity)
    phase = one_pass_phase(
        steps, source, source_guidance_scale, **edit, images=images, capacity=capacity, num_steps=steps
    )
    assert phase.parts["inverting"] == inverting.rows
    asked, left_out = phase.parts["editing"], [row for row in editing.rows if row not in phase.parts["editing"]]
    assert sorted([*asked, *left_out]) == sorted(editing.rows)
    assert set(left_out) <= set(inverting.rows)  # they are the inversion's
    inverted: set[int] = set()
    for step, (group, ahead) in enumerate(zip(phase.groups, phase.ahead, strict=True)):
        inverted |= {row[0] for row in group[len(group) - ahead :]}
        assert step in inverted  # its residual is there when the step is done
        assert all(row[0] == step for row in group[: len(group) - ahead])
    assert phase.evaluations == (len(inverting.rows) + len(asked)) * images
    assert phase.largest_batch <= max(capacity, 1)
    for one in (inverting, editing, phase):
        for n, (group, inputs) in enumerate(zip(one.groups, one.inputs, strict=True)):
            assert list(dict.fromkeys(inputs)) == list(range(len(set(inputs))))
            of_edit = len(group) - (phase.ahead[n] if one is phase else 0)
            latents = [(i < of_edit, step) for i, (step, _) in enumerate(group)]
            assert len(set(zip(inputs, latents, strict=True))) == len(set(inputs)) == len(set(latents))


@pytest.mark.parametrize(
    ("more", "retraced"),
    [
        ({}, 5),
        ({"terms": [Concept("hat", warmup_steps=3)]}, 4),  # its last step is the first in which the hat acts
        ({"terms": [Concept("hat", warmup_steps=0)]}, 1),
        ({"target": "a dog"}, 1),
        ({"target": "a cat", "guidance_scale": 2.0}, 1),
        ({"target": "a cat", "guidance_scale": 3.5, "source": "a cat"}, 5),
        ({"target": "a cat", "guidance_scale": 3.0, "source": "a cat"}, 1),
        ({"negative": "blurry"}, 1),
        ({"terms": [Concept("hat", warmup_steps=3, cooldown_steps=2)]}, 5),
        ({"terms": [Concept("hat", warmup_steps=3, cooldown_steps=2)], "momentum_scale": 0.3}, 4),
    ],
)
def test_an_edit_that_retraces_the_inversion_asks_for_nothing_of_it(more: dict[str, Any], retraced: int) -> None:
    edit = {
        "source": "",
        "negative": "",
        "target": "",
        "guidance_scale": 15.0,
        "terms": [],
        "momentum_scale": 0.0,
        **more,
    }
    edit["terms"] = terms(*edit["terms"])
    phase = one_pass_phase(5, **edit, source_guidance_scale=3.5, images=1, capacity=8, num_steps=5)
    again = {step for step, text in phase.parts["editing"] if text == ""}
    assert again == set(range(retraced, 5))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
@pytest.mark.parametrize("source", ["", "a cat"])
def test_inversion_evaluates_one_or_two_branches_a_step(source: str, scale: float) -> None:
    phase = inversion_phase(7, source, scale, images=3, capacity=5, num_steps=10)
    assert phase.evaluations == 7 * 3 * (2 if source and scale == 3.5 else 1)
    assert phase.naive * 7 == phase.evaluations * 10  # the published loop inverts the skipped steps too
    assert len(phase.groups) == 1
    assert [step for step, _ in phase.rows] == sorted(step for step, _ in phase.rows)


@pytest.mark.parametrize(
    ("config", "latents", "gflop", "parameters"),
    [
        (SD15_UNET, 64, 803, 859_520_964),
        (SD21_UNET, 96, 2149, 865_910_724),
        (SDXL_UNET, 128, 6761, 2_567_463_684),
    ],
    ids=["1.5", "2.1", "XL"],
)
def test_the_published_sizes(config: UNetConfig, latents: int, gflop: int, parameters: int) -> None:
    cost = unet_cost(config, latents, latents)
    assert (cost.flop + cost.text) / 1e9 == pytest.approx(gflop, rel=1e-3)
    assert cost.parameters == parameters


@pytest.mark.parametrize("size", [(64, 64), (17, 40), (1, 3)])
@pytest.mark.parametrize("config", [SD15_UNET, SD21_UNET], ids=["1.5", "2.1"])
def test_operations_are_those_that_torch_counts(config: UNetConfig, size: tuple[int, int]) -> None:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet, x_t, t = UNet(config), torch.empty(1, 4, *size), torch.zeros(1, dtype=torch.int64)
        counter.flop_counts.clear()
        unet(x_t, t, torch.empty(1, 77, config.cross_attention_dim))
    cost = unet_cost(config, *size)
    assert cost.flop + cost.text == counter.get_total_flops()
    assert cost.parameters == sum(weight.numel() for weight in unet.parameters())


def test_the_vae_likewise() -> None:
    encode, decode = vae_costs(SD15_VAE, 24, 40)
    with torch.device("meta"), torch.no_grad():
        vae = VAE(SD15_VAE)
        with FlopCounterMode(display=False) as encoding:
            vae.encode(torch.empty(1, 3, 192, 320))
        with FlopCounterMode(display=False) as decoding:
            vae.decode(torch.empty(1, 4, 24, 40))
    assert (encode.flop, decode.flop) == (encoding.get_total_flops(), decoding.get_total_flops())
    assert encode.parameters + decode.parameters == sum(weight.numel() for weight in vae.parameters())


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
        unet, vae = UNet(config).eval(), VAE(coder).eval()
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
    edit = {"target": "", "guidance_scale": 7.5, "negative": "", "momentum_scale": 0.0, "output_size": "model"}
    concepts, side = [Concept("hat", warmup_steps=0)], 256
    shapes, device = without_weights(model, "cpu", dtype)
    latents = (side // shapes.vae.config.factor,) * 2
    plan = plan_edit(shapes, shapes.inversion_settings(**start), latents, concepts, edit, device)

    ledits = LEdits.from_pretrained(model, device="cpu", dtype=dtype)
    assert ledits.runner.model == shapes.runner.model
    text = ledits.text
    encoders = [text.first.model, text.second.model] if isinstance(text, TextEncoderPair) else [text.model]
    weights = sum(w.nbytes for network in (ledits.unet, ledits.vae, *encoders) for w in network.parameters())
    assert plan.costs.weights + plan.text == weights
    if dtype == "bfloat16":
        assert (ledits.runner.model.width, ledits.runner.model.vae_width) == (2, 4 if family == "SDXL" else 2)

    def run() -> None:
        black = torch.zeros(side, side, 3).byte().numpy()
        ledits.invert_and_edit(black, size=side, concepts=concepts, progress=False, **start, **edit)

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
    phases = (
        inversion_phase(9, "", 3.5, 1, 4, 20),
        editing_phase("editing", 9, "", "", 15.0, terms(Concept("hat")), 0.0, 1, 4),
    )
    lines = Plan(phases, Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((64, 64)), 1, 2).lines()
    assert lines[0].startswith("one evaluation: 800 GFLOP (conv 444, linear 230, attention 126), 52.5 MiB")
    assert lines[1] == "inverting: 9 evaluations in 3 calls of at most 3, 7.2 TFLOP (the published loop: 20)"
    assert '  step 0: 1 branch, ""' in lines
    assert '  steps 1 to 8: 2 branches, "", "hat"' in lines
    assert lines[-1].endswith("at the peak")

    together = one_pass_phase(9, "", 3.5, "", "", 15.0, terms(Concept("hat")), 0.0, 1, 4, 20)
    lines = Plan((together,), Model(SD15_UNET, SD15_VAE, 77, 2, 2).costs((64, 64)), 1, 2).lines()
    assert lines[1:5] == [
        "inverting and editing: 24 evaluations in 9 calls of at most 4, 19.2 TFLOP (the published loop: 47)",
        '  inverting, steps 0 to 8: 1 branch, ""',
        '  editing, step 1: 1 branch, "hat"',
        '  editing, steps 2 to 8: 2 branches, "", "hat"',
    ]
