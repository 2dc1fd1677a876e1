"""Speculative decoding, ModelOpt checkpoints and chat output for Gemma 4 on vLLM 0.19.1.

vLLM calls :func:`register` through the entry point ``vllm.general_plugins`` in every process it starts.
A custom server calls :func:`apply` itself, before or after it imports vLLM. Importing this package
imports neither vLLM nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec._version import __version__

if TYPE_CHECKING:
    from vllm_gemma4_spec.patching.engine import PatchStatus

__all__ = ["__version__", "apply", "register", "status", "undo"]


def apply() -> None:
    """Apply every patch that its switch leaves on, once per process.

    Modules of vLLM that are imported already are patched now, the others when they are imported.

    Raises:
        VersionError: the installed vLLM is not 0.19.1.
        SettingError: a ``VLLM_GEMMA4_SPEC*`` environment variable is unknown or unreadable.
        TargetError: a target is not what its patch was written for; nothing is patched then.
    """
    from vllm_gemma4_spec.registry import PATCHER

    PATCHER.apply()


def undo() -> None:
    """Put every original back; modules imported later stay as vLLM ships them. ``apply()`` starts anew."""
    from vllm_gemma4_spec.registry import PATCHER

    PATCHER.undo()


def status() -> list[PatchStatus]:
    """The state of every patch in this process, in the order they are applied."""
    from vllm_gemma4_spec.registry import PATCHER

    return PATCHER.status()


def register() -> None:
    """Entry point for vLLM's plugin loader: :func:`apply`, then one INFO line that says what is on.

    vLLM swallows an import error of a plugin but lets an exception of this function through, so a
    mismatch stops the server instead of letting it answer wrongly. In the ``vllm`` command it ends the
    process with one line and no traceback.
    """
    from vllm_gemma4_spec.plugin import load

    load()
