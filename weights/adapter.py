"""What peft keeps beside the tensors of a LoRA: alpha, patterns of layers with their own, and how it was trained.

It stands in the file's metadata (diffusers packs one LoraConfig per part: `unet.lora_alpha`, ...; some trainers write
an alpha there and nothing else), or in adapter_config.json beside the file (peft). The rank is not read: the tensors
have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ledits_min.errors import InputError, check_number, quoted
from ledits_min.files.header import Header
from ledits_min.weights.read.folder import read_json

METADATA_KEY = "lora_adapter_metadata"
PEFT_ALPHA = 8.0  # what a LoraConfig means that does not say lora_alpha
_PARTS = {"unet": "unet.", "text": "text_encoder.", "text_2": "text_encoder_2."}
_ALPHA_KEYS = ("lora_alpha", "network_alpha", "alpha")
# Settings under which the weights are no plain W + alpha / r * B A, or not the one that the factors were trained on.
_OTHER_SUMS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

MAX_PATTERNS = 10_000
# A pattern is a regular expression from a file. Most are a layer's name, perhaps behind ^, whose dots are dots, though
# they could stand for any letter. Of the others those are taken that cannot run long: single characters, classes, one
# group of choices, and at most two repetitions.
_NAME = re.compile(r"(?P<start>\^?)(?P<name>[\w-]+(?:\\?\.[\w-]+)*)\$?")
_TOKEN = r"[\w.-]|\\[.dw]|\[[\w-]+\]"
_SAFE = re.compile(rf"\^?(?:(?:{_TOKEN})[*+]?|\((?:(?:{_TOKEN})|\|)+\)(?![*+?{{]))+\$?")
_MAX_ODD_PATTERNS, _MAX_REPETITIONS, _MAX_CHOICES = 32, 2, 32
_MAX_NAME = 160  # no layer of ours has a name as long


class Scaling(NamedTuple):
    """alpha and whether it is divided by the root of the rank (rsLoRA) instead of the rank."""

    alpha: float
    root: bool


@dataclass(frozen=True)
class Patterns:
    """peft's {pattern: value}: the first pattern that matches `(.*\\.)?(PATTERN)$` from the name's start counts.

    Source: peft, utils/other.py, get_pattern_key. Names are looked up by their dotted ends, so that thousands of them
    cost nothing; what is a real expression is kept apart.
    """

    ends: dict[str, tuple[int, float]] = field(default_factory=dict)
    whole: dict[str, tuple[int, float]] = field(default_factory=dict)
    odd: list[tuple[re.Pattern[str], int, float]] = field(default_factory=list)

    def find(self, name: str) -> float | None:
        """The value for a layer, None where no pattern matches."""
        parts = name.split(".")
        found = [self.ends[end] for i in range(len(parts)) if (end := ".".join(parts[i:])) in self.ends]
        found += [self.whole[name]] if name in self.whole else []
        if len(name) <= _MAX_NAME:
            found += [(index, value) for pattern, index, value in self.odd if pattern.match(name)]
        return min(found)[1] if found else None


def read_patterns(patterns: Any, source: str) -> Patterns:
    """Check {pattern: number}; InputError for one that is no expression or might take forever."""
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise InputError(f"{source} does not map at most {MAX_PATTERNS} patterns to numbers; download the LoRA again")
    result = Patterns()
    for index, (pattern, value) in enumerate(patterns.items()):
        check_number(f"{source}[{quoted(pattern, 60)}]", value, -1e6, 1e6)
        entry = (index, float(value))
        if match := _NAME.fullmatch(pattern):
            table = result.whole if match["start"] else result.ends
            table.setdefault(match["name"].replace("\\.", "."), entry)
            continue
        repeated, choices = len(re.findall(r"[*+]", pattern)), pattern.count("|")
        sound = len(pattern) <= 1024 and repeated <= _MAX_REPETITIONS and choices <= _MAX_CHOICES
        if not sound or pattern.count("(") > 1 or not _SAFE.fullmatch(pattern) or len(result.odd) >= _MAX_ODD_PATTERNS:
            raise InputError(
                f"{source}: the pattern {quoted(pattern, 60)} is too involved to be read safely; save the LoRA with "
                "one alpha per layer (kohya's .alpha tensors)"
            )
        result.odd.append((re.compile(rf"(.*\.)?({pattern})$"), *entry))
    return result


@dataclass(frozen=True)
class Adapter:
    """One LoraConfig, checked: every layer's scaling, and whether each layer must bring a magnitude (DoRA)."""

    alpha: float
    root: bool
    patterns: Patterns
    decomposed: bool

    def scaling(self, layer: str) -> Scaling:
        """alpha of a layer, named as peft's model names it."""
        own = self.patterns.find(layer)
        return Scaling(self.alpha if own is None else own, self.root)


