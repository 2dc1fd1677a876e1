"""What the tests of torch.compile's settings share, for target and drafter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import vllm_gemma4_spec

SETTINGS = "vllm_gemma4_spec.performance.compile_settings"


@pytest.fixture
def inductor() -> Iterator[None]:
    """Patches applied, and Inductor's choices of kernels put back: they are the process's."""
    from torch._inductor import config

    vllm_gemma4_spec.apply()
    with config.patch(inductor_choices_class=None):
        yield


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that has programmatic dependent launch, asked either way."""
    monkeypatch.setattr(f"{SETTINGS}.card_takes_pdl", lambda: True)
    monkeypatch.setattr(f"{SETTINGS}._takes_pdl", lambda: True)
