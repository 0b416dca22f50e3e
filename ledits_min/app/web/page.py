"""The page of `ledits web`: what each of its parts does. What a visitor has done is in a `Session` of their own."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ledits_min import InputError, Stopped
from ledits_min.app.cli.command import exit_and_line
from ledits_min.app.values import SOLVERS
from ledits_min.app.web import views
from ledits_min.app.web.form import (
    NUMBERS,
    ROWS,
    Row,
    filled,
    fresh_row,
    in_rows,
    index_of,
    kind_of,
    read_form,
    recall,
    remember,
    write_form,
)
from ledits_min.app.web.layout import ANOTHER_SEED, CAN_EDIT, KEEP, RECALL, SAMPLES, Layout, kinds, size_info
from ledits_min.app.web.models import CUSTOM, EXAMPLES, SUGGESTIONS, Facts, Models
from ledits_min.app.web.session import KEPT_EDITS, Edit, Remembered, Session
from ledits_min.app.web.text import as_command, as_python
from ledits_min.app.web.visits import Limits, Visits
from ledits_min.files.opening import open_image

THUMBNAIL_BYTES = 30_000  # of one that a browser has kept

# How an event is served. Values come as the browser sent them, and `form.py` reads them. Computations run one at a
# time, the others are told their place in line.
RAW: dict[str, Any] = {"api_visibility": "private", "preprocess": False}
COMPUTING = RAW | {"concurrency_id": "editor", "concurrency_limit": 1}
OPENING = RAW | {"concurrency_id": "opener", "concurrency_limit": 2}  # an opened picture is large
AT_ONCE = RAW | {"queue": False, "show_progress": "hidden"}  # what computes nothing waits for nobody
IN_BROWSER: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}


class Answer(NamedTuple):
    """What an event changes on the page, and what is said under the picture; None leaves it there."""

    values: Sequence[Any]
    notices: Sequence[str] | None = None


class Page:
    """The page around some models. `blocks` is what Gradio serves, `visits` holds what the visitors have made."""

    def __init__(self, models: Models, place: Path, limits: Limits | None = None) -> None:
        self.models, self.visits = models, Visits(models, place, limits)
        with gr.Blocks(title="ledits", analytics_enabled=False, fill_width=True) as blocks:
            self._parts = Layout(models.names, models.facts(models.names[0]), self.visits.limits.upload)
            self._connect(self._parts)
        self.blocks: gr.Blocks = blocks.queue(max_size=64, default_concurrency_limit=4)

    def sweep(self) -> None:
        """Close the visits that nobody is there for, and drop what Gradio would keep of those that are over."""
        self.visits.sweep()
        queue = self.blocks._queue
        busy = {event.session_hash for event in list(queue.event_ids_to_events.values())}
        for name in list(queue.pending_event_ids_session):
            if name not in self.visits and name not in busy:
                queue.pending_event_ids_session.pop(name, None)
                queue.pending_messages_per_session.pop(name, None)

    def unread(self, name: str) -> int:
        """How many answers Gradio holds for a visit until its page reads them."""
        messages = self.blocks._queue.pending_messages_per_session.get(name)
        return 0 if messages is None else messages.qsize()

    def _connect(self, parts: Layout) -> None:
        blocks = gr.context.Context.root_block
        fields = [part for row in parts.rows for part in row.fields]
        boxes, names = [row.box for row in parts.rows], [row.kind for row in parts.rows]
        numbers = [parts.target, parts.source, parts.negative, parts.guidance]
        numbers += [parts.steps, parts.skip, parts.seed, parts.eta, parts.size, parts.solver]
        rows = [parts.count, parts.more, *boxes, *names, *fields]
        view = [parts.empty, parts.stage, parts.slider, parts.masks, parts.status, parts.download, parts.ready]
        past = [parts.history, parts.forget, parts.kept]
        told = [parts.copy, parts.command, parts.python]
        everything = [*view, *past, *told, parts.model, *numbers, *rows]
        self._count_of_everything = len(everything)

        arrived = self._on(
            blocks.load, self._arrive, [parts.kept, parts.visit], [parts.visit, *everything], AT_ONCE, js=RECALL
        )
        kept = {"fn": None, "inputs": [parts.kept, parts.visit], "outputs": None, "js": KEEP}
        arrived.then(**kept, **IN_BROWSER)
        blocks.unload(_left)
        self._on(parts.upload.upload, self._open, [], [*view, *past], OPENING)
        self._on(parts.samples.select, self._open_sample, [], [*view, *past], OPENING)
        parts.another.click(_ask, None, [parts.empty, parts.stage], **AT_ONCE)

        self._on(parts.more.click, self._add_row, [parts.model, parts.count, *fields], rows, AT_ONCE)
        self._on(
            parts.suggestions.select, self._take_suggestion, [parts.model, parts.steps, parts.skip, parts.count,
                                                              *names, *fields], [parts.skip, *rows], AT_ONCE,
        )  # fmt: skip
        for index, row in enumerate(parts.rows):
            remove = functools.partial(self._remove_row, index)
            self._on(row.remove.click, remove, [parts.model, parts.count, *fields], rows, AT_ONCE)
            self._on(
                row.kind.input, functools.partial(self._take_preset, index),
                [parts.model, parts.steps, parts.skip, parts.count, *names],
                [row.scale, row.threshold, row.warmup, parts.skip], AT_ONCE,
            )  # fmt: skip
            for dial in (row.scale, row.threshold, row.warmup):
                dial.input(None, None, row.kind, js=f"() => '{CUSTOM}'", **IN_BROWSER)
        parts.dice.click(None, None, parts.seed, js=ANOTHER_SEED, **IN_BROWSER)
        self._on(
            parts.model.input, self._switch, [parts.model, parts.count, *fields],
            [parts.guidance, parts.steps, parts.skip, parts.size, parts.ready_made, parts.suggestions, *rows],
            COMPUTING, show_progress_on=parts.model,
        )  # fmt: skip
        asked = [parts.ready, parts.target, parts.count, *(row.text for row in parts.rows)]
        gr.on([part.change for part in asked], None, asked, parts.run, js=CAN_EDIT, **IN_BROWSER)

        form = [*numbers, parts.count, *fields]
        chosen = self._on(
            parts.examples.select, self._take_example, [parts.model], [*view, *past, *numbers, *rows], OPENING
        )
        begin: dict[str, Any] = {
            "fn": self._begin, "inputs": None, "outputs": [parts.run, parts.stop, parts.message], **AT_ONCE,
        }  # fmt: skip
        asked_for = [parts.run.click, *(row.text.submit for row in parts.rows), parts.target.submit]
        for begun in (gr.on(asked_for, **begin), chosen.success(**begin)):
            edited = self._on(
                begun.then, self._edit, [parts.model, *form], [*view, *past, *told], COMPUTING,
                show_progress_on=parts.slider,
            )  # fmt: skip
            for ended in (edited.success, edited.failure):
                ended(_idle, None, [parts.run, parts.stop], **AT_ONCE)
            edited.then(**kept, **IN_BROWSER)
        parts.stop.click(self._stop, None, None, **AT_ONCE)
        self._on(parts.history.select, self._restore, [], everything, AT_ONCE)
        forgotten = self._on(parts.forget.click, self._forget, [], past, AT_ONCE)
        forgotten.then(**kept, **IN_BROWSER)

    def _on(
        self, event: Callable[..., Any], function: Callable[..., Answer], inputs: list[Any], outputs: list[Any],
        how: dict[str, Any], **more: Any,
    ) -> Any:  # fmt: skip
        """The event with its answer; a failure is one line under the picture, as it would be one at the terminal."""

        def answer(request: gr.Request, event: gr.EventData, progress: Any, *values: Any) -> list[Any]:
            try:
                given, notices = function(Asked(request.session_hash, event._data, progress), *values)
            except Stopped:
                given, notices = None, ["Stopped; the picture is as it was."]
            except Exception as error:  # noqa: BLE001
                _, line = exit_and_line(error)
                return [views.said([line], failed=True), *_nothing(outputs)]
            said = gr.skip() if notices is None else views.said(notices)
            return [said, *(_nothing(outputs) if given is None else given)]

        if how is COMPUTING:

            def served(
                request: gr.Request,
                event: gr.EventData,
                *values: Any,
                progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for it here
            ) -> list[Any]:
                return answer(request, event, progress, *values)

        else:

            def served(request: gr.Request, event: gr.EventData, *values: Any) -> list[Any]:  # type: ignore[misc]
                return answer(request, event, None, *values)

        # Gradio reads the annotations of what it calls, as types.
        served.__annotations__ |= {"request": gr.Request, "event": gr.EventData}
        return event(served, inputs, [self._parts.message, *outputs], **how, **more)

    def _arrive(self, asked: Asked, kept: str, before: str) -> Answer:
        parts = str(asked.visit).partition(".")
        session = self.visits.arrive(str(asked.visit), str(before))
        visit = [parts[2]]
        if session.history:
            return Answer([*visit, *self._everything(session, session.history[-1])])
        if session.picture is None and not session.remembered:
            self._recall(session, kept)
        view = self._view(session) if session.picture else [gr.update(visible=True), *[gr.skip()] * 6]
        shown = [*view, *self._past(session)]
        return Answer([*visit, *shown, *[gr.skip()] * (self._count_of_everything - len(shown))])

    def _recall(self, session: Session, kept: str) -> None:
        for number, (named, basis, change) in enumerate(recall(kept, self.models.names, KEPT_EDITS)):
            _, comma, coded = named["thumbnail"].partition("base64,")
            path = session.folder / f"remembered-{number}.jpg"
            try:
                if not comma or len(coded) > THUMBNAIL_BYTES:
                    continue
                path.write_bytes(base64.b64decode(coded, validate=True))
                open_image(path)
            except (ValueError, OSError):
                path.unlink(missing_ok=True)
                continue
            session.remembered.append(Remembered(named["model"], named["source"], basis, change, path))

    def _open(self, asked: Asked) -> Answer:
        session = self.visits.session(asked.visit)
        token = asked.told.get("token") if isinstance(asked.told, dict) else None
        try:
            picture = session.open(self.visits.uploaded(asked.visit, str(token)))
        finally:
            self.visits.end_upload(str(token), asked.visit)
        return Answer([*self._view(session), *self._past(session)], picture.notices)

    def _open_sample(self, asked: Asked) -> Answer:
        session, path = self.visits.session(asked.visit), SAMPLES[index_of(asked.told, SAMPLES, "sample")]
        picture = session.open(path, str(path))
        return Answer([*self._view(session), *self._past(session)], picture.notices)

    def _take_example(self, asked: Asked, model: str) -> Answer:
        """The sample, the words and the numbers; the edit follows by itself."""
        example = EXAMPLES[index_of(asked.told, EXAMPLES, "example")]
        session, facts, path = self.visits.session(asked.visit), self.models.facts(model), SAMPLES[example.sample]
        if not facts.embedded:
            raise InputError("the ready-made edits are for the embedded model")
        session.open(path, str(path))
        preset, defaults = facts.presets[example.preset], facts.defaults
        skip = round(preset.skip * defaults.num_steps)
        row = ["add", example.text, *preset.numbers, 0, defaults.mask]
        solver = SOLVERS[defaults.solver_order - 1]
        numbers = ["", "", "", defaults.guidance_scale, defaults.num_steps, skip, 0, 1, 0, solver]
        return Answer([*self._view(session), *self._past(session), *numbers, *_shown_rows(1, [row], facts)], ())

    def _take_suggestion(self, asked: Asked, model: str, steps: Any, skip: Any, count: Any, *values: Any) -> Answer:
        """Into the first row without words, with its preset."""
        facts, kinds_now, rows = self.models.facts(model), list(values[:ROWS]), in_rows(values[ROWS:])
        count = min(max(int(count), 1), ROWS)
        text = list(SUGGESTIONS)[index_of(asked.told, list(SUGGESTIONS), "suggestion")]
        free = next((index for index, row in enumerate(rows) if not str(row[1]).strip()), None)
        if free is None:
            raise InputError(f"all {ROWS} concepts have words; remove one first")
        name = SUGGESTIONS[text]
        if name not in facts.presets:
            raise InputError("these words are the embedded model's")
        rows[free] = ["add", text, *facts.presets[name].numbers, 0, facts.defaults.mask]
        kinds_now[free], count = name, max(count, free + 1)
        least, notices = _skip_of(facts, kinds_now[:count], free, steps, skip)
        return Answer([least, *_shown_rows(count, rows, facts)], notices)

    def _add_row(self, asked: Asked, model: str, count: Any, *values: Any) -> Answer:
        facts, rows, count = self.models.facts(model), in_rows(values), int(count)
        if 1 <= count < ROWS:
            rows[count] = fresh_row(facts)
        return Answer(_shown_rows(min(count + 1, ROWS), rows, facts))

    def _remove_row(self, index: int, asked: Asked, model: str, count: Any, *values: Any) -> Answer:
        """The rows behind close up."""
        facts, rows = self.models.facts(model), in_rows(values)
        rows = rows[:index] + rows[index + 1 :] + [fresh_row(facts)]
        return Answer(_shown_rows(max(1, int(count) - 1), rows, facts))

    def _take_preset(
        self, index: int, asked: Asked, model: str, steps: Any, skip: Any, count: Any, *names: Any
    ) -> Answer:
        facts = self.models.facts(model)
        if names[index] not in facts.presets:
            return Answer([gr.skip(), gr.skip(), gr.skip(), skip], ())
        least, notices = _skip_of(facts, names[: int(count)], index, steps, skip)
        return Answer([*facts.presets[names[index]].numbers, least], notices)

    def _switch(self, asked: Asked, model: str, count: Any, *values: Any) -> Answer:
        """The words stay; every number becomes the other model's own."""
        facts = self.models.facts(model)
        with self.models.use(model):
            defaults = facts.defaults
        rows = [[*row[:2], *fresh_row(facts)[2:]] for row in in_rows(values)]
        return Answer([
            defaults.guidance_scale, defaults.num_steps, defaults.skip, gr.update(value=0, info=size_info(facts)),
            gr.update(visible=facts.embedded), gr.update(visible=facts.embedded), *_shown_rows(int(count), rows, facts),
        ], ())  # fmt: skip

    def _begin(self, request: gr.Request) -> list[Any]:
        with suppress(InputError):  # the edit that follows says it
            self.visits.session(request.session_hash).begin()
        return [gr.update(visible=False), gr.update(visible=True), ""]

    def _stop(self, request: gr.Request) -> None:
        with suppress(InputError):  # nothing to stop
            self.visits.session(request.session_hash).stop()

    def _edit(self, asked: Asked, model: str, *values: Any) -> Answer:
        basis, change = read_form(values)
        with self.visits.computing(asked.visit) as session:
            made = session.edit(model, basis, change, lambda done, what: asked.progress(done, desc=what.capitalize()))
        return Answer([*self._view(session, made), *self._past(session, made), *self._told(made)], made.notices)

    def _restore(self, asked: Asked) -> Answer:
        session = self.visits.session(asked.visit)
        entries = _entries(session)
        return Answer(*self._everything_of(session, entries[index_of(asked.told, entries, "edit")]))

    def _everything_of(self, session: Session, entry: Edit | Remembered) -> tuple[list[Any], list[str]]:
        if isinstance(entry, Edit):
            session.restore(entry)
            return self._everything(session, entry), []
        name = Path(entry.source).name
        sample = next((path for path in SAMPLES if str(path) == entry.source), None)
        if sample is not None:
            session.open(sample, str(sample))
            notice = f"The words and numbers of an earlier visit are back, and {name}; press Edit to see it again."
        else:
            notice = f"The words and numbers of an earlier visit are back; choose {name} again and press Edit."
        view = self._view(session) if sample is not None else [gr.skip()] * 7
        hidden = [gr.update(visible=False), gr.skip(), gr.skip()]
        return [*view, *self._past(session, entry), *hidden, *self._filled_in(entry)], [notice]

    def _forget(self, asked: Asked) -> Answer:
        session = self.visits.session(asked.visit)
        session.forget()
        return Answer(self._past(session), ())

    def _everything(self, session: Session, made: Edit) -> list[Any]:
        return [*self._view(session, made), *self._past(session, made), *self._told(made), *self._filled_in(made)]

    def _filled_in(self, entry: Edit | Remembered) -> list[Any]:
        facts = self.models.facts(entry.model)
        values = write_form(entry.basis, entry.change, facts)
        numbers, count, rows = values[:NUMBERS], values[NUMBERS], in_rows(values[NUMBERS + 1 :])
        return [entry.model, *numbers, *_shown_rows(count, rows, facts)]

    def _view(self, session: Session, made: Edit | None = None) -> list[Any]:
        picture = session.picture if made is None else made.picture
        assert picture is not None
        status = views.opened(picture) if made is None else views.status(made)
        return [gr.update(visible=False), gr.update(visible=True), views.compare(picture, session, made),
                views.masks(made, session), status, views.download(made, session), "1"]  # fmt: skip

    def _past(self, session: Session, current: Edit | Remembered | None = None) -> list[Any]:
        entries = _entries(session)
        thumbnails = [views.data_url(each.thumbnail) for each in reversed(entries)]
        kept = remember(entries[::-1], self.models.facts, thumbnails)
        return [views.history(entries, session, current), gr.update(visible=bool(entries)), kept]

    def _told(self, made: Edit) -> list[Any]:
        given = self.models.given
        return [gr.update(visible=True), as_command(made, given), as_python(made, given)]


