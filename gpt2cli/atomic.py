"""Files and folders that appear whole or not at all, that notice when they were changed afterwards, and that one process
holds at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt2cli.errors import UserError

SEAL = "checkpoint.json"
LARGEST_JSON = 1 << 28  # bytes


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary sibling to fill; at the end it is flushed to disk and renamed to `target`. If anything fails it is
    removed, and `target` is as it was. With `replace` an existing `target` is moved aside first and deleted last."""
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    aside = target.parent / f".{target.name}.{os.getpid()}.old"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if replace and target.exists():
            target.rename(aside)
        install(temporary, target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def new_file(target: Path, *, parents: bool = True) -> Iterator[Path]:
    """The path of a temporary sibling to write; at the end it is flushed to disk and takes the place of `target`. If
    anything fails it is removed, and `target` is as it was. With `parents` folders that are not there are made."""
    made = [parent for parent in target.parents if parents and not parent.exists()]
    if parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        _remove_empty(made)
        raise


def check_place(target: Path) -> None:
    """Raises UserError where nothing of that name can be made, before anything is spent on it."""
    there = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    if there != target.absolute() and not there.is_dir():
        raise UserError(f"{target} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK):
        raise UserError(f"{target} cannot be made: {there} may not be written to")


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def workplace(target: Path, on_wait: Callable[[], None]) -> Iterator[Path]:
    """A hidden sibling to make `target` in, held by this process alone; `on_wait` is called where another one has it. What
    an interrupted process left is still in it. It is removed when `target` is there at the end, and where it is empty."""
    place = target.parent / f".{target.name}.partial"
    place.mkdir(parents=True, exist_ok=True)
    with lock(place, on_wait):
        try:
            yield place
        finally:
            begun = any(path.is_file() and path.name != ".lock" for path in place.rglob("*"))
            if target.exists() or not begun:
                shutil.rmtree(place, ignore_errors=True)


def install(folder: Path, target: Path) -> None:
    """Flush a folder that is whole to the disk and put it in its place."""
    for path in folder.iterdir():
        flush(path)
    flush(folder)
    folder.rename(target)
    flush(target.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill leaves nothing half deleted under its name."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what a killed `new_folder` left in `parent`, and put back a folder it had moved aside."""
    for path in parent.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in parent.glob(".*.old"):
        target = parent / path.name[1:].rsplit(".", 2)[0]
        if target.exists():
            shutil.rmtree(path)
        else:
            path.rename(target)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk. Windows cannot open folders: there it is left to the system."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace one file whole or not at all."""
    with new_file(path, parents=False) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, _dump(value))


def _dump(value: Any) -> str:
    # A file name that is not UTF-8 holds surrogates, which JSON writes with a backslash.
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def is_full(error: OSError) -> bool:
    """Whether it says that the disk, or the user's part of it, is full. Some libraries have only the message."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)) or any(
        words in str(error)
        for words in ("No space left", "Not enough free space", "requested and")  # safetensors', numpy's
    )


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError, naming the file, where it does not hold one JSON object."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} is too large to be what its name says: {path.stat().st_size:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object, but a {type(value).__name__}")
    return value


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ==== paths in files ====


def to_home(path: str | Path) -> str:
    """A path to be written down: the user's name is nobody else's business."""
    try:
        return f"~/{Path(path).relative_to(Path.home()).as_posix()}"
    except (ValueError, RuntimeError):
        return str(path)


def from_home(path: str) -> Path:
    return Path.home() / path[2:] if path.startswith("~/") else Path(path)


# ==== noticing changes ====


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object whose first line is the sha256 of the rest."""
    write_json(path, {"sha256": hashlib.sha256(_dump(value).encode()).hexdigest()} | value)


def read_sealed(path: Path, *, required: bool = False) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises UserError where a byte of it has changed. Somebody who edits the file on purpose
    deletes its first line: without a seal it is taken as it is, unless one is `required`."""
    sealed = read_json(path)
    value = {key: entry for key, entry in sealed.items() if key != "sha256"}
    if sealed == value and not required:
        return value
    expected = {"sha256": hashlib.sha256(_dump(value).encode()).hexdigest()} | value
    if path.read_text(encoding="utf-8") != _dump(expected):
        raise UserError(f'{path} changed since gpt2 wrote it; if that was you, delete its line "sha256"')
    return value


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write `checkpoint.json`: `facts` and the sha256 of every file in `folder`."""
    write_sealed(folder / SEAL, facts | {"files": {path.name: sha256(path) for path in sorted(folder.iterdir())}})


def check_seal(folder: Path, names: set[str] | None = None) -> dict[str, Any] | None:
    """The facts of a sealed folder after checking its files (only `names` where given); None where it has no seal.

    Raises UserError for a file that is missing or was changed.
    """
    if not (folder / SEAL).is_file():
        return None
    mend = f"if that was you, delete {folder / SEAL}, otherwise use another checkpoint"
    try:
        facts = read_sealed(folder / SEAL, required=True)
        files = dict(facts["files"])
    except (UserError, KeyError, TypeError, ValueError):
        raise UserError(f"{folder / SEAL} changed since gpt2 wrote it; {mend}") from None
    for name, expected in files.items():
        if names is not None and name not in names:
            continue
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: the checkpoint is not whole")
        if sha256(folder / name) != expected:
            raise UserError(f"{folder / name} changed since gpt2 wrote it; {mend}")
    return facts


# ==== one process at a time ====


@contextlib.contextmanager
def lock(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an existing folder for this process. The system lets go of it when the process ends, however it ends.

    Where another process holds it: raises UserError, or, with `on_wait`, calls that and waits. A file system that knows no
    locks is trusted.
    """
    with (folder / ".lock").open("a+b", buffering=0) as file:
        while True:
            try:
                _hold(file)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                    break
                if on_wait:
                    on_wait()
                    time.sleep(0.5)
                    continue
                with contextlib.suppress(OSError, ValueError):
                    file.seek(0)
                    raise UserError(f"{folder} is in use by another gpt2 process (number {int(file.read())})") from None
                raise UserError(f"{folder} is in use by another gpt2 process") from None
        with contextlib.suppress(OSError):  # a full disk has no room for the number
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


def _hold(file: io.FileIO) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(1 << 30)  # beyond the number, which others read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
