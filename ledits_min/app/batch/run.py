"""`ledits batch`: a job table in batches that the whole table fixes, so that a run can be killed at any moment, resumed
as often as it takes, and leaves the bytes of an undisturbed one.

Half precision rounds differently in batches of other shapes. So a batch is cut from all the jobs that differ in picture
and seed alone, whether they are done or not, and is computed whole where any of them is missing. A job is done when
its output is whole and carries the hash of all that decides its pixels; nothing else is remembered.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from ledits_min.app import outputs
from ledits_min.app.batch.folder import (
    ERRORS,
    HASH,
    Failure,
    check_others,
    check_place,
    found_at,
    held,
    make_folder,
    write_errors,
)
from ledits_min.app.batch.jobs import Job
from ledits_min.app.inputs import (
    check_concepts,
    check_prompt,
    concept_fields,
    edit_settings,
    inversion_settings,
    load_model,
    only_where,
)
from ledits_min.app.terminal import disk_is_full, tell
from ledits_min.engine.budget import count
from ledits_min.engine.progress import progress_bar
from ledits_min.engine.request import PromptToPrompt, check_prompts
from ledits_min.errors import InputError, RunError, quoted
from ledits_min.files.opening import open_image, upright_size
from ledits_min.files.write import save_image
from ledits_min.sega import Concept

if TYPE_CHECKING:
    from ledits_min.pipeline import LEdits

AHEAD, BEHIND = 2, 4  # batches that are decoded before their turn, and that wait to be written


@dataclass(frozen=True)
class Task:
    """A job that can be tried.

    picture   sha256 of the file's bytes
    settings  everything else that decides the pixels, every default resolved
    """

    job: Job
    picture: str
    settings: dict[str, Any]

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps([self.picture, self.settings], sort_keys=True).encode()).hexdigest()

    def is_done(self, folder: Path) -> bool:
        found = found_at(folder / self.job.output)
        return found is not None and found.hash == self.hash


@dataclass(frozen=True)
class Batch:
    """Tasks that differ in picture and seed alone, and the lines of those that are missing."""

    tasks: tuple[Task, ...]
    missing: tuple[int, ...]


@dataclass
class Outcome:
    """How the missing tasks of a batch ended: the lines of jobs that are done now, and the failures."""

    done: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


# --- what is to be done ---------------------------------------------------------------------------------------------


def plan(
    jobs: Sequence[Job], ledits: LEdits, folder: Path, batch_size: int, attention: PromptToPrompt | None,
    overwrite: bool = False,
) -> tuple[list[Batch], list[Failure]]:  # fmt: skip
    """The batches that hold a missing job, in the table's order, and the jobs that cannot be tried.

    `ledits` needs no weights. Pictures are read for their hashes and sizes; nothing is decoded. InputError where the
    folder holds a batch's pictures of other settings, unless they are to be overwritten.
    """
    groups: dict[str, list[Task]] = {}
    failures, others, done = [], list[str](), set[int]()
    look, check_text = cache(_look), cache(lambda text: check_prompt(ledits, text))
    with progress_bar("reading", len(jobs), "job", wanted=True) as bar:
        for job in jobs:
            try:
                if job.fault:
                    raise InputError(job.fault)
                picture, size = look(job.path)
                task = _task(job, picture, size, ledits, attention)
                for text in _texts(task.settings):
                    check_text(text)
                found = found_at(folder / job.output)
                if found is not None and found.hash == task.hash:
                    done.add(job.line)
                elif found is not None and found.hash:
                    others.append(job.output)
            except (InputError, OSError) as error:
                failures.append(Failure.of(job, error))
            else:
                shared = {name: value for name, value in task.settings.items() if name != "seeds"}
                groups.setdefault(json.dumps(shared), []).append(task)
            bar.update()
    check_others(folder, others, overwrite)
    batches = []
    for tasks in groups.values():
        for start in range(0, len(tasks), batch_size):
            some = tuple(tasks[start : start + batch_size])
            batches.append(Batch(some, tuple(task.job.line for task in some if task.job.line not in done)))
    return [batch for batch in batches if batch.missing], failures


def _look(path: Path) -> tuple[str, tuple[int, int]]:
    """sha256 and upright size of a picture."""
    size = upright_size(path)
    return _sha256(path), size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _task(
    job: Job, picture: str, size: tuple[int, int], ledits: LEdits, attention: PromptToPrompt | None
) -> Task:  # fmt: skip
    """The job with every default resolved; InputError where the model refuses a value."""
    args = argparse.Namespace(**job.options)
    made = replace(inversion_settings(args, ledits), seeds=(args.seed or 0,))
    edit = {**edit_settings(args, ledits), **only_where(args)}
    if attention is not None:
        check_prompts(made.source, edit["target"], edit["negative"])
        ledits.named_words(attention, made.source, edit["target"])
    worked_at, squared = ledits.framing.worked_at(size, args.size)
    made = replace(made, squared=squared)
    check_concepts(args, ledits)
    concepts = [Concept(**fields) for fields in concept_fields(args)]
    return Task(job, picture, outputs.planned_settings(ledits, made, worked_at, concepts, attention, edit))


def _texts(settings: dict[str, Any]) -> list[str]:
    texts = [settings["source"], settings["target"], settings["negative"]]
    return texts + [concept["text"] for concept in settings["concepts"]]


# --- one batch ------------------------------------------------------------------------------------------------------


@dataclass
class Opened:
    """A batch with its pictures decoded; no members where none is left that could be done.

    members  the tasks whose picture is whole, in order, and the pictures
    missing  those of them that are to be written
    """

    members: list[tuple[Task, Image.Image]] = field(default_factory=list)
    missing: list[Task] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)


class Editor:
    """Does one batch after another; `open`, `edit` and `save` may each have a thread of its own."""

    def __init__(self, ledits: LEdits, folder: Path, attention: PromptToPrompt | None, overwrite: bool) -> None:
        self.ledits, self.folder, self.attention, self.overwrite = ledits, folder, attention, overwrite

    def __call__(self, batch: Batch) -> Outcome:
        return self.save(*self.edit(self.open(batch)))

    def open(self, batch: Batch) -> Opened:
        """Decode the pictures: first of what is missing, then, if any of that can be done, of its neighbours."""
        opened, pictures = Opened(), dict[int, Image.Image]()
        missing = [task for task in batch.tasks if task.job.line in batch.missing]
        for task in missing:
            if task.is_done(self.folder):  # by a worker that died before it could say so
                opened.outcome.done.append(task.job.line)
                continue
            try:
                pictures[task.job.line] = _decoded(task)
                check_place(self.folder / task.job.output, self.overwrite)
                opened.missing.append(task)
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends this job and no other
                opened.outcome.failures.append(Failure.of(task.job, error))
        if opened.missing:
            failed = {failure.line for failure in opened.outcome.failures}
            for task in batch.tasks:
                if task.job.line not in pictures and task.job.line not in failed:
                    with suppress(InputError, OSError):  # changed or gone since the plan was made: nobody's neighbour
                        pictures[task.job.line] = _decoded(task)
            opened.members = [(task, pictures[task.job.line]) for task in batch.tasks if task.job.line in pictures]
        return opened

    def edit(self, opened: Opened) -> tuple[list[tuple[Task, Image.Image]], Outcome]:
        """All members together; where that fails, what is missing one by one, so that only the guilty fail."""
        results, outcome = [], opened.outcome
        groups = [opened.members] if opened.missing else []
        while groups:
            group = groups.pop(0)
            try:
                images = self._edit_together(group)
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends these jobs and no others
                if len(group) > 1:
                    groups = [[member] for member in opened.members if member[0] in opened.missing]
                else:
                    outcome.failures.append(Failure.of(group[0][0].job, error))
                continue
            edited = [(task, image) for (task, _), image in zip(group, images, strict=True)]
            results += [(task, image) for task, image in edited if task in opened.missing]
        return results, outcome

    def _edit_together(self, members: Sequence[tuple[Task, Image.Image]]) -> list[Image.Image]:
        settings, seeds = members[0][0].settings, [task.settings["seeds"][0] for task, _ in members]
        names = ["source", "source_guidance_scale", "num_steps", "skip", "eta", "solver_order"]
        names += ["target", "guidance_scale", "negative"]
        _, result = self.ledits.invert_and_edit(
            [picture for _, picture in members],
            **{name: settings[name] for name in (*names, "momentum_scale", "momentum_beta", "output_size")},
            seed=seeds,
            size=None if settings.get("squared") else tuple(settings["size"]),
            concepts=[Concept(**fields) for fields in settings["concepts"]],
            attention=self.attention,
            mask_image=members[0][0].job.options["only_where"],  # the same content for all, as their settings say
            progress=False,
        )
        return result.images

    def save(self, results: Sequence[tuple[Task, Image.Image]], outcome: Outcome) -> Outcome:
        """Write each output whole. A full disk ends the run; whatever else stands in the way ends that job."""
        for task, image in results:
            try:
                text = {HASH: task.hash, **outputs.metadata(task.settings)}
                save_image(image, self.folder / task.job.output, text, through_links=False)
                outcome.done.append(task.job.line)
            except (InputError, OSError) as error:
                if disk_is_full(error):
                    raise
                outcome.failures.append(Failure.of(task.job, error))
        return outcome


def _decoded(task: Task) -> Image.Image:
    picture, mask = open_image(task.job.path), task.job.options.get("only_where")
    for path, before in ((task.job.path, task.picture), (mask, task.settings.get("only_where"))):
        if path is not None and _sha256(Path(path)) != before:
            raise InputError(f"{quoted(path)} was changed during the run; run it again")
    return picture


# --- all of them ----------------------------------------------------------------------------------------------------


Outcomes = Generator[Outcome, None, None]


class Workers(Protocol):
    """How batches are done. `ledits` is for planning, and may be without weights."""

    ledits: LEdits

    def __enter__(self) -> Workers: ...

    def __exit__(self, *_: object) -> None: ...

    def outcomes(self, batches: Sequence[Batch], folder: Path, attention: PromptToPrompt | None) -> Outcomes:
        """One a batch, in any order."""


class LocalWorkers:
    """This process: pictures are decoded ahead in one thread, and written behind in another."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.ledits, self.overwrite = load_model(args), args.overwrite

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.ledits.close()

    def outcomes(self, batches: Sequence[Batch], folder: Path, attention: PromptToPrompt | None) -> Outcomes:
        editor = Editor(self.ledits, folder, attention, self.overwrite)
        waiting = iter(batches)
        decoder, writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        try:
            opened = deque(decoder.submit(editor.open, batch) for batch in islice(waiting, AHEAD))
            saved: deque[Future[Outcome]] = deque()
            while opened:
                edited = editor.edit(opened.popleft().result())
                opened.extend(decoder.submit(editor.open, batch) for batch in islice(waiting, 1))
                saved.append(writer.submit(editor.save, *edited))
                while saved and (saved[0].done() or len(saved) > BEHIND):
                    yield saved.popleft().result()
            while saved:
                yield saved.popleft().result()
        finally:
            decoder.shutdown(cancel_futures=True)
            writer.shutdown()  # what is edited is written, however the run ends


