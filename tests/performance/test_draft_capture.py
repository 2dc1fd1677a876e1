"""Where the drafter's graphs are captured, and where the original must stay in charge."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import engine as _engine  # sets the environment
from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.stock import without
from vllm_gemma4_spec import settings
from vllm_gemma4_spec.performance import graph_capture
from vllm_gemma4_spec.performance.draft_graphs import GRAPHS, propose, update_cudagraph_mode
from vllm_gemma4_spec.performance.graph_capture import _batch_sizes, capture_drafts
from vllm_gemma4_spec.performance.patches import DRAFT_GRAPHS, DRAFT_PIECES
from vllm_gemma4_spec.registry import PATCHER
from vllm_gemma4_spec.spec_decode.proposer import GROUPS

assert _engine


class TritonAttentionMetadataBuilder:
    pass


class FlashInferMetadataBuilder:
    pass


def runner(**changes: Any) -> Any:
    from vllm.config import CUDAGraphMode

    groups = SimpleNamespace(slot_kernel=object(), builders=[changes.get("builder", TritonAttentionMetadataBuilder)()])
    drafter = SimpleNamespace(
        num_speculative_tokens=3, max_num_tokens=2048, pass_hidden_states_to_model=False, parallel_drafting=False
    )
    setattr(drafter, GROUPS, changes.get("groups", groups))
    spec = SimpleNamespace(
        uses_draft_model=lambda: changes.get("draft_model", True),
        enforce_eager=changes.get("eager", False),
        disable_padded_drafter_batch=False,
    )
    model = changes.get("model", GEMMA4)
    return SimpleNamespace(
        vllm_config=vllm_config(model, model),
        speculative_config=changes.get("speculative", spec),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode[changes.get("mode", "FULL_AND_PIECEWISE")],
            cudagraph_capture_sizes=[4, 8, 16],
        ),
        drafter=drafter,
        parallel_config=SimpleNamespace(
            data_parallel_size=changes.get("dp", 1), pipeline_parallel_size=changes.get("pp", 1)
        ),
        lora_config=changes.get("lora"),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
    )


@pytest.fixture(autouse=True)
def _no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.CHECK.name, "0")


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "FULL"])
def test_a_graph_per_batch_size_of_the_target(mode: str) -> None:
    assert _batch_sizes(runner(mode=mode)) == [1, 2, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"speculative": None},
        {"draft_model": False},
        {"eager": True},
        {"groups": None},  # one KV cache group: vLLM's own way
        {"builder": FlashInferMetadataBuilder},
        {"mode": "NONE"},
        {"mode": "PIECEWISE"},
        {"dp": 2},
        {"pp": 2},
        {"lora": object()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_elsewhere_there_are_none(changes: dict[str, Any]) -> None:
    assert _batch_sizes(runner(**changes)) == []
    assert capture_drafts(runner(**changes)) == 0


def test_none_while_every_pass_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.CHECK.name, "1")
    assert _batch_sizes(runner()) == []


@pytest.mark.parametrize(
    ("mode", "device", "draft_model", "wanted"),
    [
        ("FULL_AND_PIECEWISE", "cuda", True, True),
        ("PIECEWISE", "cuda", True, True),
        ("FULL_DECODE_ONLY", "cuda", True, False),  # the model is not compiled piecewise
        ("NONE", "cuda", True, False),
        ("FULL_AND_PIECEWISE", "cpu", True, False),
        ("FULL_AND_PIECEWISE", "cuda", False, False),  # EAGLE: vLLM does it itself
    ],
)
def test_piecewise_graphs_where_the_target_has_them(mode: str, device: str, draft_model: bool, wanted: bool) -> None:
    given: list[Any] = []
    self = runner(mode=mode, draft_model=draft_model)
    self.device = SimpleNamespace(type=device)
    self.drafter.initialize_cudagraph_keys = given.append
    update_cudagraph_mode(lambda self: given.append("the target's"))(self)
    assert given == ["the target's"] + ([self.compilation_config.cudagraph_mode] if wanted else [])


def test_piecewise_graphs_of_another_models_drafter_are_left_to_vllm() -> None:
    given: list[Any] = []
    self = runner(model=LLAMA)
    self.device, self.drafter.initialize_cudagraph_keys = SimpleNamespace(type="cuda"), given.append
    update_cudagraph_mode(lambda self: None)(self)
    assert not given


def test_out_of_memory_while_graphs_are_captured_leaves_the_drafter_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine starts, and drafts kernel by kernel; any other error still ends the start."""
    import torch
    from vllm.distributed import parallel_state

    freed: list[str] = []

    class Failing:
        def __init__(self, *args: Any) -> None: ...

        def capture(self, pool: Any) -> None:
            raise error

    monkeypatch.setattr(graph_capture, "DraftGraphs", Failing)
    monkeypatch.setattr(parallel_state, "graph_capture", lambda device: nullcontext())
    for name, value in {"mem_get_info": lambda: (1, 2), "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("cache"))
    self = runner()
    self.device, self._freeze_gc = SimpleNamespace(type="cuda"), nullcontext
    self.drafter = type("Proposer", (SimpleNamespace,), {"propose": None})(**vars(self.drafter), kv_cache_gid=0)
    self.input_batch = SimpleNamespace(block_table=[SimpleNamespace(get_device_tensor=None)])
    monkeypatch.setattr(graph_capture, "_pool", lambda: None)

    error: Exception = torch.OutOfMemoryError("no memory left")
    said: list[str] = []
    monkeypatch.setattr(graph_capture.logger, "warning", lambda text, *values: said.append(text % values))
    assert capture_drafts(self) == 0
    assert len(said) == 1
    assert "out of memory while its CUDA graphs were captured" in said[0]
    assert not hasattr(self.drafter, GRAPHS)
    assert freed == ["cache"]
    error = RuntimeError("a launch failed")
    with pytest.raises(RuntimeError, match="a launch failed"):
        capture_drafts(self)


@pytest.mark.parametrize(("cost", "lengths"), [("0", [3]), ("0.2", [1, 2, 3])])
def test_the_drafters_graphs_are_captured_after_the_targets(
    monkeypatch: pytest.MonkeyPatch, cost: str, lengths: list[int]
) -> None:
    """What both took is the engine's to reserve; with a draft length that adapts, each has its graphs."""
    import torch
    from vllm.compilation import monitor
    from vllm.distributed import parallel_state

    monkeypatch.setenv(settings.ADAPTIVE_K.name, cost)
    free, events = [100, 60], []

    class Graphs:
        def __init__(self, *args: Any) -> None:
            self.batch_sizes, self.draft_lengths = args[-2:]

        def capture(self, pool: Any) -> None:
            monitor.validate_cudagraph_capturing_enabled()
            events.append(("drafter", pool, self.batch_sizes, list(self.draft_lengths)))

    monkeypatch.setattr(graph_capture, "DraftGraphs", Graphs)
    monkeypatch.setattr(parallel_state, "graph_capture", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free.pop(0), 200))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(graph_capture, "_pool", lambda: "pool")
    monkeypatch.setattr(monitor, "cudagraph_capturing_enabled", False)
    self = runner()
    self.device, self._freeze_gc = SimpleNamespace(type="cuda"), nullcontext
    self.drafter = type("Proposer", (SimpleNamespace,), {"propose": None})(**vars(self.drafter), kv_cache_gid=0)
    self.input_batch = SimpleNamespace(block_table=[SimpleNamespace(get_device_tensor=None)])
    self.speculative_config.num_speculative_tokens = 3
    self.speculative_config.parallel_drafting = False

    def capture_model(self: Any) -> int:
        events.append(("target",))
        return 7

    assert graph_capture.capture_model(capture_model)(self) == 7 + 40
    assert events == [("target",), ("drafter", "pool", [1, 2, 4], lengths)]
    assert isinstance(getattr(self.drafter, GRAPHS), Graphs)
    with pytest.raises(RuntimeError):  # capturing is over
        monitor.validate_cudagraph_capturing_enabled()


