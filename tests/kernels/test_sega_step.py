"""kernels/sega_step.py against the equations, which `ops` reads from sega, guidance and inversion."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ledits_min.edit import edit
from ledits_min.engine import ops
from ledits_min.engine.ops import EditState, EditSteps
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings, Solver
from ledits_min.sega import percentile_mask

REGISTERS = 128  # with up to 16 warps; with 32, as for a 1024-pixel edit's maps, a multiprocessor has 64 each

# The interpreter takes about 15 ms a map and concept: small batches, few steps, one reason a size.
SIZES = {
    "non-square, below a warp's width": (7, 13),
    "odd, an eighth below a power of two": (63, 63),
    "768-pixel edits, not a power of two": (96, 96),
}


def same(kernel: Tensor, plain: Tensor) -> bool:
    """Bit for bit where both ran on a CPU; a GPU's torch divides by a number as it multiplies with its inverse."""
    if kernel.device.type == "cpu":
        return torch.equal(kernel.nan_to_num(7e33), plain.nan_to_num(7e33))
    return torch.allclose(kernel, plain, rtol=1e-5, atol=1e-5 * float(plain.nan_to_num().abs().max()), equal_nan=True)


def run(case: Any) -> EditState:
    """All steps of a case. Whatever a step must not read is NaN: other steps' residuals and idle branches."""
    state = ops.start(case.steps, case.x_t)
    state.shares.fill_(math.nan)
    for step, branches in enumerate(case.branches):
        residuals = torch.full_like(case.residuals, math.nan)
        residuals[step] = case.residuals[step]
        idle = torch.full_like(branches[:1], math.nan)
        ops.sega_step(case.steps, state, torch.cat([branches, idle]), residuals)
    return state


def both(case: Any, on: Callable[[str], None]) -> tuple[EditState, EditState]:
    on("triton")
    kernel = run(case)
    on("torch")
    return kernel, run(case)


def agree(kernel: EditState, plain: EditState) -> None:
    assert torch.equal(kernel.step, plain.step)
    assert same(kernel.x_t, plain.x_t)
    assert same(kernel.momentum, plain.momentum)
    assert same(kernel.shares, plain.shares.nan_to_num(0.0))  # the kernel writes what the plain side leaves untouched
    assert kernel.counts is not None and plain.counts is not None
    assert torch.equal(kernel.counts, plain.counts)


@pytest.mark.parametrize("concepts", [1, 5])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_a_step_is_the_equations(
    inputs: ModuleType, on: Callable[[str], None], device: str, size: tuple[int, int], concepts: int
) -> None:
    terms = tuple(inputs.term(f"c{i}", threshold=0.95 - 0.1 * i, reverse=i % 2 == 1) for i in range(concepts))
    steps = EditSteps(inputs.levels(2), EditSettings("target", concepts=terms, momentum_scale=0.3))
    kernel, plain = both(inputs.edit(steps, size, channels=2, device=device), on)
    agree(kernel, plain)
    assert plain.momentum.abs().max() > 0


