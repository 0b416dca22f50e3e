"""The options of the `ledits` command: names, help, and how each value is read."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from typing import Any, NoReturn

from ledits_min import __version__
from ledits_min.config import InputError, check_number, check_whole
from ledits_min.weights.header import quoted

_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d{1,20}", re.ASCII)
_SIZE = re.compile(r"(\d{1,6})(?:x(\d{1,6}))?", re.ASCII)


def build_parser() -> argparse.ArgumentParser:
    """The command line; every option of every command."""
    parser = _Parser(prog="ledits", description="Edit real pictures with LEDITS.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ledits {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

    edit = _command(commands, "edit", "change a picture: add or remove concepts, or give a target prompt")
    edit.add_argument("image", metavar="IMAGE|INVERSION", help="a picture, or what `ledits invert` saved")
    edit.add_argument("-o", "--output", metavar="OUT", help="PNG, JPEG or WEBP (default: <stem>.ledits.png here)")
    group = edit.add_argument_group("the edit")
    add = functools.partial(parse_concept, reverse=False)
    remove = functools.partial(parse_concept, reverse=True)
    example = '"sunglasses" or "sunglasses:scale=10,threshold=0.9,warmup=2,cooldown=40,weight=1"'
    group.add_argument("--add", dest="concepts", action="append", type=add, metavar="C", help=f"C is {example}")
    group.add_argument("--remove", dest="concepts", action="append", type=remove, metavar="C", help="likewise")
    group.add_argument("--target", type=_prompt, default="", metavar="T", help="a description of the new picture")
    group.add_argument("--negative", type=_prompt, default="", metavar="T", help="what the picture should not show")
    group.add_argument("--guidance-scale", type=_number, metavar="S", help="strength of --target")
    group.add_argument("--p2p", nargs="?", const="", type=parse_p2p, metavar="P",
                       help="Prompt-to-Prompt from --source to --target; P is cross=0.6,self=0.2")  # fmt: skip
    group.add_argument("--momentum-scale", type=_number, default=0.0, metavar="S", help="SEGA's momentum (default: 0)")
    group.add_argument("--momentum-beta", type=_number, default=0.6, metavar="B", help="its memory (default: 0.6)")
    _add_inversion_options(edit)
    _add_model_options(edit)
    group = edit.add_argument_group("files")
    group.add_argument("--output-size", choices=("input", "model"), default="input",
                       help="the change laid over the original pixels, or the model's own picture")  # fmt: skip
    group.add_argument("--save-inversion", metavar="F", help="keep the inversion for further edits (.safetensors)")
    group.add_argument("--masks", metavar="F", help="a picture of where each concept acted")
    group.add_argument("--report", metavar="F.json", help="parameters, timings, mask statistics and trace")
    group.add_argument("--explain", action="store_true", help="only say what would be evaluated, and what it costs")
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")

    invert = _command(commands, "invert", "find the noise maps of a picture, to edit it many times")
    invert.add_argument("image", metavar="IMAGE", help="a picture")
    invert.add_argument("-o", "--output", required=True, metavar="F.safetensors", help="the file to write")
    _add_inversion_options(invert)
    _add_model_options(invert)
    invert.add_argument("--overwrite", action="store_true", help="replace a file that exists")

    demo = _command(commands, "demo", "one sheet with what LEDITS does: reconstruction, workflows, masks, scales")
    demo.add_argument("image", metavar="IMAGE", nargs="?", help="a picture (default: a portrait shipped here)")
    demo.add_argument("-o", "--output", metavar="SHEET", default="ledits-demo.png", help="default: ledits-demo.png")
    _add_model_options(demo)
    demo.add_argument("--overwrite", action="store_true", help="replace a file that exists")

    inspect = _command(commands, "inspect", "say what a checkpoint is, from its header alone")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="what --model takes")
    _add_part_options(inspect.add_argument_group("what would be passed beside it"))
    return parser


def parse_concept(text: str, reverse: bool) -> dict[str, Any]:
    """The fields of a `Concept` from "sunglasses" or "sunglasses:scale=10,threshold=0.9,warmup=2,cooldown=40,weight=1".

    What follows the last colon is options where it holds key=value pairs; a pair that is wrong is an error.
    """
    words, colon, tail = text.rpartition(":")
    fields: dict[str, Any] = {"reverse": reverse}
    if not colon or "=" not in tail:
        words, tail = text, ""
    for pair in tail.split(",") if tail else []:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key not in _CONCEPT_KEYS or not equals:
            raise argparse.ArgumentTypeError(
                f"{quoted(pair.strip() or tail, 60)} is no concept option; they are {', '.join(_CONCEPT_KEYS)} "
                "(a text with = after its last colon needs options behind it, as in 'E: m=1:scale=7')"
            )
        name, convert = _CONCEPT_KEYS[key]
        if name in fields:
            raise argparse.ArgumentTypeError(f"{key} is given twice in {quoted(text, 80)}; give it once")
        try:
            fields[name] = convert(value)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{key} in {quoted(text, 80)}: {error}") from None
    if not words.strip():
        raise argparse.ArgumentTypeError(f"{quoted(text, 80)} names no concept; write it before the colon")
    return {"text": _prompt(words.strip()), **fields}


def parse_p2p(text: str) -> dict[str, float]:
    """The fields of a `PromptToPrompt` from "cross=0.6,self=0.2", either of them, or none."""
    fields: dict[str, float] = {}
    for pair in text.split(",") if text else []:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key not in ("cross", "self") or not equals or key in fields:
            raise argparse.ArgumentTypeError(
                f"{quoted(pair.strip() or text, 60)} is not cross=N or self=N, each once (a picture comes before --p2p)"
            )
        fields[key] = _number(value)
    return fields


def parse_lora(text: str) -> tuple[str, float]:
    """(path, scale) from "style.safetensors" or "style.safetensors:0.8"; a number after the last colon is the scale."""
    path, colon, scale = text.rpartition(":")
    if not colon or not _NUMBER.fullmatch(scale):
        path, scale = text, "1"
    if not path:
        raise argparse.ArgumentTypeError(f"{quoted(text, 80)} names no file; write it before the colon")
    return path, _number(scale)


def check_ranges(args: argparse.Namespace) -> None:
    """The ranges of the public interface, before anything is loaded."""
    for option, value, high in (
        ("--guidance-scale", getattr(args, "guidance_scale", None), 1000.0),
        ("--source-guidance-scale", args.source_guidance_scale, 1000.0),
        ("--eta", args.eta, 1.0),
        ("--momentum-scale", getattr(args, "momentum_scale", None), 0.999),
        ("--momentum-beta", getattr(args, "momentum_beta", None), 0.999),
    ):
        check_number(option, value, 0.0, high, optional=True)
    check_whole("--steps", args.steps, 1, 500, optional=True)
    check_whole("--skip", args.skip, 0, 499 if args.steps is None else args.steps - 1, optional=True)
    check_whole("--seed", args.seed, 0, 2**63 - 1, optional=True)


def _add_inversion_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the inversion")
    group.add_argument("--source", type=_prompt, metavar="T", help="a description of the picture as it is")
    group.add_argument("--source-guidance-scale", type=_number, metavar="S", help="strength of --source")
    group.add_argument("--steps", type=_whole, metavar="N", help="1 .. 500 (default: the model's, else 100)")
    group.add_argument("--skip", type=_whole, metavar="N", help="noisiest steps to leave out (default: the model's)")
    group.add_argument("--eta", type=_number, metavar="E", help="0 .. 1, noise of the steps (default: 1)")
    group.add_argument("--seed", type=_whole, metavar="N", help="of the noise (default: 0)")
    group.add_argument("--size", type=_size, metavar="N|WxH", help="working size, longer side or both, in pixels")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument("--model", default="tiny", metavar="M",
                       help="tiny, a .safetensors file, a diffusers folder, or org/name[@revision] in the local "
                            "Hugging Face cache")  # fmt: skip
    _add_part_options(group)
    group.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", default="auto", metavar="D", help="auto, float32, bfloat16 or float16")


def _add_part_options(group: Any) -> None:
    group.add_argument("--vae", metavar="F", help="another VAE: a .safetensors file or a folder")
    group.add_argument("--text-encoder", metavar="F", help="another text encoder, likewise")
    group.add_argument("--tokenizer", metavar="D", help="another tokenizer, a folder")
    group.add_argument("--lora", action="append", type=parse_lora, metavar="FILE[:SCALE]",
                       help="merge a LoRA into the model (default scale: 1); can be given many times")  # fmt: skip
    group.add_argument("--ema", action="store_true", help="of a file with plain and averaged (EMA) weights, the latter")
    group.add_argument("--prediction-type", choices=("eps", "v"), help="what the UNet predicts, if a file lies")


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse without its usage dump: a wrong option is bad input like any other."""

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += " (one that starts with - is written --option=VALUE)"
        raise InputError(f"{message}; `{self.prog} --help` lists the options")


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{quoted(text, 60)} is not a number")
    return float(text)


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{quoted(text, 60)} is not a whole number")
    return int(text)


def _size(text: str) -> int | tuple[int, int]:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{quoted(text, 60)} is neither a longer side (512) nor WxH (512x384)")
    width, height = match.groups()
    return int(width) if height is None else (int(width), int(height))


def _prompt(text: str) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"{quoted(text, 60)} is not UTF-8 text")
    return text


_CONCEPT_KEYS: dict[str, tuple[str, Callable[[str], float]]] = {
    "scale": ("guidance_scale", _number),
    "threshold": ("threshold", _number),
    "warmup": ("warmup_steps", _whole),
    "cooldown": ("cooldown_steps", _whole),
    "weight": ("weight", _number),
}