def run(jobs: Sequence[Job], args: argparse.Namespace, make_engine: Callable[[argparse.Namespace], Workers]) -> None:
    """Do what is missing of the table; RunError where jobs failed."""
    began = time.perf_counter()
    folder = Path(args.output)
    make_folder(folder)
    attention = None if args.p2p is None else PromptToPrompt(**args.p2p)
    with held(folder), make_engine(args) as engine:
        batches, failures = plan(jobs, engine.ledits, folder, args.batch_size, attention, args.overwrite)
        write_errors(folder, failures)
        missing = sum(len(batch.missing) for batch in batches)
        already, wrote = len(jobs) - len(failures) - missing, 0
        with (
            progress_bar("batch", missing, "job", wanted=True) as bar,
            closing(engine.outcomes(batches, folder, attention)) as outcomes,
        ):
            for outcome in outcomes:
                wrote += len(outcome.done)
                bar.update(len(outcome.done) + len(outcome.failures))
                if outcome.failures:
                    failures += outcome.failures
                    bar.set_postfix(failed=len(failures))
                    write_errors(folder, failures)
    seconds = time.perf_counter() - began
    were = f"; {already} of {len(jobs)} were done already" if already else ""
    tell(f"wrote {count(wrote, 'picture')} to {quoted(folder)} in {seconds:.1f} s{were}")
    if failures:
        jobs_failed = f"{len(failures)} of {count(len(jobs), 'job')} failed"
        raise RunError(f"{jobs_failed}; {quoted(folder / ERRORS)} says why, one line each")