def test_an_assistant_says_which_graphs_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(graph_capture.scope, "is_assistant", lambda spec: True)
    self = runner()
    self.speculative_config.num_speculative_tokens, self.speculative_config.parallel_drafting = 3, False
    self.drafter.graphs_to_capture = asked.append
    assert capture_drafts(self) == 0
    assert len(asked) == 1
    self.speculative_config.enforce_eager = True
    assert capture_drafts(self) == 0
    assert len(asked) == 1


@pytest.mark.parametrize("graphs", [None, SimpleNamespace(fits=lambda *_: False)], ids=["none", "too small"])
def test_a_batch_without_a_graph_is_the_originals(graphs: Any) -> None:
    drafter, given = SimpleNamespace(**{GRAPHS: graphs}), {"common_attn_metadata": "metadata"}
    assert propose(lambda self, **kwargs: (self, kwargs))(drafter, **given) == (drafter, given)  # type: ignore[arg-type,return-value]


def dispatched(self: Any) -> list[Any]:
    """What vLLM's own method gives the drafter's dispatcher for a draft model on CUDA."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    given: list[Any] = []
    self.drafter.initialize_cudagraph_keys = given.append
    self.device = SimpleNamespace(type="cuda")
    self.uniform_decode_query_len = 1
    self.cudagraph_dispatcher = SimpleNamespace(initialize_cudagraph_keys=lambda *args: None)
    self.speculative_config.use_eagle = self.speculative_config.uses_extract_hidden_states = lambda: False
    GPUModelRunner._check_and_update_cudagraph_mode(self, [], [])
    return given


def test_vllms_own_method_gives_a_draft_model_piecewise_graphs() -> None:
    PATCHER.apply([DRAFT_PIECES])
    assert dispatched(runner(mode="PIECEWISE")) == [runner(mode="PIECEWISE").compilation_config.cudagraph_mode]


def test_stock_gives_a_draft_model_no_piecewise_graphs() -> None:
    with without(DRAFT_PIECES):
        assert dispatched(runner(mode="PIECEWISE")) == []


class Captured:
    """Stands where a drafter keeps its graphs."""

    def fits(self, *args: Any) -> bool:
        return True

    def replay(self, *args: Any) -> str:
        return "replayed"


def drafted() -> Any:
    """What vLLM's ``propose`` does for a drafter that has graphs; the original fails on this bare one."""
    from vllm.v1.spec_decode.eagle import SpecDecodeBaseProposer

    drafter = SimpleNamespace(**{GRAPHS: Captured()}, vllm_config=vllm_config())
    names = ("target_token_ids", "target_positions", "target_hidden_states", "next_token_ids")
    names += ("token_indices_to_sample", "common_attn_metadata", "sampling_metadata", "num_rejected_tokens_gpu")
    return SpecDecodeBaseProposer.propose(drafter, **dict.fromkeys(names))


def test_captured_drafts_are_replayed() -> None:
    PATCHER.apply([DRAFT_GRAPHS])
    assert drafted() == "replayed"


def test_stock_drafts_kernel_by_kernel() -> None:
    with without(DRAFT_GRAPHS), pytest.raises(AttributeError) as caught:
        drafted()
    last = caught.traceback[-1]
    assert (last.path.name, last.name) == ("eagle.py", "propose")  # it went on to the passes themselves
