"""Files that are whole or absent: interrupted, on a full disk, through links, on file systems that can do little."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ledits_min.errors import InputError
from ledits_min.files.write import atomic_write, check_output_picture, remove_abandoned, save_image


def noise_picture(width: int = 40, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp"])
def test_every_output_format_can_be_read_again(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save_image(noise_picture(), path, {"ledits": "{}"})
    assert Image.open(path).size == (40, 24)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_png_carries_its_text(tmp_path: Path) -> None:
    text = {"ledits": '{"steps": 3}', "parameters": "a café, 日本 and 🕶"}
    save_image(noise_picture(), tmp_path / "x.png", text)
    image = Image.open(tmp_path / "x.png")
    assert isinstance(image, PngImagePlugin.PngImageFile)
    assert dict(image.text) == text


@pytest.mark.parametrize(
    ("name", "size"), [("x.gif", (9, 9)), ("x", (9, 9)), ("x.webp", (16_384, 9)), ("x.jpg", (65_501, 9))]
)
def test_formats_that_cannot_hold_the_picture_are_refused(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        check_output_picture(name, size)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    atomic_write(path, b"old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_image(noise_picture(), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_writing_goes_through_a_link_and_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "real.bin").write_bytes(b"old")
    (tmp_path / "link.bin").symlink_to("real.bin")
    atomic_write(tmp_path / "link.bin", b"new")
    assert (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "real.bin").read_bytes() == b"new"
    (tmp_path / "plain").touch()
    assert (tmp_path / "real.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("target", ["real.bin", "gone.bin", "/dev/null"])
def test_a_link_itself_is_replaced_where_it_may_not_be_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "real.bin").write_bytes(b"precious")
    (tmp_path / "link.bin").symlink_to(target)
    atomic_write(tmp_path / "link.bin", b"new", through_links=False)
    assert not (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "link.bin").read_bytes() == b"new"
    assert (tmp_path / "real.bin").read_bytes() == b"precious"
    assert not (tmp_path / "gone.bin").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_a_file_is_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.bin"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    before = os.stat(path)
    with pytest.raises(InputError, match="name a file to write"):
        atomic_write(path, b"new")
    assert os.path.samestat(os.stat(path), before)


@pytest.mark.parametrize("refused", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_or_rename_still_gets_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, number: int
) -> None:
    def cannot(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, refused, cannot)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        atomic_write(tmp_path / "x.bin", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["x.bin"]
    assert (tmp_path / "x.bin").read_bytes() == b"new"
    assert [("written in place" in str(one.message)) for one in said] == [True] * (refused == "replace")


def test_only_what_nobody_writes_any_more_is_removed(tmp_path: Path) -> None:
    dead, alive, link = (tmp_path / f".ledits-{name}.tmp" for name in ("dead", "alive", "link"))
    dead.write_bytes(b"what a killed run was writing")
    link.symlink_to("precious")
    (tmp_path / "precious").write_bytes(b"precious")
    os.mkfifo(tmp_path / ".ledits-pipe.tmp")
    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_abandoned(tmp_path)
        assert alive.exists()
    assert not dead.exists()
    assert link.is_symlink() and (tmp_path / "precious").exists()


def test_what_is_being_written_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep of another run, in the middle of a write."""
    monkeypatch.setattr(os, "fsync", lambda _: remove_abandoned(tmp_path))
    atomic_write(tmp_path / "x.bin", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["x.bin"]
