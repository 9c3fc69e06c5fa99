"""Files and folders replaced in one step, digests, and JSON with one spelling.

A writer fills a hidden sibling of the target and renames it, so a process that is killed leaves the old
artifact or the new one. One lock a target, held by the kernel for as long as the writer lives, tells a
sibling in use from a leftover; unlike a process id it cannot be mistaken across containers.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from qmamba_cli.errors import QmambaError

_SHOWN_LENGTH = 80
# Between two looks at a lock that another writer holds.
_POLL_SECONDS = 0.01
# Bounds of JSON from anyone, so that parsing it takes less than a tenth of a second: keys, lists and objects
# together, and commas, which a flat list of numbers may have many of. The manifest and the header of a model
# of 64 layers need half of the first.
MAX_JSON_NODES = 1 << 15
MAX_JSON_COMMAS = 1 << 18
# What a write can fail with through no fault of the program, and the next step.
_WRITE_HINTS = {
    errno.ENOSPC: "free some space or choose a path on another disk",
    errno.EDQUOT: "free some space or choose a path on another disk",
    errno.EFBIG: "choose a path on a disk that takes files of this size",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written",
    errno.EPERM: "choose a folder that can be written",
    errno.ENOTDIR: "a parent of this path is a file; choose another path",
    errno.EEXIST: "a parent of this path is a file; choose another path",
    errno.EISDIR: "choose the path of a file",
    errno.ENOENT: "the folder vanished while it was written; run the command again",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "choose a path without circular links",
    errno.EIO: "check the disk, then run the command again",
    errno.ENOLCK: "choose a folder on a file system with locks",
    errno.ENOTSUP: "choose a folder on a file system with locks",
    errno.ENOSYS: "choose a folder on a file system with locks",
}


def sha256_bytes(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 of a buffer, 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> str:
    r"""JSON with one spelling: keys sorted, no spaces, ASCII only, no NaN or infinity.

    >>> canonical_json({"b": [1, 2.5], "a": "é"})
    '{"a":"\\u00e9","b":[1,2.5]}'

    Raises:
        ValueError: a number is not finite or has too many digits.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def json_excess(data: bytes) -> str:
    """What JSON has more of than a reader here takes, with both numbers; empty where it keeps the bounds.

    Marks inside strings count as well: telling them apart would be parsing.

    >>> json_excess(b'{"a":' * 50_000)
    '100000 keys, lists and objects, expected at most 32768'
    """
    nodes = sum(data.count(mark) for mark in (b":", b"[", b"{"))
    if nodes > MAX_JSON_NODES:
        return f"{nodes} keys, lists and objects, expected at most {MAX_JSON_NODES}"
    commas = data.count(b",")
    return f"{commas} commas, expected at most {MAX_JSON_COMMAS}" if commas > MAX_JSON_COMMAS else ""


