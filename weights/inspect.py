"""Say what a checkpoint is without reading a weight: the report behind `ledits inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ledits_min.config import UNetConfig, VAEConfig
from ledits_min.errors import InputError, quoted
from ledits_min.files.header import read_header
from ledits_min.weights.read.folder import FOLDERS, STEMS, option, part_tensors, readable
from ledits_min.weights.read.identify import PARTS, Layout, Stored, identify, old_attention_names
from ledits_min.weights.read.published import SDXL
from ledits_min.weights.read.shapes import FLOAT_DTYPES
from ledits_min.weights.read.survey import (
    Survey,
    describe_ignored,
    find_model,
    layout_of,
    lone_part,
    part_of,
    supplied_parts,
    survey_checkpoint,
    survey_whole,
)


@dataclass(frozen=True)
class PartReport:
    """One part in numbers: how many tensors and parameters, and how many tensors of each dtype."""

    name: str
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """What `path` is, and whether it can be edited with; `reason` says why not.

    pixels    the size it was trained at, "" where that is not known
    verdict   "loads", "incomplete" (a part must be supplied), "part" (of a checkpoint, no unet), or "refused"
    """

    path: str
    size: int
    dialect: str
    family: str
    pixels: str
    parts: tuple[PartReport, ...]
    oddities: tuple[str, ...]
    missing: tuple[str, ...]
    verdict: str
    reason: str

    def __str__(self) -> str:
        lines = [
            f"file      {self.path}, {self.size:,} bytes",
            f"dialect   {self.dialect}",
            f"family    {self.family}",
            *([f"pixels    {self.pixels}"] if self.pixels else []),
        ]
        for part in self.parts:
            dtypes = ", ".join(f"{count} {dtype}" for dtype, count in part.dtypes.items())
            lines.append(f"{part.name:<9} {part.parameters:,} parameters in {part.tensors} tensors ({dtypes})")
        lines += [f"note      {oddity}" for oddity in self.oddities]
        both = "text_2" in self.missing
        lines += [f"missing   {p}: pass {option('text_2' if both and p == 'text' else p)}" for p in self.missing]
        return "\n".join([*lines, f"verdict   {self.verdict}" + (f": {self.reason}" if self.reason else "")])


@readable()
def inspect(path: str | Path, **options: Any) -> Report:
    """Describe a checkpoint, a part of one, or a folder, from headers and configs alone.

    `options` are those of `survey_whole`: the verdict is on the checkpoint with them. Raises InputError only where
    there is no header to describe: no such file, not safetensors, damaged.
    """
    supplied = supplied_parts(options.get("vae"), options.get("text_encoder"))
    path = find_model(path, supplied)
    ema, insist = bool(options.get("ema")), bool(options.get("insist"))
    layouts = _folder_layouts(path) if path.is_dir() else [layout_of(path, read_header(path), ema, insist)[0]]
    parts = {part: layout.parts[part] for layout in layouts for part in PARTS if part in layout.parts}
    survey, reason = _try_to_load(path, supplied, options)
    wanted = [part for part in PARTS if part != "text_2" or _family(layouts) == SDXL.name]
    missing = tuple(part for part in wanted if part not in parts and part not in supplied)
    verdict = "loads" if not reason else "refused" if survey is None or not missing else "incomplete"
    if verdict == "incomplete" and "unet" in missing:
        verdict = "part"
    if verdict == "refused" and (lone := _lone(path)):
        verdict, reason = "part", f"{quoted(path)} {lone}"
    return Report(
        path=quoted(path),
        size=_size(path),
        dialect=_dialect(path, layouts),
        family=_family(layouts),
        pixels="" if survey is None else _pixels(survey),
        parts=tuple(_part_report(part, tensors.values()) for part, tensors in parts.items()),
        oddities=tuple(_oddities(layouts, parts, survey)),
        missing=missing if parts and not any(layout.refusal for layout in layouts) else (),
        verdict=verdict,
        reason=reason,
    )


def _try_to_load(path: Path, supplied: Collection[str], options: Mapping[str, Any]) -> tuple[Survey | None, str]:
    """(survey, "") if it loads; (survey, reason) if what is there is sound by itself; (None, reason) if it is not."""
    survey = None
    try:
        survey = survey_checkpoint(path, supplied, bool(options.get("ema")), bool(options.get("insist")))
        survey = survey_whole(path, **options)
    except InputError as error:
        return survey, str(error)
    return survey, ""


def _lone(path: Path) -> str:
    """What a part of a diffusers folder is, by the config in its folder, and where it belongs."""
    lone = lone_part(path if path.is_dir() else path.parent)
    return lone if path.is_dir() or path.stem in STEMS.values() else ""


def _folder_layouts(path: Path) -> list[Layout]:
    """The layouts of the parts that can be read; what cannot be read is named by the verdict."""
    layouts = []
    if (path / "config.json").is_file() and (own := part_of(path)):
        return [identify(part_tensors(path, own)[0], own)]
    for part in PARTS:
        if (path / FOLDERS[part]).is_dir():
            try:
                tensors, _ = part_tensors(path / FOLDERS[part], part)
            except InputError:
                continue
            layouts.append(identify(tensors, part))
    return layouts


def _part_report(name: str, tensors: Iterable[Stored]) -> PartReport:
    infos = [tensor.info for tensor in tensors]
    dtypes = dict(Counter(info.dtype for info in infos).most_common())
    return PartReport(name, len(infos), sum(info.numel for info in infos), dtypes)


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _dialect(path: Path, layouts: Iterable[Layout]) -> str:
    if path.is_dir() and not lone_part(path):
        return "diffusers folder"
    dialects = {dialect for layout in layouts for dialect in layout.dialects.values()}
    if not dialects:
        return "unknown"
    return "LDM single file" if dialects == {"LDM"} else "one part of a diffusers folder"


def _family(layouts: Iterable[Layout]) -> str:
    """The UNet's family decides; a part alone names its own."""
    layouts = sorted(layouts, key=lambda layout: "unet" not in layout.parts)
    return layouts[0].family if layouts else "unknown"


