"""What is fuzzed: small valid files made on the fly, the damage done to them, and what then reads them.

Each kind has `make(rng)`, which writes a damaged file into its folder, and `read()`, which must accept it or refuse it.
The files grow from real ones of ours: nothing is stored.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ledits_min import Concept, Inversion, LEdits
from ledits_min.config import SD15_SCHEDULE, SD15_TEXT, SD15_UNET, SD15_VAE, TextConfig, UNetConfig, VAEConfig
from ledits_min.files.configs import config_json
from ledits_min.files.header import read_header
from ledits_min.files.inversion import FORMAT
from ledits_min.files.opening import open_image
from ledits_min.files.picture import to_tensor
from ledits_min.weights.inspect import inspect
from ledits_min.weights.load import load_checkpoint
from ledits_min.weights.read.shapes import text_shapes, unet_shapes, vae_shapes
from tests.robustness.fuzz import mutate
from tests.robustness.fuzz.hostile import BatchFolders, Decoders
from tests.robustness.fuzz.mutate import encoded
from tests.robustness.fuzz.texts import Configs, Embeddings, Tokenizers

TINY = Path(__file__).parents[3] / "weights/tiny"
UNET = UNetConfig(4, 4, (8, 16), ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D"),
                  1, (2, 2), 8, 4, 1e-5, False, 8)  # fmt: skip
VAE = VAEConfig(3, 3, 4, (4, 8), 1, 4, 0.18215, True, 16)
TEXT = TextConfig(1, 8, 16, 1, 2, 12, "quick_gelu", 1e-5, 1, 2, 0)  # as many words as the embedded model's tokenizer
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUICK = {"num_steps": 2, "skip": 0, "size": 16, "progress": False}


def write_model(folder: Path) -> None:
    """A diffusers folder of some twenty thousand weights, with the embedded model's tokenizer."""
    shutil.copytree(TINY / "tokenizer", folder / "tokenizer")
    words = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    text = TextConfig(**{**vars(TEXT), "vocab_size": len(words)})
    generator = torch.Generator().manual_seed(0)
    for name, config, shapes, stem in (
        ("unet", UNET, unet_shapes(UNET), WEIGHTS),
        ("vae", VAE, vae_shapes(VAE), WEIGHTS),
        ("text_encoder", text, text_shapes(text), "model.safetensors"),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config_json(config)))  # type: ignore[attr-defined]
        state = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save_file(state, folder / name / stem, {"format": "pt"})
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config_json(SD15_SCHEDULE)))
    shutil.copy(TINY / "model_index.json", folder)
    shutil.copy(TINY / "ledits.json", folder)


