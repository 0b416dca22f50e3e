"""What the commands read: pictures, saved inversions, models. What can be refused without torch is refused first."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ledits_min.app.terminal import notice, quiet_stderr, waiting
from ledits_min.app.values import CONCEPT_KEYS, SOLVERS
from ledits_min.app.words import check_words
from ledits_min.errors import InputError, quoted, warn
from ledits_min.files.door import read_file
from ledits_min.files.header import MAX_HEADER_BYTES

if TYPE_CHECKING:
    from PIL import Image

    from ledits_min import Inversion, LEdits, Result
    from ledits_min.files.region import Plane
    from ledits_min.inversion import InversionSettings

MAX_MASK = 256 * 2**20  # bytes
_PICTURE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"II*\0", b"MM\0*")
_MADE_WITH = ("source", "source-guidance-scale", "steps", "skip", "eta", "solver", "seed", "size", "save-inversion")


def is_saved_inversion(path: str) -> bool:
    """Whether `path` holds a safetensors header, or claims to by its name and is no picture; False if unreadable."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            start = file.read(16)
    except (OSError, ValueError):
        return False
    header = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES
    return header or (Path(path).suffix.lower() == ".safetensors" and not start.startswith(_PICTURE_MAGIC))


def open_picture(args: argparse.Namespace) -> Image.Image:
    from ledits_min.files.opening import open_image

    notices: list[str] = []
    # libtiff writes what it finds damaged to descriptor 2; nobody else has anything to say yet.
    is_tiff = Path(args.image).suffix.lower() in (".tif", ".tiff")
    with quiet_stderr() if is_tiff else nullcontext():
        picture = open_image(args.image, notices=notices)
    for text in notices:
        notice(args, text)
    return picture


def check_inversion_options(args: argparse.Namespace) -> None:
    """The options that made a saved inversion cannot be given again, because they would have no effect."""
    for option in _MADE_WITH:
        if getattr(args, option.replace("-", "_"), None) is not None:
            raise InputError(
                f"--{option} has no effect on a saved inversion such as {quoted(args.image)}; leave it out, or pass "
                "the picture instead"
            )
    if args.preset is not None:
        notice(args, f"--preset {args.preset}: a saved inversion keeps the steps and the solver that it was made with")


def load_inversion(args: argparse.Namespace) -> Inversion:
    from ledits_min import Inversion

    inversion = Inversion.load(args.image)
    if len(inversion.originals) != 1:
        raise InputError(f"{quoted(args.image)} holds {len(inversion.originals)} pictures; edit those from Python")
    return inversion


def parts(args: argparse.Namespace) -> dict[str, Any]:
    """The options that say what a checkpoint is made of, as keywords."""
    names = ("vae", "text_encoder", "tokenizer", "prediction_type", "ema", "clip_skip", "insist")
    return {"lora": args.lora or [], "embedding": args.embedding or [], **{name: getattr(args, name) for name in names}}


def check_model(args: argparse.Namespace, texts: Iterable[str] = ()) -> None:
    """InputError for a checkpoint that will not load, and for a word in `texts` that it does not know."""
    from ledits_min.weights.read.survey import survey_whole

    survey = survey_whole(args.model, **parts(args))
    check_words(survey.tokenizer, texts, [embedding.word for embedding in survey.words])


def texts_of(args: argparse.Namespace) -> list[str]:
    """Every prompt on the command line."""
    return [args.source or "", args.target, args.negative, *(fields["text"] for fields in args.concepts or [])]


def engine_of(args: argparse.Namespace) -> str:
    return "plain" if getattr(args, "plain", False) else "fast"


def load_model(args: argparse.Namespace) -> LEdits:
    with waiting(f"loading {quoted(args.model, 60)}"):
        from ledits_min import LEdits

        ledits = LEdits.from_pretrained(
            args.model, device=args.device, dtype=args.dtype, compile=args.compile, engine=engine_of(args),
            preset=getattr(args, "preset", None), **parts(args),
        )  # fmt: skip
    for text in ledits.notes:
        notice(args, text)
    return ledits


def check_prompt(ledits: LEdits, text: str) -> None:
    """InputError for words the model does not know, a warning for those it will not read."""
    ledits.text.check(text)


