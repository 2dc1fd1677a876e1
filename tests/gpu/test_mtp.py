"""MTP assistants of the four kinds in float32, head sizes 256 / 512: answers, drafts, the target's cache, graphs.

Plain decoding owns the answers, the network in plain PyTorch on the keys and values that the engine holds the drafts.
The kernels of the published heads' sizes, which tiny models have no use for, are compared with float32 products.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import device
from tests.gpu.parts import REHEARSAL
from tests.mtp import pairs
from tests.mtp.drafts import Watched
from tests.support import engine, kv_scales, tiny_models

pytestmark = pytest.mark.gpu

K = 4
WAYS: dict[str, dict[str, Any]] = {"eager": {"enforce_eager": True}, "graphs": {}, "async": {"async_scheduling": True}}
# A pass makes about ten of one rounding of the pass before it: later drafts of few steps may differ (of an H200's 482
# steps 15 for 31B, 1 to 8 for the others; first drafts never).
DIFFERENT = 0.05


class Answers:
    """Models of each kind, and plain decoding's answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pairs: dict[str, tuple[Path, Path]] = {}
        self._plain: dict[tuple[str, int], tuple[list[list[int]], list[list[float]]]] = {}
        self.prompts = engine.random_prompts(device.LENGTHS)
        self.limits = [device.TOKENS + 7 * i for i in range(len(self.prompts))]

    def pair(self, name: str) -> tuple[Path, Path]:
        if name not in self._pairs:
            kind, folder = pairs.KINDS[name](), self.folder / name
            kind.target.head_dim, kind.target.global_head_dim = device.HEADS.values()
            target = tiny_models.save(kind.target, folder / "target")
            self._pairs[name] = target, pairs.save_assistant(kind, folder / "assistant")
        return self._pairs[name]

    def plain(self, name: str, mode: int) -> tuple[list[list[int]], list[list[float]]]:
        """Of plain decoding: answers, and by how much each token leads."""
        if (name, mode) not in self._plain:
            with engine.engine(self.pair(name)[0], **device.options(None, mode)) as llm:
                self._plain[name, mode] = device.lead(llm, self.prompts, self.limits)
        return self._plain[name, mode]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(tmp_path_factory.mktemp("models"))


def check(answers: Answers, measured: Any, name: str, mode: int, changes: dict[str, Any]) -> None:
    from vllm_gemma4_spec.performance.draft_graphs import GRAPHS

    target, assistant = answers.pair(name)
    plain, leads = answers.plain(name, mode)
    options = device.options(K, mode, async_scheduling=False) | ({} if REHEARSAL else changes)
    options["speculative_config"] = {"model": str(assistant), "num_speculative_tokens": K}
    with engine.engine(target, **options) as llm:
        watched = Watched(llm, assistant)
        ties = device.same_answers(engine.generate(llm, answers.prompts, answers.limits), plain, leads)
        captured = watched.runner.drafter.__dict__.get(GRAPHS) is not None
        groups = len(watched.runner.kv_cache_config.kv_cache_groups)
    drafts = watched.drafts
    different = sum(d.made != d.wanted for d in drafts)
    measured(drafts=len(drafts), different=different, groups=groups, graphs=captured, ties=ties)
    assert len(drafts) > 20
    assert all(d.made[0] == d.wanted[0] for d in drafts)
    assert different <= DIFFERENT * len(drafts)
    assert watched.changed == 0
    assert captured == (not REHEARSAL and not changes.get("enforce_eager", False))


@pytest.mark.parametrize("way", ["eager"] if REHEARSAL else WAYS)  # a CPU has no graphs
@pytest.mark.parametrize("name", pairs.KINDS)
def test_drafts_answers_and_the_cache(answers: Answers, measured: Any, name: str, way: str) -> None:
    check(answers, measured, name, 0, WAYS[way])


def test_compiled(answers: Answers, measured: Any, cuda: None) -> None:
    check(answers, measured, "31b", 3, {"async_scheduling": True})


