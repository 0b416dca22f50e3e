"""Find the parts of a checkpoint and hold them against their configs, from headers and configs alone.

Nothing is read but headers and JSON, nothing is downloaded, and torch is not needed: `ledits inspect` is
instant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ledits_min.config import (
    SD15_SCHEDULE,
    SD15_TEXT,
    SD15_UNET,
    SD15_VAE,
    InputError,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from ledits_min.weights.family import PARTS, SUPPORTED, Layout, Stored, identify, our_names, stored
from ledits_min.weights.folder import FOLDERS, option, part_tensors, read_json, tokenizer_folder
from ledits_min.weights.header import quoted, read_header
from ledits_min.weights.shapes import Config, check_part

TINY = Path(__file__).with_name("tiny")
SD15_CONFIGS: Mapping[str, Config] = {"unet": SD15_UNET, "vae": SD15_VAE, "text": SD15_TEXT}
_PREDICTION_TYPES = {
    "eps": "epsilon",
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}
_CLIP_VOCABULARY = 49408


@dataclass
class Survey:
    """What headers and configs say of a checkpoint, before any tensor is read.

    `parts` maps "unet", "vae", "text" to {our name: where it lies}, each checked against `configs[part]`.
    """

    source: str
    parts: dict[str, dict[str, Stored]] = field(default_factory=dict)
    configs: dict[str, Config] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    schedule: ScheduleConfig = SD15_SCHEDULE
    tokenizer: Path | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def survey_checkpoint(model: str | Path, supplied: Collection[str] = ()) -> Survey:
    """Headers and configs of `model`, every part found in it checked; parts may still be absent.

    Parts named in `supplied` come from elsewhere and are not looked at.
    """
    path = TINY if model == "tiny" else Path(model)
    try:
        is_folder, exists = path.is_dir(), path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:
        raise InputError(f"{quoted(model)} is not a usable path ({quoted(error, 80)}); pass a local file") from error
    if not exists:
        raise InputError(
            f"{quoted(model)} is neither a file nor a folder here, and nothing is ever downloaded; pass the "
            "path of an SD 1.x .safetensors file or diffusers folder, or 'tiny'"
        )
    return survey_folder(path, supplied) if is_folder else survey_file(path, supplied)


def survey_file(path: Path, supplied: Collection[str] = (), configs: Mapping[str, Config] = SD15_CONFIGS) -> Survey:
    """A single file; it carries no configs, so its tensors must fit the given ones exactly."""
    header = read_header(path)
    survey = Survey(quoted(path))
    layout = identify(stored(path, header))
    for part in PARTS:
        if part in layout.parts and part not in supplied:
            _add_part(survey, part, layout, configs[part], quoted(path))
    _note_layout(survey, layout)
    survey.schedule = _schedule_of_file(survey, layout, header.metadata)
    return survey


def survey_folder(path: Path, supplied: Collection[str] = ()) -> Survey:
    """A diffusers folder: three parts with their configs, a scheduler, a tokenizer."""
    _refuse_other_folders(path)
    survey = Survey(quoted(path))
    for part in PARTS:
        # A missing one is named by check_complete.
        if part not in supplied and (path / FOLDERS[part]).is_dir():
            _take_folder(survey, part, path / FOLDERS[part])
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        survey.schedule = ScheduleConfig.from_json(read_json(scheduler), quoted(scheduler))
    else:
        survey.notes.append("no scheduler config: the noise schedule of Stable Diffusion 1.x is used")
    if (path / "tokenizer").is_dir():
        survey.tokenizer = tokenizer_folder(path / "tokenizer")
    if (path / "ledits.json").is_file():
        survey.defaults = read_json(path / "ledits.json")
    return survey


def check_complete(survey: Survey) -> None:
    """All three parts are there and fit each other; InputError with the way out if not."""
    missing = [part for part in PARTS if part not in survey.parts]
    if missing:
        found = " and ".join(survey.parts) or "nothing"
        if "unet" in missing and survey.parts:
            options = {"vae": "--vae (vae=)", "text": "--text-encoder (text_encoder=)"}
            uses = " or ".join(options[part] for part in survey.parts)
            raise InputError(
                f"{survey.source} holds the {found} only, not a whole checkpoint: pass a checkpoint, and "
                f"this file as {uses}"
            )
        supply = ", ".join(f"pass {option(part)} for the {part}" for part in missing)
        raise InputError(f"{survey.source} holds no {' and no '.join(missing)} (found: {found}); {supply}")
    unet, vae, text = typed_configs(survey)
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise InputError(
            f"{survey.source}: the unet takes {unet.in_channels} and gives {unet.out_channels} channels, the "
            f"vae has {vae.latent_channels}; use parts of one family"
        )
    if text.hidden_size != unet.cross_attention_dim:
        raise InputError(
            f"{survey.source}: the text encoder is {text.hidden_size} wide, the unet wants "
            f"{unet.cross_attention_dim}; use parts of one family"
        )
    if survey.tokenizer is None and text.vocab_size != _CLIP_VOCABULARY:
        raise InputError(
            f"{survey.source} brings no tokenizer and its text encoder knows {text.vocab_size} tokens, not "
            f"CLIP's {_CLIP_VOCABULARY}; pass tokenizer= with its folder"
        )
    if survey.tokenizer is None:
        survey.notes.append("no tokenizer in the checkpoint: the CLIP vocabulary shipped with this program is used")


def take_part(survey: Survey, part: str, path: Path) -> None:
    """Replace one part by the one in `path`: a file, the part's own folder, or a whole diffusers folder."""
    whole = path / FOLDERS[part]
    if path.is_dir():
        _take_folder(survey, part, whole if whole.is_dir() else path)
    else:
        layout = identify(stored(path, read_header(path)))
        if part not in layout.parts and layout.refusal is None:
            raise InputError(f"{quoted(path)} holds no {part} (found: {', '.join(layout.parts)}); pass another file")
        _add_part(survey, part, layout, SD15_CONFIGS[part], quoted(path))
    survey.notes.append(f"{part}: taken from {quoted(path)}")


