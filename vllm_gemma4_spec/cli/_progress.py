"""Progress over shards, on stderr, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_gemma4_spec.cli import _rich as rich


@contextmanager
def shards(verb: str, total: int, *, quiet: bool) -> Iterator[Callable[[Path], None]]:
    """A function to call after each shard; silent with ``quiet`` and where stderr is no terminal."""
    with rich.Progress(
        console=rich.Console(stderr=True), disable=quiet or not sys.stderr.isatty(), transient=True
    ) as progress:
        task = progress.add_task(verb, total=total)

        def step(file: Path) -> None:
            progress.update(task, advance=1, description=f"{verb} {file.name}")

        yield step
