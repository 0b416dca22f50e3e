"""Whole steps as graphs, on a recorder that does again what was recorded: one replay per step and nothing else, nothing
recorded twice, and the same results. The step's kernel runs through Triton's interpreter, or on a CUDA device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ledits_min import Concept, LEdits
from ledits_min.config import EditDefaults
from ledits_min.engine import loop
from ledits_min.engine.evaluate import Network
from ledits_min.engine.graphs import Replay
from ledits_min.engine.loop import Watch
from ledits_min.engine.ops import EditState
from ledits_min.engine.overhead import Overhead
from ledits_min.engine.plan import Phase, editing_phase, one_pass_phase
from ledits_min.engine.retry import NotFinite
from ledits_min.engine.steps import SIZES, Desk, GraphedSteps, StepGraphs, standing_on
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings

pytest.importorskip("triton", reason="steps are whole where kernels run")

SHAPE = (1, 4, 3)  # the interpreter takes 15 ms per map and concept
LEVELS = {"": 0.0, "a cat": 0.7, "a dog": -0.9, "hat": 1.3, "beard": -0.6}
HAT = Concept("hat", guidance_scale=3.0, threshold=0.8, warmup_steps=1)
BEARD = Concept("beard", guidance_scale=4.0, threshold=0.5, warmup_steps=1, reverse=True)


class Recorder(TorchDispatchMode):
    """Records on any device; keeps in their order what torch is asked to do, and which replays stand between."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorded = self.replayed = 0
        self.events: list[str] = []
        self._inside = False

    def __call__(self, call: Callable[[], list[Tensor]], pool: list[Any]) -> tuple[Replay, list[Tensor]]:
        pool[:] = ["the memory of all"]
        self.recorded += 1

        def replay() -> None:
            self.events.append("replay")
            self.replayed += 1
            self._inside = True
            try:
                call()
            finally:
                self._inside = False

        return replay, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            self.events.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


@dataclass
class Edit:
    """An inversion and an edit of random latents by a network of a line."""

    inversion: InversionSettings = field(default_factory=lambda: InversionSettings(num_steps=9, skip=2))
    settings: EditSettings = field(default_factory=lambda: edit_settings())
    images: int = 1
    capacity: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        steps = self.inversion.executed_steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        drawn = torch.randn(steps + 1, self.images, *SHAPE, generator=generator).to(self.device)
        self.x_0, self.noise = drawn[0], drawn[1:]
        sizes = self.images, self.capacity
        self.one_pass = one_pass_phase(self.inversion, self.settings, *sizes)
        self.editing = editing_phase("editing", self.inversion, self.settings, *sizes)

    def network(self, phase: Phase, graphs: StepGraphs | None, weights: object = 0) -> Network:
        timesteps = self.inversion.make_schedule().timesteps
        tensors = {
            "level": torch.tensor([LEVELS[text] for text in phase.texts], device=self.device),
            "t": timesteps.to(self.device, torch.float32) / 100.0,
        }

        def network(
            x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor, attention: object = None
        ) -> Tensor:
            x_t = x_t[inputs]
            level, t = (tensors[name][at].view(-1, 1, 1, 1) for name, at in (("level", texts), ("t", steps)))
            place = torch.linspace(0.0, 1.5, x_t[0].numel(), device=x_t.device).view(SHAPE)
            wave = torch.sin(3.0 * x_t + t + 0.1 * images.view(-1, 1, 1, 1))
            return torch.tanh(0.6 * x_t + level * place) + 0.2 * wave

        return network if graphs is None else GraphedSteps(network, network, tensors, weights, graphs)

    def together(
        self, graphs: StepGraphs | None = None, watch: Watch = loop.UNWATCHED, **more: Any
    ) -> tuple[Tensor, Tensor, EditState]:
        network = self.network(self.one_pass, graphs, **more)
        return loop.invert_and_edit(network, self.one_pass, self.x_0, self.noise, self.inversion, self.settings, watch)

    def edited(self, x_T: Tensor, residuals: Tensor, graphs: StepGraphs | None = None, **more: Any) -> EditState:
        network = self.network(self.editing, graphs, **more)
        return loop.edit(network, self.editing, x_T, residuals, self.inversion, self.settings)


