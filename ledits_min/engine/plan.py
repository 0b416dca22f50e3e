"""What a run will evaluate, known before it starts: `engine` follows the plan, `ledits edit --explain` prints it.

The network is asked about rows (executed step, text). Nothing is evaluated that cannot change the result: skipped
steps, equal texts twice, concepts that are idle at a step. Rows that do not wait for each other share calls, and rows
about the same x_t share what the network does before it looks at the text. (TFLOP count every evaluation as a whole.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ledits_min.config import UNetConfig, VAEConfig
from ledits_min.engine.cost import Cost, unet_cost, vae_costs
from ledits_min.guidance import guided_texts, step_texts
from ledits_min.sega import ConceptTerm

Row = tuple[int, str]


@dataclass(frozen=True)
class Phase:
    """All evaluations of one loop.

    groups    of rows; a group waits for the one before it, the rows of a group wait for nothing
    images    pictures that every row is evaluated for: an evaluation is one row of one picture
    capacity  evaluations that one call of the network may hold
    naive     evaluations of the published loop: skipped steps inverted too, two branches and one a concept to edit
    ahead     where inversion and edit share the calls: how many rows at the end of each group are the inversion's
    """

    name: str
    groups: tuple[tuple[Row, ...], ...]
    images: int
    capacity: int
    naive: int
    ahead: tuple[int, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text that is evaluated, in the order of its first use."""
        return tuple(dict.fromkeys(text for group in self.groups for _, text in group))

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for group in self.groups for row in group)

    @property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """For each group, which x_t each row reads, counted from 0: rows of one step and one loop read the same."""
        found = []
        for group, ahead in zip(self.groups, self.ahead or (0,) * len(self.groups), strict=True):
            cut = len(group) - ahead
            read = [(n >= cut, step) for n, (step, _) in enumerate(group)]
            number = {x_t: n for n, x_t in enumerate(dict.fromkeys(read))}
            found.append(tuple(number[x_t] for x_t in read))
        return tuple(found)

    @property
    def evaluations(self) -> int:
        return len(self.rows) * self.images

    @property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        """Evaluations in each call of the network, group by group."""
        sizes = [len(group) * self.images for group in self.groups]
        return tuple(split_evenly(size, self.capacity) if size else () for size in sizes)

    @property
    def largest_batch(self) -> int:
        return max(size for sizes in self.batches for size in sizes)

    @property
    def parts(self) -> dict[str, tuple[Row, ...]]:
        """The rows by the loop that they belong to."""
        if not self.ahead:
            return {self.name: self.rows}
        cuts = [len(group) - ahead for group, ahead in zip(self.groups, self.ahead, strict=True)]
        cut = list(zip(self.groups, cuts, strict=True))
        return {
            "inverting": tuple(row for group, n in cut for row in group[n:]),
            "editing": tuple(row for group, n in cut for row in group[:n]),
        }


def ranges(rows: Sequence[Row]) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """(first step, last step, texts) of consecutive steps that evaluate the same texts."""
    steps = [(step, tuple(text for _, text in same)) for step, same in groupby(rows, lambda row: row[0])]
    for texts, same in groupby(steps, lambda item: item[1]):
        indices = [step for step, _ in same]
        yield indices[0], indices[-1], texts


def inversion_phase(
    steps: int, source: str, source_guidance_scale: float, images: int, capacity: int, num_steps: int
) -> Phase:
    """The inversion: one group, because the noisy copies of a picture are independent of each other."""
    texts = guided_texts("", source, source_guidance_scale)
    rows = tuple((step, text) for step in range(steps) for text in texts)
    return Phase("inverting", (rows,), images, capacity, naive=len(texts) * num_steps * images)


def editing_phase(
    name: str,
    steps: int,
    negative: str,
    target: str,
    guidance_scale: float,
    terms: Sequence[ConceptTerm],
    momentum_scale: float,
    images: int,
    capacity: int,
) -> Phase:
    """The editing: a group a step. `terms` are without those that `ConceptTerm.is_noop` calls so."""
    groups = tuple(
        tuple((step, text) for text in step_texts(negative, target, guidance_scale, terms, step, momentum_scale))
        for step in range(steps)
    )
    return Phase(name, groups, images, capacity, naive=(2 + len(terms)) * steps * images)


