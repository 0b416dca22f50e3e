"""The `ledits` command: edit a picture, invert one for later, inspect a checkpoint.

Only a command that runs imports torch, so that `ledits --help` and a misspelt option answer at once.
Exit codes: 0 done, 2 bad input, 1 went wrong while running, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ledits_min.app.options import build_parser, check_ranges
from ledits_min.config import InputError, RunError
from ledits_min.weights.header import MAX_HEADER_BYTES, quoted

if TYPE_CHECKING:
    from PIL import Image

    from ledits_min import Concept, Inversion, LEdits

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
            _COMMANDS[args.command](args)
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


def _edit(args: argparse.Namespace) -> None:
    check_ranges(args)
    from ledits_min import Concept, PromptToPrompt
    from ledits_min.app import outputs
    from ledits_min.app.explain import latent_size, plan_edit
    from ledits_min.image import atomic_write, check_output_picture, save_image
    from ledits_min.p2p import check_prompts

    concepts = [Concept(**fields) for fields in args.concepts or []]
    attention = None if args.p2p is None else PromptToPrompt(**args.p2p)
    if args.masks is not None and not concepts:
        raise InputError("--masks shows where concepts acted, and there is none; pass --add or --remove")

    saved = is_saved_inversion(args.image)
    if args.explain:
        _tell_plan(args, concepts)
        return
    out = Path(f"{Path(args.image).stem}.ledits.png" if args.output is None else args.output)
    _check_outputs(args, {
        "-o": (out, outputs.PICTURES),
        "--masks": (args.masks, outputs.PICTURES),
        "--report": (args.report, (".json",)),
        "--save-inversion": (args.save_inversion, (".safetensors",)),
    })  # fmt: skip

    clock = _Clock()
    made = _load_inversion(args) if saved else None
    if attention is not None:
        check_prompts(made.settings.source if made else args.source or "", args.target, args.negative)
    picture = outputs.original_picture(made) if made else _open(args)
    check_output_picture(out, picture.size)
    ledits = _load_model(args)
    for text in (args.target, args.negative, *(concept.text for concept in concepts)):
        _check_prompt(ledits, text)  # now, not after minutes of inversion
    _warn_of_doubtful(args, concepts)
    clock.lap("load")
    inversion = made or _run_inversion(args, ledits, picture)
    clock.lap("invert")
    edit = _edit_settings(args, ledits)
    result = ledits.edit(inversion, concepts=concepts, trace=args.report is not None, attention=attention, **edit)
    clock.lap("edit")

    masks = [mask[0] for mask in result.masks]
    values = outputs.settings(ledits, inversion, concepts, attention, edit)
    if args.masks is not None:
        save_image(outputs.mask_picture(picture, concepts, masks), args.masks)
    if args.save_inversion is not None:
        inversion.save(args.save_inversion)
    if args.report is not None:
        plan = None
        if attention is None:  # Prompt-to-Prompt keeps to the plain loop
            plan = plan_edit(ledits, inversion.settings, latent_size(inversion), saved, concepts, edit, ledits.device)
        evaluations = {"planned": plan and plan.to_json(), "evaluated": ledits.runner.evaluations}
        content = outputs.report(
            values, masks, result.trace, clock.laps, args.said, str(ledits.device), evaluations
        )  # fmt: skip
        atomic_write(args.report, content)
    save_image(result.images[0], out, outputs.metadata(values))  # last: where it is, the others are
    _tell_written(clock, [out, args.masks, args.report, args.save_inversion])


def _edit_settings(args: argparse.Namespace, ledits: LEdits) -> dict[str, Any]:
    """The arguments of `LEdits.edit` that are plain values."""
    return {
        "target": args.target,
        "guidance_scale": ledits.defaults.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "negative": args.negative,
        "momentum_scale": args.momentum_scale,
        "momentum_beta": args.momentum_beta,
        "output_size": args.output_size,
    }


def _tell_plan(args: argparse.Namespace, concepts: Sequence[Concept]) -> None:
    """What the same command without --explain would evaluate. No weight is read and nothing is written."""
    if args.p2p is not None:
        raise InputError("--explain does not know --p2p; leave one of them out")
    from ledits_min.app.explain import fitted_size, latent_size, plan_edit, without_weights

    made = _load_inversion(args) if is_saved_inversion(args.image) else None
    ledits, device = without_weights(args.model, args.device, args.dtype, **_parts(args))
    for text in (args.source or "", args.target, args.negative, *(concept.text for concept in concepts)):
        _check_prompt(ledits, text)
    if made is not None:
        settings, latents = made.settings, latent_size(made)
    else:
        eta = 1.0 if args.eta is None else args.eta
        settings = ledits.inversion_settings(
            args.source or "", args.source_guidance_scale, args.steps, args.skip, eta
        )  # fmt: skip
        latents = fitted_size(ledits, _open(args), args.size)
    edit = _edit_settings(args, ledits)
    for line in plan_edit(ledits, settings, latents, made is not None, concepts, edit, device).lines():
        _tell(line)


def _invert(args: argparse.Namespace) -> None:
    check_ranges(args)
    if is_saved_inversion(args.image):
        raise InputError(f"{quoted(args.image)} is a saved inversion already or a model; pass a picture")
    _check_outputs(args, {"-o": (args.output, (".safetensors",))})
    clock = _Clock()
    picture = _open(args)
    inversion = _run_inversion(args, _load_model(args), picture)
    inversion.save(args.output)
    _tell_written(clock, [args.output])


def _demo(args: argparse.Namespace) -> None:
    from ledits_min.app import demo, outputs
    from ledits_min.image import save_image

    _check_outputs(args, {"-o": (args.output, outputs.PICTURES)})
    clock = _Clock()
    args.image = args.image or demo.SAMPLE
    picture = _open(args)
    save_image(demo.demo_sheet(_load_model(args), picture), args.output)
    _tell_written(clock, [args.output])


def _inspect(args: argparse.Namespace) -> None:
    from ledits_min.weights.inspect import inspect

    report = inspect(args.checkpoint, **_parts(args))
    _tell(str(report))
    if report.verdict == "refused":
        raise InputError(report.reason)


def is_saved_inversion(path: str) -> bool:
    """Whether `path` holds a safetensors header, or claims to by its name and is no picture; False if unreadable."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            start = file.read(16)
    except (OSError, ValueError):
        return False
    header = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES
    return header or (Path(path).suffix.lower() == ".safetensors" and not start.startswith(_PICTURE_MAGIC))


