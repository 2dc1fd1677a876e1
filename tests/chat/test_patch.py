"""The wrappers stand in for what they wrap, whoever calls them and however."""

from __future__ import annotations

import importlib
import inspect
from functools import reduce
from typing import Any

import pytest

from vllm_gemma4_spec.chat.patches import CHAT_OUTPUT
from vllm_gemma4_spec.patching.patch import Group
from vllm_gemma4_spec.registry import PATCHER


def target(edit: Any) -> Any:
    module, _, name = edit.target.partition(":")
    return reduce(getattr, name.split("."), importlib.import_module(module))


@pytest.mark.parametrize("edit", CHAT_OUTPUT.edits, ids=lambda e: e.target.rpartition(".")[2])
def test_parameters_keep_their_names(overlay: None, edit: Any) -> None:
    """vLLM (and its tests) pass some of them by name."""
    wrapper = target(edit)
    theirs = list(inspect.signature(wrapper).parameters)
    ours = inspect.signature(wrapper, follow_wrapped=False).parameters
    named = [n for n, p in ours.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert named == theirs[: len(named)]
    assert len(named) == len(theirs) or len(named) < len(ours)  # the rest is passed on as it comes


def test_all_or_nothing(overlay: None) -> None:
    assert CHAT_OUTPUT.group is Group.CORRECTNESS
    wrapped = [target(e) for e in CHAT_OUTPUT.edits]
    assert all(hasattr(w, "__wrapped__") for w in wrapped)
    PATCHER.undo([CHAT_OUTPUT])
    try:
        assert not any(hasattr(target(e), "__wrapped__") for e in CHAT_OUTPUT.edits)
    finally:
        PATCHER.apply([CHAT_OUTPUT])
