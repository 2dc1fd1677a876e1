"""What corrects counts and prepares drafts is not compiled by requests: async scheduling, requests that come and go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import device
from tests.mtp import pairs
from tests.support import arrivals, engine, tiny_models
from tests.support.stock import without
from vllm_gemma4_spec.performance.patches import COMPILED_AT_START

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

OURS = "_correct"
# What a start does not launch: what copies the tokens of a draft model's first pass, by the length of a prompt.
LEFT = {"draft model": {"copy_and_expand_eagle_inputs_kernel"}, "assistant": set()}
VLLMS = {"eagle_prepare_inputs_padded_kernel", "eagle_prepare_next_token_padded_kernel"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By kind of drafter: the target, and how it speculates."""
    folder = tmp_path_factory.mktemp("models")
    own = device.models(folder)
    kind = pairs.KINDS["31b"]()
    kind.target.head_dim, kind.target.global_head_dim = device.HEADS.values()
    target = tiny_models.save(kind.target, folder / "assisted")
    assistant = pairs.save_assistant(kind, folder / "assistant")
    return {
        "draft model": (own["target"], {"method": "draft_model", "model": str(own["close"])}),
        "assistant": (target, {"model": str(assistant)}),
    }


def _forget() -> None:
    """What earlier engines of this process have compiled: kernels by device, and functions of torch.compile."""
    import torch
    from vllm.v1.spec_decode import eagle

    from vllm_gemma4_spec.kernels import computed_counts

    torch._dynamo.reset()
    for kernel in (computed_counts._correct, *(getattr(eagle, name) for name in VLLMS)):
        kernel.device_caches.clear()


@contextlib.contextmanager
def _compiled() -> Iterator[list[str]]:
    """Names of kernels that Triton compiles or reads from its cache for a first launch, torch.compile, NVRTC."""
    from torch._dynamo.callback import callback_handler
    from triton import knobs

    from vllm_gemma4_spec.kernels import cuda

    found: list[str] = []

    def compiles(*, fn: Any, **_: Any) -> None:
        found.append(fn.name.rpartition(".")[2])  # the answer None: go on

    def begins(_: Any) -> None:
        found.append("torch.compile")

    nvrtc = cuda.compiled

    def in_cuda(*of: str) -> bytes:
        found.append("NVRTC")
        return nvrtc(*of)

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, compiles
    cuda.compiled = in_cuda
    callback_handler.register_start_callback(begins)
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook, cuda.compiled = before, nvrtc
        with contextlib.suppress(ValueError):  # a start may have reset Dynamo, which forgets it
            callback_handler.remove_start_callback(begins)


def _served(target: Path, speculative: dict[str, Any]) -> tuple[list[str], list[str], list[list[int]]]:
    """What a start compiles, what serving compiles after it, and the answers."""
    _forget()
    options = device.options(device.K, async_scheduling=True)
    options["speculative_config"] = {**speculative, "num_speculative_tokens": device.K}
    with _compiled() as at_start, engine.engine(target, **options) as llm:
        started = list(at_start)
        with _compiled() as late:
            answers = arrivals.serve(llm)
        del llm
    return started, late, answers


@pytest.mark.parametrize("kind", ["draft model", "assistant"])
def test_requests_compile_nothing_that_stands_between_steps(
    models: dict[str, tuple[Path, dict[str, Any]]], kind: str, measured: Any
) -> None:
    target, speculative = models[kind]
    started, late, answers = _served(target, speculative)
    with without(COMPILED_AT_START):
        _, stock, wanted = _served(target, speculative)
    measured(late=sorted(set(late)), stock=sorted(set(stock)))
    assert {OURS, *VLLMS} <= set(started)
    assert set(stock) >= {"torch.compile", *VLLMS}  # the watch sees what it should
    assert set(late) <= LEFT[kind]
    assert answers == wanted
