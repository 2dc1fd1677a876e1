"""Waiting that a key ends."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def single_keys() -> Iterator[bool]:
    """Keys arrive without Enter and are not echoed; yields False where stdin is no terminal."""
    try:
        import termios
        import tty

        if not sys.stdin.isatty():
            raise ValueError
        before = termios.tcgetattr(sys.stdin)
    except (ImportError, OSError, ValueError):
        yield False
        return
    try:
        tty.setcbreak(sys.stdin)
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def wait(seconds: float, keys: bool) -> bool:
    """True where ``q`` was pressed within ``seconds``, or the terminal has gone; other keys are ignored."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if not keys:
            time.sleep(left)
        elif select.select([sys.stdin], [], [], left)[0]:
            typed = os.read(sys.stdin.fileno(), 64)  # past Python's buffer, which select does not see
            if b"q" in typed.lower():
                return True
            if not typed:  # the terminal is gone
                return True
    return False
