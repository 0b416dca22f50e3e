"""The commands of `ledits`, each a function of its parsed options; only one that runs imports torch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ledits_min.app.batch.folder import check_folder
from ledits_min.app.batch.jobs import left_out, read_jobs
from ledits_min.app.cli.options import check_attention, check_ranges
from ledits_min.app.inputs import (
    check_concept_options,
    check_concepts,
    check_inversion_options,
    check_model,
    check_prompt,
    concept_fields,
    edit_picture,
    edit_settings,
    engine_of,
    inversion_settings,
    invert_picture,
    is_saved_inversion,
    load_inversion,
    load_model,
    only_where,
    open_picture,
    parts,
    texts_of,
    users_mask,
)
from ledits_min.app.places import PICTURES, check_outputs
from ledits_min.app.terminal import Clock, notice, tell, tell_written
from ledits_min.errors import InputError, check_whole, quoted, warn
from ledits_min.files.header import read_header
from ledits_min.files.write import atomic_write, check_output_picture, save_image

if TYPE_CHECKING:
    from PIL import Image

    from ledits_min import Concept


def run_edit(args: argparse.Namespace) -> None:
    check_ranges(args)
    if args.masks is not None and not args.concepts:
        raise InputError("--masks shows where concepts acted, and there is none; pass --add or --remove")
    saved = is_saved_inversion(args.image)
    check_attention(args, saved)
    check_concept_options(args)
    out = Path(f"{Path(args.image).stem}.ledits.png" if args.output is None else args.output)
    if not args.explain:
        check_outputs(args, {
            "-o": (out, PICTURES),
            "--masks": (args.masks, PICTURES),
            "--report": (args.report, (".json",)),
            "--save-inversion": (args.save_inversion, (".safetensors",)),
        })  # fmt: skip
    clock = Clock()
    picture = _picture_or_inversion(args, saved)
    if picture is not None:
        check_output_picture(out, picture.size)
    check_model(args, texts_of(args))
    if args.explain:
        _tell_plan(args, picture)
    else:
        _edit(args, picture, out, clock)


def _picture_or_inversion(args: argparse.Namespace, saved: bool) -> Image.Image | None:
    """The picture; of a saved inversion its header is looked at, and None comes back."""
    if not saved:
        return open_picture(args)
    check_inversion_options(args)
    read_header(args.image)
    return None


def _edit(args: argparse.Namespace, picture: Image.Image | None, out: Path, clock: Clock) -> None:
    """Everything that needs torch; `picture` is None where an inversion is given."""
    from ledits_min import Concept, PromptToPrompt
    from ledits_min.app import outputs
    from ledits_min.app.cli.explain import latent_size, plan_edit
    from ledits_min.engine.request import check_prompts

    concepts = [Concept(**fields) for fields in concept_fields(args)]
    attention = None if args.p2p is None else PromptToPrompt(**args.p2p)
    made = load_inversion(args) if picture is None else None
    source = made.settings.source if made else args.source or ""
    if attention is not None:
        check_prompts(source, args.target, args.negative)
    if made is not None:
        picture = outputs.original_picture(made)
        check_output_picture(out, picture.size)
    assert picture is not None
    mask = users_mask(args, picture.size)
    ledits = load_model(args)
    for text in texts_of(args):
        check_prompt(ledits, text)  # now, not after minutes of inversion
    if attention is not None:
        ledits.named_words(attention, source, args.target)
    check_concepts(args, ledits)
    _warn_of_doubtful(args, concepts)
    clock.lap("load")
    settings = edit_settings(args, ledits)
    edit = {**settings, "concepts": concepts, "trace": args.report is not None, "attention": attention}
    edit["mask_image"] = mask
    if made is None and args.save_inversion is None:
        inversion, result = edit_picture(args, ledits, picture, **edit)
    else:  # what is saved must give the same picture again, to the last bit, so it is not made in the edit's batches
        inversion = made or invert_picture(args, ledits, picture)
        clock.lap("invert", ledits.runner.overhead.take())
        result = ledits.edit(inversion, **edit)
    clock.lap("edit", ledits.runner.overhead.take())

    masks = [mask[0] for mask in result.masks]
    values = outputs.settings(ledits, inversion, concepts, attention, {**settings, **only_where(args)})
    if args.masks is not None:
        save_image(outputs.mask_picture(picture, concepts, masks), args.masks)
    if args.save_inversion is not None:
        inversion.save(args.save_inversion)
    if args.report is not None:
        plan = plan_edit(
            ledits, inversion.settings, latent_size(inversion), edit, ledits.device,
            inverted=made is not None, apart=args.save_inversion is not None,
        )  # fmt: skip
        evaluations = {"planned": plan.to_json(), "evaluated": ledits.runner.evaluations}
        content = outputs.report(
            values, masks, result.trace, clock.laps, args.said, str(ledits.device), evaluations
        )  # fmt: skip
        atomic_write(args.report, content)
    save_image(result.images[0], out, outputs.metadata(values))  # last: where it is, the others are
    tell_written(clock, [out, args.masks, args.report, args.save_inversion])


def _tell_plan(args: argparse.Namespace, picture: Image.Image | None) -> None:
    """What the same command without --explain would evaluate. No weight is read and nothing is written."""
    from ledits_min import Concept, PromptToPrompt
    from ledits_min.app.cli.explain import fitted_size, latent_size, plan_edit, without_weights
    from ledits_min.engine.request import check_prompts

    concepts = [Concept(**fields) for fields in concept_fields(args)]
    made = load_inversion(args) if picture is None else None
    if made is not None:
        users_mask(args, made.original_sizes[0])
    elif picture is not None:
        users_mask(args, picture.size)
    ledits, device = without_weights(args.model, args.device, args.dtype, engine_of(args), **parts(args))
    ledits = ledits.with_preset(args.preset)
    for text in texts_of(args):
        check_prompt(ledits, text)
    if made is not None:
        settings, latents = made.settings, latent_size(made)
    else:
        assert picture is not None
        settings, latents = inversion_settings(args, ledits), fitted_size(ledits, picture, args.size)
    attention = None if args.p2p is None else PromptToPrompt(**args.p2p)
    if attention is not None:
        check_prompts(settings.source, args.target, args.negative)
    edit = {**edit_settings(args, ledits), "concepts": concepts, "attention": attention}
    plan = plan_edit(
        ledits, settings, latents, edit, device, inverted=made is not None, apart=args.save_inversion is not None
    )  # fmt: skip
    for line in plan.lines():
        tell(line)


def run_sweep(args: argparse.Namespace) -> None:
    from ledits_min.app.sweep import grid as sweep

    grid = sweep.Grid.of(args)
    check_concept_options(args)
    saved = is_saved_inversion(args.image)
    check_attention(args, saved)
    out = Path(f"{Path(args.image).stem}.sweep.png" if args.output is None else args.output)
    beside = Path(f"{os.path.splitext(out)[0]}.json")
    check_outputs(args, {"-o": (out, PICTURES), "the numbers beside -o,": (beside, (".json",))})
    clock = Clock()
    picture = _picture_or_inversion(args, saved)
    check_model(args, texts_of(args))

    from ledits_min import Concept, PromptToPrompt
    from ledits_min.app import outputs
    from ledits_min.engine.request import check_prompts

    made = load_inversion(args) if picture is None else None
    source = made.settings.source if made else args.source or ""
    if args.p2p is not None:
        check_prompts(source, args.target, args.negative)
    if made is not None:
        picture = outputs.original_picture(made)
    assert picture is not None
    users_mask(args, picture.size)  # refused now, not after the model is loaded
    ledits = load_model(args)
    concepts = [Concept(**fields) for fields in concept_fields(grid.cells[0][0])]
    for text in texts_of(args):
        check_prompt(ledits, text)
    if args.p2p is not None:
        ledits.named_words(PromptToPrompt(**args.p2p), source, args.target)
    _warn_of_doubtful(args, concepts)
    clock.lap("load")
    side = sweep.cell_side(grid, picture)
    edited, inversions = sweep.run(grid, ledits, picture, made, side)
    clock.lap("sweep", ledits.runner.overhead.take())

    shared = outputs.common([one.settings for row in edited for one in row])
    sheet = sweep.draw(grid, edited, picture, side, outputs.parameters(shared))
    atomic_write(beside, sweep.numbers(grid, edited, inversions, shared, clock, args.said, str(ledits.device)))
    save_image(sheet, out, outputs.metadata(shared))
    tell_written(clock, [out, beside])


def run_invert(args: argparse.Namespace) -> None:
    check_ranges(args)
    if is_saved_inversion(args.image):
        raise InputError(f"{quoted(args.image)} is a saved inversion already or a model; pass a picture")
    check_outputs(args, {"-o": (args.output, (".safetensors",))})
    clock = Clock()
    picture = open_picture(args)
    check_model(args, [args.source or ""])
    inversion = invert_picture(args, load_model(args), picture)
    inversion.save(args.output)
    tell_written(clock, [args.output])


def run_batch(args: argparse.Namespace) -> None:
    check_ranges(args)
    check_whole("--batch-size", args.batch_size, 1, 1024)
    check_whole("--workers", args.workers, 1, 4096, optional=True)
    if args.workers is not None and args.engine != "ray":
        raise InputError("--workers belongs to --engine ray; the local engine is one process")
    jobs = read_jobs(Path(args.jobs), args)
    if not any(job.options["concepts"] for job in jobs):
        check_concept_options(args)
    only_where(args)
    check_folder(Path(args.output), jobs)
    check_model(args, texts_of(args))
    for text in left_out(Path(args.jobs)):
        notice(args, text)
    from ledits_min.app.batch.run import LocalWorkers, run

    if args.engine == "ray":
        from ledits_min.app.batch.ray_engine import RayWorkers

        run(jobs, args, RayWorkers)
    else:
        run(jobs, args, LocalWorkers)


def run_demo(args: argparse.Namespace) -> None:
    from ledits_min.weights.read.survey import TINY

    args.image = args.image or str(TINY / "samples" / "portrait1.png")
    check_outputs(args, {"-o": (args.output, PICTURES)})
    clock = Clock()
    picture = open_picture(args)
    check_model(args)
    from ledits_min.app.cli import demo

    save_image(demo.demo_sheet(load_model(args), picture), args.output)
    tell_written(clock, [args.output])


def run_web(args: argparse.Namespace) -> None:
    from ledits_min.app.web.server import check_web, serve

    check_web(args)
    serve(args)


def run_inspect(args: argparse.Namespace) -> None:
    from ledits_min.weights.inspect import inspect

    report = inspect(args.checkpoint, **parts(args))
    tell(str(report))
    if report.verdict == "refused":
        raise InputError(report.reason)


def _warn_of_doubtful(args: argparse.Namespace, concepts: Sequence[Concept]) -> None:
    """Say what is allowed and hardly meant."""
    if not concepts and not args.target:
        warn("nothing to change is asked for; the picture is only reconstructed")
    directions: dict[str, list[bool]] = {}
    for concept in concepts:
        directions.setdefault(concept.text, []).append(concept.reverse)
    for text, reversed_ in directions.items():
        if len(set(reversed_)) > 1:
            warn(f"{quoted(text, 60)} is both added and removed")
        elif len(reversed_) > 1:
            warn(f"{quoted(text, 60)} is given {len(reversed_)} times; each counts")


COMMANDS = {
    "edit": run_edit,
    "batch": run_batch,
    "invert": run_invert,
    "sweep": run_sweep,
    "web": run_web,
    "demo": run_demo,
    "inspect": run_inspect,
}