def _pixels(survey: Survey) -> str:
    unet, vae = survey.configs.get("unet"), survey.configs.get("vae")
    if not isinstance(unet, UNetConfig) or not isinstance(vae, VAEConfig):
        return ""
    side = unet.sample_size * vae.factor
    alone = survey.defaults.get("one_size") is True
    return f"trained at {side} x {side}" + (" alone; of other pictures it is given a square" if alone else "")


def _oddities(
    layouts: Iterable[Layout], parts: Mapping[str, Mapping[str, Stored]], survey: Survey | None
) -> Iterable[str]:
    if survey is not None:
        yield from survey.notes
    for layout in layouts:
        if survey is None:
            yield from describe_ignored(layout)
        if old_attention_names(layout):
            yield "vae: attention layers carry their old names (query, key, value, proj_attn)"
        for part in ("text", "text_2"):
            if any(name.startswith("text_model.") for name in layout.parts.get(part, {})):
                yield f"{part}: names carry the prefix text_model. (written by transformers before 5.6)"
    for part, tensors in parts.items():
        dtypes = Counter(tensor.info.dtype for tensor in tensors.values())
        if len(dtypes) > 1:
            counts = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
            yield f"{part}: mixed dtypes ({counts})"
        for dtype in dtypes:
            if dtype in ("F64", "F8_E4M3", "F8_E5M2"):
                cast = "float32" if dtype == "F64" else "float16"
                yield f"{part}: {dtypes[dtype]} tensors of dtype {dtype} will be cast to {cast}"
            elif dtype not in FLOAT_DTYPES:
                yield f"{part}: {dtypes[dtype]} tensors of dtype {dtype}, which cannot be loaded"
        if not all(tensor.info.numel for tensor in tensors.values()):
            yield f"{part}: some tensors are empty"
    if set(parts) == {"vae"}:
        yield "vae: SD 1.x, SD 2.x and SDXL share this layout; a file does not say which it was trained for"
