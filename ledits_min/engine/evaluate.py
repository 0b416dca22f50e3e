"""Asking the network about a phase's rows: in their order, in batches that fit, with a flag for every evaluation."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ledits_min.engine import ops
from ledits_min.engine.maps import Maps, Recorder
from ledits_min.engine.memory import is_out_of_memory
from ledits_min.engine.plan import Phase, Row, has_pair, inputs, split_evenly
from ledits_min.engine.retry import NotFinite
from ledits_min.errors import warn
from ledits_min.p2p import AttentionControl

Control = Callable[[Tensor, Tensor], AttentionControl | None]  # of rows that lend and rows that receive, in one call


class Network(Protocol):
    """x_t (m, C, h, w), the others int64 (n,) -> eps float32 (n, C, h, w): evaluation i reads x_t[inputs[i]].

    `inputs` count up from 0 to n - 1 unless m < n. A step counts the executed ones, a text is its place in Phase.texts,
    an image its place in the batch; all lie on x_t's device. `attention` controls the attention of these n rows.
    """

    def __call__(
        self, x_t: Tensor, inputs: Tensor, steps: Tensor, texts: Tensor, images: Tensor,
        attention: AttentionControl | Recorder | None = None,
    ) -> Tensor: ...  # fmt: skip


class Evaluator:
    """Evaluates a phase's groups one after the other.

    Whether a prediction is finite stays on the device, one flag per evaluation, until `check` reads them all. `maps`
    holds what was seen of the attention of the rows that are looked at.
    """

    def __init__(
        self,
        network: Network,
        phase: Phase,
        timesteps: Tensor,
        device: torch.device,
        progress: Callable[[int], object] = lambda evaluations: None,
    ) -> None:
        self.network, self.phase, self.timesteps, self.progress = network, phase, timesteps, progress
        self.capacity, self.done, self.groups_done = phase.capacity, 0, 0
        place = {text: n for n, text in enumerate(phase.texts)}
        ordered = [each for group in phase.groups for each in _in_order(group, phase.images)]
        self.evaluations = [
            (read * phase.images + image, row.step, place[row.text], image) for read, row, image in ordered
        ]
        # Those whose attention is recorded, and for what.
        self.maps = Maps()
        looked_at = [(n, look) for n, (_, row, _) in enumerate(ordered) for look in phase.looks(row)]
        self.recorded = [n for n, _ in looked_at]
        self.looks = [look for _, look in looked_at]
        self.tokens = [] if phase.recording is None else [phase.recording.tokens[look] for look in self.looks]
        self.recorded_rows = torch.tensor(self.recorded, dtype=torch.int64, device=device)
        self.numbers = torch.tensor(self.evaluations, device=device).view(-1, 4).T.contiguous()
        self.in_turn = torch.arange(max(2, phase.capacity), device=device)
        self.finite = torch.ones(phase.evaluations, dtype=torch.bool, device=device)

    def __call__(self, x_t: Tensor, control: Control | None = None) -> Tensor:
        """The next group: x_t float32 (inputs, B, C, h, w), as `plan.inputs` counts them -> eps (rows, B, C, h, w).

        `control` where the group's first row may lend its attention maps to the second.
        """
        group, flat, images = self.phase.groups[self.groups_done], x_t.flatten(0, 1), self.phase.images
        assert has_pair(group) == (control is not None)
        end, pairs_end = self.done + len(group) * images, self.done + 2 * images * has_pair(group)
        parts: list[Tensor] = []
        recorded: list[Tensor] = []
        first_recorded = bisect_left(self.recorded, self.done)
        while self.done < end:
            size = split_evenly(end - self.done, self.capacity, pairs=has_pair(group))[0]
            attention = self._pairs(min(size, pairs_end - self.done), control)
            recorder = self._recorder(size, attention)
            eps = self._call(flat, size, recorder or attention, shared=attention is None)
            if eps is None:
                self.capacity = (size + 1) // 2
                warn(
                    f"{self.phase.name}: out of memory with {size} evaluations per call; going on with {self.capacity}"
                )
                continue
            parts.append(eps)
            if recorder is not None:
                recorded += recorder.maps(self.phase.recording.size)  # type: ignore[union-attr]
        self.groups_done += 1
        looks = self.looks[first_recorded:][: len(recorded)]
        self.maps.add({
            look: torch.stack([one for one, of in zip(recorded, looks, strict=True) if of == look])
            for look in dict.fromkeys(looks)
        })  # fmt: skip
        eps = torch.cat(parts) if len(parts) > 1 else parts[0]
        if has_pair(group):  # back from pairs, image by image
            pairs, others = eps.split([2 * images, len(eps) - 2 * images])
            eps = torch.cat([pairs.unflatten(0, (images, 2)).transpose(0, 1).flatten(0, 1), others])
        return eps.view(len(group), *x_t.shape[1:])

    def skip_empty(self) -> None:
        """The next group, in which nothing is asked."""
        assert not self.phase.groups[self.groups_done]
        self.groups_done += 1

    def _pairs(self, evaluations: int, control: Control | None) -> AttentionControl | None:
        """What controls a call whose first evaluations are pairs of one that lends and one that receives."""
        if control is None or evaluations <= 0:
            return None
        rows = torch.arange(evaluations, device=self.finite.device)
        return control(rows[::2], rows[1::2])

    def _recorder(self, evaluations: int, control: AttentionControl | None) -> Recorder | None:
        """What looks at the attention of the next evaluations, in whose place `control` attends; None: nobody looks."""
        first, last = (bisect_left(self.recorded, n) for n in (self.done, self.done + evaluations))
        if self.phase.recording is None or first == last:
            return None
        rows, tokens = self.recorded_rows[first:last] - self.done, torch.stack(self.tokens[first:last])
        return self.phase.recording.recorder(rows, tokens, control, ops.attention)

    def _call(
        self, x_t: Tensor, size: int, attention: AttentionControl | Recorder | None, shared: bool
    ) -> Tensor | None:
        """One call of the network with the next `size` evaluations; None where memory ran out and fewer may fit.

        x_t holds the inputs of their whole group. `shared`: rows may share what is computed before the text is read.
        """
        here = slice(self.done, self.done + size)
        numbers = self.numbers[:, here]
        read = [evaluation[0] for evaluation in self.evaluations[here]]
        first, last = min(read), max(read)
        if last - first + 1 < size and shared:
            x_t, read_by = x_t[first : last + 1], numbers[0] - first
        else:
            x_t, read_by = x_t[numbers[0]], self.in_turn[:size]
        try:
            steps, texts, images = numbers[1:]
            eps = self.network(x_t, read_by, steps, texts, images, attention)
        except (RuntimeError, MemoryError) as error:
            least = 2 if has_pair(self.phase.groups[self.groups_done]) else 1
            if size <= least or not is_out_of_memory(error):
                raise
            return None
        self.finite[here] = eps.flatten(1).isfinite().all(dim=1)
        self.done = here.stop
        self.progress(size)
        return eps

    def check(self, latents: Tensor | None = None) -> None:
        """NotFinite, if need be; `latents` says for every step whether the latents behind it were finite."""
        finite = self.finite.tolist()
        bad = [
            (step, f"the prediction for {self.phase.texts[text]!r}")
            for (_, step, text, _), good in zip(self.evaluations, finite, strict=True)
            if not good
        ]
        of_step = [] if latents is None else latents.tolist()
        bad += [(step, "the latents") for step, good in enumerate(of_step) if not good]
        if bad:
            step, what = min(bad, key=lambda item: item[0])
            raise NotFinite.at(self.phase.name, what, step, int(self.timesteps[step]))


def _in_order(group: Sequence[Row], images: int) -> list[tuple[int, Row, int]]:
    """(input, row, image) of every evaluation: row by row, but pairs that lend and receive beside each other."""
    numbered = list(zip(inputs(group), group, strict=True))
    pairs, others = numbered[: 2 * has_pair(group)], numbered[2 * has_pair(group) :]
    paired = [(read, row, image) for image in range(images) for read, row in pairs]
    return paired + [(read, row, image) for read, row in others for image in range(images)]
