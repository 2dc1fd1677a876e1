"""Errors that a user can act on.

Everything raised for a user's mistake derives from :class:`Gemma4SpecError`; its message is one line
that names the thing and the way out. The command line prints it without a traceback.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn


class Gemma4SpecError(Exception):
    """Base of all errors raised for something a user can mend.

    The message stays one line, and draws nothing on a terminal, whatever names it quotes.
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


class CheckpointError(Gemma4SpecError, ValueError):
    """A checkpoint, or a file or tensor of it, is not what it must be; the message names it."""


class EngineConfigError(Gemma4SpecError, ValueError):
    """An engine's settings under which Gemma 4 cannot run, or would answer wrongly."""


class DrafterError(Gemma4SpecError, ValueError):
    """The drafter in the speculative config does not fit its target, or cannot be read."""


def stop(error: Gemma4SpecError) -> NoReturn:
    """End with ``error``: one line and exit code 1 in the ``vllm`` command, an exception everywhere else."""
    if os.path.basename(sys.argv[0]) == "vllm":
        raise SystemExit(f"vllm-gemma4-spec: {error}") from None
    raise error from None
