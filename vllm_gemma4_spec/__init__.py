"""Speculative decoding, ModelOpt checkpoints and chat output for Gemma 4 on vLLM 0.19.1.

vLLM calls :func:`register` through the entry point ``vllm.general_plugins`` in every process it starts.
A custom server calls :func:`apply` itself, before or after it imports vLLM. Importing this package
imports neither vLLM nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec._version import __version__

if TYPE_CHECKING:
    from vllm_gemma4_spec.library import Status

__all__ = ["__version__", "apply", "register", "status", "undo"]


def apply() -> None:
    """Apply every patch that its switch leaves on, once per process.

    Modules of vLLM that are imported already are patched now, the others when they are imported. The processes that
    vLLM starts (engine core, workers) apply them by themselves; where they will not, a warning says why.

    Raises:
        VersionError: the installed vLLM is not 0.19.1.
        SettingError: a ``VLLM_GEMMA4_SPEC*`` environment variable is unknown or unreadable.
        TargetError: a target is not what its patch was written for; nothing is patched then.
    """
    from vllm_gemma4_spec import library
    from vllm_gemma4_spec.registry import PATCHER

    PATCHER.apply()
    library.warn_of_unpatched_processes()


def undo() -> None:
    """Put every original back; modules imported later stay as vLLM ships them. ``apply()`` starts anew."""
    from vllm_gemma4_spec.registry import PATCHER

    PATCHER.undo()


def status() -> Status:
    """Every patch in the order they are applied, and which process that is true of: this one. ``print`` it to read it.

    The engine core and the workers are processes of their own; `doctor --url` and ``/metrics`` show all of a server.
    """
    from vllm_gemma4_spec import library

    return library.status()


def register() -> None:
    """Entry point for vLLM's plugin loader: :func:`apply`, then one INFO line that says what is on.

    vLLM swallows an import error of a plugin but lets an exception of this function through, so a
    mismatch stops the server instead of letting it answer wrongly. In the ``vllm`` command it ends the
    process with one line and no traceback.
    """
    from vllm_gemma4_spec.plugin import load

    load()
