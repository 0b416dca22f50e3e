"""What a visitor of `ledits web` does, without a browser: inverted once, edited often, gone back, said as a command."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ledits_min import Concept, InputError, Inversion, LEdits, Stopped
from ledits_min.app.cli import main
from ledits_min.app.cli.options import build_parser
from ledits_min.app.inputs import parts
from ledits_min.app.web import session as web_session
from ledits_min.app.web.models import PRESETS_EMBEDDED, Models
from ledits_min.app.web.notices import warnings_to_visitors
from ledits_min.app.web.session import Basis, Change, Edit, Picture, Session
from ledits_min.app.web.text import as_command, as_python
from ledits_min.weights.read.survey import TINY

SAMPLE = TINY / "samples" / "portrait1.png"
OTHER = TINY / "samples" / "portrait2.png"
BASIS = Basis(num_steps=6, skip=2)
GLASSES = Change(3.5, (Concept("sunglasses", 2.0, 0.9, 1),))


@pytest.fixture(scope="module", params=["auto"])
def models(request: pytest.FixtureRequest) -> Iterator[Models]:
    served = build_parser().parse_args(["web", "--dtype", request.param])
    models = Models(["tiny"], served.device, served.dtype, compile=served.compile, **parts(served))  # as `serve` does
    yield models
    models.close()


@pytest.fixture(scope="module")
def in_float32() -> Iterator[Models]:
    models = Models(["tiny"], dtype="float32")
    yield models
    models.close()


@pytest.fixture
def session(models: Models, tmp_path: Path) -> Iterator[Session]:
    session = Session(models, tmp_path)
    session.open(SAMPLE)
    yield session
    session.close()


@pytest.fixture
def inverted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry an inversion."""
    calls: list[int] = []
    invert = LEdits.invert

    def counted(*args: Any, **named: Any) -> Inversion:
        calls.append(1)
        return invert(*args, **named)

    monkeypatch.setattr(LEdits, "invert", counted)
    return calls


def pixels(made: Edit) -> np.ndarray[Any, Any]:
    with Image.open(made.file) as picture:
        return np.asarray(picture.convert("RGB"))


def test_the_page_takes_no_picture_before_the_visit_has_begun(models: Models, tmp_path: Path) -> None:
    web = pytest.importorskip("ledits_min.app.web.page", reason="the [web] extra is not installed")
    page = web.Page(models, tmp_path)
    config = page.blocks.get_config_file()
    (empty,) = (part for part in config["components"] if part["props"].get("elem_id") == "empty")
    assert empty["props"]["visible"] is False
    (load,) = (event for event in config["dependencies"] if "load" in [name for _, name in event["targets"]])
    assert empty["id"] in load["outputs"]


def test_many_edits_one_inversion(session: Session, inverted: list[int]) -> None:
    first = session.edit("tiny", BASIS, GLASSES)
    others = [
        session.edit("tiny", BASIS, replace(GLASSES, target="a portrait with a red hat")),
        session.edit("tiny", BASIS, replace(GLASSES, negative="beard")),
        session.edit("tiny", BASIS, Change(5.0, (Concept("beard", 3.0, 0.8, 2), Concept("hat", reverse=True)))),
    ]
    assert len(inverted) == 1
    assert first.inverted is not None and first.inverted > 0.0
    assert [made.inverted for made in others] == [None] * 3
    assert session.history == [first, *others]
    assert len({made.file.read_bytes() for made in session.history}) == 4


@pytest.mark.parametrize(
    "other",
    [
        replace(BASIS, num_steps=7),
        replace(BASIS, skip=1),
        replace(BASIS, eta=0.5),
        replace(BASIS, seed=1),
        replace(BASIS, source="a portrait"),
        replace(BASIS, size=192),
    ],
    ids=["steps", "skip", "eta", "seed", "source", "size"],
)
def test_another_basis_is_inverted_once_and_going_back_is_free(
    session: Session, inverted: list[int], other: Basis
) -> None:
    first = session.edit("tiny", BASIS, GLASSES)
    assert session.edit("tiny", other, GLASSES).inverted is not None
    again = session.edit("tiny", BASIS, GLASSES)
    assert len(inverted) == 2
    assert again.inverted is None
    assert np.array_equal(pixels(first), pixels(again))