class Headers:
    """Safetensors files by themselves: the check, the library behind it, and `ledits inspect`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "x.safetensors"
        write_model(folder / "model")
        names = [*_sd15(), *unet_shapes(UNET), *vae_shapes(VAE)]
        strange = ["v_pred", "ztsnr", "lora_unet_x.lora_down.weight", "model_ema.decay", "control_model.x"]
        self.vocabulary = [*Random(0).sample(names, 60), *strange]
        weights = (f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors")
        self.corpus = [(folder / "model" / name).read_bytes() for name in weights]
        dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
        few = {f"t.{i}": torch.zeros(2, i).to(dtype) for i, dtype in enumerate(dtypes)} | {"s": torch.zeros(())}
        save_file(few, self.path, {"format": "pt", "modelspec.prediction_type": "v"})
        self.corpus += [self.path.read_bytes()] * 6

    def make(self, rng: Random) -> None:
        self.path.write_bytes(mutate.safetensors(rng, rng.choice(self.corpus), self.vocabulary))

    def read(self) -> None:
        header = read_header(self.path)
        _same_as_the_library(self.path, {name: list(info.shape) for name, info in header.tensors.items()})
        str(inspect(self.path))


def _same_as_the_library(path: Path, ours: Mapping[str, list[int]]) -> None:
    try:
        with safe_open(path, framework="np") as file:
            theirs = {name: file.get_slice(name).get_shape() for name in file.offset_keys()}
    except SafetensorError as error:
        raise AssertionError(f"accepted here, refused by the library: {error}") from error
    assert theirs == ours, "read differently by the library"


def _sd15() -> list[str]:
    """Names as single files of Stable Diffusion spell a few of them."""
    return [*("model.diffusion_model." + name for name in unet_shapes(SD15_UNET)),
            *("first_stage_model." + name for name in vae_shapes(SD15_VAE)),
            *("cond_stage_model.transformer.text_model." + name for name in text_shapes(SD15_TEXT))]  # fmt: skip


class Pictures:
    """Images in every format that is read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "x"
        values = np.random.default_rng(0).integers(0, 255, (20, 24, 4), dtype=np.uint8)
        rgba = Image.fromarray(values)
        rgb, second = rgba.convert("RGB"), rgba.convert("RGB").rotate(90)
        exif = Image.Exif()
        exif[0x0112] = 6
        exif[0x010E] = "a description"
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        other = srgb.replace("sRGB".encode("utf-16-be"), "aRGB".encode("utf-16-be")).replace(b"sRGB b", b"aRGB b")
        deep = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
        frames: dict[str, Any] = {"save_all": True, "append_images": [second]}
        self.corpus = [
            *(self._png(image, **more) for image, more in (
                (rgb, {}), (rgba, {}), (rgb.quantize(8), {"transparency": 1}), (deep, {}), (rgb.convert("1"), {}),
                (rgb.convert("L"), {"icc_profile": other}), (rgb, {"icc_profile": other, "exif": exif}),
                (rgb, frames))),
            *((mutate.jpeg, encoded(image, "JPEG", **more)) for image, more in (
                (rgb, {}), (rgb, {"progressive": True, "exif": exif}), (rgb.convert("L"), {}),
                (rgb.convert("CMYK"), {}), (rgb, {"icc_profile": other}))),
            *((mutate.tiff, encoded(image, "TIFF", **more)) for image, more in (
                (rgb, {}), (deep, {}), (rgb.convert("F"), {}), (rgba, {}), (rgb, {"compression": "tiff_lzw"}),
                (rgb, {"compression": "tiff_adobe_deflate"}), (rgb, {"compression": "jpeg"}), (rgb, frames),
                (rgb.convert("1"), {"compression": "group4"}), (rgb.convert("LAB"), {}), (rgb.convert("CMYK"), {}))),
            *((mutate.riff, encoded(image, "WEBP", **more)) for image, more in (
                (rgb, {}), (rgba, {"lossless": True}), (rgb, frames), (rgb, {"icc_profile": other, "exif": exif}))),
            *((mutate.raw, encoded(image, "GIF", **more)) for image, more in ((rgb, {}), (rgba, frames))),
            *((mutate.raw, encoded(image, "BMP")) for image in (rgb, rgba, rgb.convert("1"), rgb.quantize(8))),
            (mutate.raw, encoded(rgb, "MPO", **frames)),
        ]  # fmt: skip

    def _png(self, image: Image.Image, **options: Any) -> tuple[Callable[[Random, bytes], bytes], bytes]:
        return mutate.png, encoded(image, "PNG", **options)

    def make(self, rng: Random) -> None:
        deep, data = rng.choice(self.corpus)
        damage = mutate.raw if rng.random() < 0.3 else deep
        self.path.write_bytes(damage(rng, data))

    def read(self) -> None:
        notices: list[str] = []
        picture = open_image(self.path, notices=notices)
        assert picture.mode == "RGB" and not picture.info
        assert all(notice.isprintable() and len(notice) < 1000 for notice in notices)
        to_tensor([picture], (16, 16))


