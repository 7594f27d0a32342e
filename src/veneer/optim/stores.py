"""Where paged optimizer states lie, and the window through which a step sees them.

A store is a run of bytes. `read` copies ranges of it into the window, one after the other, and returns what is filled;
`write` copies them back. Files are read and written, not mapped, because mapped pages count as the process's own.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from veneer.errors import OptimizerError

Range = tuple[int, int]
"""Where a range begins, and how many bytes it has."""


def scratch() -> str:
    """The folder for temporary states: TMPDIR, or /var/tmp, which lies on a disk where /tmp may be memory."""
    return tempfile.gettempdir() if "TMPDIR" in os.environ or not Path("/var/tmp").is_dir() else "/var/tmp"


class FileStore:
    """States in an unnamed file: it is gone when the optimizer is, even if the process is killed."""

    def __init__(self, device: torch.device, window: int, folder: str | Path | None) -> None:
        self.folder = scratch() if folder is None else str(folder)
        self.size = 0
        self._host = torch.empty(window, dtype=torch.uint8, pin_memory=_pins(device))
        self._window = self._host if device.type == "cpu" else torch.empty_like(self._host, device=device)
        self._bytes = self._host.numpy().data
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  # open as long as this is
        except OSError as error:
            raise OptimizerError(
                f"PagedAdamW cannot make a file in {self.folder}: {error.strerror}. Give a folder that takes one."
            ) from error
        weakref.finalize(self, self._file.close)

    def grow(self, size: int) -> None:
        """Make it `size` bytes long, with disk blocks behind every one of them; OptimizerError where there are none."""
        try:
            if sys.platform == "linux":
                os.posix_fallocate(self._file.fileno(), self.size, size - self.size)
            else:  # no call takes blocks, so something is written to each, no matter what
                self._file.seek(self.size)
                for start in range(self.size, size, len(self._bytes)):
                    self._put(self._bytes[: min(len(self._bytes), size - start)])
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            os.truncate(self._file.fileno(), self.size)
            raise OptimizerError(
                f"PagedAdamW needs {size - self.size:,} bytes in {self.folder} for the states of its parameters, where "
                f"{free:,} are free: {error.strerror}. Free some, or give a folder on another disk."
            ) from error
        self.size = size

    def read(self, ranges: Sequence[Range]) -> Tensor:
        """The window, filled with these ranges; on the parameters' device."""
        end = 0
        for offset, length in ranges:
            self._file.seek(offset)
            while length:  # one call gives 2 GiB at most
                got = self._file.readinto(self._bytes[end : end + length])
                if not got:
                    raise OptimizerError(
                        f"The file of PagedAdamW in {self.folder} was cut short. Train from a checkpoint."
                    )
                end, length = end + got, length - got
        if self._window is not self._host:
            self._window[:end].copy_(self._host[:end])
        return self._window[:end]

    def write(self, ranges: Sequence[Range]) -> None:
        """Put what the window holds back where these ranges came from."""
        end = sum(length for _, length in ranges)
        if self._window is not self._host:
            self._host[:end].copy_(self._window[:end])
        end = 0
        for offset, length in ranges:
            self._file.seek(offset)
            self._put(self._bytes[end : end + length])
            end += length

    def _put(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]

    def buffer(self) -> mmap.mmap:
        """All of it as memory that the disk is read into when it is looked at; changes to it stay out of the file."""
        return mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_COPY)


class HostStore:
    """States in the host's memory, pinned so that an accelerator copies them on its own."""

    def __init__(self, device: torch.device, window: int) -> None:
        self.size = 0
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._window = torch.empty(window, dtype=torch.uint8, device=device)

    def grow(self, size: int) -> None:
        """Make it `size` bytes long."""
        self._wait()
        larger = torch.empty(size, dtype=torch.uint8, pin_memory=_pins(self._device))
        larger[: self.size] = self._memory
        self._memory, self.size = larger, size

    def read(self, ranges: Sequence[Range]) -> Tensor:
        """The window, filled with these ranges; on the parameters' device."""
        end = 0
        for offset, length in ranges:
            self._window[end : end + length].copy_(self._memory[offset : offset + length], non_blocking=True)
            end += length
        return self._window[:end]

    def write(self, ranges: Sequence[Range]) -> None:
        """Put what the window holds back where these ranges came from; in the order of the device's own stream."""
        end = 0
        for offset, length in ranges:
            self._memory[offset : offset + length].copy_(self._window[end : end + length], non_blocking=True)
            end += length

    def buffer(self) -> memoryview:
        """All of it, the memory itself."""
        self._wait()
        return self._memory.numpy().data

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def _pins(device: torch.device) -> bool:
    return device.type in ("cuda", "xpu")
