"""What a run costs, before it starts: memory, operations, how many evaluations a call may hold; and the same in words.

(TFLOP count every evaluation as a whole, though rows about the same latents share some of it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ledits_min.config import UNetConfig, VAEConfig
from ledits_min.engine.cost import Cost, unet_cost, vae_costs
from ledits_min.engine.memory import total_memory
from ledits_min.engine.plan import Phase, editing_phase, inversion_phase, one_pass_phase, ranges
from ledits_min.guidance import EditSettings
from ledits_min.inversion import InversionSettings

# Above so many evaluations per call nothing gets faster; on a CPU, above so many bytes, which come from main memory.
MOST = 64
CPU_ROOM = 2**28

# (TFLOP of a call of the UNet, its milliseconds): an H100 in float16, calls recorded as graphs (bench/results/h100),
# and two cores with AMX in bfloat16. The shape matters: what a call costs by itself, and where that stops to show.
CALLS = {
    "cuda": ((0.8, 5.3), (2.4, 9.79), (3.2, 11.2), (6.4, 20.4), (25.6, 79.0), (51.2, 154.0)),
    "cpu": ((0.8, 1900.0), (3.2, 4600.0)),
}
FRUGAL = 1.04  # so many times longer a phase may take whose calls need less memory


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
    """What decides the costs besides the size: configs, the contexts' length L, bytes per number in UNet and VAE."""

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


def capacity(costs: Costs, room: int, most: int = MOST) -> int:
    """Evaluations a UNet call may hold: at most `most`, and at least one within `room` bytes for what is alive."""
    return max(1, min(most, room // (costs.width * costs.unet.values)))


def batch_limit(costs: Costs, device: torch.device) -> int:
    """Evaluations a call of the network may hold on this device; the same on every run, whatever else is running."""
    room = total_memory(device) // 2 - costs.weights
    return capacity(costs, min(room, CPU_ROOM) if device.type == "cpu" else room)


def seconds(phase: Phase, costs: Costs, device: torch.device) -> float:
    """About what a phase takes on a machine like the one in CALLS."""
    points = CALLS.get(device.type, CALLS["cpu"])

    def of_call(evaluations: int) -> float:
        work = evaluations * costs.unet.flop / 1e12
        ends = list(pairwise(points))
        (x, y), (x_next, y_next) = next((ends for ends in ends if work <= ends[1][0]), ends[-1])
        return y + (work - x) * (y_next - y) / (x_next - x)

    return sum(of_call(size) for sizes in phase.batches for size in sizes) / 1e3


def inverting(settings: InversionSettings, images: int, costs: Costs, device: torch.device) -> Phase:
    """`inversion_phase` in calls that are as large as it pays, on a device."""
    limit = batch_limit(costs, device)
    sizes = [2**n for n in range(limit.bit_length()) if 2**n < limit]
    return _frugal([inversion_phase(settings, images, size) for size in [*sizes, limit]], costs, device)


def inverting_and_editing(
    inversion: InversionSettings, settings: EditSettings, images: int, costs: Costs, device: torch.device
) -> Phase:
    """`one_pass_phase` in calls that are as large as it pays, on a device.

    Mostly the inversion's row of a step rides in the call that the edit makes at that step, and all calls are alike.
    """
    limit = batch_limit(costs, device)
    rows = max(map(len, editing_phase("", inversion, settings, images, limit).groups))
    sizes = [images * (rows + ahead) for ahead in (0, 1, 2, 4, 8, 16, 32) if images * (rows + ahead) < limit]
    phases = [one_pass_phase(inversion, settings, images, size) for size in [*sizes, limit]]
    return _frugal(phases, costs, device)


def _frugal(phases: Sequence[Phase], costs: Costs, device: torch.device) -> Phase:
    """Of phases with growing calls the first that is nearly as fast as the fastest."""
    times = [seconds(phase, costs, device) for phase in phases]
    return next(phase for phase, time in zip(phases, times, strict=True) if time <= FRUGAL * min(times))


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
