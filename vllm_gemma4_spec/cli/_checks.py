"""What a command checks before it imports torch, which takes seconds: a mistake is said at once."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.errors import CheckpointError


def checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in ``path``, its headers read.

    Raises:
        CheckpointError: not a folder, or a checkpoint that cannot be read.
    """
    if path.is_file():
        if path.suffix == ".gguf":
            raise CheckpointError(f"{path}: a GGUF file, which is not read here; name a folder of safetensors")
        raise CheckpointError(f"{path}: a file; name the folder that holds the checkpoint")
    found = Checkpoint(path)
    assert found.tensors is not None  # reads every header
    return found


def new_folder(option: str, out: Path) -> None:
    """``out`` does not exist and can be made.

    Raises:
        CheckpointError: says why not.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{option} {out}: exists already; name a folder that does not")
    parent = next(p for p in out.absolute().parents if p.exists())
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise CheckpointError(f"{option} {out}: no folder can be made in {parent} ({error.strerror})") from None


def say(text: str, quiet: bool = False) -> None:
    """One line on stderr where somebody watches: what takes longer than a second."""
    if not quiet and sys.stderr.isatty():
        print(text, file=sys.stderr)


@contextmanager
def slow(text: str, quiet: bool = False) -> Iterator[None]:
    """Says ``text`` if what is done within takes longer than a second."""
    timer = threading.Timer(1, say, (text, quiet))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
