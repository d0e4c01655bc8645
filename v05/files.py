"""Reading files that people hand over, and writing to disks that fill up, fail and lose power."""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")  # weights, configuration, tokenizer, chat template
BLOCK = 1 << 20  # bytes


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark. ValueError names the file and the line that is not UTF-8."""
    data = path.read_bytes()
    try:
        return _decoded(data, str(path))
    except ValueError:
        for _ in _numbered_lines(path):  # names the line
            pass
        raise


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds. ValueError names the file and what is wrong with it."""
    return _object(read_text(path), str(path))


def read_objects(path: Path, *, growing: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file that has one a line, each with the number of its line; blank lines are skipped.

    With `growing`, a last line without a line break is still being written, and left out. The file is read as a stream.
    Raises ValueError that names the file and the line: not UTF-8, no JSON object, a number of too many digits, a lone surrogate.
    """
    for number, line in _numbered_lines(path):
        if line.strip() and not (growing and not line.endswith("\n")):
            yield number, _object(line, f"{path}, line {number}", " a line")


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, _decoded(line, f"{path}, line {number}")


def _decoded(data: bytes, where: str) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{where} is UTF-16; convert the file to UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error}); convert the file") from None


def _object(text: str, where: str, each: str = "") -> dict[str, Any]:
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair has no UTF-8, which would show where it is written or tokenised
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, a lone surrogate, or more digits than Python reads
        raise ValueError(f"{where}: {error}; give one JSON object{each}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds no JSON object but {text.strip()[:60]!r}; give one{each}")
    return value


def content_digest(path: Path) -> str | None:
    """A hash of a file's bytes, or of a folder's model files by name: paths of one hash hold the same data, wherever they lie.

    None for what is neither: nothing is there, or a pipe, which can be read only once.
    """
    if path.is_dir():
        parts = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES and file.is_file())
        named = "".join(f"{file.name} {_sha256_as_of(file)}\n" for file in parts)
        return hashlib.sha256(named.encode()).hexdigest()
    return _sha256_as_of(path) if path.is_file() else None


def _sha256_as_of(path: Path) -> str:
    found = path.stat()
    return _remembered_sha256(path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _remembered_sha256(path: Path, inode: int, size: int, changed: int) -> str:
    """A comparison asks for the same weights again and again; they are read anew when the file has changed."""
    return sha256(path)


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def explained(path: Path, outlook: str) -> Iterator[None]:
    """An OSError that names `path`, the remedy and the `outlook` for any error of writing within."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
        raise OSError(f"{path} cannot be written ({error}); make room or give write access, then call again: {outlook}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file beside `path`; what is written to it within takes the place of `path`, whole, or nothing changes. The folder
    is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of one node or several, which may have the same number in their containers, may write the same file.
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        scratch.touch()
        mode = scratch.stat().st_mode
        yield scratch
        scratch.chmod(mode)  # safetensors replaces it by a file that its owner alone may read
        flush(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Have the disk hold a folder and its files, and let whoever may read the folder read them: safetensors writes files that their
    owner alone may read, whatever the umask says."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Have the disk hold a file's contents, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
