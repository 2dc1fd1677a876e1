"""In a draft's first pass the drafter's KV-shared layers see each request's last token alone; drafts are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM

import vllm_gemma4_spec
from tests.support import tiny_models
from tests.support.configs import LLAMA, vllm_config
from tests.support.engine import engine, generate, random_prompts
from tests.support.recorder import Recorder
from tests.support.stock import without
from vllm_gemma4_spec import scope
from vllm_gemma4_spec.performance import last_tokens
from vllm_gemma4_spec.performance.patches import LAST_TOKENS

K = 4


class Rows:
    """How many tokens a drafter's first and last layer see, pass by pass, while it drafts."""

    def __init__(self, drafter: Any) -> None:
        layers = drafter.model.model.layers
        self.seen: list[tuple[int, int]] = []
        layers[0].register_forward_pre_hook(self._first, with_kwargs=True)
        layers[-1].register_forward_pre_hook(self._last, with_kwargs=True)

    def _first(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tokens = len(args[1])

    def _last(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.append((self._tokens, len(args[1])))


Run = tuple[list[tuple[list[int], list[int]]], list[tuple[int, int]]]


def run(models: dict[str, Path], prepare: Callable[[Any], None] = lambda _: None, **options: Any) -> Run:
    """What was drafted, and how many tokens both ends of the drafter saw."""
    with engine(models["target"], models["drafter"], K, **options) as llm:
        recorder = Recorder(llm)
        rows = Rows(recorder.runner.drafter)
        prepare(recorder.runner.drafter)
        generate(llm, random_prompts((3, 33, 70, 300)), [6, 8, 14, 11])
    return recorder.drafts, rows.seen


def are_greedy(drafts: Sequence[tuple[list[int], list[int]]], drafter: Path) -> None:
    model = Gemma4ForCausalLM.from_pretrained(drafter, dtype=torch.float32).eval()
    assert len(drafts) >= 30
    for context, draft in drafts:
        with torch.no_grad():
            logits = model(torch.tensor([context + draft[:-1]])).logits[0, len(context) - 1 :]
        assert logits.argmax(-1).tolist() == draft


def firsts(seen: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    return iter(seen[::K])


def test_shared_layers_see_the_last_tokens_alone(tiny: dict[str, Path]) -> None:
    """Prompts together, steps in which one request after the other ends, drafts rejected at every length."""
    drafts, seen = run(tiny)
    are_greedy(drafts, tiny["drafter"])
    assert seen[0] == (3 + 33 + 70 + 300 + 4, 4)
    assert {tokens // last for tokens, last in list(firsts(seen))[1:]} == {K + 2}
    assert {last for _, last in firsts(seen)} >= {1, 2, 4}
    assert all(tokens == last for i, (tokens, last) in enumerate(seen) if i % K)


def test_a_drafter_needs_no_per_layer_inputs(tiny: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_models.drafter_config(hidden_size_per_layer_input=0)
    drafter = tiny_models.save(config, tmp_path / "drafter", seed=1)
    drafts, seen = run({"target": tiny["target"], "drafter": drafter})
    are_greedy(drafts, drafter)
    assert seen[0] == (410, 4)


def test_a_targets_own_fast_prefill_stays_vllms(tiny: dict[str, Path]) -> None:
    """Its metadata says which tokens its second half is for: those that are sampled from, of all that are there."""
    prompts = random_prompts((3, 33, 70, 300))
    answers = []
    for fast in (False, True):
        with engine(tiny["drafter"], kv_sharing_fast_prefill=fast) as llm:
            answers.append(generate(llm, prompts, 8))
    assert answers[0] == answers[1]


def test_stock_runs_all_layers_for_all_tokens(tiny: dict[str, Path]) -> None:
    with without(LAST_TOKENS):
        drafts, seen = run(tiny)
    are_greedy(drafts, tiny["drafter"])
    assert seen[0] == (410, 410)
    assert all(tokens == last for tokens, last in seen)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 24, "max_num_seqs": 3},  # parts of prompts
        {"enable_prefix_caching": True, "async_scheduling": True},
    ],
    ids=["parts", "prefixes"],
)
def test_drafts_are_the_same_however_requests_are_scheduled(tiny: dict[str, Path], options: dict[str, Any]) -> None:
    drafts, seen = run(tiny, **options)
    are_greedy(drafts, tiny["drafter"])
    assert sum(tokens > last for tokens, last in seen) >= 10


def test_drafts_that_do_not_fit_are_stocks(tiny: dict[str, Path]) -> None:
    """The longest request ends where some of its drafts would stand behind the longest context."""
    longest = {"max_model_len": 306}
    drafts, seen = run(tiny, **longest)
    assert sum(tokens > last for tokens, last in seen) >= 10
    with without(LAST_TOKENS):
        assert run(tiny, **longest)[0] == drafts


def test_piecewise_graphs_find_the_last_tokens_where_they_were_captured(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches padded to multiples of eight, as a CUDA graph's are; there is no graph on a CPU."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor

    at: set[tuple[str, int]] = set()

    def padded(num_tokens: int, **_: Any) -> tuple[CUDAGraphMode, BatchDescriptor]:
        return CUDAGraphMode.PIECEWISE, BatchDescriptor(num_tokens=-(-num_tokens // 8) * 8)

    def prepare(drafter: Any) -> None:
        decoder = drafter.model.model
        assert len(decoder.hidden_states) == len(decoder.per_layer_inputs) == 0  # no graphs: nothing is kept
        for name in ("hidden_states", "per_layer_inputs"):
            buffer = getattr(decoder, name)
            setattr(decoder, name, buffer.new_zeros(1024, *buffer.shape[1:]))
        monkeypatch.setattr(drafter.cudagraph_dispatcher, "dispatch", padded)

        forward = decoder.cross_decoder.forward  # called as it is, without a module's hooks

        def look(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            at.update((name, t.data_ptr()) for name, t in zip(("positions", "hidden", "inputs"), args, strict=True))
            return forward(*args, **kwargs)

        decoder.cross_decoder.forward = look

    drafts, seen = run(tiny, prepare)
    are_greedy(drafts, tiny["drafter"])
    assert seen[0] == (416, 8)
    assert len(at) == 3  # each at one address


def test_each_half_is_compiled_as_the_drafters(tiny: dict[str, Path]) -> None:
    with engine(tiny["target"], tiny["drafter"], K) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        decoder = runner.drafter.model.model
        config = decoder.self_decoder.vllm_config
        assert not runner.cache_config.kv_sharing_fast_prefill
        assert not runner.model.model.fast_prefill_enabled
    for half in scope.HALVES:
        assert scope.drafters_graph(SimpleNamespace(prefix=half, vllm_config=config))
        assert not scope.drafters_graph(SimpleNamespace(prefix=half, vllm_config=runner.vllm_config))  # a target's own
    assert not scope.drafters_graph(SimpleNamespace(prefix="backbone", vllm_config=config))


class Decoder(torch.nn.Module):
    """Of a ``Gemma4Model`` what a pass touches."""

    def __init__(self, compiled: bool, on_gpu: bool = False) -> None:
        super().__init__()
        self.norm = SimpleNamespace(
            weight=SimpleNamespace(is_cuda=on_gpu), forward_cuda="one kernel", _forward_method="eight"
        )
        self.hidden_states = self.per_layer_inputs = torch.zeros(64, 8)
        self.given: list[torch.Tensor] = []
        self.self_decoder = lambda **_: (torch.ones(3, 8), torch.ones(3, 2, 8))
        self.cross_decoder = Half(self.given, compiled)


class Half:
    def __init__(self, given: list[torch.Tensor], compiled: bool) -> None:
        self.given, self.do_not_compile = given, not compiled

    def __call__(self, positions: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        self.given += (positions, *tensors)
        return tensors[0] + 1


@pytest.mark.parametrize("compiled", [True, False])
def test_what_vllm_keeps_of_the_first_compiled_pass_is_empty(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """vLLM compiles with the largest prompt's tensors, and keeps them: 130 MB of E4B for 4,096 tokens."""
    from vllm.config import CUDAGraphMode

    context = SimpleNamespace(attn_metadata=None, cudagraph_runtime_mode=CUDAGraphMode.NONE)
    monkeypatch.setattr(last_tokens, "get_forward_context", lambda: context)
    decoder, positions = Decoder(compiled), torch.arange(3)
    last_tokens._prepare(decoder, 4)
    assert len(decoder.hidden_states) == len(decoder.per_layer_inputs) == 4
    run_pass = last_tokens.fast_prefill_forward(lambda *_: torch.empty(0))
    for first in (True, False):
        assert run_pass(decoder, None, positions).tolist() == torch.full((3, 8), 2.0).tolist()
        sizes = [t.untyped_storage().size() for t in decoder.given[-3:]]
        assert sizes == ([24, 0, 0] if compiled and first else [24, 96, 192])


def test_a_dummy_run_is_no_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory ends before a draft's model is called, the tokens of that pass are left; a dummy run drops them."""
    from vllm.config import CUDAGraphMode

    context = SimpleNamespace(attn_metadata=None, cudagraph_runtime_mode=CUDAGraphMode.NONE)
    monkeypatch.setattr(last_tokens, "get_forward_context", lambda: context)
    decoder = Decoder(compiled=False)
    last_tokens._prepare(decoder, 4)
    setattr(decoder, last_tokens.NEXT, last_tokens.LastTokens(None, None, torch.tensor([37])))
    run_pass = last_tokens.fast_prefill_forward(lambda *_: torch.empty(0))
    assert len(run_pass(decoder, None, torch.arange(3))) == 3
    assert last_tokens.NEXT not in decoder.__dict__


@pytest.mark.parametrize(("on_gpu", "wanted"), [(True, "one kernel"), (False, "eight")])
def test_the_last_norm_is_one_kernel_on_a_gpu(on_gpu: bool, wanted: str) -> None:
    decoder = Decoder(compiled=True, on_gpu=on_gpu)
    last_tokens._prepare(decoder, 4)
    assert decoder.norm._forward_method == wanted


def proposer(drafter: Any, **changes: Any) -> Any:
    config = vllm_config(
        drafter=drafter,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=changes.pop("asked", False)),
        parallel_config=SimpleNamespace(pipeline_parallel_size=changes.pop("stages", 1)),
    )
    return SimpleNamespace(vllm_config=config, **{"parallel_drafting": False, "uses_mrope": False} | changes)


def drafter_like(shared: int, model_type: str = "gemma4_text", experts: bool = False) -> Any:
    text = SimpleNamespace(model_type=model_type, num_kv_shared_layers=shared, enable_moe_block=experts)
    return SimpleNamespace(hf_config=text, hf_text_config=text)


@pytest.mark.parametrize(
    ("drafter", "changes", "wanted"),
    [
        (drafter_like(18), {}, True),
        (drafter_like(0), {}, False),
        (drafter_like(18, "gemma3n_text"), {}, False),
        (drafter_like(18, experts=True), {}, False),
        (LLAMA, {}, False),
        (drafter_like(18), {"parallel_drafting": True}, False),
        (drafter_like(18), {"uses_mrope": True}, False),
        (drafter_like(18), {"asked": True}, False),
        (drafter_like(18), {"stages": 2}, False),
    ],
)
def test_other_drafters_are_built_as_in_stock(drafter: Any, changes: dict[str, Any], wanted: bool) -> None:
    vllm_gemma4_spec.apply()
    given = proposer(drafter, **changes)
    halves: list[bool] = []

    def original(_: Any) -> torch.nn.Module:
        halves.append(last_tokens._in_halves.get())
        return torch.nn.Module()

    last_tokens.get_model(original)(given)
    assert halves == [wanted]
    assert not last_tokens._in_halves.get()


def test_a_drafter_that_does_not_load_leaves_nothing_behind() -> None:
    cache = SimpleNamespace(kv_sharing_fast_prefill=False)
    seen: list[bool] = []

    def fails(_: Any, *, vllm_config: Any) -> None:
        seen.append(vllm_config.cache_config.kv_sharing_fast_prefill)
        raise RuntimeError("no such weight")

    def original(_: Any) -> Any:
        last_tokens.model_init(fails)(None, vllm_config=SimpleNamespace(cache_config=cache))

    with pytest.raises(RuntimeError, match="no such weight"):
        last_tokens.get_model(original)(proposer(drafter_like(18)))
    assert seen == [True]
    assert not cache.kv_sharing_fast_prefill
    assert not last_tokens._in_halves.get()
