"""Whether weights are those that were recorded with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors.torch import load_file


def digest(folder: Path) -> str:
    """Of every tensor's name and bytes, whatever wrote the file."""
    mark = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        mark.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return mark.hexdigest()[:16]