def test_a_padded_batch(answers: Answers, measured: Any, cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """9 to 11 requests in the graph of 12: block table rows past the batch hold no block that exists."""
    from vllm_gemma4_spec.mtp.graphs import AssistantGraphs

    seen, original = [], AssistantGraphs.replay

    def replay(self: Any, num_reqs: int, draft_length: int) -> torch.Tensor:
        seen.append((num_reqs, self._padded[num_reqs]))
        return original(self, num_reqs, draft_length)

    monkeypatch.setattr(AssistantGraphs, "replay", replay)
    target, assistant = answers.pair("e4b")
    prompts, most = engine.random_prompts([5 + 7 * i for i in range(12)]), 12
    limits = [24 + 5 * i for i in range(12)]
    size = {"max_num_seqs": most, "num_gpu_blocks_override": 4096}
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    sizes = [{"compilation_config": graphs | {"cudagraph_capture_sizes": [n, most * n]}} for n in (1, K + 1)]
    with engine.engine(target, **(device.options(None) | size | sizes[0])) as llm:
        plain, leads = device.lead(llm, prompts, limits)
    options = device.options(K, async_scheduling=True) | size | sizes[1]
    options["speculative_config"] = {"model": str(assistant), "num_speculative_tokens": K}
    with engine.engine(target, **options) as llm:
        ties = device.same_answers(engine.generate(llm, prompts, limits), plain, leads)
    measured(replays=len(seen), padded=sum(n < to for n, to in seen), ties=ties)
    assert {n for n, to in seen if to == most} >= {9, 10, 11, 12}


@pytest.mark.parametrize("name", ["31b", "e4b"])
def test_an_fp8_cache_is_read_with_the_donors_scales(
    answers: Answers, measured: Any, cuda: None, tmp_path: Path, name: str
) -> None:
    """The reference multiplies what the cache holds by the donor's scales; with 1.0 every score would be 4 times off.

    In bfloat16, which the format needs: a rounding may change a draft.
    """
    target, assistant = answers.pair(name)
    scaled = kv_scales.with_kv_scales(target, tmp_path / "scaled", k_scale=0.25, v_scale=0.125)
    options = device.options(K, async_scheduling=False, dtype="bfloat16")
    options["speculative_config"] = {"model": str(assistant), "num_speculative_tokens": K}
    with engine.engine(scaled, **options) as llm:
        watched = Watched(llm, assistant)
        layers = watched.runner.compilation_config.static_forward_context
        own = [layers[layer] for layer in watched.runner.drafter._draft_attn_layer_names]
        assert {(a.kv_cache_dtype[:3], a._k_scale.item(), a._v_scale.item()) for a in own} == {("fp8", 0.25, 0.125)}
        engine.generate(llm, answers.prompts, answers.limits)
    drafts = watched.drafts
    first = sum(d.made[0] != d.wanted[0] for d in drafts)
    measured(drafts=len(drafts), first_different=first, different=sum(d.made != d.wanted for d in drafts))
    assert first <= 0.2 * len(drafts)
    assert watched.changed == 0


@pytest.mark.parametrize("mode", [0] if REHEARSAL else [0, 3])
@pytest.mark.parametrize("name", ["31b", "e4b"])
def test_in_bfloat16_with_the_kernels_for_it(name: str, mode: int, measured: Any, tmp_path: Path) -> None:
    """Widths that they take: every linear layer and the queries of every layer, in graphs, compiled and not."""
    from vllm_gemma4_spec.performance import head_norms

    kind = pairs.KINDS[name]()
    kind.target.head_dim, kind.target.global_head_dim = device.HEADS.values()
    kind.target.hidden_size = 128
    target = tiny_models.save(kind.target, tmp_path / "target")
    assistant = pairs.save_assistant(kind, tmp_path / "assistant", hidden_size=256, intermediate_size=256)
    prompts = engine.random_prompts(device.LENGTHS)
    options = device.options(K, mode, async_scheduling=False, dtype="bfloat16")
    options["speculative_config"] = {"model": str(assistant), "num_speculative_tokens": K}
    with engine.engine(target, **options) as llm:
        watched = Watched(llm, assistant)
        modules = list(watched.runner.drafter.model.modules())
        rows = sum(type(getattr(module, "quant_method", None)).__name__ == "FewRows" for module in modules)
        heads = sum(hasattr(module, head_norms.OURS) for module in modules)
        engine.generate(llm, prompts, device.TOKENS)
    drafts = watched.drafts
    first = sum(d.made[0] != d.wanted[0] for d in drafts)
    measured(drafts=len(drafts), first_different=first, different=sum(d.made != d.wanted for d in drafts), layers=rows)
    assert (rows, heads) == ((0, 0) if REHEARSAL else (2 + 4 * 4, 4))
    assert len(drafts) > 20
    assert first <= 0.2 * len(drafts)
    assert watched.changed == 0


ROWS = (1, 3, 8, 16)


def near(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Hidden states whose largest logit stands out, as a trained head's does: a row of the head and noise."""
    g = torch.Generator(weight.device).manual_seed(rows)
    chosen = torch.randint(len(weight), (rows,), device=weight.device, generator=g)
    return weight[chosen] + 0.5 * torch.randn(rows, weight.shape[1], device=weight.device, generator=g).to(weight.dtype)


def test_the_copy_of_a_head_finds_the_largest_logit(measured: Any, cuda: None) -> None:
    """31B's and 26B-A4B's head."""
    from vllm_gemma4_spec.kernels.draft_head import DraftHead, suits

    weight = torch.randn(262_144, 1024, device="cuda", dtype=torch.bfloat16)
    assert suits(weight)
    head = DraftHead(weight)
    for rows in ROWS:
        hidden = near(weight, rows)
        assert torch.equal(head.argmax(hidden), (hidden.float() @ weight.float().T).argmax(-1)), rows


def test_the_head_by_centroids_in_its_published_size(measured: Any, cuda: None) -> None:
    """E4B's and E2B's head, in a CUDA graph: the kernel on the chosen clusters, beside products of all their rows."""
    from vllm_gemma4_spec.mtp.centroids import CentroidHead

    with torch.device("cuda"):
        head = CentroidHead(262_144, 256, 2048, 32).to(torch.bfloat16)
        head.weight.data.normal_()
        head.token_ordering = torch.randperm(262_144)
    weight = head.weight.data.clone()
    head.order()
    # A cluster's centroid is the mean of its rows, so that the best row's cluster is among the chosen.
    head.centroids.data = head.weight.data.unflatten(0, (2048, 128)).float().mean(1).to(torch.bfloat16)
    for rows in ROWS:
        hidden = 4 * near(weight, rows)
        chosen = (hidden @ head.centroids.T).topk(32).indices
        tokens = head.token_ordering.view(2048, 128)[chosen].flatten(1)
        logits = torch.einsum("nd,nrd->nr", hidden.float(), weight[tokens].float())
        wanted = tokens.gather(1, logits.argmax(-1, keepdim=True)).squeeze(1)
        assert torch.equal(head.argmax(hidden), wanted), rows
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            made = head.argmax(hidden)
        graph.replay()
        assert torch.equal(made, wanted), rows
