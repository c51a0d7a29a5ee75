"""Files that are whole or not there, folders that one process writes, and what a file holds.

A kill, a full disk or a second process may come at any moment: a file is written beside its place, flushed to disk and
renamed, so a reader sees the old one or the new one, never a part.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

HERE = re.sub(r"\W", "-", platform.node())[:32] or "here"
"""This machine, in the names of temporary files: of a folder that several of them write."""
_CLAIMS: dict[Path, int] = {}
"""Folders that this process writes, each with the descriptor that holds its lock."""
LIST = ".files"
"""In a run folder: the files that its runs wrote, a line each, so that nobody else's are deleted with them."""
_LISTED: dict[Path, set[str]] = {}
"""Folders of which this process keeps such a list, with the lines that are in it."""
UNLISTED = [
    f"{stage}{name}" for stage in ("", "tune/", "distil/")
    for name in (
        "metrics.jsonl", "checkpoints/*.ckpt", "tensorboard/events.out.tfevents.*", "tensorboard/hparams.yaml",
        "wandb/**/*", "wandb-id",
    )
] + ["parts/*-[0-9]*.safetensors", "result.json", "inputs.json", "config.yaml"]  # fmt: skip
"""Files of a run that are appended to or renamed, and those of a run without a list, of an earlier version. The last ones make
it that run: they go last."""


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary file to write; at the end it takes its place at ``path``, after an error it is gone.

    Args:
        path: of the file; its folder is made if missing, an earlier file is replaced.

    Raises:
        OSError: naming ``path``: no room, no permission, a name that is too long.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{HERE}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        _list(path)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def write(path: str | Path, content: bytes | str | Iterable[bytes]) -> Path:
    """Write bytes, parts of them, or a text (UTF-8), whole or not at all."""
    if isinstance(content, str):
        content = content.encode()
    with whole(path) as temporary, temporary.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
    return Path(path)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], told: Mapping[str, str] | None = None) -> Path:
    """Write contiguous tensors that share no memory (safetensors), whole or not at all.

    Raises:
        OSError: no room.
    """
    with whole(path) as temporary:
        try:
            save_file(dict(tensors), temporary, None if told is None else dict(told))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
    return Path(path)


def drop_cut_line(path: str | Path) -> None:
    """Drop the last line of a file where a kill cut it."""
    path = Path(path)
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        write(path, content[: content.rfind(b"\n") + 1])


def claim(folder: str | Path) -> None:
    """Make this process the only one that writes to a folder, until `release` or its end; a killed one leaves no lock.

    Of several ranks of one run, the first claims. Where the file system has no locks, nothing is claimed.

    Raises:
        ValueError: another process writes it.
    """
    try:
        import fcntl
    except ImportError:  # no locks on this system
        return
    folder = Path(folder).resolve()
    if folder in _CLAIMS or any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK")):
        return
    try:
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # a folder that cannot be written: the first write says so
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"{folder} is being written by another process: wait for it, or choose another out=") from None
    except OSError:
        os.close(lock)
        return
    _CLAIMS[folder] = lock
    for left in folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
        left.unlink(missing_ok=True)


class Claims:
    """Pieces of work of a folder that several processes share: what one of them claims is nobody else's until it is done with
    it or has ended, on whatever machine.

    A piece is a byte of one lock file. Locks of bytes (POSIX) reach from machine to machine on NFS, Lustre and GPFS, where
    those of whole files often do not, and the system takes them from a process that ends, so none is ever stale. Where the
    file system has no locks, every piece is free to everybody.

    Args:
        folder: that all processes see; made if missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / ".claims"
        self.lock: int | None = None

    def __enter__(self) -> Claims:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # a folder that cannot be written: the first write says so
            self.lock = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            os.close(self.lock)

    @contextmanager
    def of(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Inside, whether the piece of this name is this process's.

        Args:
            wait: until it is.
        """
        try:
            import fcntl
        except ImportError:  # no locks on this system
            yield True
            return
        byte = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        mine = True
        if self.lock is not None:
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
            except OSError as error:
                mine = error.errno not in (errno.EACCES, errno.EAGAIN)
        try:
            yield mine
        finally:
            if mine and self.lock is not None:
                with suppress(OSError):
                    fcntl.lockf(self.lock, fcntl.LOCK_UN, 1, byte)


def sweep(folder: str | Path) -> None:
    """Delete the temporary files in a folder that others may write of those processes of this machine that have ended."""
    if os.name != "posix":  # elsewhere a process cannot be asked for without ending it
        return
    for left in Path(folder).rglob(f".*.{HERE}.*.tmp"):
        number = left.suffixes[-2][1:]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (OSError, ValueError):  # somebody else's, or no number
            continue


def keep_list(folder: str | Path) -> None:
    """List from now on the files that this process writes into a folder."""
    folder = Path(folder).resolve()
    file = folder / LIST
    _LISTED[folder] = set(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else set()


def _list(path: Path) -> None:
    """Put a file that is about to appear on the list of its folder."""
    for folder, lines in _LISTED.items():
        if (where := path.resolve()).is_relative_to(folder):
            line = json.dumps(where.relative_to(folder).as_posix())
            if line not in lines:
                lines.add(line)
                with (folder / LIST).open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")


def listed(folder: str | Path) -> list[Path]:
    """The files of a folder that its runs wrote, in the order in which to delete them; nothing outside it."""
    folder = Path(folder).resolve()
    file = folder / LIST
    names = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(ValueError):  # a line that a kill cut
            names.append(str(json.loads(line)))
    last = [path for pattern in UNLISTED for path in sorted(folder.glob(pattern))]
    paths = [path for name in sorted(names) if (path := folder / name) not in last] + last
    return [path for path in paths if (path.is_file() or path.is_symlink()) and path.parent.resolve().is_relative_to(folder)]


def clear(folder: str | Path) -> None:
    """Delete what its runs wrote into a folder, and the folders in it that this leaves empty: nobody else's files."""
    folder = Path(folder).resolve()
    paths = listed(folder)
    for path in paths:
        path.unlink(missing_ok=True)
    emptied = {parent for path in paths for parent in path.parents if folder in parent.parents}
    emptied |= {inner for outer in emptied for inner in outer.rglob("*") if inner.is_dir()}  # wandb makes some ahead
    for inner in sorted(emptied, key=lambda inner: len(inner.parts), reverse=True):
        with suppress(OSError):  # somebody else's files are in it
            inner.rmdir()
    (folder / LIST).unlink(missing_ok=True)
    keep_list(folder)


def claimed() -> list[Path]:
    """Folders that this process claimed, as seen from where it runs."""
    here = Path.cwd()
    return [path.relative_to(here) if path.is_relative_to(here) else path for path in _CLAIMS]


def release() -> None:
    """Give up all folders that this process claimed."""
    _LISTED.clear()
    while _CLAIMS:
        os.close(_CLAIMS.popitem()[1])


def digest(path: str | Path) -> str:
    """What a file holds, as SHA-256; read once while it stays as it is."""
    stat = os.stat(path)
    return _digest(os.path.abspath(path), stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=256)
def _digest(path: str, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_root(root: str | Path | None = None) -> Path:
    """Where data are kept: ``root``, else $STEERFM_DATA, else ~/.cache/steerfm."""
    return Path(root or os.environ.get("STEERFM_DATA") or Path.home() / ".cache" / "steerfm")


def where_set(root: str | Path | None = None) -> str:
    """What an error about missing data says of $STEERFM_DATA, where it decides."""
    own = os.environ.get("STEERFM_DATA")
    return f" (STEERFM_DATA={own} is set: no other folder is looked in)" if own and not root else ""