def test_another_picture_is_inverted_and_few_inversions_are_kept(session: Session, inverted: list[int]) -> None:
    session.edit("tiny", BASIS, GLASSES)
    session.open(OTHER)
    session.edit("tiny", BASIS, GLASSES)
    assert len(inverted) == 2
    for seed in range(1, web_session.KEPT_INVERSIONS):
        session.edit("tiny", replace(BASIS, seed=seed), GLASSES)
    session.restore(session.history[0])
    count = len(inverted)
    session.edit("tiny", BASIS, GLASSES)  # the oldest, which made room
    assert len(inverted) == count + 1


def test_the_history_brings_back_the_picture_and_forgets_the_oldest(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_session, "KEPT_EDITS", 2)
    first = session.edit("tiny", BASIS, GLASSES)
    portrait = session.picture
    session.open(OTHER)
    second = session.edit("tiny", BASIS, GLASSES)
    session.restore(first)
    assert session.picture is portrait
    third = session.edit("tiny", BASIS, Change(3.5))
    assert third.picture is portrait and third.inverted is None
    assert session.history == [second, third]
    assert not first.file.exists() and second.file.exists() and third.file.exists()
    assert [made.label for made in session.history] == ["+ sunglasses", "reconstruction"]


@pytest.mark.parametrize(
    ("basis", "change", "says"),
    [
        (BASIS, Change(3.5, (Concept("bicycle"),)), "bicycle"),
        (replace(BASIS, source="bicycle"), GLASSES, "bicycle"),
        (BASIS, Change(-1.0), "guidance scale is -1"),
        (replace(BASIS, skip=6), GLASSES, "skip .with 6 steps. is 6"),
        (replace(BASIS, eta=2.0), GLASSES, "eta is 2"),
        (replace(BASIS, seed=-1), GLASSES, "seed is -1"),
        (replace(BASIS, size=5000), GLASSES, "4096"),
    ],
)
def test_what_is_refused_leaves_no_trace(session: Session, basis: Basis, change: Change, says: str) -> None:
    with pytest.raises(InputError, match=says):
        session.edit("tiny", basis, change)
    assert session.history == []
    assert session.edit("tiny", BASIS, GLASSES).number == 1


def test_without_a_picture_there_is_nothing_to_edit(models: Models, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no picture"):
        Session(models, tmp_path).edit("tiny", BASIS, GLASSES)


def test_a_bad_file_is_named_as_the_visitor_knows_it(session: Session, tmp_path: Path) -> None:
    place = tmp_path / "upload" / "0123456789abcdef"
    place.mkdir(parents=True)
    (place / "holiday.png").write_bytes(b"%PDF-1.7")
    before = session.picture
    with pytest.raises(InputError, match="^'holiday.png' is a PDF document"):
        session.open(place / "holiday.png")
    assert session.picture is before


def test_too_many_pixels_are_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_session, "MAX_PIXELS", 128 * 128 - 1)
    with pytest.raises(InputError, match="'portrait2.png' is 128 x 128, more than"):
        session.open(OTHER)


@pytest.mark.parametrize("phase", ["inverting", "editing"])
def test_a_run_can_be_stopped_and_the_next_one_is_not(session: Session, phase: str) -> None:
    def stop_there(done: float, what: str) -> None:
        if what == phase and done > 0.0:
            session.stop()

    with pytest.raises(Stopped):
        session.edit("tiny", BASIS, GLASSES, stop_there)
    assert session.history == []
    with pytest.raises(Stopped):  # one that still stood in line when it was stopped
        session.edit("tiny", BASIS, GLASSES)
    told: list[tuple[float, str]] = []
    session.begin()
    session.edit("tiny", BASIS, GLASSES, lambda done, what: told.append((done, what)))
    assert told[-1] == (1.0, "editing")
    assert ("inverting" in {what for _, what in told}) == (phase == "inverting")  # an inversion that is done is kept