def edit_settings(*concepts: Concept, **more: Any) -> EditSettings:
    terms = tuple(concept.resolve(EditDefaults()) for concept in concepts or (HAT, BEARD))
    return EditSettings(concepts=terms, **more)


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LEDITS_KERNELS", "triton")
    with np.errstate(all="ignore"):  # the interpreter's numpy would warn of overflows where a GPU says nothing
        yield


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def graphs(recorder: Recorder) -> StepGraphs:
    return StepGraphs(Overhead(), recorder)


def same(one: EditState, other: EditState) -> None:
    for name in ("x_t", "momentum", "shares", "counts", "step"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)


def test_in_the_steady_state_a_step_is_one_replay(recorder: Recorder, graphs: StepGraphs) -> None:
    """A kind of step is run once, recorded when it comes again, and replayed from then on."""
    run = Edit(InversionSettings(num_steps=14, skip=2))
    expected = run.together()
    first = run.together(graphs)
    kinds = len(next(iter(graphs.desks.values())).steps)
    assert 2 <= recorder.recorded <= kinds <= 4
    assert recorder.replayed == 12 - 2 - kinds, "two steps retrace the inversion"
    recorder.events.clear()
    with recorder:
        again = run.together(graphs)
    for found in (first, again):
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
        same(found[2], expected[2])
    assert recorder.recorded <= kinds
    events = recorder.events
    begin, end = events.index("replay"), len(events) - events[::-1].index("replay")
    assert events[begin:end].count("replay") >= 8
    assert set(events[begin:end]) == {"replay"}, "something else is launched between two replays"


@pytest.mark.parametrize("images", [1, 2])
def test_a_second_edit_records_nothing(images: int, recorder: Recorder, graphs: StepGraphs) -> None:
    """Of another picture, with other texts, scales, thresholds and momentum; and the first one's result stays."""
    one = Edit(images=images, capacity=4 * images)
    x_T, residuals, state = one.together(graphs)
    one.together(graphs)  # by now a kind that came once has come again
    edited = one.edited(x_T, residuals, graphs)
    one.edited(x_T, residuals, graphs)
    kept = [tensor.clone() for tensor in (x_T, residuals, state.x_t, edited.x_t)]
    recorded = recorder.recorded
    hat = replace(HAT, guidance_scale=2.0, threshold=0.3)
    other = Edit(
        replace(one.inversion, eta=0.5), edit_settings(hat, replace(BEARD, text="a dog", weight=0.4)),
        images, 4 * images, seed=5,
    )  # fmt: skip
    assert [len(group) for group in other.one_pass.groups] == [len(group) for group in one.one_pass.groups]
    expected = other.together()
    found = other.together(graphs)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
    same(found[2], expected[2])
    same(other.edited(*expected[:2], graphs), other.edited(*expected[:2]))
    assert recorder.recorded == recorded
    assert all(map(torch.equal, kept, (x_T, residuals, state.x_t, edited.x_t)))


def test_what_is_no_buffer_asks_for_another_desk(graphs: StepGraphs, recorder: Recorder) -> None:
    """The source's scale is a number that the graph holds."""
    settings = edit_settings(HAT)
    for scale in (2.0, 3.0, 2.0):
        inversion = InversionSettings(num_steps=7, skip=0, source="a cat", source_guidance_scale=scale)
        run = Edit(inversion, settings, capacity=4)
        expected, found = run.together(), run.together(graphs)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
        same(found[2], expected[2])
    assert len(graphs.desks) == 2 and recorder.replayed > 0


def test_few_sizes_are_kept_and_all_are_freed(graphs: StepGraphs) -> None:
    for steps in range(3, 5 + SIZES):
        Edit(InversionSettings(num_steps=steps, skip=0)).together(graphs)
        assert len(graphs.desks) <= SIZES
    assert len(graphs.desks) == SIZES
    graphs.clear()
    assert not graphs.desks and not graphs.pool


def test_other_weights_end_what_was_recorded(graphs: StepGraphs, recorder: Recorder) -> None:
    run = Edit()
    for weights in ("as loaded", "moved", None, None):
        before = recorder.recorded
        run.together(graphs, weights=weights)
        assert recorder.recorded > before
        assert len(graphs.desks) == 1
    before = recorder.recorded
    run.together(graphs, weights="moved")
    run.together(graphs, weights="moved")
    again = recorder.recorded - before
    run.together(graphs, weights="moved")
    assert recorder.recorded - before == again