class Inversions:
    """Saved inversions: loaded, and edited where they are accepted."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "x.safetensors"
        write_model(folder / "model")
        self.ledits = LEdits.from_pretrained(folder / "model", device="cpu", dtype="float32")
        pictures = [np.full((24, 24, 3), value, dtype=np.uint8) for value in (60, 200)]
        self.corpus = []
        for images, settings in ((pictures[0], {}), (pictures, {"source": "a man", "eta": 0.5, "seed": [1, 2]})):
            self.ledits.invert(images, **{**QUICK, **settings}).save(self.path)  # type: ignore[arg-type]
            self.corpus.append(self.path.read_bytes())
        self.vocabulary = ["x_T", "latents", "residuals", "original.0", "original.1", "original.01"]

    def make(self, rng: Random) -> None:
        data = rng.choice(self.corpus)
        if rng.random() < 0.5:
            length = struct.unpack("<Q", data[:8])[0]
            header = json.loads(data[8 : 8 + length])
            settings = json.loads(header["__metadata__"][FORMAT])
            header["__metadata__"][FORMAT] = mutate.json_text(rng, settings).decode("latin-1")
            text = json.dumps(header).encode()
            data = struct.pack("<Q", len(text)) + text + data[8 + length :]
        else:
            data = mutate.safetensors(rng, data, self.vocabulary)
        self.path.write_bytes(data)

    def read(self) -> None:
        inversion = Inversion.load(self.path)
        if inversion.settings.num_steps <= 10 and max(inversion.latents.shape) <= 64:
            self.ledits.edit(inversion, concepts=[Concept("hat", warmup_steps=0)], progress=False)


class Folders:
    """Diffusers folders with one damaged file: loaded, and a picture edited where they are accepted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "model"
        write_model(self.folder)
        words = ["<|startoftext|>", "<|endoftext|>", *"abcdefhinrtu", "h</w>"]
        vocabulary = {word: i for i, word in enumerate(words)}
        self.extra = {
            "tokenizer/vocab.json": json.dumps(vocabulary).encode(),
            "tokenizer/merges.txt": b"#version: 0.2\nh a\nha t</w>\n",
            f"unet/{WEIGHTS}.index.json": json.dumps(
                {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(unet_shapes(UNET), WEIGHTS)}).encode(),
        }  # fmt: skip
        found = (path for path in self.folder.rglob("*") if path.is_file())
        self.pristine = {str(path.relative_to(self.folder)): path.read_bytes() for path in found}
        values = [self._values(json.loads(data)) for name, data in self.pristine.items() if name.endswith(".json")]
        self.vocabulary = sorted({value for some in values for value in some})
        self.changed: list[str] = []

    def _values(self, value: Any) -> list[str]:
        """Every key and every string in a parsed JSON file."""
        if isinstance(value, dict):
            return [*value, *(text for item in value.values() for text in self._values(item))]
        if isinstance(value, list):
            return [text for item in value for text in self._values(item)]
        return [value] if isinstance(value, str) else []

    def make(self, rng: Random) -> None:
        for name in self.changed:
            if name in self.pristine:
                self._write(name, self.pristine[name])
            else:
                (self.folder / name).unlink()
        files = {**self.pristine, **self.extra}
        name = rng.choice(sorted(files))
        data = files[name]
        self.changed = [name]
        if name.endswith("index.json"):
            (self.folder / "unet" / WEIGHTS).unlink()
            self._write("unet/shard.safetensors", self.pristine[f"unet/{WEIGHTS}"])
            data = data.replace(b'.safetensors"', b'.safetensors"').replace(WEIGHTS.encode(), b"shard.safetensors")
            self.changed += ["unet/shard.safetensors", f"unet/{WEIGHTS}"]
        elif name.startswith(("tokenizer/vocab", "tokenizer/merges")):
            self.changed = sorted(other for other in self.extra if other.startswith("tokenizer"))
            for other in self.changed:
                self._write(other, self.extra[other])
        if name.endswith(".json"):
            data = mutate.json_text(rng, json.loads(data), self.vocabulary)
        else:
            data = (mutate.safetensors if name.endswith(".safetensors") else mutate.raw)(rng, data)
        self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        # A new file each time: the old one may still be mapped, and cutting a mapped file kills the process.
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).write_bytes(data)

    def read(self) -> None:
        str(inspect(self.folder))
        ledits = LEdits.from_pretrained(self.folder, device="cpu", dtype="float32")
        picture = np.full((16, 16, 3), 100, dtype=np.uint8)
        inversion = ledits.invert(picture, **QUICK)  # type: ignore[arg-type]
        ledits.edit(inversion, target="a man", concepts=[Concept("hat", warmup_steps=0)], progress=False)


class Loras:
    """LoRA files in the three spellings, merged into a small model."""

    def __init__(self, folder: Path) -> None:
        self.path, self.model = folder / "x.safetensors", folder / "model"
        write_model(self.model)
        layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        text = "encoder.layers.0.self_attn.q_proj"
        flat, alpha = layer.replace(".", "_"), torch.tensor(2.0)
        down, up = torch.randn(2, 8), torch.randn(8, 2)
        files: list[tuple[dict[str, torch.Tensor], dict[str, str]]] = [
            ({f"lora_unet_{flat}.lora_down.weight": down, f"lora_unet_{flat}.lora_up.weight": up,
              f"lora_unet_{flat}.alpha": alpha,
              f"lora_te_text_model_{text.replace('.', '_')}.lora_down.weight": down.clone(),
              f"lora_te_text_model_{text.replace('.', '_')}.lora_up.weight": up.clone()}, {"ss_network_dim": "2"}),
            ({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up},
             {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}),
            ({f"unet.{layer}.lora.down.weight": down, f"unet.{layer}.lora.up.weight": up}, {"format": "pt"}),
        ]  # fmt: skip
        self.corpus = []
        for tensors, metadata in files:
            save_file(tensors, self.path, metadata)
            self.corpus.append(self.path.read_bytes())
        ends = ("lora_up.weight", "lora_mid.weight", "dora_scale", "hada_w1_a", "alpha", "lora_A.weight", "processor")
        self.vocabulary = [f"lora_unet_{flat}.{end}" for end in ends] + [f"unet.{layer}.{end}" for end in ends]

    def make(self, rng: Random) -> None:
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(mutate.safetensors(rng, rng.choice(self.corpus), self.vocabulary))

    def read(self) -> None:
        str(inspect(self.path))
        load_checkpoint(self.model, lora=self.path)


