"""What people really pass by mistake: exit code, one line that names the matter, and nothing written.

Each row is one of its kind: images, checkpoints, folders, numbers, texts, names. All go through the command's entry
point; those marked `process` also as a process of their own.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ledits_min.app.cli import main
from ledits_min.config import SD15_TEXT, SD15_UNET, SD15_VAE

SAMPLE = Path(__file__).resolve().parents[2] / "weights/tiny/samples/portrait1.png"


@dataclass(frozen=True)
class Workshop:
    """Where a row makes its files: an empty folder, the writer of checkpoints, and a whole random diffusers folder."""

    place: Path
    checkpoints: ModuleType
    whole: Path

    def folder(self, name: str = "model") -> Path:
        """A copy of the whole folder to damage; made of links, so a file is replaced, never written into."""
        return Path(shutil.copytree(self.whole, self.place / name, copy_function=os.link))

    def listing(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names, dtypes and shapes of a complete SD 1.5 single file."""
        result: dict[str, tuple[str, tuple[int, ...]]] = self.checkpoints.ldm_listing(SD15_UNET, SD15_VAE, SD15_TEXT)
        return result

    def hollow(self, listing: Mapping[str, Any], name: str = "bad.safetensors") -> None:
        self.checkpoints.write_hollow(self.place / name, listing)


Make = Callable[[Workshop], object]


@dataclass(frozen=True)
class Row:
    """What is typed, what the line must say, what lies in the folder beforehand, and how it ends."""

    name: str
    command: str | list[str]
    says: str
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    make: Make | None = None
    code: int = 2
    process: bool = False

    @property
    def argv(self) -> list[str]:
        return shlex.split(self.command) if isinstance(self.command, str) else self.command


def picture(file_format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (32, 32), **options: Any) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    (Image.new("F", size, 0.5) if mode == "F" else image.convert(mode)).save(buffer, format=file_format, **options)
    return buffer.getvalue()