def test_the_second_order_is_the_equations(inputs: ModuleType, on: Callable[[str], None], device: str) -> None:
    solver = Solver(InversionSettings(num_steps=5, skip=1, solver_order=2))
    settings = EditSettings("target", concepts=(inputs.term("c"),), momentum_scale=0.3)
    steps = EditSteps(solver.levels, settings, solver.weights)
    kernel, plain = both(inputs.edit(steps, (7, 13), batch=2, channels=2, device=device), on)
    agree(kernel, plain)
    assert kernel.pred_x0 is not None and plain.pred_x0 is not None
    assert same(kernel.pred_x0, plain.pred_x0)
    first = both(inputs.edit(EditSteps(solver.levels, settings), (7, 13), batch=2, channels=2, device=device), on)
    assert not same(kernel.x_t, first[0].x_t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision_branches_in_both_layouts(
    inputs: ModuleType, on: Callable[[str], None], device: str, dtype: torch.dtype, channels_last: bool
) -> None:
    steps = EditSteps(inputs.levels(1), EditSettings("target", concepts=(inputs.term("c"),)))
    case = inputs.edit(steps, (9, 6), batch=2, channels=3, dtype=dtype, device=device, channels_last=channels_last)
    agree(*both(case, on))


EDITS: dict[str, dict[str, Any]] = {
    "no concept": {"concepts": []},
    "nothing to guide": {"guidance_scale": 1.0},
    "scale 0": {"guidance_scale": 0.0},
    "empty target": {"target": ""},
    "negative prompt": {"negative": "blurry"},
    "target equals the negative": {"target": "blurry", "negative": "blurry"},
    "concept equals the target": {"concepts": [{"text": "target"}]},
    "two strengths of one text": {"concepts": [{}, {"guidance_scale": 2.0, "reverse": True}]},
    "one warms up": {"concepts": [{}, {"text": "late", "warmup_steps": 2}]},
    "one warms up the momentum": {"concepts": [{}, {"text": "late", "warmup_steps": 2}], "momentum_scale": 0.5},
    "one cools down": {"concepts": [{}, {"text": "early", "cooldown_steps": 1}], "momentum_scale": 0.5},
    "all cooled down": {"concepts": [{"cooldown_steps": 2}], "momentum_scale": 0.5, "momentum_beta": 0.9},
}


@pytest.mark.parametrize("changes", EDITS.values(), ids=EDITS.keys())
def test_a_whole_edit_is_the_plain_loop(
    inputs: ModuleType, on: Callable[[str], None], device: str, changes: dict[str, Any]
) -> None:
    """`edit.edit` is the truth; `ops` must repeat it step by step on both sides, whatever the schedule of branches."""
    concepts = changes.get("concepts", [{}])
    terms = tuple(inputs.term(**({"text": "concept", "threshold": 0.5} | concept)) for concept in concepts)
    settings = EditSettings(**({"target": "target", "guidance_scale": 3.0} | changes | {"concepts": terms}))
    inversion = InversionSettings(num_steps=4, skip=0)
    schedule = inversion.make_schedule()
    steps = EditSteps(schedule.levels(1.0), settings)
    texts = {text for step in range(4) for text in settings.texts(step)} | {""}
    generator = torch.Generator().manual_seed(0)
    contexts = {text: torch.randn(2, 3, 5, generator=generator).to(device) for text in sorted(texts)}
    x_t, *residuals = torch.randn(5, 1, 2, 3, 5, generator=generator).to(device)

    def eps_model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return torch.tanh(x) + 0.1 * context

    truth = edit(eps_model, contexts, x_t, torch.stack(residuals), inversion, settings)
    for side in ("torch", "triton"):
        on(side)
        state = ops.start(steps, x_t, masks=False)
        for step in range(4):
            t = schedule.timesteps[step].expand(1)
            branches = torch.stack([eps_model(state.x_t, t, contexts[text]) for text in settings.texts(step)])
            ops.sega_step(steps, state, branches, torch.stack(residuals))
        assert same(state.x_t, truth), side


def masks(values: Tensor, threshold: float, inputs: ModuleType, on: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """(the kernel's mask, percentile_mask's) of the magnitudes of one row of values (n,)."""
    term = inputs.term("c", guidance_scale=1.0, threshold=threshold)
    steps = EditSteps(inputs.levels(1), EditSettings(concepts=(term,)))
    psi = values.reshape(1, 1, 1, -1)
    state = ops.start(steps, torch.zeros_like(psi))
    on("triton")
    ops.sega_step(steps, state, torch.stack([torch.zeros_like(psi), psi]), torch.zeros_like(psi)[None])
    assert state.counts is not None
    return state.counts[0].bool().flatten(), percentile_mask(psi, threshold).flatten()


# Ties, zeros of both signs, neighbours, subnormals and the largest numbers are likely, ordinary ones are there too.
MAGNITUDES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-23, 1e-45, -1e-40, 1.2e-38, 1e30, -3e38]),
    st.floats(-10.0, 10.0, width=32),
)
THRESHOLDS = st.one_of(st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.floats(0.0, 1.0))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(MAGNITUDES, min_size=1, max_size=150), threshold=THRESHOLDS)
def test_the_percentile_is_torchs_and_numpys(
    inputs: ModuleType, on: Callable[[str], None], device: str, values: list[float], threshold: float
) -> None:
    row = torch.tensor(values, dtype=torch.float32, device=device)
    kernel, plain = masks(row, threshold, inputs, on)
    assert torch.equal(kernel, plain)

    # numpy computes ranks and the interpolation in float64: only values next to its cut may fall on the other side.
    magnitude = row.abs().double().cpu().numpy()
    cut = np.quantile(magnitude, threshold)
    nearby = max(1e-4 * (magnitude.max() - magnitude.min()), float(np.spacing(np.float32(cut))))
    clear = np.abs(magnitude - cut) > nearby
    assert (kernel.cpu().numpy() == (magnitude >= cut))[clear].all()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(
    "values",
    [
        pytest.param([2.5] * 77, id="all equal"),
        pytest.param([0.0, -0.0] * 40, id="zeros of both signs"),
        pytest.param([1e-45 * i for i in range(64)], id="subnormals"),
        pytest.param([1e30 * (-1) ** i * i for i in range(100)], id="1e30"),
        pytest.param([1.0] * 95 + [2.0] * 5, id="a tie at the cut"),
        pytest.param([float(i) for i in range(100)] + [math.inf], id="an infinity"),
    ],
)
def test_adversarial_magnitudes(
    inputs: ModuleType, on: Callable[[str], None], device: str, values: list[float], threshold: float
) -> None:
    kernel, plain = masks(torch.tensor(values, device=device), threshold, inputs, on)
    assert torch.equal(kernel, plain)
    if threshold == 0.0 and math.inf not in values:
        assert kernel.all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_latents(
    inputs: ModuleType, on: Callable[[str], None], device: str, bad: float
) -> None:
    steps = EditSteps(inputs.levels(1), EditSettings(concepts=(inputs.term("c"),), momentum_scale=0.3))
    case = inputs.edit(steps, (5, 7), channels=2, device=device)
    case.branches[0][-1, 0, 1, 2, 3] = bad  # the concept's prediction, second channel
    kernel, plain = both(case, on)
    agree(kernel, plain)
    assert not torch.isfinite(kernel.x_t[0, 1, 2, 3])
    assert torch.isfinite(kernel.x_t[0, 0]).all()


