"""One kernel caps a Gemma 4's logits on a GPU; elsewhere PyTorch's three functions."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_gemma4_spec
from tests.support import engine as _engine  # sets the environment
from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.stock import without
from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import soft_cap as kernel
from vllm_gemma4_spec.performance.patches import SOFT_CAP

assert _engine

WEIGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 20


class OnCard(torch.Tensor):
    """A tensor that says it is on a GPU, and so does all that is made of it."""

    is_cuda = True


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    vllm_gemma4_spec.apply()
    with set_current_vllm_config(VllmConfig()):
        yield


def capped(
    monkeypatch: pytest.MonkeyPatch,
    target: Any = GEMMA4,
    dtype: torch.dtype = torch.bfloat16,
    on_card: bool = True,
    hip: str | None = None,
    cap: float | None = 30.0,
    **options: Any,
) -> int:
    """How often the kernel caps logits; they must be what PyTorch gives."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    launched = []

    def launch(logits: torch.Tensor, cap: float) -> torch.Tensor:
        launched.append(logits.shape)
        return logits.copy_((logits / cap).tanh() * cap)

    monkeypatch.setattr(kernel, "soft_cap", launch)
    monkeypatch.setattr(scope, "current_config", lambda: vllm_config(target, target))
    monkeypatch.setattr(torch.version, "hip", hip)
    hidden = torch.ones(3, 4).to(dtype)
    if on_card:
        hidden = hidden.as_subclass(OnCard)
    head = SimpleNamespace(quant_method=SimpleNamespace(apply=lambda _, x, bias: x @ WEIGHT.to(dtype).T))
    made = LogitsProcessor(6, soft_cap=cap, **options)
    monkeypatch.setattr(made, "_gather_logits", lambda logits: logits)
    found = made(head, hidden)
    assert made.soft_cap == cap
    wanted = hidden if options.get("logits_as_input") else hidden @ WEIGHT.to(dtype).T
    if cap is not None:
        wanted = (wanted / cap).tanh() * cap
    assert torch.equal(found, wanted * options.get("scale", 1.0))
    return len(launched)


def test_one_kernel_caps_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capped(monkeypatch) == 1


def test_stock_caps_with_three_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with without(SOFT_CAP):
        assert capped(monkeypatch) == 0


@pytest.mark.parametrize(
    "case",
    [
        {"target": LLAMA},
        {"dtype": torch.float32},
        {"on_card": False},
        {"hip": "7.0"},
        {"cap": None},
        {"scale": 0.5},
        {"logits_as_input": True},
    ],
    ids=lambda c: str(*c),
)
def test_elsewhere_pytorch_does(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]) -> None:
    assert capped(monkeypatch, **case) == 0


def test_a_rank_without_logits_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM gathers them for the first rank alone on some platforms."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    monkeypatch.setattr(scope, "current_config", lambda: vllm_config(GEMMA4, GEMMA4))
    made = LogitsProcessor(6, soft_cap=30.0)
    monkeypatch.setattr(made, "_get_logits", lambda *_: None)
    assert made(SimpleNamespace(), torch.ones(3, 4).as_subclass(OnCard)) is None