def test_an_edit_inside_an_edit_goes_the_usual_way(graphs: StepGraphs) -> None:
    outer, inner = Edit(), Edit(seed=3)
    expected = outer.together(), inner.together()
    found: list[Any] = []

    def on_step(step: object) -> None:
        found.append(inner.together(graphs)) if len(found) < 2 else None

    state = outer.together(graphs, Watch(step=on_step, predictions=False))[2]
    same(state, expected[0][2])
    for one in found:
        same(one[2], expected[1][2])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not while capturing\na long story")]
)
def test_what_cannot_be_recorded_goes_the_usual_way_and_says_so(error: Exception) -> None:
    def failing(call: Callable[[], list[Tensor]], pool: list[Any]) -> tuple[Replay, list[Tensor]]:
        raise error

    graphs, run = StepGraphs(Overhead(), failing), Edit()
    with pytest.warns(UserWarning, match="steps of 3 evaluations run without a CUDA graph of their own: not "):
        found = run.together(graphs)
    same(found[2], run.together()[2])


def test_where_memory_ends_batches_are_split(graphs: StepGraphs, recorder: Recorder) -> None:
    run = Edit()
    network = cast(GraphedSteps, run.network(run.one_pass, graphs))

    def limited(x_t: Tensor, inputs: Tensor, *more: Any) -> Tensor:
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run.network(run.one_pass, None)(x_t, inputs, *more)

    network = replace(network, network=cast(Network, limited), plain=cast(Network, limited))
    with pytest.warns(UserWarning, match="out of memory with 4 evaluations per call; going on with 2"):
        found = loop.invert_and_edit(network, run.one_pass, run.x_0, run.noise, run.inversion, run.settings)
    same(found[2], run.together()[2])
    assert recorder.recorded == 0


@pytest.mark.parametrize("step", [3, 6])
def test_what_is_not_finite_is_named(step: int, graphs: StepGraphs, recorder: Recorder) -> None:
    """In a replayed step too: its text and its step."""
    run = Edit()
    t = int(run.inversion.make_schedule().timesteps[step])
    poisoned = run.network(run.editing, graphs)
    x_T, residuals, _ = run.together()
    run.edited(x_T, residuals, graphs)
    run.edited(x_T, residuals, graphs)
    before = recorder.recorded
    residuals[step] = torch.inf
    with pytest.raises(NotFinite, match=rf"editing: the latents .* step {step} \(t = {t}\)"):
        loop.edit(poisoned, run.editing, x_T, residuals, run.inversion, run.settings)
    levels = dict(LEVELS)
    x_T, residuals, _ = run.together()
    try:
        LEVELS["beard"] = torch.nan
        with pytest.raises(NotFinite, match=r"editing: the prediction for 'beard' .* step 1 "):
            run.edited(x_T, residuals, graphs)
    finally:
        LEVELS.update(levels)
    assert recorder.recorded == before


# --- what the graphs of a real network stand on ---------------------------------------------------------------------


def test_what_is_changed_or_put_on_a_network_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3)).requires_grad_(False)
    before = standing_on(network, True)
    assert before == standing_on(network, True) != standing_on(network, False)
    changes: list[Callable[[Any], object]] = [
        lambda network: network[0].weight.mul_(2.0),
        lambda network: network.double(),
        lambda network: setattr(network[0], "weight", nn.Parameter(torch.zeros(3, 3), requires_grad=False)),
    ]
    for change in changes:
        other = copy.deepcopy(network)
        kept = standing_on(other)
        change(other)
        assert kept != standing_on(other)
    monkeypatch.setenv("LEDITS_KERNELS", "torch")
    assert before != standing_on(network, True)
    handle = network[0].register_forward_hook(lambda *_: None)
    assert standing_on(network) is None
    handle.remove()
    assert standing_on(network) is not None
    network[0].forward = lambda x: x  # type: ignore[method-assign]
    assert standing_on(network) is None


def test_moving_and_closing_an_editor_frees_its_graphs() -> None:
    ledits = LEdits.from_pretrained("tiny", device="cpu", dtype="float32")
    assert standing_on(ledits.unet) is not None, "the fast blocks are taken for something put on"
    for free in (lambda: ledits.to("cpu"), ledits.close):
        ledits.runner.graphs.desks["a size"] = Desk({})
        ledits.runner.graphs.pool.append("memory")
        free()
        assert not ledits.runner.graphs.desks and not ledits.runner.graphs.pool
