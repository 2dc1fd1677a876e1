"""What the doctor reports."""

from __future__ import annotations

from enum import Enum

from pydantic.dataclasses import dataclass

from vllm_gemma4_spec.ops.output import CONFIG, Output


class State(str, Enum):
    """``problem`` makes the exit code 1; a ``note`` needs no action."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(config=CONFIG)
class Finding:
    """One fact."""

    section: str
    """versions, plugin, device, patches, environment or server"""
    name: str
    state: State
    """a `problem` makes the exit code 1; a `note` needs no action"""
    found: str
    wanted: str = ""
    """what is supported; empty where there is nothing to compare with"""
    advice: str = ""
    """what to do, or why it is so; may be empty"""


class Report(Output):
    """All findings, in the order they are printed."""

    healthy: bool
    """no finding is a problem"""
    python: str
    """the environment that was examined"""
    findings: list[Finding]