def one_pass_phase(
    steps: int,
    source: str,
    source_guidance_scale: float,
    negative: str,
    target: str,
    guidance_scale: float,
    terms: Sequence[ConceptTerm],
    momentum_scale: float,
    images: int,
    capacity: int,
    num_steps: int,
) -> Phase:
    """Inversion and edit in the same calls: a group a step, the edit's rows first.

    An editing step needs the inversion of the same step and of none behind it. So the inversion runs as far ahead as
    there is room in calls that are made anyway. As long as the edit retraces the inversion (both are guided alike, no
    concept acts and no momentum is let go) its predictions for the inversion's texts are the inversion's own, and not
    evaluated again.
    """
    inverting = inversion_phase(steps, source, source_guidance_scale, images, capacity, num_steps)
    editing = editing_phase("", steps, negative, target, guidance_scale, terms, momentum_scale, images, capacity)
    source_texts = guided_texts("", source, source_guidance_scale)
    texts = guided_texts(negative, target, guidance_scale)
    guided_alike = texts == source_texts and (len(texts) == 1 or guidance_scale == source_guidance_scale)
    waiting, retraces = deque(inverting.rows), True
    groups, ahead = [], []
    for step, wanted in enumerate(editing.groups):
        rows = [row for row in wanted if not (retraces and row[1] in source_texts)]
        needed = sum(row[0] == step for row in waiting)
        calls = -(-(len(rows) + needed) * images // capacity)
        room = calls * capacity // images - len(rows)
        now = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        groups.append((*rows, *now))
        ahead.append(len(now))
        let_go = momentum_scale > 0.0 and bool(terms) and all(term.is_warm(step) for term in terms)
        retraces = retraces and guided_alike and not let_go and not any(term.acts(step) for term in terms)
    naive = inverting.naive + editing.naive
    return Phase("inverting and editing", tuple(groups), images, capacity, naive, tuple(ahead))


def split_evenly(total: int, most: int) -> tuple[int, ...]:
    """`total` in as few parts of at most `most` as there can be, larger ones first, sizes one apart at most."""
    parts = -(-total // most)
    size, more = divmod(total, parts)
    return (size + 1,) * more + (size,) * (parts - more)


# --- what it costs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """One evaluation of the UNet, one encoding, one decoding; a number has `width` bytes, in the VAE `vae_width`.

    With `transforms`, weights of `width` bytes are kept in `winograd`'s form, too.
    """

    unet: Cost
    encode: Cost
    decode: Cost
    width: int
    vae_width: int
    transforms: bool = False

    @property
    def weights(self) -> int:
        """Bytes of all parameters, and of what is made of them."""

        def of(cost: Cost, width: int) -> int:
            return width * (cost.parameters + cost.transformed * (self.transforms and width == self.width))

        return of(self.unet, self.width) + of(self.encode, self.vae_width) + of(self.decode, self.vae_width)

    def working(self, batch: int) -> int:
        """Bytes at the peak besides the weights: of a UNet call, or of coding one picture."""
        coding = self.vae_width * max(self.encode.values, self.decode.values)
        return max(self.width * batch * self.unet.values, coding)


@dataclass(frozen=True)
class Model:
    """What decides the costs besides the size: configs, the contexts' length L, bytes a number in UNet and VAE."""

    unet: UNetConfig
    vae: VAEConfig
    tokens: int
    width: int
    vae_width: int

    def costs(self, latents: tuple[int, int], transforms: bool = False) -> Costs:
        """Of latents (h, w)."""
        unet = unet_cost(self.unet, *latents, self.tokens)
        return Costs(unet, *vae_costs(self.vae, *latents), self.width, self.vae_width, transforms)

    def largest_side(self, size: tuple[int, int], free: int) -> int:
        """The longer side in pixels below that of `size` = (width, height) that `free` bytes can hold.

        It is a multiple of 8 latents. The aspect is kept and the weights are there already; 0 where nothing fits.
        """
        step = 8 * self.vae.factor
        for side in range((max(size) - 1) // step * step, 0, -step):
            across, down = (max(1, round(pixels * side / max(size)) // self.vae.factor) for pixels in size)
            if self.costs((down, across)).working(batch=1) <= free:
                return side
        return 0


def capacity(costs: Costs, room: int, most: int) -> int:
    """Evaluations a UNet call may hold: at most `most`, and at least one within `room` bytes for what is alive."""
    return max(1, min(most, room // (costs.width * costs.unet.values)))


# --- the same for people and for reports ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Everything a run will do; `encodes` and `decodes` count pictures, `text` the bytes of the text encoders."""

    phases: tuple[Phase, ...]
    costs: Costs
    encodes: int
    decodes: int
    text: int = 0

    @property
    def memory(self) -> int:
        """Bytes at the peak, about."""
        working = self.costs.working(max(phase.largest_batch for phase in self.phases))
        return self.costs.weights + self.text + working

    @property
    def flop(self) -> int:
        evaluations = sum(phase.evaluations for phase in self.phases)
        coding = self.encodes * self.costs.encode.flop + self.decodes * self.costs.decode.flop
        return evaluations * self.costs.unet.flop + coding

    def to_json(self) -> dict[str, object]:
        return {
            "tflop": round(self.flop / 1e12, 3),
            "peak_memory_bytes": self.memory,
            "phases": {
                phase.name: {
                    "evaluations": phase.evaluations,
                    "published": phase.naive,
                    "calls": sum(map(len, phase.batches)),
                    "largest_batch": phase.largest_batch,
                    "branches": [
                        {"of": part, "first_step": first, "last_step": last, "texts": list(texts)}
                        for part, rows in phase.parts.items()
                        for first, last, texts in ranges(rows)
                    ],
                }
                for phase in self.phases
            },
        }

    def lines(self) -> list[str]:
        """The plan as `--explain` prints it."""
        unet = self.costs.unet
        kinds = ", ".join(f"{name} {giga(getattr(unet, name))}" for name in ("conv", "linear", "attention"))
        found = [f"one evaluation: {giga(unet.flop)} GFLOP ({kinds}), {size(self.costs.width * unet.values)} of memory"]
        for phase in self.phases:
            calls, tera = sum(map(len, phase.batches)), phase.evaluations * unet.flop / 1e12
            found.append(
                f"{phase.name}: {count(phase.evaluations, 'evaluation')} in {count(calls, 'call')} of at most "
                f"{phase.largest_batch}, {tera:.3g} TFLOP (the published loop: {phase.naive})"
            )
            for part, rows in phase.parts.items():
                of = f"{part}, " if len(phase.parts) > 1 else ""
                for first, last, texts in ranges(rows):
                    steps = f"step {first}" if first == last else f"steps {first} to {last}"
                    named = ", ".join(f'"{text}"' for text in texts)
                    found.append(f"  {of}{steps}: {count(len(texts), 'branch', 'branches')}, {named}")
        encodes, decodes = count(self.encodes, "encoding"), count(self.decodes, "decoding")
        encode, decode = giga(self.costs.encode.flop), giga(self.costs.decode.flop)
        found.append(f"VAE: {encodes} of {encode} GFLOP, {decodes} of {decode} GFLOP")
        found.append(f"in all: {self.flop / 1e12:.3g} TFLOP, about {size(self.memory)} at the peak")
        return found


def count(number: int, singular: str, plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def giga(number: int) -> str:
    return f"{number / 1e9:.3g}" if number < 1e12 else f"{number / 1e9:.0f}"


def size(number: int) -> str:
    return f"{number / 2**20:.3g} MiB" if number < 1000 * 2**20 else f"{number / 2**30:.1f} GiB"
