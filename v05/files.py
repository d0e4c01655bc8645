"""Reading files from users, and writing files so that a full disk, an error or a power failure leaves no broken file."""

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
    """The text of a UTF-8 file without its byte-order mark. A ValueError names the file and the line that is not UTF-8."""
    data = path.read_bytes()
    try:
        return _decoded(data, str(path))
    except ValueError:
        for _ in _numbered_lines(path):  # raises an error that names the line
            pass
        raise


def require_model(argument: str, folder: Path) -> None:
    """Raise ValueError, naming the argument, unless the folder holds a Hugging Face model."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{argument}={folder}: no config.json there; give a Hugging Face model folder (nothing is downloaded; "
            "hf download NAME --local-dir FOLDER makes one)"
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. A ValueError names the file and what is wrong with it."""
    return _object(read_text(path), str(path))


def read_objects(path: Path, *, growing: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, JSON object) of a file with one object on each line. Blank lines are skipped.

    The file is read as a stream. With `growing`, a last line without a line break is skipped, because it is still being written.

    Raises:
        ValueError: a line is not UTF-8 or not a JSON object, or has a number of too many digits or a lone surrogate. The message
            names the file and the line.
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
        if "\\ud" in text.lower():  # raises for a lone surrogate, which cannot be written or tokenised later
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, a lone surrogate, or too many digits
        if isinstance(error, json.JSONDecodeError):  # its own text counts lines from the beginning of `text`
            place = f"column {error.pos + 1}" if error.pos < len(text.rstrip()) else "its end"
            told = f"{error.msg} at {place}" if each else str(error)
        else:
            told = str(error)
        raise ValueError(f"{where}: {told}; give one JSON object{each}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds no JSON object but {text.strip()[:60]!r}; give one{each}")
    return value


def content_digest(path: Path) -> str | None:
    """A SHA-256 of a file's bytes, or of the names and bytes of a folder's model files. Equal digests mean equal data.

    None if the path does not exist or is something else, such as a pipe, which could be read only once.
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
    """Cached, because a comparison hashes the same weights many times. A changed file is read again."""
    return sha256(path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def explained(path: Path, outlook: str) -> Iterator[None]:
    """Turn errors of writing into an OSError that names `path`, the remedy and the `outlook`: what a repeated call will do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps an OSError in an error of its own
        raise OSError(f"{path} cannot be written ({error}); make room or give write access, then call again: {outlook}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch file beside `path`, which replaces `path` at the end of the block.

    If the block raises, `path` is unchanged. The folder is created if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is random because several processes may write the same file, and their ids can be equal in different containers.
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        scratch.touch()
        mode = scratch.stat().st_mode
        yield scratch
        scratch.chmod(mode)  # safetensors makes files that only their owner can read
        flush(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Flush a folder and its files to disk, and give the files the read and write permissions of the folder.

    safetensors writes files that only their owner can read, whatever the umask is.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