class Bombs:
    """Files that are small and promise much: deep or wide JSON, huge pictures, compressed text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, rng: Random) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        count = rng.choice((10, 1000, 100_000, 300_000))
        inner = rng.choice((b"[]", b"{}", b"0", b'"ab"', b"[0,0]", b"1e9"))
        text = rng.choice((
            b'{"a":[' + b",".join([inner] * count) + b"]}",
            b"{" + b",".join(b'"k%d":%s' % (i, inner) for i in range(min(count, 200_000))) + b"}",
            b'{"a":' * min(count, 200_000) + b"1" + b"}" * min(count, 200_000),
            b'{"a":' + b"[" * count + b"]" * count + b"}",
            b'{"a":' + b"9" * min(count, 100_000) + b"}",
            b'{"__metadata__":{' + b",".join(b'"k%d":"v"' % i for i in range(min(count, 200_000))) + b"}}",
        ))  # fmt: skip
        if rng.random() < 0.5:
            (self.folder / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(rng.choice((0, 8))))
        else:
            side = rng.choice((100, 7_900, 9_000, 60_000, 2**31 - 1))
            kind = rng.choice(("PNG", "BMP", "GIF", "TIFF"))
            modes = ("1", "L", "P", "RGB", "RGBA", "I;16") if kind in ("PNG", "TIFF") else ("1", "L", "P")
            data = encoded(Image.new(rng.choice(modes), (16, 16)), kind)
            place = {"PNG": 16, "BMP": 18, "GIF": 6, "TIFF": 30}[kind]
            number = struct.pack(">II" if kind == "PNG" else "<HH" if kind == "GIF" else "<II",
                                 *((side % 65536,) * 2 if kind == "GIF" else (side, side)))  # fmt: skip
            data = data[:place] + number + data[place + len(number) :]
            (self.folder / "x.png").write_bytes(_with_checksum(data) if kind == "PNG" else data)

    def read(self) -> None:
        path = next(self.folder.iterdir())
        if path.suffix == ".png":
            to_tensor([open_image(path)], (16, 16))
        else:
            str(inspect(path))


def _with_checksum(data: bytes) -> bytes:
    return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]


Kind = (Headers | Pictures | Decoders | BatchFolders | Inversions | Folders | Loras | Embeddings | Tokenizers | Configs
        | Bombs)  # fmt: skip
# Kind -> how many of a thousand inputs are of it; a bomb takes a hundred times as long as any other.
SHARES: dict[str, tuple[Callable[[Path], Kind], int]] = {
    "headers": (Headers, 250),
    "pictures": (Pictures, 240),
    "decoders": (Decoders, 50),
    "batch folders": (BatchFolders, 80),
    "inversions": (Inversions, 100),
    "folders": (Folders, 60),
    "loras": (Loras, 60),
    "embeddings": (lambda folder: Embeddings(folder, with_model(folder)), 37),
    "tokenizers": (lambda folder: Tokenizers(folder, TINY / "tokenizer"), 70),
    "configs": (lambda folder: Configs(folder, with_model(folder)), 50),
    "bombs": (Bombs, 3),
}


def with_model(folder: Path) -> Path:
    write_model(folder / "whole")
    return folder / "whole"


def build(folder: Path) -> dict[str, Kind]:
    """Every kind with a folder of its own, and proof that each reads a file that is not damaged."""
    kinds: dict[str, Kind] = {}
    for name, (begin, _) in SHARES.items():
        os.mkdir(folder / name)
        kinds[name] = kind = begin(folder / name)
        if not isinstance(kind, Folders | Bombs | BatchFolders | Configs | Tokenizers):
            whole = kind.corpus[0]
            kind.path.write_bytes(whole if isinstance(whole, bytes) else whole[1])
        if not isinstance(kind, Bombs | BatchFolders):
            kind.read()
    return kinds