def read_adapters(header: Header, path: Path, silent: Iterable[str]) -> dict[str, Adapter]:
    """Part -> the LoraConfig that speaks of it; {} where there is none and the tensors say everything.

    `silent` are the layers, as the file spells them, without an alpha of their own: those of peft need one from beside.
    """
    silent = list(silent)
    if METADATA_KEY in header.metadata:
        source = f"{quoted(path)} ({METADATA_KEY})"
        try:
            settings = json.loads(header.metadata[METADATA_KEY])
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source} is not JSON ({quoted(error, 80)}); download the LoRA again") from error
        if not isinstance(settings, dict):
            raise InputError(f"{source} is not a JSON object; download the LoRA again")
    elif any(name.startswith("base_model.model.") for name in silent):
        beside = path.with_name("adapter_config.json")
        source, settings = quoted(beside), read_json(beside)
    else:
        source = f"{quoted(path)} (metadata)"
        settings = _alpha_alone(header.metadata, source) if silent else {}
    packed = any(key.startswith(tuple(_PARTS.values())) for key in settings)
    adapters = {}
    for part, prefix in _PARTS.items():
        own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        own = own if packed else settings
        if own:
            adapters[part] = _adapter(own, source)
    return adapters


def _alpha_alone(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """What plain entries say, `lora_alpha` or `unet.lora_alpha`, as a LoraConfig would; {} where they say nothing."""
    found: dict[str, Any] = {}
    for key, text in metadata.items():
        prefix = next((prefix for prefix in _PARTS.values() if key.startswith(prefix)), "")
        if key.removeprefix(prefix) not in _ALPHA_KEYS:
            continue
        try:
            alpha = float(text)
        except ValueError:
            raise InputError(f"{source}: {key} is {quoted(text, 40)}; a number is wanted") from None
        check_number(f"{source}: {key}", alpha, -1e6, 1e6)
        if found.setdefault(f"{prefix}lora_alpha", alpha) != alpha:
            raise InputError(f"{source} gives two alphas, {found[f'{prefix}lora_alpha']:g} and {alpha:g}; keep one")
        found[f"{prefix}use_rslora"] = metadata.get(f"{prefix}use_rslora", "").lower() == "true"
    return found


def _adapter(settings: Mapping[str, Any], source: str) -> Adapter:
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"{source} is an adapter of the kind {quoted(kind, 40)}; peft's LoRA and DoRA are merged")
    if other := next((key for key in _OTHER_SUMS if settings.get(key)), None):
        raise InputError(f"{source} sets {other}, which is not supported: the weights are then no plain sum")
    start = settings.get("init_lora_weights")
    if not isinstance(start, str | bool | None) or start not in _PLAIN_STARTS:
        raise InputError(
            f"{source} has init_lora_weights {quoted(start, 40)} (PiSSA, OLoRA, LoftQ, ...): its factors belong to "
            "base weights that were changed when training began, so added to the checkpoint's own they make another "
            "model; save it as a plain LoRA (peft: save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    alpha = settings.get("lora_alpha", PEFT_ALPHA)
    check_number(f"{source}: lora_alpha", alpha, -1e6, 1e6)
    patterns = read_patterns(settings.get("alpha_pattern") or {}, f"{source}: alpha_pattern")
    return Adapter(float(alpha), bool(settings.get("use_rslora")), patterns, bool(settings.get("use_dora")))
