"""Files and folders that are no checkpoint, or not one that can be used: one line, exit code 2, nothing written."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Row = dict[str, Any]
NAMES = ("--model", "--vae", "--text-encoder", "--tokenizer", "--lora", "--embedding")  # options that name a file
TINY = Path(__file__).resolve().parents[2] / "weights/tiny"


def bad(name: str, command: str | list[str], says: str, files: Mapping[str, bytes] | None = None, **more: Any) -> Row:
    """What is typed, what the line must say, what lies there beforehand; `more` as in the Row of conftest.py."""
    return {"name": name, "command": command, "says": says, "files": files or {}, **more}


def tensors(header: str | bytes | dict[str, Any], data: int = 32, length: int | None = None) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    body = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(body) if length is None else length) + body + bytes(data)


def entry(dtype: str = "F32", shape: Any = (8,), offsets: Any = (0, 32)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ONE = json.dumps(entry())


def header_rows() -> list[Row]:
    """Files that are no complete safetensors file, passed as the model."""
    valid = tensors({"a": entry()})
    contents: list[tuple[str, bytes, str]] = [
        ("empty", b"", "empty file"),
        ("cut short", valid[:-8], "promises 32 bytes of data, 24"),
        ("header cut short", valid[:20], "cut short"),
        ("bytes behind", valid + b"PK\x05\x06", "4 bytes follow"),
        ("length 2^63", struct.pack("<Q", 2**63) + b"{}", "header would take"),
        ("length 101 MB", struct.pack("<Q", 101_000_000) + b"{}", "header would take"),
        ("length past the end", tensors("{}", 0, 1000), "ends at byte 1008"),
        ("overlap", tensors({"a": entry(), "b": entry(offsets=(16, 48))}, 48), "overlaps"),
        ("hole", tensors({"a": entry(), "b": entry(offsets=(40, 72))}, 72), "hole of 8 bytes"),
        ("twice", tensors('{"a": ' + ONE + ', "a": ' + json.dumps(entry(offsets=(32, 64))) + "}", 64), "'a' twice"),
        ("twice the same", tensors('{"a": ' + ONE + ', "a": ' + ONE + "}"), "'a' twice"),
        ("leading space", tensors(' {"a": ' + ONE + "}"), "does not start"),
        ("negative offset", tensors({"a": entry(offsets=(-32, 0))}), "impossible data_offsets"),
        ("negative shape", tensors({"a": entry(shape=(-8,))}), "impossible shape"),
        ("overflow", tensors({"a": entry(shape=(2**40, 2**40))}), "bits"),
        ("shape against offsets", tensors({"a": entry(shape=(9,))}), "bits"),
        ("unknown dtype", tensors({"a": entry("F33")}), "unknown dtype 'F33'; known are"),
        ("not utf-8", tensors(b'{"\xff": ' + ONE.encode() + b"}"), "UTF-8"),
        ("not json", tensors('{"a": '), "not JSON"),
        ("a list", tensors("[1]"), "does not start|not a JSON object"),
        ("metadata number", tensors('{"__metadata__": {"a": 1}, "a": ' + ONE + "}"), "strings"),
        ("no tensors", tensors("{}", 0), "no tensors"),
        ("nested", tensors('{"a":' * 50_000), "nested|not JSON"),
        ("lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("html", b"<html><head><title>404</title>", "HTML"),
        ("json error", b'{"error": "Access to model is restricted"}', "JSON"),
        ("pickle in a zip", b"PK\x03\x04" + bytes(99), "pickled"),
        ("pickle", b"\x80\x04\x95" + bytes(99), "pickle"),
        ("pickle that would run code", b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.", "pickle"),
        ("half a character", tensors('{"__metadata__": {"a": "\\ud800"}, "a": ' + ONE + "}"), "surrogate"),
        ("name that moves the cursor", tensors({"a\x1b[2J": entry()}), "unprintable"),
        ("header of 17 MB", struct.pack("<Q", 17_000_000) + b"{}", "at most 16000000"),
        ("gguf", b"GGUF\3\0\0\0" + bytes(99), "GGUF"),
        ("picture", b"\x89PNG\r\n\x1a\n" + bytes(99), "PNG picture"),
        ("scalar", tensors({"a": entry(shape=(), offsets=(0, 4))}, 4), "no Stable Diffusion weights"),
        ("nothing known", valid, "no Stable Diffusion weights"),
    ]
    rows = [
        bad(f"header: {name}", "edit p.png --model bad.safetensors", says, {"bad.safetensors": data})
        for name, data, says in contents
    ]
    edits = [
        bad(f"inversion: {name}", "edit bad.safetensors --add beard", says, {"bad.safetensors": data})
        for name, data, says in contents
        if name in ("empty", "cut short", "overlap", "pickle", "nothing known", "twice")
        for says in [says if name != "nothing known" else "not a saved inversion"]
    ]
    inspected = [
        bad(f"inspect: {name}", "inspect bad.safetensors", says, {"bad.safetensors": data})
        for name, data, says in contents
        if name in ("empty", "hole", "html", "picture")
    ]
    return [
        *rows, *edits, *inspected,
        bad("header: in a process", "edit p.png --model m.safetensors", "empty", {"m.safetensors": b""}, process=True),
        bad("inversion: in a process", "edit i.safetensors", "hole", {"i.safetensors": contents[8][1]}, process=True),
        *(bad(f"header: {suffix}", f"edit p.png --model m{suffix}", "pickle", {f"m{suffix}": b"PK\3\4"})
          for suffix in (".ckpt", ".pt", ".pth", ".bin")),
    ]  # fmt: skip


def checkpoint_rows() -> list[Row]:
    """Whole files of the wrong kind; they are written with holes, since only their headers matter."""
    unet = "model.diffusion_model."

    def row(name: str, says: str, change: Callable[[dict[str, Any]], object], options: str = "") -> Row:
        def make(workshop: Any) -> None:
            listing = workshop.listing()
            changed = change(listing)
            workshop.hollow(changed if isinstance(changed, dict) else listing)

        return bad(f"checkpoint: {name}", f"edit p.png --model bad.safetensors {options}", says, make=make)

    def only(*prefixes: str) -> Callable[[dict[str, Any]], object]:
        return lambda listing: {name: value for name, value in listing.items() if name.startswith(prefixes)}

    def resized(name: str, shape: tuple[int, ...], dtype: str = "F16") -> Callable[[dict[str, Any]], object]:
        return lambda listing: listing.update({name: (dtype, shape)})

    def bare(listing: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(unet): value for name, value in listing.items() if name.startswith(unet)}

    first, key = f"{unet}input_blocks.0.0.weight", f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    sd3 = {f"{unet}joint_blocks.0.x_block.attn.qkv.weight": ("F16", (8, 8))}
    lora = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": ("F16", (4, 320))}
    refiner = {"conditioner.embedders.0.model.text_projection": ("F16", (1280, 1280))}
    return [
        row("lora", "LoRA", lambda listing: lora),
        row("lora merged in", "LoRA", lambda listing: listing.update(lora)),
        row("sdxl refiner", "SDXL refiner", lambda listing: refiner),
        row("sd 2 in one layer", r"Stable Diffusion 2\.x: 63 of another shape", resized(key, (320, 1024))),
        row("inpainting", "inpainting.*9 channels", resized(first, (320, 9, 3, 3))),
        row("pix2pix", "pix2pix.*8 channels", resized(first, (320, 8, 3, 3))),
        row("depth", "depth.*5 channels", resized(first, (320, 5, 3, 3))),
        row("flux", "Flux", lambda listing: {"double_blocks.0.img_attn.qkv.weight": ("F16", (8, 8))}),
        row("sd 3", "SD 3", lambda listing: sd3),
        row("pixart", "PixArt", lambda listing: {"t_block.1.weight": ("F16", (8, 8))}),
        row("wan", "Wan", lambda listing: {f"{unet}head.modulation": ("F16", (1, 8))}),
        row("svd", "video model", lambda listing: listing.update({f"{unet}a.time_stack.b": ("F16", (8, 8))})),
        row("ip-adapter", "IP-Adapter", lambda listing: {"image_proj.proj.weight": ("F16", (8, 8))}),
        row("controlnet", "ControlNet", lambda listing: {"control_model.input_hint_block.0.weight": ("F16", (8, 8))}),
        row("textual inversion", "textual inversion", lambda listing: {"emb_params": ("F32", (2, 768))}),
        row("vae only", "vae only.*--vae", only("first_stage_model.")),
        row("text only", "text only", only("cond_stage_model.")),
        row("unet only", "no vae and no text.*--vae", only(unet)),
        row("bare unet", "no vae and no text", bare),
        row("no vae", "no vae.*--vae", only(unet, "cond_stage_model.")),
        row("key missing", "missing|lacks|absent", lambda listing: listing.pop(f"{unet}out.0.bias") and None),
        row("extra key in the unet", "extra_adapter", resized(f"{unet}extra_adapter.weight", (4,))),
        row("wrong shape", r"\[300, 4, 3, 3\]", resized(first, (300, 4, 3, 3))),
        row("transposed", r"\[768, 320\]", resized(key, (768, 320))),
        row("integers", "I8", resized(first, (320, 4, 3, 3), "I8")),
        row("fp8", "F8_E8M0", resized(first, (320, 4, 3, 3), "F8_E8M0")),
        row("vae that holds none", "no vae", only(unet), "--vae bad.safetensors"),
        bad("checkpoint: repo id", "edit p.png --model runwayml/stable-diffusion-v1-5", "nothing is ever downloaded"),
        bad("checkpoint: missing", "edit p.png --model m.safetensors", "nothing is ever downloaded", process=True),
        bad("checkpoint: dangling", "edit p.png --model m.safetensors", "link",
            make=lambda w: (w.place / "m.safetensors").symlink_to("gone")),
        bad("checkpoint: below a file", "edit p.png --model p.png/m.safetensors", "p.png/m.safetensors"),
        bad("checkpoint: vae below a file", "edit p.png --vae p.png/v.safetensors", "p.png/v.safetensors"),
        bad("checkpoint: folder named as a file", "edit p.png --model m.safetensors", "unet/",
            make=lambda w: os.mkdir(w.place / "m.safetensors")),
        bad("checkpoint: vae is an empty folder", "edit p.png --vae m", "m'", make=lambda w: os.mkdir(w.place / "m")),
        bad("checkpoint: device", "edit p.png --model /dev/zero", "not a regular file"),
        bad("checkpoint: null byte", ["edit", "p.png", "--model", "a\0b"], "path"),
        bad("checkpoint: missing vae", "edit p.png --vae none.safetensors", "none.safetensors"),
        bad("checkpoint: missing text encoder", "edit p.png --text-encoder none", "none"),
        bad("checkpoint: missing tokenizer", "edit p.png --tokenizer none", "none"),
        *(bad(f"checkpoint: {option[2:]} of 100 kB", ["edit", "p.png", "--add", "hat", option, "a" * 100_000],
              r"'a+\.\.\.a+.*too long") for option in NAMES),
        bad("checkpoint: inspect missing", "inspect none.safetensors", "none.safetensors"),
    ]  # fmt: skip


def folder_rows() -> list[Row]:
    """Diffusers folders that lack something or contradict themselves."""
    weights = "diffusion_pytorch_model.safetensors"

    def row(name: str, says: str, change: Callable[[Path], object], code: int = 2) -> Row:
        return bad(f"folder: {name}", "edit p.png --model model", says, make=lambda w: change(w.folder()), code=code)

    def config(part: str, **values: Any) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            path = folder / part
            content = json.loads(path.read_text()) | values
            path.unlink()
            path.write_text(json.dumps(content))

        return change

    def replaced(part: str, content: bytes) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            (folder / part).unlink(missing_ok=True)
            (folder / part).write_bytes(content)

        return change

    def scaled(part: str, key: str, value: float) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            state = load_file(folder / part)
            state[key] = torch.full_like(state[key], value)
            (folder / part).unlink()
            save_file(state, folder / part)

        return change

    def far_inside(folder: Path) -> None:
        """The end token's row, which every prompt reads, lies behind the first 64 KiB."""
        path = folder / "text_encoder/model.safetensors"
        state = load_file(path)
        name = next(name for name in state if name.endswith("token_embedding.weight"))
        assert state[name].shape[0] == 49408 and state[name][:49000].nbytes > 65536
        state[name][49000:] = torch.nan
        path.unlink()
        save_file(state, path)

    def damaged_tokenizer(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer/tokenizer.json").write_text("{}")

    def tokenizer(words: dict[str, int | None], name: str = "tokenizer.json") -> Callable[[Path], object]:
        """The embedded model's word-level tokenizer with some words renumbered or removed."""

        def change(folder: Path) -> None:
            shutil.copytree(TINY / "tokenizer", folder / "tokenizer")
            content = json.loads((folder / "tokenizer" / name).read_text())
            vocabulary = content["model"]["vocab"] | words
            content["model"]["vocab"] = {word: number for word, number in vocabulary.items() if number is not None}
            (folder / "tokenizer" / name).write_text(json.dumps(content))

        return change

    def pickled(folder: Path) -> None:
        (folder / "unet" / weights).rename(folder / "unet/diffusion_pytorch_model.bin")

    unet, vae, scheduler = "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"
    return [
        row("no unet", "vae and text only", lambda folder: shutil.rmtree(folder / "unet")),
        row("no vae", "no vae", lambda folder: shutil.rmtree(folder / "vae")),
        row("no text encoder", "no text", lambda folder: shutil.rmtree(folder / "text_encoder")),
        row("no config", "config.json", lambda folder: (folder / unet).unlink()),
        row("no weights", weights, lambda folder: (folder / "vae" / weights).unlink()),
        row("pickles only", "pickle", pickled),
        row("config is a list", "JSON object", replaced(unet, b"[]")),
        row("config is no json", "not JSON", replaced(unet, b"{'a': 1}")),
        row("config is an lfs pointer", "git lfs pull", replaced(vae, b"version https://git-lfs.github.com/spec/v1\n")),
        row("unknown setting", "class_embed_type", config(unet, class_embed_type="timestep")),
        row("wrong block", "AttnDownBlock2D", config(unet, down_block_types=["AttnDownBlock2D"] * 3)),
        row("config against weights", r"wanted|width", config(unet, cross_attention_dim=32)),
        row("channels of text for a number", "block_out_channels", config(unet, block_out_channels="wide")),
        row("another vae class", "AutoencoderTiny", config(vae, _class_name="AutoencoderTiny")),
        row("schedule unknown", "squaredcos_cap_v2", config(scheduler, beta_schedule="squaredcos_cap_v2")),
        row("prediction unknown", "sample", config(scheduler, prediction_type="sample")),
        row("flow matching", "no schedule over betas", config(scheduler, _class_name="FlowMatchHeunDiscreteScheduler")),
        row("truncated weights", "cut short", replaced(f"unet/{weights}", tensors({"a": entry()})[:-8])),
        row("nan in weights", "NaN", scaled(f"unet/{weights}", "conv_in.bias", float("nan"))),
        row("nan far inside", "not finite at step 0 .* use a checkpoint that is not damaged", far_inside, code=1),
        row("weights that overflow", "not finite", scaled(f"unet/{weights}", "conv_out.weight", 3e38), code=1),
        row("xl without its second text encoder", "text_encoder_2", lambda folder: os.mkdir(folder / "text_encoder_2")),
        row("tokenizer damaged", "tokenizer", damaged_tokenizer),
        row("tokenizer of another model", "up to 60000, the text encoder knows 49408", tokenizer({"hat": 60_000})),
        row("tokenizer without its unknown word", r"do not belong together", tokenizer({"<unk>": None})),
        row("a million layers", "layers_per_block is 1000000", config(unet, layers_per_block=10**6)),
        row("a million text layers", "num_hidden_layers", config("text_encoder/config.json", num_hidden_layers=10**6)),
        row("all noise", "pure noise", config(scheduler, beta_end=0.999)),
        row("code in a config", "auto_map", config(unet, auto_map={"AutoModel": "evil.Model"})),
        row("infinity in weights", "infinity", scaled(f"unet/{weights}", "conv_in.bias", float("inf"))),
        row("a letter for a long text", "_class_name is 'UNet2DConditionModelUNet.*\\.\\.\\.",
            config(unet, _class_name="UNet2DConditionModel" * 400)),
        row("tokenizer empty", "tokenizer", lambda folder: (folder / "tokenizer").mkdir()),
        row("defaults unknown", "stepz", replaced("ledits.json", b'{"stepz": 3}')),
        bad("folder: empty", "edit p.png --model model", "unet/", make=lambda w: os.mkdir(w.place / "model")),
        bad("folder: of pictures", "edit p.png --model .", "unet/"),
    ]  # fmt: skip


ROWS = header_rows() + checkpoint_rows() + folder_rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_ends_in_one_line(row: Row, refused: Callable[[Row], None]) -> None:
    refused(row)


@pytest.mark.parametrize("command", [
    "edit p.png --model x.safetensors", "edit p.png --vae x.safetensors", "inspect x.safetensors", "edit x.safetensors",
    "edit x.png", "edit p.png --model model",
])  # fmt: skip
def test_a_file_without_the_right_to_read(
    refused: Callable[[Row], None], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """root may read anything, so `open` says what it says to others."""
    plain = builtins.open

    def denied(file: Any, *more: Any, **named: Any) -> Any:
        if Path(file).name in ("x.safetensors", "x.png", "diffusion_pytorch_model.safetensors"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return plain(file, *more, **named)

    monkeypatch.setattr(builtins, "open", denied)
    whole = command.endswith("model")
    files = {} if whole else {"x.safetensors": tensors({"a": entry()}), "x.png": b"\x89PNG"}
    make = (lambda w: w.folder()) if whole else None
    refused(bad("checkpoint: unreadable", command, "Permission denied", files, make=make))


@pytest.mark.parametrize("row", [row for row in ROWS if row.get("process")], ids=lambda row: row["name"])
def test_ends_a_process_in_one_line(row: Row, refused_process: Callable[[Row], None]) -> None:
    refused_process(row)


def test_there_are_rows_enough() -> None:
    assert len(ROWS) >= 90
    assert len({row["name"] for row in ROWS}) == len(ROWS)
    assert sum(bool(row.get("process")) for row in ROWS) >= 3