class Asked(NamedTuple):
    """What comes with an event besides its values: whose it is, what the browser says of it, how to tell progress."""

    visit: str | None
    told: Any
    progress: Any


def _entries(session: Session) -> list[Edit | Remembered]:
    """The newest first."""
    entries: list[Edit | Remembered] = [*reversed(session.history), *reversed(session.remembered)]
    return entries[:KEPT_EDITS]


def _nothing(outputs: Sequence[Any]) -> list[Any]:
    return [gr.skip()] * len(outputs)


def _left() -> None:
    """A page with such an event says all the time that it is still there; `door.py` listens."""


def _ask() -> list[Any]:
    return [gr.update(visible=True), gr.update(visible=False)]


def _idle() -> list[Any]:
    return [gr.update(visible=True), gr.update(visible=False)]


def _skip_of(facts: Facts, names: Sequence[Any], index: int, steps: Any, skip: Any) -> tuple[int, list[str]]:
    """The skip that all presets in use can do with, and what to say of it: the largest change wants the least."""
    count = steps if isinstance(steps, int) and steps > 0 else facts.defaults.num_steps
    wanted = {name: round(facts.presets[name].skip * count) for name in names if name in facts.presets}
    least, own = min(wanted.values()), wanted[names[index]]
    if least < own:
        other = min(wanted, key=lambda name: wanted[name])
        return least, [f"Skip stays {least}, which the other concept's preset ({other}) needs."]
    return least, [f"The preset ({names[index]}) also set Skip, from {skip} to {least}."] if least != skip else []


def _shown_rows(count: int, rows: Sequence[Row], facts: Facts) -> list[Any]:
    """The count, the button for one more, which boxes are visible, the presets, and what stands in the rows."""
    rows = filled(rows, facts)
    boxes = [gr.update(visible=index < count) for index in range(ROWS)]
    presets = [gr.update(choices=kinds(facts), value=kind_of(facts, row)) for row in rows]
    return [count, gr.update(interactive=count < ROWS), *boxes, *presets, *(value for row in rows for value in row)]