def test_another_picture_may_be_opened_while_one_is_edited(session: Session) -> None:
    first = session.picture

    def open_another(done: float, what: str) -> None:
        if session.picture is first:
            session.open(OTHER)

    made = session.edit("tiny", BASIS, GLASSES, open_another)
    assert made.picture is first is not session.picture
    session.restore(made)
    assert made.picture.shown.exists() and session.edit("tiny", replace(BASIS, skip=3), GLASSES).inverted is not None


def test_a_page_that_is_left_frees_its_inversions_and_one_that_is_gone_its_files(
    models: Models, tmp_path: Path, inverted: list[int]
) -> None:
    session = Session(models, tmp_path)
    session.open(SAMPLE)
    made = session.edit("tiny", BASIS, GLASSES)
    session.release()
    session.begin()
    assert made.file.exists()
    assert session.edit("tiny", BASIS, GLASSES).inverted is not None  # it came back
    session.close()
    assert list(tmp_path.iterdir()) == []
    assert session.history == [] and session.picture is None


def test_visitors_do_not_see_each_other(session: Session, models: Models, tmp_path: Path) -> None:
    other = Session(models, tmp_path)
    session.edit("tiny", BASIS, GLASSES)
    assert other.picture is None and other.history == []
    other.open(SAMPLE)
    made = other.edit("tiny", BASIS, GLASSES)
    assert made.inverted is not None and made.number == 1
    assert made.file.parent != session.history[0].file.parent
    other.close()
    assert session.history[0].file.exists()


def test_another_model_frees_the_one_before() -> None:
    models = Models(["tiny", str(TINY), "tiny"])
    assert models.names == ("tiny", str(TINY))
    with models.use("tiny") as first:
        assert first.device.type != "meta"
    with models.use(str(TINY)) as second:
        assert first.device.type == "meta" and second.device.type != "meta"
    assert set(models.facts("tiny").presets) == set(PRESETS_EMBEDDED)  # without loading it again
    assert second.device.type != "meta"
    models.close()
    assert second.device.type == "meta"
    with pytest.raises(InputError, match="not one of the models"), models.use("/etc/passwd"):
        pass


def test_one_computation_at_a_time(models: Models) -> None:
    inside = threading.Event()

    def enter() -> None:
        with models.use("tiny"):
            inside.set()

    with models.use("tiny"):
        other = threading.Thread(target=enter)
        other.start()
        assert not inside.wait(0.2)
    other.join(60)
    assert inside.is_set()


def test_a_warning_reaches_the_visitor_it_concerns_once(session: Session) -> None:
    late = Concept("beard", warmup_steps=50)
    with warnings.catch_warnings(record=True) as elsewhere, warnings_to_visitors():
        made = session.edit("tiny", BASIS, Change(3.5, (late, late)))
        warnings.warn("nobody's", stacklevel=1)
    assert len(made.notices) == 1 and "never acts" in made.notices[0]
    assert [str(warning.message) for warning in elsewhere] == ["nobody's"]


EDITS = [
    (replace(BASIS, solver_order=2), GLASSES),
    (
        Basis(num_steps=5, skip=1, source="a portrait", eta=0.3, seed=12345678901, size=192),
        Change(
            2.75,
            (
                Concept("beard", 1 / 3, 0.85, 0, 3, reverse=True, mask="both"),
                Concept("a red hat", 3.0, 0.8, 1, mask="percentile"),
            ),
            target="a portrait with a red hat",
            negative="glasses",
        ),
    ),
]


