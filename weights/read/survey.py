"""Find the parts of a checkpoint and hold them against their configs, from headers and configs alone.

Nothing is read but headers and JSON, nothing is downloaded, and torch is not needed: `ledits inspect` is
instant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ledits_min.config import SD15_SCHEDULE, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ledits_min.errors import InputError, check_whole, quoted
from ledits_min.files.configs import read_config
from ledits_min.files.header import Header, read_header
from ledits_min.files.scheduler import unused_settings
from ledits_min.weights.embedding import Embedding, EmbeddingSource, check_words, embedding_pairs, survey_embedding
from ledits_min.weights.lora import Lora, LoraSource, lora_pairs, survey_lora
from ledits_min.weights.read.compatibility import check_latents, check_parts, check_scale, check_vocabulary
from ledits_min.weights.read.ema import choose_weights
from ledits_min.weights.read.folder import FOLDERS, part_tensors, read_json, readable, tokenizer_folder
from ledits_min.weights.read.hub import EMBEDDING_FILES, LORA_FILES, cached_file, cached_model, cached_part, is_hub_id
from ledits_min.weights.read.identify import (
    INSIST,
    PARTS,
    SUPPORTED,
    Layout,
    Stored,
    configs_of,
    identify,
    our_names,
    pruned,
    stored,
)
from ledits_min.weights.read.prediction import (
    TELLING_TENSOR,
    UNDECIDED,
    few_steps,
    prediction_type_named,
    schedule_of_file,
    schedule_of_folder,
)
from ledits_min.weights.read.published import FAMILIES, SD20, SD21, Config, family_of
from ledits_min.weights.read.shapes import check_part, expected_shapes

TINY = Path(__file__).resolve().parents[1] / "tiny"


@dataclass
class Survey:
    """What headers and configs say of a checkpoint, before any tensor is read.

    `parts` maps "unet", "vae", "text" and SDXL's "text_2" to {our name: where it lies}, each checked against
    `configs[part]`. `undecided` is the weight that tells eps from v where neither file nor user does. `own_vae` is what
    a folder's VAE looked like, where another one replaces it.
    """

    source: str
    parts: dict[str, dict[str, Stored]] = field(default_factory=dict)
    configs: dict[str, Config] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    schedule: ScheduleConfig = SD15_SCHEDULE
    undecided: Stored | None = None
    tokenizer: Path | None = None
    tokenizer_2: Path | None = None
    zeros_for_empty_prompt: bool = True
    defaults: dict[str, Any] = field(default_factory=dict)
    own_vae: VAEConfig | None = None
    loras: list[Lora] = field(default_factory=list)
    words: list[Embedding] = field(default_factory=list)
    skipped_layers: int = 0
    notes: list[str] = field(default_factory=list)


class Parts(TypedDict, total=False):
    """What may be passed beside a checkpoint; it travels whole.

    vae, text_encoder  a file, a folder or a cached Hugging Face id, which replaces or supplies the part
    tokenizer          a folder
    prediction_type    "epsilon" or "v_prediction" (or eps, v)
    lora               paths, cached ids or (path, scale) pairs
    ema                take the averaged UNet weights of an LDM file that has both
    embedding          textual inversions, each a path, a cached id or a (path, word) pair
    clip_skip          the text encoder's layer to read, counted from the last, which is 1
    insist             against a refusal that rests on a name and on no tensor
    """

    vae: str | Path | None
    text_encoder: str | Path | None
    tokenizer: str | Path | None
    prediction_type: str | None
    lora: LoraSource | Sequence[LoraSource]
    ema: bool
    embedding: EmbeddingSource | Sequence[EmbeddingSource]
    clip_skip: int | None
    insist: bool


@readable()
def survey_whole(model: str | Path, **parts: Unpack[Parts]) -> Survey:
    """A checkpoint with everything that was passed beside it, complete and fitting together, or an InputError."""
    if unknown := parts.keys() - Parts.__annotations__.keys():
        raise TypeError(f"a checkpoint has no {', '.join(sorted(unknown))}")
    supplied = supplied_parts(parts.get("vae"), parts.get("text_encoder"))
    survey = survey_checkpoint(model, supplied, parts.get("ema", False), parts.get("insist", False))
    for part, path in supplied.items():
        take_part(survey, part, path)
    if (tokenizer := parts.get("tokenizer")) is not None:
        survey.tokenizer = tokenizer_folder(Path(tokenizer))
    if (prediction_type := parts.get("prediction_type")) is not None:
        settle(survey, prediction_type_named(prediction_type))
    check_complete(survey)
    take_loras(survey, parts.get("lora", ()))
    take_words(survey, parts.get("embedding", ()))
    if (clip_skip := parts.get("clip_skip")) is not None:
        skip_layers(survey, clip_skip)
    return survey


def survey_checkpoint(
    model: str | Path, supplied: Collection[str] = (), ema: bool = False, insist: bool = False
) -> Survey:
    """Headers and configs of `model`, every part found in it checked; parts may still be absent.

    Parts named in `supplied` come from elsewhere and are not looked at.
    """
    path = find_model(model, supplied)
    if path.is_dir():
        return survey_folder(path, supplied, ema, insist)
    return survey_file(path, supplied, ema=ema, insist=insist)


def find_model(model: str | Path, supplied: Collection[str] = ()) -> Path:
    """The file or folder that `model` names: "tiny", a path, or the snapshot of org/name in the Hugging Face cache.

    A path that exists here wins over an id that reads the same.
    """
    path = TINY if model == "tiny" else Path(model)
    if _exists(path):
        return path
    if is_hub_id(model):
        return cached_model(str(model), supplied)
    raise InputError(
        f"{quoted(model)} is neither a file nor a folder here, and nothing is ever downloaded; pass the path of a "
        ".safetensors file or diffusers folder, the org/name of a model in the Hugging Face cache, or 'tiny'"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:
        raise InputError(f"{quoted(path)} is not a usable path ({quoted(error, 80)}); pass a local file") from error


def survey_file(
    path: Path,
    supplied: Collection[str] = (),
    configs: Mapping[str, Config] | None = None,
    ema: bool = False,
    insist: bool = False,
) -> Survey:
    """A single file; it carries no configs, so its tensors must fit the given ones exactly (None: its family's)."""
    header = read_header(path)
    survey = Survey(quoted(path))
    layout, survey.notes = layout_of(path, header, ema, insist)
    for part in PARTS:
        if part in layout.parts and part not in supplied:
            config = (configs or configs_of(layout))[part]
            if isinstance(config, UNetConfig):
                config = pruned(config, layout)
            _add_part(survey, part, layout, config, quoted(path))
    _note_layout(survey, layout)
    schedule, notes = schedule_of_file(layout, header.metadata)
    survey.notes.extend(notes)
    if schedule is None:
        _leave_undecided(survey)
    else:
        survey.schedule = schedule
        settle(survey, schedule.prediction_type)
    return survey


def layout_of(path: Path, header: Header, ema: bool = False, insist: bool = False) -> tuple[Layout, list[str]]:
    """What a single file holds, with one set of UNet weights, and a note if that set is the averaged one."""
    unets = [unet for family in FAMILIES if isinstance(unet := family.configs["unet"], UNetConfig)]
    tensors, notes = choose_weights(stored(path, header), ema, unets, quoted(path))
    return identify(tensors, insist=insist), notes


def survey_folder(path: Path, supplied: Collection[str] = (), ema: bool = False, insist: bool = False) -> Survey:
    """A diffusers folder: its parts with their configs, a scheduler, tokenizers."""
    _refuse_other_folders(path, insist)
    if ema:
        raise InputError(f"{quoted(path)} is a folder, and those hold one set of weights; --ema is for single files")
    survey = Survey(quoted(path))
    for part in PARTS:
        # A missing one is named by check_complete.
        if part not in supplied and (path / FOLDERS[part]).is_dir():
            _take_folder(survey, part, path / FOLDERS[part])
    if "vae" in supplied and (own := path / FOLDERS["vae"] / "config.json").is_file():
        survey.own_vae = read_config(VAEConfig, read_json(own), quoted(own))
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        mapping = read_json(scheduler)
        survey.schedule = schedule_of_folder(mapping, quoted(scheduler), insist)
        if (kind := few_steps(mapping)) is not None:
            survey.notes.append(f"scheduler: that of a {kind} model, taken for a plain one's since it is insisted on")
        survey.notes.extend(unused_settings(mapping))
    else:
        survey.notes.append("no scheduler config: the noise schedule of Stable Diffusion is used")
        _leave_undecided(survey)
    if (path / "tokenizer").is_dir():
        survey.tokenizer = tokenizer_folder(path / "tokenizer")
    if (path / "tokenizer_2").is_dir():
        survey.tokenizer_2 = tokenizer_folder(path / "tokenizer_2")
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    survey.zeros_for_empty_prompt = index.get("force_zeros_for_empty_prompt", True) is True
    if (path / "ledits.json").is_file():
        survey.defaults = read_json(path / "ledits.json")
    return survey


def settle(survey: Survey, prediction_type: str) -> None:
    """Fix what the UNet predicts; SD 2.x files without configs tell from it at which size they were trained."""
    survey.schedule = replace(survey.schedule, prediction_type=prediction_type)
    survey.undecided, survey.notes = None, [note for note in survey.notes if note != UNDECIDED]
    if survey.configs.get("unet") == SD20.configs["unet"] and prediction_type == SD21.schedule.prediction_type:
        survey.configs["unet"] = SD21.configs["unet"]


def _leave_undecided(survey: Survey) -> None:
    unet = survey.configs.get("unet")
    if isinstance(unet, UNetConfig) and family_of(unet) in (SD20, SD21):
        survey.undecided = survey.parts["unet"][TELLING_TENSOR]
        survey.notes.append(UNDECIDED)


def check_complete(survey: Survey) -> None:
    """All parts are there and fit each other; InputError with the way out if not."""
    check_parts(survey.configs, survey.source)
    tokenizers = {"text": survey.tokenizer, "text_2": survey.tokenizer_2}
    check_vocabulary(survey.configs, tokenizers, survey.source)
    if survey.tokenizer is None:
        survey.notes.append("no tokenizer in the checkpoint: the CLIP vocabulary shipped with this program is used")


def supplied_parts(vae: str | Path | None, text_encoder: str | Path | None) -> dict[str, str | Path]:
    """Part -> where it comes from instead of the checkpoint. A text encoder may be SDXL's second one, or both."""
    supplied: dict[str, str | Path] = {} if vae is None else {"vae": vae}
    if text_encoder is not None:
        path = _located(text_encoder, "text")
        if not path.is_dir():
            layout = identify(stored(path, read_header(path)))
            found = [part for part in ("text", "text_2") if part in layout.parts]
        else:
            found = [part for part in ("text", "text_2") if (path / FOLDERS[part]).is_dir()]
            found = found or (["text_2"] if path.name == FOLDERS["text_2"] else [])
        supplied |= dict.fromkeys(found or ["text"], text_encoder)
    return supplied


def take_part(survey: Survey, part: str, source: str | Path) -> None:
    """Replace one part by the one in `source`: a file, the part's own folder, or a whole diffusers folder.

    A folder may be named by its org/name in the Hugging Face cache.
    """
    path = _located(source, part)
    whole = path / FOLDERS[part]
    if path.is_dir():
        _take_folder(survey, part, whole if whole.is_dir() else path)
    else:
        layout = identify(stored(path, read_header(path)))
        if part not in layout.parts and layout.refusal is None:
            raise InputError(f"{quoted(path)} holds no {part} (found: {', '.join(layout.parts)}); pass another file")
        if part == "vae" and layout.family in {family.name for family in FAMILIES}:
            check_scale(survey.configs.get("unet"), configs_of(layout)[part], quoted(path))  # of a whole checkpoint
        _add_part(survey, part, layout, _published(survey, layout)[part], quoted(path))
    if part == "vae":
        check_latents(survey.own_vae, survey.configs[part], quoted(path))
    survey.notes.append(f"{part}: taken from {quoted(path)}")


def _located(source: str | Path, part: str) -> Path:
    path = Path(source)
    return cached_part(str(source), part) if not _exists(path) and is_hub_id(source) else path


def _located_file(source: str | Path, names: Sequence[str]) -> Path:
    """A file by its path, else the file of one of these names in the Hugging Face cache."""
    path = Path(source)
    return path if _exists(path) or not isinstance(source, str) else cached_file(source, names) or path


def _published(survey: Survey, layout: Layout) -> Mapping[str, Config]:
    """What a part from a file must look like: as the checkpoint's family has it, else as the file's own has."""
    unet = survey.configs.get("unet")
    family = family_of(unet) if isinstance(unet, UNetConfig) else None
    return {**configs_of(layout), **(family.configs if family is not None else {})}


def take_loras(survey: Survey, lora: LoraSource | Sequence[LoraSource]) -> None:
    """Hold every LoRA against the weights of a complete survey; they are merged in this order when tensors are read."""
    shapes = {part: expected_shapes(config) for part, config in survey.configs.items()}
    changed = {part: names for part, names in shapes.items() if part != "vae"}
    unet, _, _ = typed_configs(survey)
    for source, scale in lora_pairs(lora):
        survey.loras.append(survey_lora(_located_file(source, LORA_FILES), scale, changed, unet))
        survey.notes.append(str(survey.loras[-1]))


def take_words(survey: Survey, embedding: EmbeddingSource | Sequence[EmbeddingSource]) -> None:
    """The new words of textual inversions, and of the LoRAs that bring some."""
    for source, word in embedding_pairs(embedding):
        survey.words.append(survey_embedding(_located_file(source, EMBEDDING_FILES), word))
    survey.words.extend(word for lora in survey.loras for word in lora.words)
    check_words(survey.words, survey.configs, survey.source)
    survey.notes.extend(map(str, survey.words))


def skip_layers(survey: Survey, clip_skip: int) -> None:
    """Read the text from an earlier layer, counted from the last one, which is 1; SDXL reads the second by itself.

    In SD 1.x and 2.x the final norm stands behind the layer that is read, so those behind it need not be there.
    """
    text = survey.configs["text"]
    assert isinstance(text, TextConfig)
    own = 2 if "text_2" in survey.configs else 1
    layers = min(c.num_hidden_layers for c in survey.configs.values() if isinstance(c, TextConfig))
    check_whole("clip skip", clip_skip, own, layers)
    if own == 2:
        survey.skipped_layers = clip_skip - own
    elif skipped := clip_skip - own:
        survey.configs["text"] = shorter = replace(text, num_hidden_layers=layers - skipped)
        wanted = expected_shapes(shorter)
        survey.parts["text"] = {name: tensor for name, tensor in survey.parts["text"].items() if name in wanted}
    survey.notes.append(f"clip skip {clip_skip}: the text is read from layer {layers + 1 - clip_skip} of {layers}")


def _take_folder(survey: Survey, part: str, folder: Path) -> None:
    tensors, notes = part_tensors(folder, part)
    source = quoted(folder)
    layout = identify(tensors, part)
    if layout.refusal is not None:
        raise InputError(f"{source} {layout.refusal}")
    if part not in layout.parts:
        raise InputError(f"{source} holds no {part} (found: {', '.join(layout.parts)}); take the folder whole")
    mapping, config_source = read_json(folder / "config.json"), quoted(folder / "config.json")
    config: Config
    if part == "unet":
        config = read_config(UNetConfig, mapping, config_source)
    elif part == "vae":
        config = read_config(VAEConfig, mapping, config_source)
        check_scale(survey.configs.get("unet"), config, config_source)
    else:
        # The folder's name says whether its text is pooled; some configs name the other class.
        kind = "CLIPTextModelWithProjection" if part == "text_2" else "CLIPTextModel"
        config = read_config(TextConfig, {**mapping, "architectures": [kind]}, config_source)
    _add_part(survey, part, layout, config, source)
    survey.notes.extend(notes)


def _add_part(survey: Survey, part: str, layout: Layout, config: Config, source: str) -> None:
    if layout.refusal is not None:
        raise InputError(f"{source} {layout.refusal}")
    tensors = our_names(layout, part, config, source)
    check_part(part, {name: tensor.info for name, tensor in tensors.items()}, config, source)
    survey.parts[part], survey.configs[part], survey.layouts[part] = tensors, config, layout
    if isinstance(config, UNetConfig) and (config.reverse_transformer_layers_per_block or not config.mid_depth):
        down, up = (" ".join("+".join(map(str, d)) for d in side) for side in (config.down_depths, config.up_depths))
        middle = config.mid_depth
        survey.notes.append(f"unet: pruned, its transformers have {down} layers down, {middle} in the middle, {up} up")
    if unread := len(layout.parts[part]) - len({tensor.name for tensor in tensors.values()}):
        survey.notes.append(
            f"{part}: {_tensors(unread)} that are never read (a last layer, a projection, a temperature)"
        )


# What a folder is by itself: by the part that its config describes, or by a file in it.
_LONE_PARTS = {
    "unet": "is the UNet of a checkpoint and loads with the rest of it alone: pass the folder around it",
    "vae": "is the VAE of a checkpoint: pass that one as --model, and this as --vae (vae=)",
    "text": "is the text encoder of a checkpoint: pass that one as --model, and this as --text-encoder (text_encoder=)",
}
_TOKENIZER = "is a tokenizer: pass a checkpoint as --model, and this as --tokenizer (tokenizer=)"
_LONE = {
    "adapter_config.json": "is a LoRA of peft: pass a checkpoint as --model, and the .safetensors file in it as --lora "
    "(lora=)",
    "scheduler_config.json": "is the scheduler of a checkpoint: pass the folder around it",
    "tokenizer_config.json": _TOKENIZER,
    "vocab.json": _TOKENIZER,
}


def _refuse_other_folders(path: Path, insist: bool) -> None:
    """Name the folders that people pass by mistake. With `insist` those beside a unet/ are taken as left over."""
    source = quoted(path)
    if (path / "snapshots").is_dir():
        raise InputError(f"{source} is a hub cache folder; pass the folder inside its snapshots/ instead")
    for name, family in (
        ("transformer", "SD 3 or Flux"),
        ("prior", "Stable Cascade"),
        ("image_normalizer", "SD 2.x unCLIP"),
    ):
        beside = (path / FOLDERS["unet"]).is_dir()
        if (path / name).is_dir() and not (beside and insist):
            way_out = f"; if {name}/ was only left in a plain checkpoint, {INSIST}" if beside else ""
            raise InputError(f"{source} is {family}: it has {name}/; not supported; {SUPPORTED}{way_out}")
    if not any((path / folder).is_dir() for folder in FOLDERS.values()):
        if lone := lone_part(path):
            raise InputError(f"{source} {lone}")
        wanted = ", ".join(f"{folder}/" for folder in FOLDERS.values())
        raise InputError(f"{source} is not a diffusers folder: {wanted} are wanted in it; pass the right folder")


def lone_part(folder: Path) -> str:
    """What a folder is that holds one part of a checkpoint, and where it belongs; "" for any other folder."""
    what = next((said for name, said in _LONE.items() if (folder / name).is_file()), "")
    if (folder / "config.json").is_file():
        what = _LONE_PARTS.get(part_of(folder), "")
    whole = folder.resolve().parent
    if what and any((whole / name).is_dir() for name in FOLDERS.values()) and whole.name != "snapshots":
        what += f"; the whole checkpoint is {quoted(whole)}"
    return what


def part_of(folder: Path) -> str:
    """Which part a folder's config.json describes, "" where it is none of ours."""
    config = read_json(folder / "config.json")
    said = f"{config.get('_class_name')} {config.get('model_type')} {config.get('architectures')}"
    marks = {"AutoencoderKL": "vae", "UNet2DConditionModel": "unet", "CLIPText": "text", "clip_text_model": "text"}
    return next((part for mark, part in marks.items() if mark in said), "")


def describe_ignored(layout: Layout) -> list[str]:
    """One line for each kind of tensor that no module of ours takes."""
    notes = [f"ignored: {_tensors(count)}, {reason}" for reason, count in layout.ignored.items()]
    if layout.unknown:
        shown = ", ".join(quoted(name, 60) for name in layout.unknown[:5])
        notes.append(f"ignored: {_tensors(len(layout.unknown))} of no part known here ({shown})")
    return notes


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _note_layout(survey: Survey, layout: Layout) -> None:
    if layout.refusal is not None:
        raise InputError(f"{survey.source} {layout.refusal}")
    survey.notes.extend(describe_ignored(layout))


def typed_configs(survey: Survey) -> tuple[UNetConfig, VAEConfig, TextConfig]:
    """The configs that every complete survey has."""
    unet, vae, text = (survey.configs[part] for part in ("unet", "vae", "text"))
    assert isinstance(unet, UNetConfig) and isinstance(vae, VAEConfig) and isinstance(text, TextConfig)
    return unet, vae, text
