"""Writing files so that a kill never leaves half of one under a good name, and reading them with suspicion."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.errors import CorruptFile, FileError, UnsafeFile

TRAINABLE = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files under temporary names, sync them, then rename them in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for name, content in contents.items():
            with temporary[name].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, path in temporary.items():
            path.replace(folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    sync(folder)


def sync(path: Path) -> None:
    """Have a file or a folder on the disk before anything after this is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when all of it is written and synced, and is gone on an error.

    Raises FileError where `folder` exists already.
    """
    if folder.exists():
        raise FileError(f"{folder} exists already; name a new folder.")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(folder.parent)


def to_json(content: Mapping[str, Any]) -> bytes:
    """The same content always gives the same bytes."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CorruptFile for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        to_json({"content": content})  # what cannot be written again, such as half a surrogate pair, is no text
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} is not readable as JSON: {error}. Restore it from where it came from.") from None
    if not isinstance(content, dict):
        raise CorruptFile(f"{path} holds a JSON {type(content).__name__}, not an object.")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UnsafeFile for a pickle, CorruptFile for anything else or for NaN."""
    if not path.exists():
        pickled = next(
            (path.parent / n for n in ("adapter_model.bin", "adapter_model.pt") if (path.parent / n).exists()), None
        )
        if pickled:
            raise UnsafeFile(
                f"{pickled} is a pickle, which can run code when it is read. Convert it to {path.name} where you trust "
                "it: safetensors.torch.save_file(torch.load(file, weights_only=True), new_file)."
            )
        raise FileError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no iterator of its own
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFile(
            f"{path} is truncated or no safetensors file ({error}). Copy it again from its source."
        ) from None
    for key, tensor in tensors.items():
        if tensor.dtype not in {*TRAINABLE, torch.int32, torch.int64}:
            raise CorruptFile(f"{path}: {key} is stored as {tensor.dtype}; an adapter's tensors are floats or indices.")
        if not torch.isfinite(tensor).all():
            raise CorruptFile(
                f"{path}: {key} holds NaN or infinite numbers; its training diverged. Use an earlier save."
            )
    return tensors


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