def strict_json(data: bytes) -> Any:
    """Parse JSON that may come from anyone.

    Raises:
        ValueError: beyond the bounds of `json_excess`, not UTF-8, not JSON, nested too deeply, a key given
            twice, NaN or infinity, or an integer of more than a few thousand digits.
    """
    # First, and at the speed of memory: what follows takes a hundred times as long a byte.
    excess = json_excess(data)
    if excess:
        raise ValueError(excess)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for name, item in pairs:
            if name in value:
                raise ValueError(f"key `{shown(name)}` is given twice")
            value[name] = item
        return value

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"`{constant}` is not a JSON number")

    try:
        # A string of half a surrogate pair parses, yet can be neither hashed nor printed.
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("a string holds half a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg.lower()} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def shown(text: str) -> str:
    r"""Text from a file as it may stand in a message: printable ASCII, at most 80 characters.

    >>> shown("weight\x1b[2J")
    'weight\\x1b[2J'
    """
    # No more than what is shown: a string may be as long as a header.
    plain = ascii(text[: _SHOWN_LENGTH + 1])[1:-1]
    return plain if len(plain) <= _SHOWN_LENGTH else f"{plain[: _SHOWN_LENGTH - 3]}..."


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Report an `OSError` raised inside as a `QmambaError` that names ``path`` and the reason."""
    try:
        yield
    except OSError as error:
        raise QmambaError(
            f"cannot read `{path}`, got `{error.strerror or error}`",
            hint="check the path and its permissions",
        ) from error


def check_output(path: Path, *, force: bool, directory: bool = False, known: Collection[str] = ()) -> None:
    """Refuse an output path before any work is done for it.

    Args:
        path: what is to be written; it need not exist, nor its folder.
        force: whether an existing output may be replaced.
        directory: whether the output is a folder.
        known: names of the entries a folder of this kind holds. One that holds anything else is never
            replaced, since it is not one of ours. Empty: any folder may be.

    Raises:
        QmambaError: something else is there, it may not be replaced, or the folder cannot be written.
    """
    target = _real(path)
    with writing(path, target):
        _require_free(path, target, force=force, directory=directory, known=known)
        folder = next(parent for parent in target.parents if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(folder, os.W_OK | os.X_OK):
            read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
            reason = errno.EROFS if read_only else errno.EACCES
            raise OSError(reason, os.strerror(reason))


@contextmanager
def atomic_file(path: Path, *, force: bool, patience: float = 0.0) -> Iterator[Path]:
    """Write a file beside ``path`` and rename it when the block ends well.

    The block gets the path of an empty file to fill. When it raises, that file is removed and ``path`` is as
    it was. Missing parent folders are made; leftovers of a killed writer of the same path are removed.

    Args:
        path: the file to make.
        force: whether an existing file may be replaced.
        patience: seconds to wait for another process that is writing ``path``.

    Raises:
        QmambaError: ``path`` exists and ``force`` is false, it is no regular file, another process is
            writing it, or the disk refuses.
    """
    check_output(path, force=force)
    target = _real(path)
    with _sole_writer(path, target, patience):
        _require_free(path, target, force=force, directory=False)
        temporary = _sibling(target, "tmp")
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(target)
            _sync(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_directory(path: Path, *, force: bool, known: Collection[str] = ()) -> Iterator[Path]:
    """Fill a folder beside ``path`` and put it in place when the block ends well.

    A folder cannot be renamed over another, so the old one is renamed away first. Whoever is killed between
    the two renames leaves both; `recover_directory` and the next writer put the old one back.

    Args:
        path: the folder to make.
        force: whether an existing folder may be replaced; an empty one always may.
        known: as for `check_output`.

    Raises:
        QmambaError: as for `atomic_file`.
    """
    check_output(path, force=force, directory=True, known=known)
    target = _real(path)
    with _sole_writer(path, target):
        _require_free(path, target, force=force, directory=True, known=known)
        temporary = _sibling(target, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _swap_directory(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def recover_directory(path: Path) -> None:
    """Put back a folder whose replacement was killed between its two renames; does nothing otherwise.

    Raises:
        QmambaError: the folder is being written at this moment, or the disk refuses.
    """
    target = _real(path)
    if not os.path.lexists(target) and target.parent.is_dir() and _leftovers(target, "old"):
        with _sole_writer(path, target):
            pass


def _swap_directory(temporary: Path, target: Path) -> None:
    """Put ``temporary`` in the place of ``target``, which may exist."""
    previous = _sibling(target, "old")
    if target.exists():
        target.rename(previous)
    try:
        temporary.rename(target)
    except BaseException:
        if previous.exists():
            previous.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _real(path: Path) -> Path:
    """The path behind symbolic links, so that a link stays a link and siblings lie on the same disk."""
    return Path(os.path.realpath(path))


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.qmamba-{role}-{secrets.token_hex(4)}")


def _leftovers(target: Path, role: str) -> list[Path]:
    prefix = f".{target.name}.qmamba-{role}-"
    return sorted(entry for entry in target.parent.iterdir() if entry.name.startswith(prefix))


@contextmanager
def _sole_writer(path: Path, target: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the target's lock, with the leftovers of writers that are gone cleared away."""
    lock = target.with_name(f".{target.name}.qmamba-lock")
    with writing(path, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(lock, path, patience)
        try:
            _clear_leftovers(target)
            yield
        finally:
            # Unlinked while still held: whoever opened it meanwhile sees that the name is gone.
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
            os.close(descriptor)


def _acquire(lock: Path, path: Path, patience: float) -> int:
    deadline = time.monotonic() + patience
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have unlinked the name between the open and the lock.
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                continue
            raise QmambaError(
                f"another process is writing `{path}`",
                hint="wait for it to end, or choose another path or `--workdir`",
            ) from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _clear_leftovers(target: Path) -> None:
    previous = _leftovers(target, "old")
    if previous and not os.path.lexists(target):
        previous.pop().rename(target)
    for leftover in previous + _leftovers(target, "tmp"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _require_free(
    path: Path, target: Path, *, force: bool, directory: bool, known: Collection[str] = ()
) -> None:
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    # Also keeps a device such as /dev/null from being replaced by a file.
    right_kind: Callable[[int], bool] = stat.S_ISDIR if directory else stat.S_ISREG
    if not right_kind(mode):
        what = "a folder" if directory else "a regular file"
        raise QmambaError(f"`{path}` exists and is not {what}", hint="choose another path")
    entries = sorted(entry.name for entry in target.iterdir()) if directory else [target.name]
    if not entries:
        return
    strangers = [name for name in entries if name not in known]
    if directory and known and strangers:
        raise QmambaError(
            f"`{path}` is not replaced: it holds `{shown(strangers[0])}`, expected only {', '.join(known)}",
            hint="move that away or choose another path",
        )
    if not force:
        raise QmambaError(f"`{path}` already exists", hint="pass `--force` to replace it")


def _sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; the rename stays atomic there.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, target: Path) -> Iterator[None]:
    """Report a disk that refuses ``target``, which is ``path`` behind links, as a `QmambaError`."""
    try:
        yield
    except OSError as error:
        hint = _WRITE_HINTS.get(error.errno or 0)
        if hint is None or not _concerns(error, target):
            raise
        raise QmambaError(f"cannot write `{path}`, got `{error.strerror or error}`", hint=hint) from error


def _concerns(error: OSError, target: Path) -> bool:
    """Whether an error is about the target, its folder or one above, or names no file at all."""
    if not isinstance(error.filename, str | bytes):
        return True
    culprit = Path(os.fsdecode(error.filename))
    return culprit.is_relative_to(target.parent) or target.is_relative_to(culprit)