def concept_fields(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The fields of each `Concept`; where one does not set a value, that of an option of its own, if there is one."""
    given = {field: getattr(args, name, None) for name, (field, _) in CONCEPT_KEYS.items()}
    shared = {field: value for field, value in given.items() if value is not None}
    return [{**shared, **fields} for fields in args.concepts or []]


def check_concept_options(args: argparse.Namespace) -> None:
    """InputError for an option that is of concepts where there is none, and for a mask that cannot be read."""
    for name in ("mask", "only_where"):
        if getattr(args, name) is not None and not args.concepts:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is of concepts, and there is none; pass --add or --remove")
    if args.mask is not None and all("mask" in concept for concept in args.concepts):
        raise InputError("--mask has no effect: every concept sets its own; leave one of them out")
    only_where(args)


def only_where(args: argparse.Namespace) -> dict[str, Any]:
    """What `outputs.settings` say of --only-where: a digest of the file, which decides pixels."""
    if args.only_where is None:
        return {}
    return {"only_where": hashlib.sha256(read_file(args.only_where, "a mask", MAX_MASK)).hexdigest()}


def users_mask(args: argparse.Namespace, size: tuple[int, int]) -> Plane | None:
    """The mask of --only-where for a picture of `size`; InputError for one that would be refused."""
    if args.only_where is None:
        return None
    from ledits_min.files.region import open_masks

    return open_masks(args.only_where, [size])[0]


def edit_settings(args: argparse.Namespace, ledits: LEdits) -> dict[str, Any]:
    """The arguments of `LEdits.edit` that are plain values."""
    return {
        "target": args.target,
        "guidance_scale": ledits.defaults.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "negative": args.negative,
        "momentum_scale": args.momentum_scale,
        "momentum_beta": args.momentum_beta,
        "output_size": args.output_size,
    }


def check_concepts(args: argparse.Namespace, ledits: LEdits) -> None:
    """InputError for concepts that `LEdits.edit` would refuse: before the inversion, which may take minutes."""
    from ledits_min import Concept

    ledits.edit_settings(args.target, None, args.negative, [Concept(**fields) for fields in concept_fields(args)])


def inversion_settings(args: argparse.Namespace, ledits: LEdits) -> InversionSettings:
    """What the inversion would note down; InputError for what it would refuse."""
    eta = 1.0 if args.eta is None else args.eta
    return ledits.inversion_settings(
        args.source or "", args.source_guidance_scale, args.steps, args.skip, eta, solver_order=solver_order(args)
    )


def invert_picture(args: argparse.Namespace, ledits: LEdits, picture: Image.Image, **more: Any) -> Inversion:
    """`more` holds further arguments of `LEdits.invert`."""
    inversion = ledits.invert(picture, **_inversion_options(args, ledits), **more)
    _tell_size(args, ledits, inversion)
    return inversion


def edit_picture(
    args: argparse.Namespace, ledits: LEdits, picture: Image.Image, **edit: Any
) -> tuple[Inversion, Result]:
    """Inversion and edit in the same calls of the UNet; `edit` holds arguments of `LEdits.edit`."""
    inversion, result = ledits.invert_and_edit(picture, **_inversion_options(args, ledits), **edit)
    _tell_size(args, ledits, inversion)
    return inversion, result


def solver_order(args: argparse.Namespace) -> int | None:
    """Of --solver; None: the model's default."""
    return None if args.solver is None else SOLVERS.index(args.solver) + 1


def _inversion_options(args: argparse.Namespace, ledits: LEdits) -> dict[str, Any]:
    """The arguments of `LEdits.invert` besides the picture."""
    size = args.size
    longer = max(size) if isinstance(size, tuple) else size or 0
    if longer > 1.5 * ledits.native_size and not ledits.defaults.one_size:  # which says so itself
        warn(f"--size asks for {longer} pixels, the model was trained at {ledits.native_size}; expect repeated shapes")
    return {
        "source": args.source or "",
        "source_guidance_scale": args.source_guidance_scale,
        "num_steps": args.steps,
        "skip": args.skip,
        "eta": 1.0 if args.eta is None else args.eta,
        "solver_order": solver_order(args),
        "seed": args.seed or 0,
        "size": size,
    }


def _tell_size(args: argparse.Namespace, ledits: LEdits, inversion: Inversion) -> None:
    """Say so where the model works at another size than was asked for."""
    from ledits_min.app.outputs import worked_at

    size, (width, height) = args.size, worked_at(ledits, inversion)
    if size is not None and size not in (max(width, height), (width, height)):
        asked = " x ".join(map(str, size)) if isinstance(size, tuple) else size
        factor = ledits.vae.config.factor
        notice(args, f"--size {asked}: this model works in steps of {factor} pixels; {width} x {height} is used")
