"""Atomic writes, locks of folders, and digests of files.

A kill, a full disk or a second process can interrupt at any moment. So a file is written to a temporary name, flushed to disk
and renamed: a reader sees the old file or the new one, never a part.
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
"""The name of this machine in temporary files, for folders that several machines write to."""
_CLAIMS: dict[Path, int] = {}
"""Folders that this process has locked, each with the descriptor of its lock."""
LIST = ".files"
"""A file in a run folder that lists the files of its runs, one per line, so that `clear` deletes no other files."""
_LISTS: dict[Path, set[str]] = {}
"""Folders for which this process writes such a list, with its lines."""
PATTERNS = [
    f"{stage}{name}" for stage in ("", "tune/", "distil/")
    for name in (
        "metrics.jsonl", "checkpoints/*.ckpt", "tensorboard/events.out.tfevents.*", "tensorboard/hparams.yaml",
        "wandb/**/*", "wandb-id",
    )
] + ["parts/*-[0-9]*.safetensors", "result.json", "inputs.json", "config.yaml"]  # fmt: skip
"""Files of a run that are appended to or renamed, and files of an earlier version, which wrote no list. The last ones identify
the run, so they are deleted last."""


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A context with a temporary file to write. At the end it is renamed to ``path``; after an error it is deleted.

    Args:
        path: of the file; its folder is created if missing, an existing file is replaced.

    Raises:
        OSError: the disk is full, permission is missing, or the name is too long; it names ``path``.
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
    """Write bytes, parts of bytes, or a text (UTF-8), in one atomic step."""
    if isinstance(content, str):
        content = content.encode()
    with whole(path) as temporary, temporary.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
    return Path(path)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write contiguous tensors that share no memory (safetensors), in one atomic step.

    Args:
        path: of the file.
        tensors: by name.
        metadata: texts by name, for the header.

    Raises:
        OSError: the disk is full.
    """
    with whole(path) as temporary:
        try:
            save_file(dict(tensors), temporary, None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
    return Path(path)


def drop_cut_line(path: str | Path) -> None:
    """Remove the last line of a file if it is incomplete, after a kill."""
    path = Path(path)
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        write(path, content[: content.rfind(b"\n") + 1])


def claim(folder: str | Path) -> None:
    """Lock a folder for this process, until `release` or its end; a killed process leaves no lock.

    Of several ranks of one run, only the first takes the lock. Without locks in the file system this does nothing.

    Raises:
        ValueError: another process holds the lock.
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
    except OSError:  # the folder is not writable: the first write will raise the error
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"{folder} is in use by another process: wait for it, or choose another out=") from None
    except OSError:
        os.close(lock)
        return
    _CLAIMS[folder] = lock
    for file in folder.rglob(".*.tmp"):  # left by a killed process
        file.unlink(missing_ok=True)


class Claims:
    """Locks for pieces of work that several processes share, on one or more machines. A process holds a piece until it
    releases it or ends.

    A piece is one byte of a lock file. Byte locks (POSIX) work between machines on NFS, Lustre and GPFS, where whole-file
    locks often do not. The system releases them when a process ends, so none is ever stale. Without locks in the file system
    every piece is free for every process.

    Args:
        folder: a folder that all processes see; created if missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / ".claims"
        self.lock: int | None = None

    def __enter__(self) -> Claims:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # the folder is not writable: the first write will raise the error
            self.lock = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            os.close(self.lock)

    @contextmanager
    def of(self, name: str, wait: bool = False) -> Iterator[bool]:
        """A context that tries to lock a piece; its value says whether this process holds it.

        Args:
            name: of the piece.
            wait: until the lock is free.
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
    """Delete temporary files of ended processes of this machine, in a folder that other processes may write to."""
    if os.name != "posix":  # on other systems os.kill would end the process
        return
    for file in Path(folder).rglob(f".*.{HERE}.*.tmp"):
        number = file.suffixes[-2][1:]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except (OSError, ValueError):  # another user's process, or not a number
            continue


def keep_list(folder: str | Path) -> None:
    """Start to list the files that this process writes into a folder."""
    folder = Path(folder).resolve()
    file = folder / LIST
    _LISTS[folder] = set(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else set()


def _list(path: Path) -> None:
    """Add a file to the list of its folder."""
    for folder, lines in _LISTS.items():
        if (where := path.resolve()).is_relative_to(folder):
            line = json.dumps(where.relative_to(folder).as_posix())
            if line not in lines:
                lines.add(line)
                with (folder / LIST).open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")


def run_files(folder: str | Path) -> list[Path]:
    """The files that runs wrote into a folder, in the order of deletion; never files outside it."""
    folder = Path(folder).resolve()
    file = folder / LIST
    names = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(ValueError):  # an incomplete line, after a kill
            names.append(str(json.loads(line)))
    last = [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]
    paths = [path for name in sorted(names) if (path := folder / name) not in last] + last
    return [path for path in paths if (path.is_file() or path.is_symlink()) and path.parent.resolve().is_relative_to(folder)]


def clear(folder: str | Path) -> None:
    """Delete the files that runs wrote into a folder, and subfolders that become empty. Other files stay."""
    folder = Path(folder).resolve()
    paths = run_files(folder)
    for path in paths:
        path.unlink(missing_ok=True)
    folders = {parent for path in paths for parent in path.parents if folder in parent.parents}
    folders |= {inner for outer in folders for inner in outer.rglob("*") if inner.is_dir()}  # wandb creates some in advance
    for inner in sorted(folders, key=lambda inner: len(inner.parts), reverse=True):
        with suppress(OSError):  # it holds other files
            inner.rmdir()
    (folder / LIST).unlink(missing_ok=True)
    keep_list(folder)


def claimed_folders() -> list[Path]:
    """The folders that this process has locked, relative to the working directory."""
    here = Path.cwd()
    return [path.relative_to(here) if path.is_relative_to(here) else path for path in _CLAIMS]


def release() -> None:
    """Release all folders that this process has locked."""
    _LISTS.clear()
    while _CLAIMS:
        os.close(_CLAIMS.popitem()[1])


def digest(path: str | Path) -> str:
    """SHA-256 of a file's content; cached while the file does not change."""
    stat = os.stat(path)
    return _digest(os.path.abspath(path), stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=256)
def _digest(path: str, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data sets: ``root``, else $STEERFM_DATA, else ~/.cache/steerfm."""
    return Path(root or os.environ.get("STEERFM_DATA") or Path.home() / ".cache" / "steerfm")


def where_set(root: str | Path | None = None) -> str:
    """A remark about $STEERFM_DATA for errors about missing data; "" if it is not set or not used."""
    own = os.environ.get("STEERFM_DATA")
    return f" (STEERFM_DATA={own} is set: no other folder is searched)" if own and not root else ""
