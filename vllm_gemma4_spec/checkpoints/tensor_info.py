"""One tensor of a checkpoint, as its file's header describes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorInfo:
    """``start`` and ``end`` are bytes from the file's beginning; ``dtype`` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.name} ({self.file.name})"
