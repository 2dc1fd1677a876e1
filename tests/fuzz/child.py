"""One target in a process of its own, first under atheris, then by plain mutation; see ``__main__``."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.targets import TARGETS

HANG_SECONDS = 60  # for a batch of mutated cases; the slowest case takes milliseconds
_BATCH = 64


def guided(name: str, options: list[str]) -> None:
    """libFuzzer's own loop; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["vllm_gemma4_spec"]):
        target = TARGETS[name].load()
        target(b"")  # imports what it needs, so that all of it is instrumented
    atheris.Setup([name, *options], target)
    atheris.Fuzz()


def mutated(name: str, cases: int, seed: int, kept: Path, crash: Path) -> None:
    """``cases`` mutations of the inputs that coverage kept, without its cost."""
    target, longest = TARGETS[name].load(), TARGETS[name].longest
    corpus = [file.read_bytes() for file in sorted(kept.iterdir())] or [b""]
    rng = random.Random(seed)
    target(b"")
    began = time.monotonic()
    current = b""

    def hung(*_: object) -> None:
        crash.write_bytes(current)
        os.write(2, b"HangError: no end in sight\n")
        os._exit(1)

    signal.signal(signal.SIGALRM, hung)
    for n in range(cases):
        if n % _BATCH == 0:
            signal.alarm(HANG_SECONDS)
        current = mutation(rng, corpus)[:longest]
        try:
            target(current)
        except BaseException:
            crash.write_bytes(current)
            raise
    signal.alarm(0)
    print(f"Done {cases} runs in {time.monotonic() - began:.0f} second(s)")


def mutation(rng: random.Random, corpus: list[bytes]) -> bytes:
    """Two inputs spliced, then bytes set, taken out and put in; one in eight is random from the start."""
    pick: Callable[[int], int] = rng.randrange
    if not pick(8):
        return rng.randbytes(pick(300))
    one, other = corpus[pick(len(corpus))], corpus[pick(len(corpus))]
    data = bytearray(one[: pick(len(one) + 1)] + other[pick(len(other) + 1) :] if pick(2) else one)
    for _ in range(1 + pick(4)):
        at, what = pick(len(data) + 1), pick(3)
        if what == 0:
            data[at:at] = rng.randbytes(1 + pick(3))
        elif what == 1:
            del data[at : at + 1 + pick(4)]
        elif at < len(data):
            data[at] = pick(256)
    return bytes(data)


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    kind, name, *rest = sys.argv[1:]
    if kind == "guided":
        guided(name, rest)
    else:
        cases, seed, kept, crash = rest
        mutated(name, int(cases), int(seed), Path(kept), Path(crash))


if __name__ == "__main__":
    main()
