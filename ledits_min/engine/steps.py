"""A whole editing step as one CUDA graph: the network, the inversion's residuals, the step's kernel, the next input.

What differs between two steps lies in tables on the device, at the row that the state's own counter names; what differs
between two edits lies in buffers that an edit fills. So a graph that is recorded once serves all steps that ask about
the same texts, of all edits of that size: it is kept with the editor, until its networks are moved or closed.

A step is whole where it asks about all its texts itself, in one call of the network, and where the step's kernel runs.
All others (retraced ones, Prompt-to-Prompt, traced ones, those whose memory ran out) go the loop's usual way.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ledits_min.engine import ops
from ledits_min.engine.evaluate import Evaluator, Network
from ledits_min.engine.graphs import Record, Replay, record_on_cuda
from ledits_min.engine.maps import Recorder
from ledits_min.engine.memory import is_out_of_memory
from ledits_min.engine.ops import EditState, EditSteps
from ledits_min.engine.overhead import Overhead
from ledits_min.engine.plan import EDIT, has_pair, inputs
from ledits_min.engine.torch_private import is_called_plainly, version
from ledits_min.errors import warn
from ledits_min.inversion import InversionSettings, Solver
from ledits_min.p2p import AttentionControl

SIZES = 4  # of edits whose graphs are kept, the latest ones

# Of a step: the texts that the edit asks about, and (how many steps ahead, text) of the inversion's rows.
Kind = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]


class Running(Protocol):
    """An inversion that runs along, as `loop.RunningInversion`."""

    x: Tensor
    residuals: Tensor
    table: Tensor
    texts: tuple[str, ...]
    settings: InversionSettings
    solver: Solver
    waiting: list[Tensor]
    predicted: list[Tensor]
    taken: int


@dataclass
class Step:
    """A kind of step: its rows as numbers on the device, and its graph once there is one; False: it has none."""

    inputs: Tensor
    ahead: Tensor  # of the step, per evaluation
    texts: Tensor
    images: Tensor
    reads: Tensor  # how far ahead lie the inversion's x_t that are read
    replay: Replay | bool | None = None


@dataclass
class Desk:
    """The buffers of edits of one size, and what was recorded on them."""

    tensors: dict[str, Tensor]
    steps: dict[Kind, Step] = field(default_factory=dict)


class StepGraphs:
    """What is kept from edit to edit: desks by size, at most SIZES. One edit at a time; another meanwhile has none."""

    def __init__(self, overhead: Overhead, record: Record = record_on_cuda) -> None:
        self.overhead, self.record = overhead, record
        self.desks: OrderedDict[object, Desk] = OrderedDict()
        self.pool: list[Any] = []  # the memory that all graphs share, once there is one
        self.weights: object = None
        self._in_use = Lock()

    def clear(self) -> None:
        self.desks.clear()
        self.pool.clear()

    @contextmanager
    def desk(self, tensors: dict[str, Tensor], numbers: object, weights: object) -> Iterator[Desk | None]:
        """A desk whose buffers hold what `tensors` hold; None where another edit is at it.

        numbers  that a graph holds and no buffer: another desk for others
        weights  what all graphs stand on besides; None where nobody can tell whether it is still the same
        """
        if not self._in_use.acquire(blocking=False):
            yield None
            return
        try:
            if weights is None or weights != self.weights:
                self.clear()
            self.weights = weights
            shapes = tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items())
            size = shapes, numbers
            if size not in self.desks:
                kept = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
                self.desks[size] = Desk(kept)
            else:
                for name, tensor in tensors.items():
                    self.desks[size].tensors[name].copy_(tensor)
            self.desks.move_to_end(size)
            while len(self.desks) > SIZES:
                self.desks.popitem(last=False)
            yield self.desks[size]
        finally:
            self._in_use.release()


@dataclass(frozen=True)
class GraphedSteps:
    """A `Network` whose steps can be whole.

    network   as the loop's usual way asks it
    plain     the same without graphs of its own; it reads `tensors`, which are exchanged for a desk's
    weights   as `StepGraphs.desk` takes it
    """

    network: Network
    plain: Network
    tensors: dict[str, Tensor]
    weights: object
    graphs: StepGraphs

    def __call__(
        self, x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor,
        attention: AttentionControl | Recorder | None = None,
    ) -> Tensor:  # fmt: skip
        return self.network(x_t, inputs, steps, texts, images, attention)


@dataclass
class WholeSteps:
    """One edit at a desk: `state`, `residuals` and `finite` (per step, of the latents behind it) are the desk's."""

    network: GraphedSteps
    desk: Desk
    evaluate: Evaluator
    steps: EditSteps
    state: EditState
    running: Running | None
    done: list[tuple[int, int, int]] = field(default_factory=list)  # (step, its first evaluation, how many)

    def __post_init__(self) -> None:
        texts = 0 if self.running is None else len(self.running.texts)
        self.nothing = self.state.x_t.new_empty(texts, 0)  # in place of predictions that nobody will take

    @property
    def finite(self) -> Tensor:
        return self.desk.tensors["finite"]

    def __call__(self, i: int) -> bool:
        """Do step i, if it can be whole."""
        kind = self._kind(i)
        if kind is None:
            return False
        if kind not in self.desk.steps:
            step = self.desk.steps[kind] = self._step(i, kind)
            if not self._first(step, kind):
                return False
        else:
            step = self.desk.steps[kind]
            if step.replay is None:
                step.replay = self._recorded(step, kind)
            if isinstance(step.replay, bool):
                return False
            step.replay()
        self._count(i, kind)
        return True

    def flags(self) -> None:
        """Hand the evaluator its flags of the steps that were whole."""
        places = [(first + n, step, n) for step, first, size in self.done for n in range(size)]
        if places:
            to, step, n = torch.tensor(places, device=self.finite.device).T
            self.evaluate.finite[to] = self.desk.tensors["predictions"][step, n]

    def left(self) -> EditState:
        """The state, for whoever goes on with it when the next edit is at the desk; the inversion is left likewise."""
        if self.running is not None:
            self.running.x, self.running.residuals = self.running.x.clone(), self.running.residuals.clone()
        state = {name: getattr(self.state, name) for name in _STATE}
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in state.items() if tensor is not None}
        return replace(self.state, **copies)

    def _kind(self, i: int) -> Kind | None:
        """What step i asks; None where it cannot be whole."""
        phase, settings, running = self.evaluate.phase, self.steps.settings, self.running
        group = phase.groups[i]
        if has_pair(group):  # its attention is controlled or looked at, and its latents may be blended
            return None
        own = [row for row in group if row.reads == EDIT]
        others = group[len(own) :]
        if not own or tuple(row.text for row in own) != tuple(settings.texts(i)):
            return None
        if len(group) * phase.images > self.evaluate.capacity:
            return None
        if others and not (running and _files_whole_steps(running, len(others))):
            return None
        place = phase.texts.index
        return tuple(place(row.text) for row in own), tuple((row.step - i, place(row.text)) for row in others)

    def _step(self, i: int, kind: Kind) -> Step:
        group, images = self.evaluate.phase.groups[i], self.evaluate.phase.images
        own, others = kind
        rows = [(0, text) for text in own] + list(others)
        reads = list(dict.fromkeys(ahead for ahead, _ in others))
        numbers = [
            (read * images + image, ahead, text, image)
            for read, (ahead, text) in zip(inputs(group), rows, strict=True)
            for image in range(images)
        ]
        device = self.state.x_t.device
        read, ahead, text, image = torch.tensor(numbers, device=device).T.contiguous()
        return Step(read, ahead, text, image, torch.tensor(reads, dtype=torch.int64, device=device))

    def _first(self, step: Step, kind: Kind) -> bool:
        """The step without a graph: it compiles kernels and finds out whether the memory is enough."""
        try:
            row, eps = self._predict(step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            del self.desk.steps[kind]  # a later edit may have more of it
            return False
        self._advance(kind, row, eps)
        return True

    def _recorded(self, step: Step, kind: Kind) -> Replay | bool:
        def whole() -> list[Tensor]:
            self._advance(kind, *self._predict(step))
            return [self.state.x_t]

        graphs = self.network.graphs
        with graphs.overhead.timed("record"):
            try:
                replay, _ = graphs.record(whole, graphs.pool)
            except RuntimeError as error:
                why = "not enough memory" if is_out_of_memory(error) else str(error).partition("\n")[0]
                warn(f"steps of {len(step.inputs)} evaluations run without a CUDA graph of their own: {why}")
                return False
        return replay

    def _predict(self, step: Step) -> tuple[Tensor, Tensor]:
        """The row of the tables that the step reads, (1,), and eps of its evaluations."""
        row = self.state.step.flatten()[:1].long()
        x_t = self.state.x_t
        if len(step.reads):
            x_t = torch.cat([x_t, self.desk.tensors["x"].index_select(0, row + step.reads).flatten(0, 1)])
        return row, self.network.plain(x_t, step.inputs, row + step.ahead, step.texts, step.images)

    def _advance(self, kind: Kind, row: Tensor, eps: Tensor) -> None:
        kept, (own, others) = self.desk.tensors, kind
        finite = eps.flatten(1).isfinite().all(dim=1)
        kept["predictions"][:, : len(eps)].index_copy_(0, row, finite[None])
        eps = eps.unflatten(0, (-1, self.evaluate.phase.images))
        if others:
            running = self.running
            assert running is not None
            new = len(others) // len(running.texts)
            at = row + others[0][0] + torch.arange(new + 1, device=row.device)
            branches = eps[len(own) :].unflatten(0, (new, len(running.texts))).transpose(0, 1).contiguous()
            found = ops.residuals(
                kept["x"].index_select(0, at), branches, running.settings, running.solver, range(new),
                kept["levels"].index_select(0, at[:new]),
            )  # fmt: skip
            kept["residuals"].index_copy_(0, at[:new], found)
        ops.sega_step(self.steps, self.state, eps[: len(own)], kept["residuals"])
        kept["finite"].index_copy_(0, row, self.state.x_t.isfinite().all()[None])

    def _count(self, i: int, kind: Kind) -> None:
        """What the loop's usual way notes down."""
        evaluate, running = self.evaluate, self.running
        size = len(evaluate.phase.groups[i]) * evaluate.phase.images
        self.done.append((i, evaluate.done, size))
        evaluate.done += size
        evaluate.groups_done += 1
        if running is not None:  # its predictions are no more needed, their number is
            running.predicted += [self.nothing] * (len(kind[1]) // len(running.texts))
            running.predicted.pop(0)
            running.taken += 1
        evaluate.progress(size)


def _files_whole_steps(running: Running, rows: int) -> bool:
    """Whether that many rows are all texts of some steps, each of which can be finished by itself."""
    return not running.waiting and not running.solver.weights and rows % len(running.texts) == 0


@contextmanager
def whole_steps(
    network: Network, evaluate: Evaluator, steps: EditSteps, state: EditState, of: Tensor | Running, finite: Tensor
) -> Iterator[WholeSteps | None]:
    """What does steps whole, from now on for as long as it lasts; None where nothing can.

    of      the residuals, or the inversion that finds them on the way
    finite  bool (T,): whether the latents behind a step are. From here on these, and the state, are the desk's
    """
    if not isinstance(network, GraphedSteps) or not ops.steps_by_kernel(steps, state):
        yield None
        return
    running = None if isinstance(of, Tensor) else of
    count, phase = len(steps.levels), evaluate.phase
    most = max(map(len, phase.groups)) * phase.images
    tensors = {f"network: {name}": tensor for name, tensor in network.tensors.items()}
    tensors |= {f"tables: {name}": table for name, table in state.tables.items()}
    tensors |= {name: value for name in _STATE if (value := getattr(state, name)) is not None}
    tensors |= {
        "residuals": of if isinstance(of, Tensor) else of.residuals,
        "finite": finite,
        "predictions": torch.ones(count, most, dtype=torch.bool, device=state.x_t.device),
    }
    if running is not None:
        tensors |= {"x": running.x, "levels": running.table}
    guided = None if running is None else (len(running.texts), running.settings.source_guidance_scale)
    with network.graphs.desk(tensors, guided, network.weights) as desk:
        if desk is None:
            yield None
            return
        kept = desk.tensors
        network.tensors.update({name: kept[f"network: {name}"] for name in network.tensors})
        held: dict[str, Any] = {name: kept[name] for name in _STATE if name in kept}
        state = replace(state, tables={name: kept[f"tables: {name}"] for name in state.tables}, **held)
        if running is not None:
            running.x, running.residuals, running.table = kept["x"], kept["residuals"], kept["levels"]
        yield WholeSteps(network, desk, evaluate, steps, state, running)


_STATE = "step", "x_t", "momentum", "shares", "counts", "pred_x0"


def standing_on(network: nn.Module, *more: object) -> object:
    """What says whether graphs of a network may be replayed; None where something put on it might have changed unseen.

    Its weights, where they lie and how often they were changed in place; who computes; and `more`.
    """
    for module in network.modules():
        ours = type(module).__module__.startswith(("torch.nn.modules.", "ledits_min."))
        if not ours or not is_called_plainly(module):
            return None
    weights = [(w.data_ptr(), w.dtype, 0 if w.is_inference() else version(w)) for w in network.parameters()]
    return weights, os.environ.get("LEDITS_KERNELS"), more
