"""Errors that a user can act on.

Everything raised for a user's mistake derives from :class:`Gemma4SpecError`; its message is one line
that names the thing and the way out. The command line prints it without a traceback.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn


class Gemma4SpecError(Exception):
    """Base of all errors raised for something a user can fix.

    No ``ValueError`` while a checkpoint or a drafter is read: pydantic would wrap that in lines of its own. The message
    stays one line, and draws nothing on a terminal, whatever names it quotes.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class VersionError(Gemma4SpecError):
    """The installed vLLM is not the one the patches were written for."""


class SettingError(Gemma4SpecError, ValueError):
    """An environment variable has an unknown name or a value that cannot be read."""


class TargetError(Gemma4SpecError):
    """A patch's target is not what the patch was written for."""


class PatchStateError(Gemma4SpecError):
    """Patches were applied or undone in an order that cannot work."""


class CheckpointError(Gemma4SpecError):
    """A checkpoint, or a file or tensor of it, is not what it must be; the message names it."""


class EngineConfigError(Gemma4SpecError, ValueError):
    """An engine's settings under which Gemma 4 cannot run, or would answer wrongly."""


class DrafterError(Gemma4SpecError):
    """The drafter in the speculative config does not fit its target, or cannot be read."""


# What starts a server or a batch run: the `vllm` command, its modules by `python -m`, our own for the CPU wheel.
_PROGRAMS = ("vllm", "api_server.py", "run_batch.py", "launcher.py", "vllm_command.py")


def stop(error: Gemma4SpecError) -> NoReturn:
    """End with ``error``: one line and exit code 1 in vLLM's own programs, an exception in anybody else's."""
    if os.path.basename(sys.argv[0]) in _PROGRAMS:
        raise SystemExit(f"vllm-gemma4-spec: {error}") from None
    raise error from None
