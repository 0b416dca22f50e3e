"""Files of a bounded size, and typed access to a parsed JSON object that lets nothing pass unnoticed."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ledits_min.errors import InputError, quoted, short


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; InputError for anything else, before it is read."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{quoted(path)} is not a regular file; take the folder whole")
            if status.st_size > limit:
                raise InputError(
                    f"{quoted(path)} has {status.st_size} bytes, and such a file has at most {limit}; download it again"
                )
            return file.read(limit)
    except OSError as error:
        raise InputError(f"{quoted(path)} cannot be read: {error.strerror}; take the folder whole") from error


class Reader:
    """Typed access to a parsed JSON object that remembers which keys were honoured."""

    def __init__(
        self, mapping: Mapping[str, Any], source: str, class_name: str | None, defaults: Mapping[str, Any]
    ) -> None:
        if not isinstance(mapping, Mapping):
            raise InputError(f"{source}: a JSON object is wanted, not {type(mapping).__name__}")
        found = mapping.get("_class_name", class_name)
        if class_name is not None and found != class_name:
            raise InputError(f"{source}: _class_name is {short(found)}; only {class_name!r} is supported here")
        self.mapping, self.source, self.defaults = mapping, source, defaults
        self.honoured: set[str] = set()

    def _get(self, key: str, default: Any) -> Any:
        self.honoured.add(key)
        value = self.mapping.get(key)
        return default if value is None else value

    def _wrong(self, key: str, value: Any, wanted: str) -> InputError:
        return InputError(f"{self.source}: {key} is {short(value)}; {wanted} is wanted")

    def whole(self, key: str, default: int) -> int:
        value = self._get(key, default)
        if type(value) is not int or abs(value) > 2**31:
            raise self._wrong(key, value, "a whole number below 2^31")
        return int(value)

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not abs(value) <= 1e30:
            raise self._wrong(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self._wrong(key, value, "true or false")
        return value

    def string(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if type(value) is not str:
            raise self._wrong(key, value, "a string")
        return value

    def strings(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        value = self._get(key, default)
        if not isinstance(value, list | tuple) or not all(type(item) is str for item in value):
            raise self._wrong(key, value, "a list of strings")
        return tuple(value)

    def wholes(self, key: str, default: int | tuple[int, ...], repeat: int = 1) -> tuple[int, ...]:
        """A list of positive whole numbers, or one of them standing for `repeat` equal ones."""
        value = self._get(key, default)
        items = value if isinstance(value, list | tuple) else [value] * repeat
        if not 1 <= len(items) <= 16 or not all(type(item) is int and 0 < item < 2**31 for item in items):
            raise self._wrong(key, value, "a short list of positive whole numbers")
        return tuple(items)

    def depths(self, key: str, levels: int, default: int | tuple[()]) -> tuple[int | tuple[int, ...], ...]:
        """One whole number for each level, or a list of one for each layer of it; one alone stands for all levels."""
        value = self._get(key, default)
        if value == ():
            return ()
        items = value if isinstance(value, list | tuple) else [value] * levels
        lists = [item if isinstance(item, list | tuple) else [item] for item in items]
        sound = all(1 <= len(one) <= 257 and all(type(n) is int and 0 <= n < 2**31 for n in one) for one in lists)
        if not 1 <= len(items) <= 16 or not sound:
            raise self._wrong(key, value, "a short list of whole numbers, or of lists of them,")
        return tuple(one[0] if len(set(one)) == 1 else tuple(one) for one in lists)

    def honour(self, *keys: Collection[str]) -> None:
        """Keys that somebody else has judged."""
        self.honoured.update(*keys)

    def refuse_if_changed(self) -> None:
        """Refuse a key of the defaults table that holds another value than the one we implement."""
        for key, default in self.defaults.items():
            value = self.mapping.get(key)
            if value is not None and not _same(value, default):
                raise InputError(
                    f"{self.source}: {key} = {short(value)} is not supported; only {short(default)} is implemented"
                )

    def refuse_the_rest(self) -> None:
        """As `refuse_if_changed`, and an unknown key may only be null or false."""
        self.refuse_if_changed()
        for key, value in self.mapping.items():
            if key in self.honoured or key in self.defaults or key.startswith("_"):
                continue
            if value is not None and value is not False:
                setting = f"{short(key)} = {short(value)}"
                raise InputError(f"{self.source}: {setting} is a setting this program does not know")


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, list):
        return all(_same(item, default) for item in value)
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)