def test_it_refuses_what_it_cannot_compute(inputs: ModuleType, device: str) -> None:
    from ledits_min.kernels import sega_step as kernel

    steps = EditSteps(inputs.levels(1), EditSettings(concepts=(inputs.term("c"),)))
    case = inputs.edit(steps, (4, 6), device=device)
    state = ops.start(steps, case.x_t)
    arguments: dict[str, Any] = {
        "step": state.step, "tables": state.tables, "branches": case.branches[0], "residuals": case.residuals,
        "x_t": state.x_t, "carried": [state.momentum], "shares": state.shares, "counts": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match="momentum .* must be contiguous"):
        kernel.sega_step(**arguments | {"carried": [state.momentum.transpose(2, 3)]})
    with pytest.raises(ValueError, match="does not fit"):
        kernel.sega_step(**arguments | {"x_t": torch.zeros(1, 4, 129, 128, device=device)})


def test_maps_too_large_go_to_torch_and_say_so(inputs: ModuleType, on: Callable[[str], None], device: str) -> None:
    steps = EditSteps(inputs.levels(1), EditSettings())
    case = inputs.edit(steps, (129, 128), channels=1, device=device)
    on("triton")
    with pytest.warns(UserWarning, match="too large for registers"):
        state = run(case)
    on("torch")
    assert torch.equal(state.x_t, run(case).x_t)