def png_promising(width: int, height: int) -> bytes:
    """A small PNG whose header promises another size."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return start + picture()[33:]


def tensors(header: str | bytes | dict[str, Any], data: int = 32, length: int | None = None) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    body = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(body) if length is None else length) + body + bytes(data)


def entry(dtype: str = "F32", shape: Any = (8,), offsets: Any = (0, 32)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ONE = json.dumps(entry())


def image_rows() -> list[Row]:
    """Files that are no picture, or not one that can be used."""
    gif = picture("GIF", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    contents: list[tuple[str, str, bytes, str]] = [
        ("empty", "x.png", b"", "empty file"),
        ("text", "x.png", b"hello, this is not a picture\n" * 9, "not a picture"),
        ("html", "x.jpg", b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML.*download"),
        ("svg", "x.png", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        ("pdf", "x.png", b"%PDF-1.7\n" + bytes(200), "PDF"),
        ("postscript", "x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(99), "PostScript"),
        ("fits", "x.png", b"SIMPLE  =                    T" + bytes(2880), "FITS"),
        ("icon", "x.ico", b"\0\0\1\0\1\0\x10\x10" + bytes(99), "icon"),
        ("jpeg 2000", "x.jp2", picture("JPEG2000"), "JPEG 2000"),
        ("avif", "x.avif", b"\0\0\0\x20ftypavif" + bytes(99), "AVIF"),
        ("heic", "x.heic", b"\0\0\0\x18ftypheic" + bytes(99), "HEIC"),
        ("heic as jpg", "x.jpg", b"\0\0\0\x18ftypmif1" + bytes(99), "HEIC"),
        ("raw", "x.nef", picture("TIFF"), "RAW"),
        ("photoshop", "x.psd", b"8BPS\0\1" + bytes(99), "Photoshop"),
        ("video", "x.mp4", b"\0\0\0\x18ftypisom" + bytes(99), "video"),
        ("zip", "x.png", b"PK\x03\x04" + bytes(99), "zip archive"),
        ("numpy", "x.npy", b"\x93NUMPY" + bytes(99), "NumPy"),
        ("lfs pointer", "x.png", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        ("truncated png", "x.png", picture()[:900], "damaged or cut short"),
        ("truncated jpeg", "x.jpg", picture("JPEG")[:-300], "damaged or cut short"),
        ("truncated webp", "x.webp", picture("WEBP")[:-300], "damaged|not a picture"),
        ("truncated gif", "x.gif", gif[:500], "damaged|not a picture"),
        ("only magic", "x.png", b"\x89PNG\r\n\x1a\n", "not a picture|damaged"),
        ("95 megapixels", "x.png", png_promising(9_500, 10_000), "64 megapixels"),
        ("400 megapixels", "x.png", png_promising(20_000, 20_000), "64 megapixels"),
        ("text bomb", "x.png", _text_bomb(), "damaged"),
        ("float tiff", "x.tif", picture("TIFF", "F"), "floating-point"),
        ("one pixel", "x.png", picture(size=(1, 1)), "at least 16 pixels"),
        ("a line", "x.png", picture(size=(3, 500)), "at least 16 pixels"),
        ("a strip", "x.png", picture(size=(20, 400)), "8:1"),
        ("a checkpoint as picture", "x.ckpt", b"PK\x03\x04" + bytes(99), "zip archive"),
    ]
    return [
        *(Row(f"image: {name}", f"edit {file} --add hat", says, {file: data}) for name, file, data, says in contents),
        Row("image: missing", "edit none.png", "'none.png' does not exist", process=True),
        Row("image: truncated, in a process", "edit x.jpg", "damaged", {"x.jpg": picture("JPEG")[:-300]}, process=True),
        Row("image: folder", "edit .", "folder"),
        Row("image: dangling link", "edit x.png", "link", make=lambda w: (w.place / "x.png").symlink_to("gone.png")),
        Row("image: link to itself", "edit x.png", "cannot be read",
            make=lambda w: (w.place / "x.png").symlink_to("x.png")),
        Row("image: pipe", "edit x.png", "not a regular file", make=lambda w: os.mkfifo(w.place / "x.png")),
        Row("image: device", "edit /dev/zero -o o.png", "not a regular file"),
        Row("image: null byte", ["edit", "a\0b.png", "-o", "o.png"], "path"),
        Row("image: 300 letters", ["edit", f"{'a' * 300}.png", "-o", "o.png"], "File name too long"),
        Row("image: bytes that are not UTF-8", ["edit", os.fsdecode(b"\xff.png")], r"'\\udcff.png' does not"),
        Row("image: line break", ["edit", "no\nsuch.png"], r"'no\\nsuch.png' does not exist"),
        Row("image: url", "edit https://example.org/x.png", "does not exist"),
        Row("image: for invert too", "invert x.png -o o.safetensors", "empty file", {"x.png": b""}),
    ]  # fmt: skip


def _text_bomb() -> bytes:
    """A PNG whose compressed text would fill 100 MB."""
    chunk = b"zTXt" + b"bomb\0\0" + zlib.compress(bytes(100_000_000), 9)
    whole = picture()
    return whole[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]


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
        ("gguf", b"GGUF\3\0\0\0" + bytes(99), "GGUF"),
        ("picture", picture(), "PNG picture"),
        ("scalar", tensors({"a": entry(shape=(), offsets=(0, 4))}, 4), "no Stable Diffusion weights"),
        ("nothing known", valid, "no Stable Diffusion weights"),
    ]
    rows = [
        Row(f"header: {name}", "edit p.png --model bad.safetensors", says, {"bad.safetensors": data})
        for name, data, says in contents
    ]
    edits = [
        Row(f"inversion: {name}", "edit bad.safetensors --add beard", says, {"bad.safetensors": data})
        for name, data, says in contents
        if name in ("empty", "cut short", "overlap", "pickle", "nothing known", "twice")
        for says in [says if name != "nothing known" else "not a saved inversion"]
    ]
    inspected = [
        Row(f"inspect: {name}", "inspect bad.safetensors", says, {"bad.safetensors": data})
        for name, data, says in contents
        if name in ("empty", "hole", "html", "picture")
    ]
    return [
        *rows, *edits, *inspected,
        Row("header: in a process", "edit p.png --model m.safetensors", "empty", {"m.safetensors": b""}, process=True),
        Row("inversion: in a process", "edit i.safetensors", "hole", {"i.safetensors": contents[8][1]}, process=True),
        *(Row(f"header: {suffix}", f"edit p.png --model m{suffix}", "pickle", {f"m{suffix}": b"PK\3\4"})
          for suffix in (".ckpt", ".pt", ".pth", ".bin")),
    ]  # fmt: skip


def checkpoint_rows() -> list[Row]:
    """Whole files of the wrong kind; they are written with holes, since only their headers matter."""
    unet = "model.diffusion_model."

    def row(name: str, says: str, change: Callable[[dict[str, Any]], object], options: str = "") -> Row:
        def make(workshop: Workshop) -> None:
            listing = workshop.listing()
            changed = change(listing)
            workshop.hollow(changed if isinstance(changed, dict) else listing)

        return Row(f"checkpoint: {name}", f"edit p.png --model bad.safetensors {options}", says, make=make)

    def only(*prefixes: str) -> Callable[[dict[str, Any]], object]:
        return lambda listing: {name: value for name, value in listing.items() if name.startswith(prefixes)}

    def resized(name: str, shape: tuple[int, ...], dtype: str = "F16") -> Callable[[dict[str, Any]], object]:
        return lambda listing: listing.update({name: (dtype, shape)})

    def bare(listing: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(unet): value for name, value in listing.items() if name.startswith(unet)}

    first, key = f"{unet}input_blocks.0.0.weight", f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    sd3 = {f"{unet}joint_blocks.0.x_block.attn.qkv.weight": ("F16", (8, 8))}
    lora = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": ("F16", (4, 320))}
    wide = {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": ("I64", (1, 77))}
    return [
        row("lora", "LoRA", lambda listing: lora),
        row("lora merged in", "LoRA", lambda listing: listing.update(lora)),
        row("sdxl", "SDXL", lambda listing: listing.update(wide)),
        row("sd 2", "SD 2", resized(key, (320, 1024))),
        row("inpainting", "inpainting.*9 channels", resized(first, (320, 9, 3, 3))),
        row("pix2pix", "pix2pix.*8 channels", resized(first, (320, 8, 3, 3))),
        row("depth", "depth.*5 channels", resized(first, (320, 5, 3, 3))),
        row("flux", "Flux", lambda listing: {"double_blocks.0.img_attn.qkv.weight": ("F16", (8, 8))}),
        row("sd 3", "SD 3", lambda listing: sd3),
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
        row("fp8", "F8_E4M3", resized(first, (320, 4, 3, 3), "F8_E4M3")),
        row("zero terminal snr", "zero terminal SNR", lambda listing: listing.update(ztsnr=("F32", ()))),
        row("vae that holds none", "no vae", only(unet), "--vae bad.safetensors"),
        Row("checkpoint: repo id", "edit p.png --model runwayml/stable-diffusion-v1-5", "nothing is ever downloaded"),
        Row("checkpoint: missing", "edit p.png --model m.safetensors", "nothing is ever downloaded", process=True),
        Row("checkpoint: dangling", "edit p.png --model m.safetensors", "link",
            make=lambda w: (w.place / "m.safetensors").symlink_to("gone")),
        Row("checkpoint: device", "edit p.png --model /dev/zero", "not a regular file"),
        Row("checkpoint: null byte", ["edit", "p.png", "--model", "a\0b"], "path"),
        Row("checkpoint: missing vae", "edit p.png --vae none.safetensors", "none.safetensors"),
        Row("checkpoint: missing text encoder", "edit p.png --text-encoder none", "none"),
        Row("checkpoint: missing tokenizer", "edit p.png --tokenizer none", "none"),
        Row("checkpoint: inspect missing", "inspect none.safetensors", "none.safetensors"),
    ]  # fmt: skip


def folder_rows() -> list[Row]:
    """Diffusers folders that lack something or contradict themselves."""
    weights = "diffusion_pytorch_model.safetensors"

    def row(name: str, says: str, change: Callable[[Path], object], code: int = 2) -> Row:
        return Row(f"folder: {name}", "edit p.png --model model", says, make=lambda w: change(w.folder()), code=code)

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

    def damaged_tokenizer(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer/tokenizer.json").write_text("{}")

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
        row("zero snr", "rescale_betas_zero_snr", config(scheduler, rescale_betas_zero_snr=True)),
        row("truncated weights", "cut short", replaced(f"unet/{weights}", tensors({"a": entry()})[:-8])),
        row("nan in weights", "NaN", scaled(f"unet/{weights}", "conv_in.bias", float("nan"))),
        row("weights that overflow", "not finite", scaled(f"unet/{weights}", "conv_out.weight", 3e38), code=1),
        row("xl", "SDXL", lambda folder: os.mkdir(folder / "text_encoder_2")),
        row("tokenizer damaged", "tokenizer", damaged_tokenizer),
        row("tokenizer empty", "tokenizer", lambda folder: (folder / "tokenizer").mkdir()),
        row("defaults unknown", "stepz", replaced("ledits.json", b'{"stepz": 3}')),
        Row("folder: empty", "edit p.png --model model", "unet/", make=lambda w: os.mkdir(w.place / "model")),
        Row("folder: of pictures", "edit p.png --model .", "unet/"),
    ]  # fmt: skip


def option_rows() -> list[Row]:
    """Numbers, texts and combinations."""
    values: list[tuple[str, str]] = [
        ("--steps 0", "--steps is 0; a whole number in 1 .. 500"),
        ("--steps 501", "--steps is 501"),
        ("--steps -3", "--steps is -3"),
        ("--steps 1.5", "'1.5' is not a whole number"),
        ("--steps ten", "'ten' is not a whole number"),
        ("--steps ''", "'' is not a whole number"),
        ("--steps 99999999999999999999999999", "not a whole number"),
        ("--steps \u0663", "not a whole number"),
        ("--skip -1", "--skip is -1"),
        ("--steps 20 --skip 20", r"--skip is 20; a whole number in 0 \.\. 19"),
        ("--skip 50", "skip"),
        ("--eta 1.01", "--eta is 1.01"),
        ("--eta -0.1", "--eta is -0.1"),
        ("--eta nan", "'nan' is not a number"),
        ("--guidance-scale inf", "'inf' is not a number"),
        ("--guidance-scale 1e9", "--guidance-scale is 1000000000.0"),
        ("--guidance-scale 1e999", "--guidance-scale is inf"),
        ("--guidance-scale=-1e3", "--guidance-scale is -1000"),
        ("--guidance-scale -1e3", "expected one argument"),
        ("--source-guidance-scale -1", "--source-guidance-scale is -1"),
        ("--momentum-scale 1", "--momentum-scale is 1"),
        ("--momentum-beta 1.5", "--momentum-beta is 1.5"),
        ("--seed -1", "--seed is -1"),
        ("--seed 9223372036854775808", "--seed is 9223372036854775808"),
        ("--seed 18446744073709551616", "--seed is 18446744073709551616"),
        ("--seed 1.5", "not a whole number"),
        ("--size 0", "size 0"),
        ("--size 8", "too small"),
        ("--size 99999", "size 99999"),
        ("--size 64x0", "size 64 x 0"),
        ("--size 64*64", "neither a longer side"),
        ("--size -64", "neither a longer side|expected one argument"),
        ("--device cuda:99", "cuda:99.*not available|cuda:99.*use"),
        ("--device potato", "potato"),
        ("--dtype int8", "int8"),
        ("--prediction-type x", "'x'"),
        ("--output-size large", "'large'"),
        ("--add 'cat:scal=3'", "'scal=3' is no concept option; they are scale, threshold"),
        ("--add 'cat:scale=x'", "'x' is not a number"),
        ("--add 'cat:scale='", "'' is not a number"),
        ("--add 'cat:scale=3,'", "no concept option"),
        ("--add 'cat:scale=3,wamrup=2'", "'wamrup=2' is no concept option"),
        ("--add 'cat:scale=3,scale=4'", "scale is given twice"),
        ("--add 'cat:scale=1e4'", "guidance_scale is 10000.0"),
        ("--add 'cat:scale=-3'", "guidance_scale is -3.0"),
        ("--add 'cat:threshold=1.5'", "threshold is 1.5"),
        ("--add 'cat:warmup=-1'", "warmup_steps is -1"),
        ("--add 'cat:warmup=1.5'", "not a whole number"),
        ("--add 'cat:weight=nan'", "not a number"),
        ("--add ':scale=3'", "names no concept"),
        ("--add ''", "names no concept"),
        ("--remove '  '", "names no concept"),
        ("--add", "expected one argument"),
        ("--add beard --ad hat", "unrecognized arguments: --ad hat"),
        ("--add zeppelin", "does not know 'zeppelin'; it knows"),
        ("--target 'a zeppelin'", "zeppelin"),
        ("--negative zeppelin", "zeppelin"),
        ("--source zeppelin", "zeppelin"),
        ("--masks m.png", "--masks shows where concepts acted"),
        ("q.png", "unrecognized arguments: q.png"),
    ]
    return [
        *(Row(f"option: {options}", f"edit p.png {options}", says) for options, says in values),
        Row("option: bytes that are not UTF-8", ["edit", "p.png", "--add", os.fsdecode(b"\xff")], "not UTF-8"),
        Row("option: steps in a process", "edit p.png --steps 0", "--steps is 0", process=True),
        Row("option: unknown in a process", "edit p.png --stepz 3", "unrecognized arguments: --stepz 3", process=True),
        Row("option: misspelt concept in a process", "edit p.png --add cat:scal=3", "'scal=3'", process=True),
        Row("option: no command", "", "COMMAND", process=True),
        Row("option: word in a process", "edit p.png --add zeppelin", "does not know 'zeppelin'", process=True),
        Row("option: unknown command", "edti p.png", "edti"),
        Row("option: no picture", "edit", "IMAGE"),
        Row("option: invert without a name", "invert p.png", "-o"),
        Row("option: invert with an edit", "invert p.png -o i.safetensors --add hat", "--add"),
        Row("option: inspect nothing", "inspect", "CHECKPOINT"),
    ]  # fmt: skip


def output_rows() -> list[Row]:
    """Names that cannot be written; found out before any work."""

    def linked(workshop: Workshop) -> None:
        (workshop.place / "same.png").hardlink_to(workshop.place / "p.png")

    there = {"o.png": b"precious", "p.ledits.png": b"precious", "r.json": b"{}"}
    return [
        Row("output: exists", "edit p.png -o o.png", "exists already; pass --overwrite", there, process=True),
        Row("output: the default exists", "edit p.png", "p.ledits.png' exists already", there),
        Row("output: report exists", "edit p.png -o n.png --report r.json", "--report 'r.json' exists", there),
        Row("output: unknown ending", "edit p.png -o o.gif", r"must end in \.png"),
        Row("output: no ending", "edit p.png -o o", "must end in"),
        Row("output: dash", "edit p.png -o -", "must end in|expected one argument"),
        Row("output: empty", "edit p.png -o ''", "must end in"),
        Row("output: no such folder", "edit p.png -o no/o.png", "folder .*no' does not exist", process=True),
        Row("output: folder is a file", "edit p.png -o p.png/o.png", "not a folder|not a directory|Not a directory"),
        Row("output: is a folder", "edit p.png -o o.png", "is a folder", make=lambda w: (w.place / "o.png").mkdir()),
        Row("output: is a pipe", "edit p.png -o o.png --overwrite", "not a regular file",
            make=lambda w: os.mkfifo(w.place / "o.png")),
        Row("output: too long", ["edit", "p.png", "-o", f"{'a' * 300}.png"], "too long"),
        Row("output: default too long", ["edit", f"{'a' * 250}.png"], "too long.*-o",
            make=lambda w: shutil.copy(w.place / "p.png", w.place / f"{'a' * 250}.png")),
        Row("output: null byte", ["edit", "p.png", "-o", "a\0b.png"], "null byte"),
        Row("output: the input", "edit p.png -o p.png --overwrite", "is an input of this run"),
        Row("output: the input by another name", "edit p.png -o ./same.png --overwrite", "is an input", make=linked),
        Row("output: twice", "edit p.png -o o.png --add hat --masks ./o.png", "also the name given with -o"),
        Row("output: masks ending", "edit p.png --add hat --masks m.txt", "--masks 'm.txt' must end in"),
        Row("output: report ending", "edit p.png --report r.txt", r"must end in \.json"),
        Row("output: inversion ending", "edit p.png --save-inversion i.pt", r"must end in \.safetensors"),
        Row("output: invert ending", "invert p.png -o i.png", r"must end in \.safetensors"),
        Row("output: invert over a file", "invert p.png -o i.safetensors", "exists already", {"i.safetensors": b"x"}),
        Row("output: too wide for webp", "edit w.png -o o.webp", "16383 pixels a side",
            make=lambda w: Image.new("RGB", (16_400, 2_100)).save(w.place / "w.png")),
    ]  # fmt: skip


ROWS = image_rows() + header_rows() + checkpoint_rows() + folder_rows() + option_rows() + output_rows()


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory: pytest.TempPathFactory, checkpoints: ModuleType) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model"
    checkpoints.write_folder(path)
    return path


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: ModuleType, whole_folder: Path) -> Workshop:
    shutil.copy(SAMPLE, tmp_path / "p.png")
    monkeypatch.chdir(tmp_path)
    return Workshop(tmp_path, checkpoints, whole_folder)


def prepared(row: Row, workshop: Workshop) -> dict[str, tuple[int, int]]:
    for name, content in row.files.items():
        (workshop.place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if row.make is not None:
        row.make(workshop)
    return snapshot(workshop.place)


def snapshot(place: Path) -> dict[str, tuple[int, int]]:
    """Every name below `place` with its size and time of change."""
    found = {}
    for folder, _, names in os.walk(place):
        for path in [Path(folder), *(Path(folder) / name for name in names)]:
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


def check_line(stderr: str, row: Row) -> None:
    """One line of error, the last, that says what the row wants; what stands above it may only be notices."""
    lines = stderr.splitlines()
    assert lines[-1].startswith("ledits: error: "), stderr
    assert [line for line in lines if line.startswith("ledits: error: ")] == lines[-1:]
    assert all(line.startswith("ledits: ") for line in lines), stderr
    assert re.search(row.says, lines[-1]), lines[-1]
    assert len(lines[-1]) < 4000


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_ends_in_one_line(row: Row, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    before = prepared(row, workshop)
    code = main(row.argv)
    output = capsys.readouterr()
    assert code == row.code, output.err
    check_line(output.err, row)
    assert output.out == ""
    assert snapshot(workshop.place) == before


@pytest.mark.parametrize("row", [row for row in ROWS if row.process], ids=lambda row: row.name)
def test_bad_input_ends_a_process_in_one_line(row: Row, workshop: Workshop) -> None:
    before = prepared(row, workshop)
    finished = subprocess.run(
        [sys.executable, "-m", "ledits_min.app.cli", *row.argv], capture_output=True, text=True, check=False
    )
    assert finished.returncode == row.code, finished.stderr
    check_line(finished.stderr, row)
    assert finished.stdout == ""
    assert snapshot(workshop.place) == before


def test_there_are_rows_enough() -> None:
    assert len(ROWS) >= 80
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert sum(row.process for row in ROWS) >= 12
