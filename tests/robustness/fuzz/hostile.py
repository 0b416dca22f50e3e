"""What is built to do harm, not damaged by chance: pictures that keep decoders busy, folders full of traps."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import zlib
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from ledits_min.app.batch.folder import ERRORS, HASH, Failure, check_folder, check_place, held, write_errors
from ledits_min.app.batch.jobs import Job
from ledits_min.errors import InputError
from ledits_min.files.opening import open_image, upright_size
from ledits_min.files.write import save_image
from tests.robustness.fuzz import mutate
from tests.robustness.fuzz.mutate import encoded


class Decoders:
    """Pictures built to keep a decoder busy: repeated scans, pages, tags, blocks and chunks, in numbers up to a limit.

    The clock of every input is what judges them; most are small, and some stay just inside the bounds.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "x"
        values = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        self.small = Image.fromarray(values)
        self.large = self.small.resize((2400, 2000), Image.Resampling.NEAREST)
        self.scans = [encoded(image, "JPEG", progressive=True) for image in (self.small, self.large)]
        self.plain = {kind: encoded(self.small, kind) for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "AVIF")}
        self.corpus = [self.plain["PNG"]]

    def make(self, rng: Random) -> None:
        count = rng.choice((3, 30, 300, 900, 3000, 20_000))
        makes = (self._scans, self._segments, self._exif, self._pages, self._tags, self._comments, self._blocks,
                 self._chunks, self._runs, self._cut)  # fmt: skip
        data = rng.choice(makes)(rng, count)
        self.path.write_bytes(mutate.raw(rng, data) if rng.random() < 0.2 else data)

    def _scans(self, rng: Random, count: int) -> bytes:
        data = rng.choice(self.scans)
        places = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
        which = rng.randrange(len(places))
        end = places[which + 1] if which + 1 < len(places) else len(data) - 2
        scan = data[places[which] : end]
        return data[:-2] + scan * min(count, 20_000_000 // len(scan)) + data[-2:]

    def _segments(self, rng: Random, count: int) -> bytes:
        body = rng.randbytes(rng.choice((0, 1, 100, 60_000)))
        marker = rng.choice((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xDB, 0xC4))
        lead = rng.choice((b"", b"Exif\0\0", b"ICC_PROFILE\0\1\1", b"Photoshop 3.0\0", b"JFIF\0", b"Adobe"))
        one = struct.pack(">BBH", 0xFF, marker, len(lead + body) + 2) + lead + body
        return self.plain["JPEG"][:2] + one * min(count, 20_000_000 // len(one)) + self.plain["JPEG"][2:]

    def _directory(self, rng: Random, count: int, size: int) -> bytes:
        order = rng.choice("<>")
        tags = sorted(rng.sample(range(255, 65_536), min(count, 60_000)))
        kind, number = rng.choice(((7, size), (2, size), (1, size), (3, size // 2), (4, size // 4), (5, size // 8)))
        body = b"".join(struct.pack(f"{order}HHII", tag, kind, number, 8) for tag in tags)
        start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
        return start + struct.pack(f"{order}H", len(tags)) + body + bytes(4)

    def _exif(self, rng: Random, count: int) -> bytes:
        exif = self._directory(rng, min(count, 5000), 60_000).ljust(rng.choice((1000, 64_000)), b"\0")
        kind = rng.choice(("JPEG", "PNG", "WEBP", "AVIF"))
        if kind == "JPEG":
            exif = b"Exif\0\0" + exif[:65_000]
            return self.plain[kind][:2] + struct.pack(">BBH", 0xFF, 0xE1, len(exif) + 2) + exif + self.plain[kind][2:]
        if kind == "PNG":
            chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
            return self.plain[kind][:33] + chunk + self.plain[kind][33:]
        return encoded(self.small, kind, exif=exif) if kind == "WEBP" else self.plain[kind] + exif

    def _pages(self, rng: Random, count: int) -> bytes:
        if rng.random() < 0.2:
            return encoded(self.small, "TIFF", save_all=True, append_images=[self.small] * min(count, 30))
        data = self.plain["TIFF"]
        at = struct.unpack("<I", data[4:8])[0]
        length = 2 + 12 * struct.unpack("<H", data[at : at + 2])[0]
        directory, start = data[at : at + length], len(data) + len(data) % 2
        pages = [start + page * (length + 4) for page in range(count)]
        pages.append(rng.choice((0, pages[0], 8, 2**31)))
        body = b"".join(directory + struct.pack("<I", follows) for follows in pages[1:])
        return data[:4] + struct.pack("<I", start) + data[8:].ljust(start - 8, b"\0") + body

    def _tags(self, rng: Random, count: int) -> bytes:
        return self._directory(rng, count, rng.choice((10, 1000, 500_000))).ljust(rng.choice((0, 600_000)), b"\0")

    def _comments(self, rng: Random, count: int) -> bytes:
        data = self.plain["GIF"]
        at = 13 + 3 * 2 ** ((data[10] & 7) + 1)
        block = rng.choice((b"\xff" + bytes(255), b"\1a", b"\0"))
        comment = b"\x21" + rng.choice((b"\xfe", b"\xff", b"\x01")) + block * count + b"\0"
        return data[:at] + comment * rng.choice((1, 1, 3)) + data[at:]

    def _blocks(self, rng: Random, count: int) -> bytes:
        data = self.plain["GIF"]
        return data[:-2] + rng.choice((b"\1a", b"\xff" + bytes(255))) * count + data[-2:] * rng.choice((1, 50))

    def _chunks(self, rng: Random, count: int) -> bytes:
        kind = rng.choice((b"prVt", b"tEXt", b"IDAT", b"gAMA", b"eXIf", b"fdAT", b"acTL", b"fcTL", b"iCCP", b"zTXt"))
        body = rng.choice((b"", b"k\0v", b"k\0\0" + zlib.compress(bytes(900_000), 9), rng.randbytes(30)))
        one = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        many = one * min(count * rng.choice((1, 12)), 20_000_000 // len(one))
        at = rng.choice((33, len(self.plain["PNG"]) - 12))
        return self.plain["PNG"][:at] + many + self.plain["PNG"][at:]

    def _runs(self, rng: Random, count: int) -> bytes:
        side = rng.choice((64, 1000, 7900))
        body = rng.choice((b"\1\1", b"\xff\1", b"\0\0", b"\0\2\xff\xff", b"\0\3abc\0")) * min(count * 100, 900_000)
        header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 0)
        return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + header + bytes(1024) + body

    def _cut(self, rng: Random, count: int) -> bytes:
        data = rng.choice((*self.scans, *self.plain.values()))
        return data[: -rng.choice((1, 2, 20, count))] if len(data) > count else data

    def read(self) -> None:
        picture = open_image(self.path)
        assert picture.mode == "RGB" and upright_size(self.path) == picture.size


class BatchFolders:
    """Output folders of `ledits batch` with links, pipes and foreign files in them: what is not ours stays as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.beside = folder, folder / "out", folder / "beside"
        picture = folder / "picture.png"
        self.names = [f"{i}.png" for i in range(3)]
        self.jobs = [Job(i, "picture.png", picture, name, {}) for i, name in enumerate(self.names, start=1)]
        save_image(Image.new("RGB", (32, 32)), picture, {HASH: "0" * 64})
        self.ours = picture.read_bytes()
        self.error = json.dumps(asdict(Failure(1, "a", "b", "c"))).encode() + b"\n"

    def make(self, rng: Random) -> None:
        if self.out.is_symlink():
            self.out.unlink()
        for place in (self.out, self.beside):
            shutil.rmtree(place, ignore_errors=True)
        self.beside.mkdir()
        (self.beside / "precious").write_bytes(b"precious")
        if rng.random() < 0.05:
            self.out.symlink_to(rng.choice(("beside", "gone", "/dev/null", "out")))
        if not os.path.lexists(self.out):
            self.out.mkdir()
            for name in (*self.names, ERRORS, ".ledits-0123.tmp"):
                if rng.random() < 0.6:
                    self._put(rng, self.out / name)
        self.overwrite = rng.random() < 0.5
        self.failing = rng.random() < 0.5

    def _put(self, rng: Random, path: Path) -> None:
        kind = rng.randrange(8)
        if kind == 0:
            targets = ("../beside/precious", "../beside/gone", "/dev/zero", "/dev/full", path.name, "../beside", "..")
            path.symlink_to(rng.choice(targets))
        elif kind == 1:
            os.mkfifo(path)
        elif kind == 2:
            path.mkdir()
        elif kind == 3:
            os.link(self.beside / "precious", path)
        else:
            data = rng.choice((b"", b"text", self.ours, self.error, self.ours[:-4]))
            path.write_bytes(mutate.raw(rng, data) if data and rng.random() < 0.4 else data)

    def read(self) -> None:
        before = {path: _state(path) for path in self._paths()}
        links = os.path.islink(self.out)
        try:
            check_folder(self.out, self.jobs)
            with held(self.out):
                failures = []
                for job in self.jobs:
                    try:
                        check_place(self.out / job.output, self.overwrite)
                        save_image(Image.new("RGB", (32, 32)), self.out / job.output, {HASH: "1" * 64}, False)
                    except InputError as error:
                        failures.append(Failure.of(job, error))
                write_errors(self.out, failures if self.failing else [])
        finally:
            assert (self.beside / "precious").read_bytes() == b"precious"
            assert os.listdir(self.beside) == ["precious"] or links
            for path, state in before.items():
                if state.foreign and not self.overwrite and not path.name.startswith(".ledits"):
                    assert _state(path) == state, f"{path.name} was touched"

    def _paths(self) -> list[Path]:
        return sorted(self.out.iterdir()) if self.out.is_dir() else []


class _State(NamedTuple):
    """What lies under a name, and whether no batch has put it there."""

    inode: int
    size: int
    target: str
    foreign: bool


def _state(path: Path) -> _State:
    status = os.lstat(path)
    regular = stat.S_ISREG(status.st_mode)
    start = path.read_bytes() if regular else b""
    ours = regular and (not start or HASH.encode() in start or start.startswith(b'{"line": '))
    target = os.readlink(path) if path.is_symlink() else ""
    return _State(status.st_ino, status.st_size, target, not ours)