def test_residuals_and_branches_of_any_layout_are_taken(inputs: ModuleType, device: str) -> None:
    """Residuals that torch made behind a channels-last network, on whatever device, are not contiguous."""
    from ledits_min.kernels import sega_step as kernel

    plan = EditSteps(inputs.levels(2), EditSettings("target", concepts=(inputs.term("c"),)))
    case = inputs.edit(plan, (5, 7), batch=2, channels=3, device=device)

    def step(residuals: Tensor, branches: Tensor) -> EditState:
        state = ops.start(plan, case.x_t)
        kernel.sega_step(
            state.step, state.tables, branches=branches, residuals=residuals, x_t=state.x_t, carried=[state.momentum],
            shares=state.shares, counts=state.counts,
        )  # fmt: skip
        return state

    plain = step(case.residuals, case.branches[0])
    for residuals, branches in zip(others(case.residuals), others(case.branches[0]), strict=True):
        agree(step(residuals, case.branches[0]), plain)
        agree(step(residuals, branches), plain)


def others(maps: Tensor) -> list[Tensor]:
    """maps (N, B, C, h, w) as channels-last, as steps last, and with h and w crossed."""
    channels_last = maps.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, maps.shape[:2])
    crossed = (maps.transpose(a, b).contiguous().transpose(a, b) for a, b in ((0, 4), (3, 4), (0, 1)))
    return [channels_last, *crossed]


@pytest.mark.parametrize("probes", [1, 2, 8])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.95, 1.0])
def test_no_launch_shape_changes_a_bit(
    inputs: ModuleType, on: Callable[[str], None], device: str, probes: int, threshold: float
) -> None:
    from ledits_min.kernels._launch import forced_shape

    plan = EditSteps(inputs.levels(1), EditSettings("target", concepts=(inputs.term("c", threshold=threshold),)))
    case = inputs.edit(plan, (9, 21), channels=1, device=device)
    case.branches[0].round_(decimals=1)  # ties
    with forced_shape("sega_cut 256", {"probes": probes}), forced_shape("sega_combine", {"tile": 128}):
        agree(*both(case, on))


def test_compiles_without_spills(ahead_of_time: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """The float32 that our UNet returns in both layouts, with and without mask counts, and half precision."""
    from ledits_min.kernels import sega_step as kernel

    variants: list[dict[str, Any]] = []
    integers = {"step_ptr": "*i32", "slots_ptr": "*i32", "rows_ptr": "*i32", "counts_ptr": "*i32"}
    residual = [f"residual_{of}stride" for of in ("step_", "sample_", "channel_")]
    for dtype, positions, count, channels_last, concepts, second in [
        ("fp32", 4096, True, False, 4, False),
        ("fp32", 4096, True, True, 4, False),
        ("fp32", 4096, True, True, 4, True),
        ("fp32", 9216, True, False, 8, True),
        ("fp16", 4096, False, False, 4, False),
        ("fp32", 16384, True, True, 4, False),
        ("bf16", 16384, False, False, 4, False),
    ]:
        block, warps, probes, limit = kernel.cut_shape(positions, torch.device("cpu"))
        common = {
            "module": "sega_step", "fuse": False, "types": integers | {"branches_ptr": f"*{dtype}"},
            "aligned": ["positions", "branch_stride", "sample_stride", "channel_stride", *residual],
        }  # fmt: skip
        layout = {"STRIDE": 4, "channel_stride": 1} if channels_last else {"STRIDE": 1}
        variants.append({
            "kernel": "_cut", "constants": layout | {"BLOCK": block, "PROBES": probes}, "num_warps": warps,
            "limit": limit, **common,
        })  # fmt: skip
        constants = {
            "K": concepts,
            "COUNT": count,
            "SECOND": second,
            "TILE": kernel.COMBINE["tile"],
            "residual_stride": 1,
        }
        variants.append({
            "kernel": "_combine", "constants": layout | constants, "num_warps": kernel.COMBINE["warps"],
            "limit": kernel.REGISTERS, **common,
        })  # fmt: skip
    for usage in ahead_of_time(variants):
        assert usage["cubin"] > 0
        assert usage["stack"] == 0, usage
        assert usage["registers"] <= REGISTERS, usage