@pytest.mark.parametrize(
    ("models", "basis", "change", "name"),
    [("auto", *EDITS[0], "portrait.png"), ("float32", *EDITS[1], "-it's my $HOME.png")],
    indirect=["models"], ids=["plain", "everything"],
)  # fmt: skip
def test_the_command_and_the_program_make_the_same_picture(
    session: Session, in_float32: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    basis: Basis, change: Change, name: str,
) -> None:  # fmt: skip
    """To the last bit, once the command keeps its inversion as the page does; in one pass it rounds differently."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(OTHER, tmp_path / name)
    session.open(tmp_path / name)
    made = session.edit("tiny", basis, change)
    with closing(Session(in_float32, tmp_path)) as precise:
        precise.open(tmp_path / name)
        exact = pixels(precise.edit("tiny", basis, change)).astype(float)
    out = tmp_path / f"{Path(name).stem}.ledits.png"

    command = as_command(made, session.models.given).replace(" \\\n", " ")
    program, *argv = shlex.split(command)
    assert program == "ledits"
    assert main(argv) == 0
    with Image.open(out) as theirs:
        one_pass, two = (np.abs(picture - exact).mean() for picture in (np.asarray(theirs), pixels(made)))
    assert one_pass < 1.2 * two + 0.02, "levels of 255: one pass is as precise as two, and in float32 the same"
    out.unlink()
    assert main([*argv, "--save-inversion", "kept.safetensors"]) == 0
    with Image.open(out) as theirs, Image.open(made.file) as ours:
        assert np.array_equal(np.asarray(theirs), np.asarray(ours))
        assert json.loads(theirs.info["ledits"]) == json.loads(ours.info["ledits"])
    out.unlink()

    exec(compile(as_python(made, session.models.given), "page.py", "exec"), {})
    with Image.open(out) as theirs:
        assert np.array_equal(np.asarray(theirs), pixels(made))


SERVED: list[list[str]] = [
    [],
    ["--compile", "--ema", "--device", "cuda:0", "--dtype", "float16", "--prediction-type", "v"],
    ["--lora", "a b.safetensors:0.5", "--lora=-c.safetensors", "--vae", "v.safetensors"],
    ["--text-encoder", "it's a folder", "--tokenizer", "$HOME"],
]


@pytest.mark.parametrize("options", SERVED, ids=["default", "switches", "parts", "quotes"])
@pytest.mark.parametrize(("basis", "change"), EDITS, ids=["plain", "everything"])
def test_the_command_says_what_the_server_was_started_with(
    tmp_path: Path, options: list[str], basis: Basis, change: Change
) -> None:
    """Built from the arguments of `ledits web` as `serve` passes them on, read back by the parser of `ledits edit`."""
    parser = build_parser()
    served = parser.parse_args(["web", *options])
    models = Models(["tiny"], served.device, served.dtype, compile=served.compile, **parts(served))
    picture = Picture(tmp_path, (8, 8), "p.png", (), tmp_path)
    made = Edit(1, "tiny", picture, basis, change, tmp_path, (), None, 0.0)
    _, *argv = shlex.split(as_command(made, models.given).replace(" \\\n", " "))
    read = vars(parser.parse_args(argv))
    for name, value in models.given.items():
        assert (read[name] or None) == (value or None), name
    assert [fields["text"] for fields in read["concepts"] or []] == [concept.text for concept in change.concepts]
    assert (read["steps"], read["skip"], read["seed"]) == (basis.num_steps, basis.skip, basis.seed)
    assert "False" not in argv and "None" not in argv
    compile(as_python(made, models.given), "page.py", "exec")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--model", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--model", "tiny", "--model", "b.safetensors", "--ema"], "--ema would change each of 2 models"),
        (["--share"], "--share"),
    ],
)
def test_a_page_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert main(["web", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ledits: error: ") and says in line


@pytest.mark.parametrize("found", [None, "5.49.1"])
def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: str | None
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["web"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ledits: error: ") and "pip install 'ledits-min[web]'" in line
