"""The `ledits` command: edit a picture, invert one for later, inspect a checkpoint.

Only a command that runs imports torch, so that `ledits --help` and a misspelt option answer at once.
Exit codes: 0 done, 2 bad input, 1 went wrong while running, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ledits_min import __version__
from ledits_min.config import InputError, RunError, check_number, check_whole
from ledits_min.weights.header import quoted

if TYPE_CHECKING:
    from PIL import Image

    from ledits_min import Concept, Inversion, LEdits

_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d{1,20}", re.ASCII)
_SIZE = re.compile(r"(\d{1,6})(?:x(\d{1,6}))?", re.ASCII)
_PICTURE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"II*\0", b"MM\0*")


class _Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt no ordinary handler may swallow it."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code; every failure is one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    with _signals(), _warnings_as_lines() as said:
        try:
            args = build_parser().parse_args(argv)
            args.said = said
            args.run(args)
        except SystemExit as finished:  # --help and --version
            return int(finished.code or 0)
        # The one place that catches everything: a person at a terminal gets a line and an exit code, not a traceback.
        except BaseException as error:  # noqa: BLE001
            if "--debug" in argv:
                traceback.print_exc()
            code, line = _explain(error)
            _say(f"error: {line}")
            return code
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line; every option of every command."""
    parser = _Parser(prog="ledits", description="Edit real pictures with LEDITS.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ledits {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    edit = _command(commands, "edit", _edit, "change a picture: add or remove concepts, or give a target prompt")
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
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")

    invert = _command(commands, "invert", _invert, "find the noise maps of a picture, to edit it many times")
    invert.add_argument("image", metavar="IMAGE", help="a picture")
    invert.add_argument("-o", "--output", required=True, metavar="F.safetensors", help="the file to write")
    _add_inversion_options(invert)
    _add_model_options(invert)
    invert.add_argument("--overwrite", action="store_true", help="replace a file that exists")

    inspect = _command(commands, "inspect", _inspect, "say what a checkpoint is, from its header alone")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="a .safetensors file, a folder, or tiny")
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
        fields[name] = convert(value)
    if not words.strip():
        raise argparse.ArgumentTypeError(f"{quoted(text, 80)} names no concept; write it before the colon")
    return {"text": _prompt(words.strip()), **fields}


def _edit(args: argparse.Namespace) -> None:
    from ledits_min import Concept
    from ledits_min.app import outputs
    from ledits_min.image import atomic_write, check_output_picture, save_image

    _check_inversion_options(args)
    for option, value, high in (
        ("--guidance-scale", args.guidance_scale, 1000.0),
        ("--momentum-scale", args.momentum_scale, 0.999),
        ("--momentum-beta", args.momentum_beta, 0.999),
    ):
        check_number(option, value, 0.0, high, optional=True)
    concepts = [Concept(**fields) for fields in args.concepts or []]
    if args.masks is not None and not concepts:
        raise InputError("--masks shows where concepts acted, and there is none; pass --add or --remove")
    _warn_of_doubtful(args, concepts)

    saved = is_saved_inversion(args.image)
    out = Path(f"{Path(args.image).stem}.ledits.png" if args.output is None else args.output)
    _check_outputs(args, {
        "-o": (out, outputs.PICTURES),
        "--masks": (args.masks, outputs.PICTURES),
        "--report": (args.report, (".json",)),
        "--save-inversion": (args.save_inversion, (".safetensors",)),
    })  # fmt: skip

    clock = _Clock()
    source = _load_inversion(args) if saved else _open(args)
    picture_size = _picture_size(source)
    check_output_picture(out, picture_size)
    ledits = _load_model(args)
    for text in (args.target, args.negative, *(concept.text for concept in concepts)):
        _check_prompt(ledits, text)  # now, not after minutes of inversion
    clock.lap("load")
    inversion = _run_inversion(args, ledits, source)
    clock.lap("invert")
    edit = {
        "target": args.target,
        "guidance_scale": ledits.defaults.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "negative": args.negative,
        "momentum_scale": args.momentum_scale,
        "momentum_beta": args.momentum_beta,
        "output_size": args.output_size,
    }
    result = ledits.edit(inversion, concepts=concepts, trace=args.report is not None, **edit)
    clock.lap("edit")

    masks = [mask[0] for mask in result.masks]
    values = outputs.settings(ledits, inversion, concepts, edit)
    if args.masks is not None:
        original = outputs.original_picture(inversion)
        save_image(outputs.mask_picture(original, concepts, masks), args.masks)
    if args.save_inversion is not None:
        inversion.save(args.save_inversion)
    if args.report is not None:
        content = outputs.report(values, masks, result.trace, clock.laps, args.said, str(ledits.device))
        atomic_write(args.report, content)
    save_image(result.images[0], out, outputs.metadata(values))  # last: where it is, the others are
    _tell_written(clock, [out, args.masks, args.report, args.save_inversion])


