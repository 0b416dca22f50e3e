"""Small files, and empty ones of gigabytes, take no memory: what they promise is bounded before it is acted on.

Each case runs in a process that may not take more than a stated amount beyond what its imports took.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ledits_min.errors import InputError
from ledits_min.files.reader import read_bounded
from ledits_min.weights.clip_bpe import clip_merges, clip_vocabulary

MAY_TAKE = 500e6  # bytes; the faults that these files once were took over 3 GB
CODE = """
import json, resource, sys
from pathlib import Path
from ledits_min.errors import InputError
{imports}
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int({may_take}),) * 2)
for name in sys.argv[1:]:
    try:
        answer = {call}
    except InputError as error:
        answer = str(error)
    print(json.dumps([Path(name).name, str(answer)]))
"""
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits are set as Linux counts")


def answers(imports: str, call: str, folders: list[Path]) -> dict[str, str]:
    """What each folder is answered, in one process with a limit."""
    code = CODE.format(imports=imports, call=call, may_take=MAY_TAKE)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def sparse(path: Path, size: int = 4_000_000_000, start: bytes = b"") -> None:
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


def word_level() -> dict[str, Any]:
    """The smallest tokenizer.json that works."""
    words = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", "a", "cat"])}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "post_processor": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }  # fmt: skip


def replacing(*pairs: tuple[dict[str, str], str]) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": pattern, "content": content} for pattern, content in pairs],
    }


def template(pieces: int, ids: int) -> dict[str, Any]:
    special = {"id": "<bos>", "ids": [1] * ids, "tokens": ["<bos>"] * ids}
    piece: dict[str, Any] = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    frame = [piece] * pieces + [{"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": frame, "pair": frame, "special_tokens": {"<bos>": special}}


A = {"String": "a"}
# Name -> (what is changed in the tokenizer.json, words of the refusal).
DESCRIBED: dict[str, tuple[dict[str, Any], str]] = {
    "doubling": ({"normalizer": replacing(*[(A, "aa")] * 16)}, "could lengthen any text"),
    "too many steps": ({"normalizer": replacing(*[(A, "a")] * 40)}, "at most 16 steps"),
    "one long": ({"normalizer": replacing((A, "a" * 1000))}, "could lengthen any text"),
    "empty matches": ({"normalizer": replacing(({"Regex": "x*"}, "a"))}, "could lengthen any text"),
    "between letters": ({"normalizer": replacing(({"Regex": "(?=a)"}, "a"))}, "could lengthen any text"),
    "sequences": ({"normalizer": {"type": "Sequence", "normalizers": [replacing((A, "aa"))]}}, "is not supported"),
    "prepending": ({"normalizer": {"type": "Prepend", "prepend": "a" * 10000}}, "'Prepend' is not supported"),
    "a template of 20,000": ({"post_processor": template(20_000, 1)}, "more than 16 tokens"),
    "a token of 20,000": ({"post_processor": template(1, 20_000)}, "more than 16 tokens"),
    "a product of both": ({"post_processor": template(16, 20_000)}, "more than 16 tokens"),
    "decoding": (
        {"decoder": {"type": "Replace", "pattern": A, "content": "a" * 9999}}, "decoder 'Replace' is not supported"
    ),
    "splitting for ever": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
        "could take forever",
    ),
    "dropout": ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5}}, "other tokens of a text"),
    "a long suffix": (
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "x" * 999}},
        "is longer than 256",
    ),
    "many words": ({"model": {"type": "WordLevel", "vocab": {f"{i}": i for i in range(300_000)}}}, "at most 262144"),
    "added tokens": ({"added_tokens": [{"id": i, "content": "x"} for i in range(5000)]}, "no list of at most 4096"),
    "no model": ({"model": None}, "model None is not supported"),
    "no steps": ({"normalizer": {"type": "Sequence", "normalizers": None}}, "no list of at most 16"),
}  # fmt: skip
# What published tokenizers have, and padding that the file alone would ask for.
SOUND: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {
        "padding": {
            "strategy": {"Fixed": 2**30}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<pad>",
        }
    },
    "spaces and marks": {
        "normalizer": replacing(({"Regex": r"\s+"}, " "), ({"Regex": r"[.,;:!?()\"'-]"}, " "), (A, "a"))
    },
    "framed": {"post_processor": template(1, 1)},
}  # fmt: skip


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in clip_merges())]))
    return folder


def test_tokenizers(tmp_path: Path, clip_files: Path) -> None:
    """Every hostile tokenizer is refused by its fault, every sound one is taken, in half a gigabyte."""
    wanted: dict[str, str] = {}
    for name, (change, reason) in DESCRIBED.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(word_level() | change))
        wanted[name] = reason
    for name, change in SOUND.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(word_level() | change))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "unk_token": "<unk>"}))
        wanted[name] = "TokenizersBackend"
    for file in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        folder = tmp_path / f"gigabytes of {file}"
        shutil.copytree(clip_files, folder)
        sparse(folder / file)
        wanted[folder.name] = "4000000000 bytes, and such a file has at most"
    folder = tmp_path / "gigabytes of added_tokens.json"
    shutil.copytree(clip_files, folder)
    sparse(folder / "added_tokens.json")
    wanted[folder.name] = "4000000000 bytes"
    shutil.copytree(clip_files, tmp_path / "CLIP")
    wanted["CLIP"] = "CLIPTokenizer"

    imports = (
        "from ledits_min.config import SD15_TEXT\nfrom ledits_min.weights.tokenizer import load_tokenizer\n"
        "load_tokenizer(None, SD15_TEXT)"
    )
    found = answers(imports, "type(load_tokenizer(Path(name), SD15_TEXT))", [tmp_path / name for name in wanted])
    assert found.keys() == wanted.keys()
    assert {name: answer for name, answer in found.items() if wanted[name] not in answer} == {}


def test_tokenizers_whose_words_are_looked_at_early(tmp_path: Path) -> None:
    """The same where words are checked before a model is loaded; what is none of whole words is left for later."""
    for name, (change, _) in DESCRIBED.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(word_level() | change))
    imports = "from ledits_min.app.words import check_words\nimport tokenizers"
    found = answers(imports, "check_words(Path(name), ['a ' * 500])", [tmp_path / name for name in DESCRIBED])
    later = {"dropout", "a long suffix", "many words", "no model", "a template of 20,000"}  # or longer than it looks at
    wanted = {name: "None" if name in later else says for name, (_, says) in DESCRIBED.items()}
    assert {name: found[name] for name, says in wanted.items() if says not in found[name]} == {}


def config(**change: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "unet/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return write


def deep(levels: int, layers: int, depth: int) -> Callable[[Path], None]:
    return config(
        block_out_channels=[32] * levels, down_block_types=["CrossAttnDownBlock2D"] * levels,
        up_block_types=["CrossAttnUpBlock2D"] * levels, attention_head_dim=4, layers_per_block=layers,
        transformer_layers_per_block=depth,
    )  # fmt: skip


def gigabytes(name: str) -> Callable[[Path], None]:
    return lambda folder: sparse(folder / name)


def instead(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replace


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "16 x 256 x 256": (deep(16, 256, 256), "2109456 blocks; at most 4096 are believed"),
    "a level of 2^31": (config(layers_per_block=2**31 - 1), "layers_per_block is 2147483647"),
    "16 x 256": (deep(16, 256, 1), "blocks; at most 4096"),
    "16 x 256 deep": (deep(16, 2, 256), "blocks; at most 4096"),
    **{
        f"gigabytes of {name.replace('/', ' ')}": (gigabytes(name), "4000000000 bytes")
        for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json", "vae/config.json")
    },
    "a list of lists": (
        lambda folder: (folder / "unet/config.json").write_text("[" + "[]," * 2_600_000 + "1]"), "hold a JSON object"
    ),
    "a pipe": (instead("vae/config.json", os.mkfifo), "not a regular file"),
    "a device": (instead("vae/config.json", lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
}  # fmt: skip


def test_configs(pristine: Path, tmp_path: Path) -> None:
    """The same for configs, in `inspect` and where a checkpoint is loaded; torch is not even needed."""
    for name, (damage, _) in FOLDERS.items():
        shutil.copytree(pristine, tmp_path / name)
        damage(tmp_path / name)
    folders = [tmp_path / name for name in FOLDERS]
    imports = "from ledits_min.weights.inspect import inspect\nfrom ledits_min.weights.read.survey import survey_whole"
    for call in ("inspect(name).reason", "survey_whole(name)"):
        found = answers(imports, call, folders)
        assert {name: found[name] for name, (_, reason) in FOLDERS.items() if reason not in found[name]} == {}


def test_a_limit_is_a_limit(tmp_path: Path) -> None:
    """The process of these tests would die of what they refuse; and a file of the size allowed is read whole."""
    with pytest.raises(AssertionError, match="MemoryError"):
        answers("", "len(bytearray(600_000_000))", [tmp_path / "x"])
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bounded(tmp_path / "x", 5) == b"12345"
    with pytest.raises(InputError, match="has 5 bytes, and such a file has at most 4"):
        read_bounded(tmp_path / "x", 4)