def _check_outputs(args: argparse.Namespace, wanted: dict[str, tuple[str | Path | None, Sequence[str]]]) -> None:
    from ledits_min.app.outputs import check_outputs

    outputs = {option: (Path(path), suffixes) for option, (path, suffixes) in wanted.items() if path is not None}
    loras = [path for path, _ in args.lora or []]
    inputs = [args.image, args.model, args.vae, args.text_encoder, args.tokenizer, *loras]
    check_outputs(outputs, inputs, args.overwrite)


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


def _parts(args: argparse.Namespace) -> dict[str, Any]:
    """The options that say what a checkpoint is made of, as keywords."""
    names = ("vae", "text_encoder", "tokenizer", "prediction_type", "ema")
    return {"lora": args.lora or [], **{name: getattr(args, name) for name in names}}


def _load_model(args: argparse.Namespace) -> LEdits:
    from ledits_min.weights.survey import survey_whole

    survey_whole(args.model, **_parts(args))  # a bad file is refused before torch and transformers are imported
    from ledits_min import LEdits

    ledits = LEdits.from_pretrained(args.model, device=args.device, dtype=args.dtype, **_parts(args))
    for note in ledits.notes:
        _notice(args, note)
    return ledits


def _check_prompt(ledits: LEdits, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prompt that is too long is told when it is used
        ledits.text.check(text)


def _run_inversion(args: argparse.Namespace, ledits: LEdits, picture: Image.Image) -> Inversion:
    size = args.size
    longer = max(size) if isinstance(size, tuple) else size or 0
    if longer > 1.5 * ledits.native_size:
        warnings.warn(
            f"--size asks for {longer} pixels, the model was trained at {ledits.native_size}; expect repeated shapes",
            stacklevel=2,
        )
    inversion = ledits.invert(
        picture,
        source=args.source or "",
        source_guidance_scale=args.source_guidance_scale,
        num_steps=args.steps,
        skip=args.skip,
        eta=1.0 if args.eta is None else args.eta,
        seed=args.seed or 0,
        size=size,
    )
    factor = ledits.vae.config.factor
    height, width = (factor * side for side in inversion.latents.shape[-2:])
    if size is not None and size not in (max(width, height), (width, height)):
        asked = " x ".join(map(str, size)) if isinstance(size, tuple) else size
        _notice(args, f"--size {asked}: this model works in steps of {factor} pixels; {width} x {height} is used")
    return inversion


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
    """Ctrl-C and SIGTERM both end a run through every `finally`."""
    ends: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: _Terminated}

    def stop(number: int, _: object) -> NoReturn:
        for each in ends:
            signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        raise ends[number]

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A shell starts what runs in its background with Ctrl-C ignored; it stays so.
    before = {each: signal.getsignal(each) for each in ends if signal.getsignal(each) is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler or signal.SIG_DFL)


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


_COMMANDS = {"edit": _edit, "invert": _invert, "demo": _demo, "inspect": _inspect}

if __name__ == "__main__":
    sys.exit(main())