def _invert(args: argparse.Namespace) -> None:
    _check_inversion_options(args)
    if is_saved_inversion(args.image):
        raise InputError(f"{quoted(args.image)} is a saved inversion already or a model; pass a picture")
    _check_outputs(args, {"-o": (args.output, (".safetensors",))})
    clock = _Clock()
    picture = _open(args)
    inversion = _run_inversion(args, _load_model(args), picture)
    inversion.save(args.output)
    _tell_written(clock, [args.output])


def _inspect(args: argparse.Namespace) -> None:
    from ledits_min.weights.inspect import inspect

    _tell(str(inspect(args.checkpoint)))


def is_saved_inversion(path: str) -> bool:
    """Whether `path` holds a safetensors header, or claims to by its name and is no picture; False if unreadable."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            start = file.read(16)
    except (OSError, ValueError):
        return False
    header = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000
    return header or (Path(path).suffix.lower() == ".safetensors" and not start.startswith(_PICTURE_MAGIC))


def _check_inversion_options(args: argparse.Namespace) -> None:
    """The ranges of the public interface, before anything is loaded."""
    check_whole("--steps", args.steps, 1, 500, optional=True)
    check_whole("--skip", args.skip, 0, 499 if args.steps is None else args.steps - 1, optional=True)
    check_whole("--seed", args.seed, 0, 2**63 - 1, optional=True)
    check_number("--eta", args.eta, 0.0, 1.0, optional=True)
    check_number("--source-guidance-scale", args.source_guidance_scale, 0.0, 1000.0, optional=True)


def _check_outputs(args: argparse.Namespace, wanted: dict[str, tuple[str | Path | None, Sequence[str]]]) -> None:
    from ledits_min.app.outputs import check_outputs

    outputs = {option: (Path(path), suffixes) for option, (path, suffixes) in wanted.items() if path is not None}
    check_outputs(outputs, [args.image, args.model, args.vae, args.text_encoder, args.tokenizer], args.overwrite)


def _open(args: argparse.Namespace) -> Image.Image:
    from ledits_min.image import open_image

    notices: list[str] = []
    picture = open_image(args.image, notices=notices)
    for notice in notices:
        _notice(args, notice)
    return picture


def _load_inversion(args: argparse.Namespace) -> Inversion:
    """A saved inversion; the options that made it cannot be given again, because they would have no effect."""
    from ledits_min import Inversion

    inversion = Inversion.load(args.image)
    if len(inversion.originals) != 1:
        raise InputError(f"{quoted(args.image)} holds {len(inversion.originals)} pictures; edit those from Python")
    for option in ("source", "source-guidance-scale", "steps", "skip", "eta", "seed", "size", "save-inversion"):
        if getattr(args, option.replace("-", "_")) is not None:
            raise InputError(
                f"--{option} has no effect on a saved inversion such as {quoted(args.image)}; leave it out, or pass "
                "the picture instead"
            )
    return inversion


def _picture_size(source: Image.Image | Inversion) -> tuple[int, int]:
    if hasattr(source, "originals"):
        height, width, _ = source.originals[0].shape
        return width, height
    return source.size


def _load_model(args: argparse.Namespace) -> LEdits:
    from ledits_min import LEdits

    ledits = LEdits.from_pretrained(
        args.model,
        device=args.device,
        dtype=args.dtype,
        vae=args.vae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        prediction_type=args.prediction_type,
    )
    for note in ledits.notes:
        _notice(args, note)
    return ledits


def _check_prompt(ledits: LEdits, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prompt that is too long is told when it is used
        ledits.text.check(text)


def _run_inversion(args: argparse.Namespace, ledits: LEdits, source: Image.Image | Inversion) -> Inversion:
    if hasattr(source, "originals"):
        return source
    size = args.size
    longer = max(size) if isinstance(size, tuple) else size or 0
    if longer > 1.5 * ledits.native_size:
        warnings.warn(
            f"--size asks for {longer} pixels, the model was trained at {ledits.native_size}; expect repeated shapes",
            stacklevel=2,
        )
    return ledits.invert(
        source,
        source=args.source or "",
        source_guidance_scale=args.source_guidance_scale,
        num_steps=args.steps,
        skip=args.skip,
        eta=1.0 if args.eta is None else args.eta,
        seed=args.seed or 0,
        size=size,
    )


def _warn_of_doubtful(args: argparse.Namespace, concepts: Sequence[Concept]) -> None:
    """Say what is allowed and hardly meant."""
    if not concepts and not args.target:
        warnings.warn("nothing to change is asked for; the picture is only reconstructed", stacklevel=2)
    directions: dict[str, list[bool]] = {}
    for concept in concepts:
        directions.setdefault(concept.text, []).append(concept.reverse)
    for text, reversed_ in directions.items():
        if len(set(reversed_)) > 1:
            warnings.warn(f"{quoted(text, 60)} is both added and removed", stacklevel=2)
        elif len(reversed_) > 1:
            warnings.warn(f"{quoted(text, 60)} is given {len(reversed_)} times; each counts", stacklevel=2)


def _add_inversion_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the inversion")
    group.add_argument("--source", type=_prompt, metavar="T", help="a description of the picture as it is")
    group.add_argument("--source-guidance-scale", type=_number, metavar="S", help="strength of --source")
    group.add_argument("--steps", type=_whole, metavar="N", help="1 .. 500 (default: the model's, else 100)")
    group.add_argument("--skip", type=_whole, metavar="N", help="noisiest steps left out (default: 36 %% of them)")
    group.add_argument("--eta", type=_number, metavar="E", help="0 .. 1, noise of the steps (default: 1)")
    group.add_argument("--seed", type=_whole, metavar="N", help="of the noise (default: 0)")
    group.add_argument("--size", type=_size, metavar="N|WxH", help="working size, longer side or both, in pixels")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument("--model", default="tiny", metavar="M",
                       help="tiny, a Stable Diffusion 1.x .safetensors file, or a diffusers folder")  # fmt: skip
    group.add_argument("--vae", metavar="F", help="another VAE: a .safetensors file or a folder")
    group.add_argument("--text-encoder", metavar="F", help="another text encoder, likewise")
    group.add_argument("--tokenizer", metavar="D", help="another tokenizer, a folder")
    group.add_argument("--prediction-type", choices=("eps", "v"), help="what the UNet predicts, if a file lies")
    group.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", default="auto", metavar="D", help="auto, float32, bfloat16 or float16")


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run)
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


class _Clock:
    """Seconds a phase, for the report."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.laps[phase], self.last = now - self.last, now


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and the line for a person."""
    text = str(error)
    if isinstance(error, InputError):
        return 2, text
    if isinstance(error, RunError):
        return 1, text
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, _Terminated):
        return 143, "terminated"
    # torch's own error is known by its name only, since torch may never have been imported.
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    if isinstance(error, MemoryError) or out_of_memory:
        return 1, "out of memory; try a smaller --size, --dtype bfloat16, or --device cpu"
    if isinstance(error, OSError):
        where = "" if error.filename is None else f" ({quoted(os.fsdecode(error.filename))})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return 1, f"the disk is full{where}; free some space and run it again"
        return 1, f"{error.strerror or text}{where}"
    return 1, f"{type(error).__name__}: {text or 'no message'} (a fault of this program; --debug shows where)"


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends a run the way Ctrl-C does: through every `finally`."""

    def stop(*_: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def _warnings_as_lines() -> Iterator[list[str]]:
    """Python's warnings as `ledits: warning: ...`; yields the list of what was said, for the report."""
    said: list[str] = []

    def show(message: Warning | str, *_: object, **__: object) -> None:
        said.append(str(message))
        _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield said


def _notice(args: argparse.Namespace, text: str) -> None:
    args.said.append(text)
    _say(text)


def _say(text: str) -> None:
    """One line on stderr, whatever the text holds."""
    if sys.stderr is not None:
        line = "".join(character if character.isprintable() else " " for character in text)
        print(f"ledits: {' '.join(line.split())}", file=sys.stderr, flush=True)


def _tell(text: str) -> None:
    """The result, on stdout."""
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        # The reader has left (`| head`); what is still buffered must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_written(clock: _Clock, paths: Sequence[str | Path | None]) -> None:
    names = ", ".join(quoted(path, 4096) for path in paths if path is not None)
    _tell(f"wrote {names} in {time.perf_counter() - clock.start:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
