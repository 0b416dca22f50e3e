"""What describes instead of holding numbers: tokenizers, configs whose numbers multiply, files that bring new words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from ledits_min import LEdits
from ledits_min.app.words import check_words as check_early
from ledits_min.config import SD15_SCHEDULE, SD15_TEXT, SD15_UNET, SD15_VAE, ScheduleConfig
from ledits_min.errors import InputError
from ledits_min.files.configs import config_json, read_config
from ledits_min.inversion import InversionSettings
from ledits_min.weights.inspect import inspect
from ledits_min.weights.read.survey import survey_whole
from ledits_min.weights.tokenizer import check_vocabulary, check_words, load_tokenizer
from tests.robustness.fuzz import mutate

PROMPTS = ("a man with a red hat", "", "A" * 3000, "a " * 1500, "\N{SNOWMAN} e\u0301\u200d\n\x00 1234567890 {}[]\\")
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _in_turn(several: str, *steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", several: list(steps)}


def _template(pieces: int, ids: int) -> dict[str, Any]:
    special = {"id": "<unk>", "ids": [1] * ids, "tokens": ["<unk>"] * ids}
    frame = [{"SpecialToken": {"id": "<unk>", "type_id": 0}}] * pieces + [{"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": frame, "pair": frame, "special_tokens": {"<unk>": special}}


A = {"String": "a"}
EXPRESSIONS = (
    "(a+)+$",
    "(a|a)*b",
    "a{1,30000}",
    "(?=a)",
    "x*",
    "[",
    r"(\w+)\1",
    r"\p{L}+",
    "(?R)",
    "a" * 600,
    r"\s+",
    ".",
)
# What a tokenizer.json describes -> hostile, doubtful and sound descriptions of it.
STEPS: dict[str, tuple[Any, ...]] = {
    "normalizer": (
        _in_turn("normalizers", *[_replace(A, "aa")] * 16), _in_turn("normalizers", *[_replace(A, "a")] * 17),
        _in_turn("normalizers", _in_turn("normalizers", _replace(A, "aa"))), _replace(A, "a" * 1000),
        *(_replace({"Regex": expression}, content) for expression in EXPRESSIONS for content in ("", "a", "aa")),
        {"type": "Prepend", "prepend": "a" * 9999}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "BertNormalizer"}, {"type": "StripAccents"},
    ),
    "pre_tokenizer": (
        *({"type": "Split", "pattern": {"Regex": expression}, "behavior": behavior, "invert": invert}
          for expression in EXPRESSIONS for behavior in ("Isolated", "Removed") for invert in (False, True)),
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
        {"type": "Digits", "individual_digits": True}, _in_turn("pretokenizers", *[{"type": "Whitespace"}] * 30),
    ),
    "post_processor": (
        _template(1, 1), _template(16, 16), _template(17, 1), _template(1, 20_000), _template(3000, 1),
        {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}, {"type": "ByteLevel", "trim_offsets": False},
        {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2**40], "trim_offsets": True},
    ),
    "decoder": ({"type": "WordPiece", "prefix": "#" * 5000, "cleanup": True}, {"type": "Replace", "content": "a"}),
    "model": (
        {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]}, {"type": "Unigram", "unk_id": 0, "vocab": []},
        {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", float(2**60)]]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}, {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "nowhere"},
        {"type": "WordPiece", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>", "max_input_chars_per_word": 2**63},
    ),
    "added_tokens": (
        [{"id": number, "content": f"<{number}>"} for number in range(5000)], [{"id": 0, "content": "a" * 300}],
        [{"id": 60, "content": "a", "special": True, "lstrip": True}], [{"id": 2**40, "content": "a"}], [None],
    ),
    "padding": (
        {"strategy": {"Fixed": 2**30}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
    ),
}  # fmt: skip
SMALL_STEPS = [step for steps in STEPS.values() for step in steps if len(json.dumps(step)) < 500]


class Tokenizers:
    """Tokenizer folders with a damaged or hostile file: looked at early, loaded, and handed prompts of all lengths."""

    def __init__(self, folder: Path, own: Path) -> None:
        self.path = shutil.copytree(own, folder / "tokenizer")
        letters = ["<|startoftext|>", "<|endoftext|>", *"abcdefhinrtu", "h</w>", "t</w>", "ha", "hat</w>"]
        vocabulary = {word: number for number, word in enumerate(letters)}
        word_level, config = (json.loads((own / name).read_text()) for name in ("tokenizer.json", SIDE_FILES[0]))
        pieces: dict[str, Any] = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
            "post_processor": _template(1, 1),
            "normalizer": _in_turn("normalizers", {"type": "NFC"}, _replace({"Regex": r"\s+"}, " ")),
            "pre_tokenizer": {"type": "Whitespace"},
            "decoder": None,
            "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(["<unk>", *"abht", "ha"])},
                      "merges": ["h a"], "unk_token": "<unk>", "end_of_word_suffix": None},
        }  # fmt: skip
        self.corpus: list[dict[str, Any]] = [
            {"tokenizer.json": word_level, SIDE_FILES[0]: config},
            {"tokenizer.json": pieces, SIDE_FILES[0]: dict.fromkeys(("pad_token", "unk_token", "eos_token"), "<unk>")},
            {"vocab.json": vocabulary, "merges.txt": b"#version: 0.2\nh a\nha t</w>\n"},
        ]  # fmt: skip
        unk, new = {"content": "<unk>", "lstrip": False}, {"content": "<new>", "special": False}
        sides = ({"unk_token": unk, "added_tokens_decoder": {"6": new}}, {"unk_token": unk}, {"<new>": 6})
        self.sides: dict[str, Any] = dict(zip(SIDE_FILES, sides, strict=True))

    def make(self, rng: Random) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        files = dict(rng.choice(self.corpus))
        for name in SIDE_FILES:
            if name not in files and rng.random() < 0.15:
                files[name] = self.sides[name]
        damaged = rng.choice(sorted(files)) if rng.random() < 0.8 else ""
        for name, content in files.items():
            if name != damaged:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
            elif isinstance(content, bytes):
                data = mutate.raw(rng, content)
            else:
                hostile = name == "tokenizer.json" and rng.random() < 0.6
                part = rng.choice(list(STEPS))
                step = {part: rng.choice(STEPS[part] if rng.random() < 0.9 else SMALL_STEPS)}
                data = json.dumps(content | step).encode() if hostile else mutate.json_text(rng, content, SMALL_STEPS)
            (self.path / name).write_bytes(data)

    def read(self) -> None:
        check_early(self.path, [prompt for prompt in PROMPTS if prompt.startswith("a m")])
        tokenizer = load_tokenizer(self.path, SD15_TEXT)
        check_vocabulary(tokenizer, SD15_TEXT.vocab_size)
        for prompt in PROMPTS:
            ids = tokenizer([prompt], padding="max_length", truncation=True, max_length=77).input_ids
            assert [len(row) for row in ids] == [77]
        for prompt in PROMPTS:
            with suppress(InputError):  # of a prompt, not of the tokenizer
                check_words(tokenizer, prompt, 75)


class Configs:
    """Sound configs whose numbers multiply, in a folder with a checkpoint's weights: looked at, surveyed, scheduled."""

    def __init__(self, folder: Path, whole: Path) -> None:
        self.folder, self.whole = folder / "model", whole
        shutil.copytree(whole, self.folder)
        self.corpus: dict[str, dict[str, Any]] = {
            "unet/config.json": config_json(SD15_UNET),
            "vae/config.json": config_json(SD15_VAE),
            "text_encoder/config.json": config_json(SD15_TEXT),
            "scheduler/scheduler_config.json": config_json(SD15_SCHEDULE),
            "ledits.json": json.loads((whole / "ledits.json").read_text()),
        }
        self.name = "unet/config.json"

    def make(self, rng: Random) -> None:
        shutil.copy(self.whole / self.name, self.folder / self.name)
        self.name = rng.choice((*self.corpus, "unet/config.json", "unet/config.json"))
        own = json.loads((self.whole / self.name).read_text())
        content = own if rng.random() < 0.5 else dict(self.corpus[self.name])
        levels = rng.choice((1, 2, 3, 4, 16, 64, 255, 1000))
        relevelled = rng.random() < 0.6
        for key, value in content.items():
            if isinstance(value, list) and relevelled:
                content[key] = self._list(rng, value, levels)
            elif type(value) in (int, float) and rng.random() < 0.3:
                content[key] = type(value)(rng.choice((*mutate.INTEGERS, value * 2, value + 1, 255, 257, 1000)))
        if self.name == "unet/config.json" and rng.random() < 0.4:
            depths = [rng.choice((1, 2, 10, 256, 257)) for _ in range(levels)]
            content["transformer_layers_per_block"] = rng.choice((depths, depths[0], [depths] * levels))
        path = self.folder / self.name
        path.unlink()  # a link's other name would change too
        path.write_text(json.dumps(content))

    def _list(self, rng: Random, value: Sequence[Any], levels: int) -> list[Any]:
        if value and type(value[0]) is int and rng.random() < 0.5:
            return [rng.choice((8, 32, 64, 320, 2**20, 2**31 - 1)) for _ in range(levels)]
        return [rng.choice(value) if rng.random() < 0.2 else value[0] for _ in range(levels)] if value else []

    def read(self) -> None:
        content = json.loads((self.folder / self.name).read_text())
        str(inspect(self.folder))
        survey = survey_whole(self.folder)
        if self.name.startswith("scheduler"):
            schedule = read_config(ScheduleConfig, content, self.name)
            InversionSettings(
                "", schedule, num_steps=min(50, schedule.num_train_timesteps // 2), skip=0
            ).make_schedule()
        assert survey.parts


class Embeddings:
    """Textual inversions in their spellings, with words of every kind: loaded, and a prompt read with them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.path, self.model = folder / "x.safetensors", model
        files: list[dict[str, torch.Tensor]] = [
            {"emb_params": torch.randn(3, 8)}, {"<strange hat>": torch.randn(8)},
            {"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 8)}, {"*": torch.randn(75, 8)},
        ]  # fmt: skip
        self.corpus = []
        for tensors in files:
            save_file(tensors, self.path, {"format": "pt"})
            self.corpus.append(self.path.read_bytes())
        self.vocabulary = [
            "emb_params",
            "clip_l",
            "clip_g",
            "*",
            "bundle_emb.hat.emb_params",
            "string_to_param.*",
            "hat",
        ]
        self.words = (
            None,
            "hat",
            "(",
            r"\w+",
            "[a",
            "  ",
            "\x00",
            "x" * 64,
            "x" * 65,
            "Ünder",
            "a b",
            "<x>",
            "\U000f0000",
        )
        self.word: str | None = None

    def make(self, rng: Random) -> None:
        self.path.unlink(missing_ok=True)
        whole = rng.choice(self.corpus)
        self.path.write_bytes(mutate.safetensors(rng, whole, self.vocabulary) if rng.random() < 0.8 else whole)
        self.word = rng.choice(self.words)

    def read(self) -> None:
        str(inspect(self.path))
        ledits = LEdits.from_pretrained(
            self.model, device="cpu", dtype="float32", embedding=(self.path, self.word) if self.word else self.path
        )
        ledits.text.encode([f"a man {self.word or 'x'} hat"])
