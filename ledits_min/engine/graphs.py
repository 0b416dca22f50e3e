"""The network's calls as CUDA graphs: recorded once per batch size, then replayed without the host's launching kernels.

What differs between two steps (x_t, and the numbers of steps, texts and pictures) is data in fixed buffers, so one
graph serves all steps with equally many live branches.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ledits_min.engine.evaluate import Network
from ledits_min.engine.maps import Recorder
from ledits_min.engine.memory import is_out_of_memory
from ledits_min.engine.overhead import Overhead
from ledits_min.errors import InputError, warn
from ledits_min.p2p import AttentionControl

Replay = Callable[[], object]
Record = Callable[[Callable[[], list[Tensor]], list[Any]], tuple[Replay, list[Tensor]]]


def use_graphs(device: torch.device) -> bool:
    """LEDITS_GRAPHS: auto (a CUDA device has graphs, the default) or off. InputError for another value."""
    mode = os.environ.get("LEDITS_GRAPHS", "auto")
    if mode not in ("auto", "off"):
        raise InputError(f"LEDITS_GRAPHS is {mode!r}; it must be 'auto' or 'off'")
    return mode == "auto" and device.type == "cuda"


def record_on_cuda(call: Callable[[], list[Tensor]], pool: list[Any]) -> tuple[Replay, list[Tensor]]:
    """The work that `call` launches as a graph, and the tensors that every replay writes its results to.

    Its memory is that of `pool`, a list of one, or of none yet: graphs that are never replayed at once may share it.
    """
    if not pool:
        pool.append(torch.cuda.graph_pool_handle())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool[0]):
        outputs = call()
    return graph.replay, outputs


@dataclass(frozen=True)
class Tape:
    """A recorded call: fill `inputs`, `replay`, read `outputs`: eps, and what was seen of the attention."""

    inputs: list[Tensor]
    replay: Replay
    outputs: list[Tensor]


class Graphed:
    """A network(x_t, *numbers) -> eps that is recorded when it meets a batch size again, and replayed from then on.

    A batch size is the number of x_t and that of evaluations, which may share them, and of how many of these the
    attention is recorded. Attention that is controlled differs from step to step: such a call stays plain.

    A size that is met once is not worth recording, and the first, plain call does what a recording may not: it compiles
    kernels and finds out whether the memory is enough. Where recording fails, that size stays plain, with a warning.
    """

    def __init__(
        self,
        network: Network,
        overhead: Overhead,
        record: Record = record_on_cuda,
    ) -> None:
        self.network, self.overhead, self.record = network, overhead, record
        self.met: set[object] = set()
        self.tapes: dict[object, Tape | None] = {}  # None: it could not be recorded

    def __call__(
        self, x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor,
        attention: AttentionControl | Recorder | None = None,
    ) -> Tensor:  # fmt: skip
        values = [x_t, inputs, steps, texts, images]
        if isinstance(attention, AttentionControl) or (attention is not None and attention.control is not None):
            return self.network(x_t, inputs, steps, texts, images, attention)
        recorded = None if attention is None else (len(attention.rows), attention.layers)
        size = len(x_t), len(inputs), recorded
        if size not in self.met:
            self.met.add(size)
            return self.network(x_t, inputs, steps, texts, images, attention)
        values += [] if attention is None else [attention.rows, attention.tokens]
        if size not in self.tapes:
            with self.overhead.timed("record"):
                self.tapes[size] = self._recorded(values, attention)
        tape = self.tapes[size]
        if tape is None:
            return self.network(x_t, inputs, steps, texts, images, attention)
        for buffer, value in zip(tape.inputs, values, strict=True):
            buffer.copy_(value)
        tape.replay()
        eps, *seen = (output.clone() for output in tape.outputs)  # the next replay writes over them
        if attention is not None:
            attention.seen += seen
        return eps

    def _recorded(self, values: list[Tensor], recorder: Recorder | None) -> Tape | None:
        buffers = [value.clone() for value in values]
        x_t, inputs, steps, texts, images = buffers[:5]

        def call() -> list[Tensor]:
            if recorder is None:
                return [self.network(x_t, inputs, steps, texts, images)]
            rows, tokens = buffers[5:]
            looking = Recorder(rows, tokens, recorder.layers, recorder.attend)
            eps = self.network(x_t, inputs, steps, texts, images, looking)
            return [eps, *looking.seen]

        try:
            replay, outputs = self.record(call, [])
        except RuntimeError as error:
            why = "not enough memory" if is_out_of_memory(error) else str(error).partition("\n")[0]
            warn(f"{len(inputs)} evaluations per call run without a CUDA graph: {why}")
            return None
        return Tape(buffers, replay, outputs)