def _take_folder(survey: Survey, part: str, folder: Path) -> None:
    tensors, notes = part_tensors(folder, part)
    source = quoted(folder)
    layout = identify(tensors)
    if layout.refusal is not None:
        raise InputError(f"{source} {layout.refusal}")
    if part not in layout.parts:
        raise InputError(f"{source} holds no {part} (found: {', '.join(layout.parts)}); take the folder whole")
    mapping, config_source = read_json(folder / "config.json"), quoted(folder / "config.json")
    config: Config
    if part == "unet":
        config = UNetConfig.from_json(mapping, config_source)
    elif part == "vae":
        config = VAEConfig.from_json(mapping, config_source)
        _refuse_other_scale(survey, config, config_source)
    else:
        config = TextConfig.from_json(mapping, config_source)
    _add_part(survey, part, layout, config, source)
    survey.notes.extend(notes)


def _add_part(survey: Survey, part: str, layout: Layout, config: Config, source: str) -> None:
    if layout.refusal is not None:
        raise InputError(f"{source} {layout.refusal}")
    tensors = our_names(layout, part, config, source)
    check_part(part, {name: tensor.info for name, tensor in tensors.items()}, config, source)
    survey.parts[part], survey.configs[part], survey.layouts[part] = tensors, config, layout


def _refuse_other_scale(survey: Survey, vae: VAEConfig, source: str) -> None:
    """A VAE of the same shape may speak another latent language, which only its scaling factor betrays."""
    unet = survey.configs.get("unet")
    if unet == SD15_UNET and vae.scaling_factor != SD15_VAE.scaling_factor:
        raise InputError(
            f"{source}: scaling_factor {vae.scaling_factor} belongs to another family than the unet (its VAE "
            f"has {SD15_VAE.scaling_factor}); use an SD 1.x VAE"
        )


def _refuse_other_folders(path: Path) -> None:
    """Name the folders that people pass by mistake."""
    source = quoted(path)
    if (path / "snapshots").is_dir():
        raise InputError(f"{source} is a hub cache folder; pass the folder inside its snapshots/ instead")
    for name, family in (
        ("text_encoder_2", "SDXL"),
        ("transformer", "SD 3 or Flux"),
        ("prior", "Stable Cascade"),
    ):
        if (path / name).is_dir():
            raise InputError(f"{source} is {family}: it has {name}/; not supported yet; {SUPPORTED}")
    if not any((path / folder).is_dir() for folder in FOLDERS.values()):
        wanted = ", ".join(f"{folder}/" for folder in FOLDERS.values())
        hint = "pass it as --vae or --text-encoder" if (path / "config.json").is_file() else "pass the right folder"
        raise InputError(f"{source} is not a diffusers folder: {wanted} are wanted in it; {hint}")


def _schedule_of_file(survey: Survey, layout: Layout, metadata: Mapping[str, str]) -> ScheduleConfig:
    """A single file says how it was trained only by marker tensors or by modelspec metadata, if at all."""
    if "ztsnr" in layout.markers:
        raise InputError(f"{survey.source} was trained with zero terminal SNR, not supported; {SUPPORTED}")
    if "v_pred" in layout.markers:
        survey.notes.append("v-prediction: the file holds the marker tensor v_pred")
        return replace(SD15_SCHEDULE, prediction_type="v_prediction")
    declared = _PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", "epsilon"))
    if declared == "v_prediction":
        survey.notes.append("v-prediction: the file's metadata says so (modelspec.prediction_type)")
        return replace(SD15_SCHEDULE, prediction_type=declared)
    return SD15_SCHEDULE


def describe_ignored(layout: Layout) -> list[str]:
    """One line for each kind of tensor that no module of ours takes."""
    notes = [f"ignored: {_tensors(count)}, {reason}" for reason, count in layout.ignored.items()]
    if layout.unknown:
        shown = ", ".join(quoted(name, 60) for name in layout.unknown[:5])
        notes.append(f"ignored: {_tensors(len(layout.unknown))} of no part known here ({shown})")
    return notes


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def prediction_type_named(value: str) -> str:
    """eps and v in their short and their long spelling."""
    if value not in _PREDICTION_TYPES:
        raise InputError(f"prediction type {quoted(value, 40)} is unknown; the choices are eps and v")
    return _PREDICTION_TYPES[value]


def _note_layout(survey: Survey, layout: Layout) -> None:
    if layout.refusal is not None:
        raise InputError(f"{survey.source} {layout.refusal}")
    survey.notes.extend(describe_ignored(layout))


def typed_configs(survey: Survey) -> tuple[UNetConfig, VAEConfig, TextConfig]:
    """The three configs of a complete survey."""
    unet, vae, text = (survey.configs[part] for part in PARTS)
    assert isinstance(unet, UNetConfig) and isinstance(vae, VAEConfig) and isinstance(text, TextConfig)
    return unet, vae, text
