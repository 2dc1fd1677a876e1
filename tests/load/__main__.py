"""``python -m tests.load``: prints counts, leaks and differences; exit code 1 if there is anything to fix."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from tests.load.run import run
from vllm_gemma4_spec.demo import build


def main(
    requests: Annotated[int, typer.Option(help="Requests altogether.")] = 3000,
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 64,
    speculate: Annotated[bool, typer.Option(help="With the drafter.")] = True,
    overlay: Annotated[bool, typer.Option(help="Otherwise vLLM as it is, without speculation.")] = True,
    seqs: Annotated[int, typer.Option(help="Requests that the engine runs at once.")] = 32,
    blocks: Annotated[int, typer.Option(help="Blocks of the KV cache.")] = 700,
    questions: Annotated[int, typer.Option(help="Different requests, each asked alone first.")] = 60,
    log: Annotated[Path, typer.Option(help="File for the server's log.")] = Path("load.log"),
) -> None:
    pair, _ = build.ensure(build.default_folder())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server goes down with us
    result = run(
        pair,
        log,
        requests,
        clients,
        speculate,
        overlay,
        seqs,
        blocks,
        questions,
        step=lambda text: print(text, flush=True),
    )
    print(*result.lines(), sep="\n")
    sys.exit(bool(result.errors or result.different or any(result.left.values())))


if __name__ == "__main__":
    typer.run(main)
