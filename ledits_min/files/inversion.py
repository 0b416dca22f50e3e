"""An inversion as an object and as a file, so that a picture is inverted once and edited many times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from ledits_min.config import ScheduleConfig
from ledits_min.errors import InputError, check_number, check_whole, quoted, short
from ledits_min.files.configs import read_config
from ledits_min.files.display import figures
from ledits_min.files.door import read_file
from ledits_min.files.header import TensorInfo, read_header
from ledits_min.files.opening import check_size
from ledits_min.files.picture import MAX_SIDE
from ledits_min.files.write import atomic_write
from ledits_min.inversion import InversionSettings

FORMAT = "ledits_min inversion 1"
MAX_BYTES = 2**32  # of a file, which is read whole


@dataclass(frozen=True)
class Inversion:
    """Everything an edit needs of the pictures; editing again never pays for the inversion again.

    x_T        float32 (B, C, h, w)     noisy latents at timesteps[skip]
    residuals  float32 (T, B, C, h, w)  x_{t-1} - mu_t of every executed step, T = num_steps - skip
    latents    float32 (B, C, h, w)     x_0, the pictures' own latents
    originals  B uint8 tensors (H, W, 3), the pictures as they came in
    settings   an `InversionSettings`: what it was made with
    """

    x_T: Tensor = field(repr=False)
    residuals: Tensor = field(repr=False)
    latents: Tensor = field(repr=False)
    originals: tuple[Tensor, ...] = field(repr=False)
    settings: InversionSettings

    @property
    def original_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of every picture as it came in."""
        return [(original.shape[1], original.shape[0]) for original in self.originals]

    @property
    def pictures(self) -> list[Image.Image]:
        """`originals` as PIL images."""
        return [Image.fromarray(original.cpu().numpy()) for original in self.originals]

    def _repr_html_(self) -> str:
        """The pictures and how they were inverted, for a notebook."""
        made = self.settings
        seeds = f", seed {', '.join(map(str, made.seeds))}" if made.seeds else ""
        source = f", source {quoted(made.source)}" if made.source else ""
        note = f"inversion of {made.num_steps} steps, skip {made.skip}, eta {made.eta:g}{seeds}{source}"
        return figures([[(f"{picture.width} x {picture.height}", picture)] for picture in self.pictures], note)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically. OSError where the folder cannot be written."""
        tensors = {"x_T": self.x_T, "residuals": self.residuals, "latents": self.latents}
        tensors |= {f"original.{i}": original for i, original in enumerate(self.originals)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        # One entry: the library writes several in an order of chance, and equal inversions are equal files.
        metadata = {FORMAT: json.dumps(asdict(self.settings))}
        content = save(tensors, metadata)
        if len(content) > MAX_BYTES:
            raise InputError(f"{quoted(path)} would be {len(content):,} bytes long; save fewer pictures in one file")
        atomic_write(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Inversion:
        """Read what `save` wrote. InputError for any other file, or one whose numbers do not fit together."""
        header = read_header(path)
        if FORMAT not in header.metadata:
            way_out = "make one with `ledits invert` (a checkpoint goes to --model)"
            raise InputError(f"{quoted(path)}: not a saved inversion; {way_out}")
        settings = _read_settings(header.metadata[FORMAT], quoted(path))
        _check_shapes(header.tensors, settings, quoted(path))
        # Not by name: the library takes only names that are UTF-8.
        content = read_file(path, "a saved inversion", MAX_BYTES)
        if len(content) != header.size:
            raise InputError(f"{quoted(path)} was changed while it was read; try again")
        tensors = load(content)
        for name in ("x_T", "residuals", "latents"):
            if not bool(tensors[name].isfinite().all()):
                raise InputError(f"{quoted(path)}: {name} holds values that are not finite; make the inversion again")
        originals = tuple(tensors[f"original.{i}"] for i in range(len(tensors["x_T"])))
        return cls(tensors["x_T"], tensors["residuals"], tensors["latents"], originals, settings)


def _read_settings(text: str, path: str) -> InversionSettings:
    """Parse and check the settings of a saved inversion; every value is held to the range the interface allows."""
    try:
        values: dict[str, Any] = json.loads(text)
        values["schedule"] = read_config(ScheduleConfig, values["schedule"], path)
        values["seeds"] = tuple(values["seeds"])
        settings = InversionSettings(**values)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: damaged settings ({type(error).__name__}); make the inversion again") from None
    check_inversion_settings(settings, path)
    return settings


def check_inversion(inversion: object, channels: int) -> None:
    """InputError unless it is an inversion whose latents have the model's channels."""
    if not isinstance(inversion, Inversion):
        raise InputError(
            f"inversion is {short(inversion)}; `edit` takes what `invert` gives back or Inversion.load reads, and "
            "`invert_and_edit` takes a picture"
        )
    if inversion.latents.shape[1] != channels:
        found = inversion.latents.shape[1]
        raise InputError(f"this inversion has latents of {found} channels, the model works with {channels}")


def check_inversion_settings(settings: InversionSettings, where: str) -> None:
    """InputError for a setting outside the range that the public interface documents."""
    check_whole(f"{where}: num_steps", settings.num_steps, 1, settings.schedule.num_train_timesteps // 2)
    check_whole(f"{where}: skip", settings.skip, 0, settings.num_steps - 1)
    check_number(f"{where}: eta", settings.eta, 0.0, 1.0)
    check_whole(f"{where}: solver_order", settings.solver_order, 1, 2)
    if settings.solver_order == 2 and settings.eta != 1.0:
        raise InputError(f"{where}: solver_order 2 (dpm++) is defined for eta 1 alone, and eta is {settings.eta:g}")
    check_number(f"{where}: source_guidance_scale", settings.source_guidance_scale, 0.0, 1000.0)
    for seed in settings.seeds:
        check_whole(f"{where}: seed", seed, 0, 2**63 - 1)
    if type(settings.squared) is not bool:
        raise InputError(f"{where}: squared is {short(settings.squared)}; true or false is wanted")
    for name in ("source", "fingerprint"):
        if not isinstance(getattr(settings, name), str):
            raise InputError(f"{where}: {name} is not a string")


def _check_shapes(found: Mapping[str, TensorInfo], settings: InversionSettings, path: str) -> None:
    """Hold the header of a saved inversion against what the settings say it must contain."""
    latents = found["latents"].shape if "latents" in found else ()
    if len(latents) == 4 and 0 not in latents:
        executed = settings.executed_steps
        wanted = {"x_T": latents, "latents": latents, "residuals": (executed, *latents)}
        originals = {f"original.{i}" for i in range(latents[0])}
        pictures = [found[name] for name in originals & set(found)]
        if (
            set(found) == set(wanted) | originals
            and all(found[name].dtype == "F32" and found[name].shape == shape for name, shape in wanted.items())
            and all(p.dtype == "U8" and len(p.shape) == 3 and p.shape[2] == 3 and p.numel for p in pictures)
            and len(settings.seeds) in (0, latents[0])
            and max(latents[2:]) <= MAX_SIDE
        ):
            for picture in pictures:
                check_size((picture.shape[1], picture.shape[0]), f"{path}: one of its pictures")
            return
    raise InputError(f"{path}: its tensors do not fit its settings; make the inversion again")
