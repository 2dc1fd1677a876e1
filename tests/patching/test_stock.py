"""What vLLM 0.19.1 does without a patch, for the patches whose own tests do not show it already."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vllm_gemma4_spec
from tests.hf_config.test_normal_form import as_written_later
from tests.quantization.comparison import FIXTURES, edited, engine_logprobs, per_expert, text_only
from tests.support import engine as _engine
from tests.support.engine import engine, generate, random_prompts
from tests.support.stock import without
from vllm_gemma4_spec.cpu import patches as cpu
from vllm_gemma4_spec.errors import DrafterError
from vllm_gemma4_spec.hf_config import patches as hf_config
from vllm_gemma4_spec.lora import patches as lora
from vllm_gemma4_spec.patching.patch import Patch
from vllm_gemma4_spec.performance import patches as performance
from vllm_gemma4_spec.quantization import patches as quantization
from vllm_gemma4_spec.spec_decode import patches as spec_decode

assert _engine


def ends_start(patch: Patch, error: type[Exception], message: str, model: Path, *args: Any, **options: Any) -> None:
    """Without ``patch`` the engine does not come up, and says ``message``."""
    with without(patch), pytest.raises(error, match=message), engine(model, *args, **options):
        pass


def test_draft_layers_in_several_groups_are_refused(tiny: dict[str, Path]) -> None:
    message = "All drafting layers should belong to the same kv cache group"
    ends_start(spec_decode.DRAFT_GROUPS, AssertionError, message, tiny["target"], tiny["target"])


def test_a_saved_e4b_lacks_weights_that_nothing_reads(tiny: dict[str, Path]) -> None:
    message = r"weights were not initialized from checkpoint.*k_norm"
    ends_start(spec_decode.KV_SHARED_LAYERS, ValueError, message, tiny["drafter"])


def test_one_group_takes_one_window(tiny: dict[str, Path]) -> None:
    message = "must have the same window size"
    options: dict[str, Any] = {"disable_hybrid_kv_cache_manager": True}
    ends_start(spec_decode.ONE_GROUP_WINDOWS, ValueError, message, tiny["target"], tiny["drafter"], **options)


def test_a_multimodal_target_is_refused_with_a_draft_model() -> None:
    from vllm.v1.spec_decode.eagle import SpecDecodeBaseProposer

    with without(spec_decode.TEXT_DRAFTER), pytest.raises(NotImplementedError, match="multimodal"):
        SpecDecodeBaseProposer._raise_if_multimodal(SimpleNamespace(supports_mm_inputs=True, method="draft_model"))


def test_a_drafter_that_does_not_fit_is_not_named_in_one_line(tiny: dict[str, Path], tmp_path: Path) -> None:
    with (
        without(spec_decode.DRAFTER_CHECKS),
        pytest.raises(ValueError, match="Invalid repository ID") as caught,
        engine(tiny["target"], tmp_path),
    ):
        pass
    assert len(str(caught.value).splitlines()) > 1
    assert not isinstance(caught.value, DrafterError)


def test_the_cpu_refuses_speculation(tiny: dict[str, Path]) -> None:
    ends_start(cpu.CPU_RUNNER, AssertionError, "spec decode is not supported", tiny["target"], tiny["target"])


def test_triton_kernels_cannot_be_launched_on_a_cpu() -> None:
    from vllm.v1.sample import rejection_sampler

    # Without Triton, and with it.
    with (
        without(cpu.CPU_KERNELS),
        pytest.raises((TypeError, RuntimeError), match=r"not subscriptable|0 active drivers"),
    ):
        rejection_sampler.expand_kernel[(1,)]()


def test_local_argmax_ends_the_engine(tiny: dict[str, Path]) -> None:
    options: dict[str, Any] = {"speculative": {"use_local_argmax_reduction": True}}
    with (
        without(performance.LOCAL_ARGMAX),
        engine(tiny["target"], tiny["target"], **options) as llm,
        pytest.raises(AttributeError, match="get_top_tokens"),
    ):
        generate(llm, random_prompts([5]), 4)


def test_experts_on_a_cpu_do_not_know_gelu(tmp_path: Path) -> None:
    (patch,) = [p for p in quantization.PATCHES if p.name == "cpu-moe-gelu"]
    folder = edited(FIXTURES / "26b-mm-awq-lite", tmp_path / "experts", per_expert)
    with without(patch), pytest.raises(AssertionError, match=r"MoEActivation\.GELU is not supported"):
        engine_logprobs(folder, **text_only(folder))


def test_a_whole_drafter_beside_several_ranks_is_refused() -> None:
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    sizes = [SimpleNamespace(tensor_parallel_size=size) for size in (1, 2)]
    spec = SimpleNamespace(
        draft_parallel_config=sizes[0], target_parallel_config=sizes[1], uses_draft_model=lambda: True
    )
    proposer = SimpleNamespace(speculative_config=spec)
    with without(performance.WHOLE_COPIES), pytest.raises(ValueError, match="draft_tensor_parallel_size"):
        DraftModelProposer._raise_if_draft_tp_mismatch(proposer)


def test_sizes_by_layer_are_not_read(tmp_path: Path) -> None:
    """What transformers 5.15 and later writes: 0.19.1 goes on with the default size of full layers."""
    from vllm.transformers_utils.config import get_config

    written = as_written_later(json.loads((FIXTURES / "31b-nvfp4" / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(written))
    with without(hf_config.CONFIG_FORM):
        stock = get_config(tmp_path, trust_remote_code=False)
    vllm_gemma4_spec.apply()
    ours = get_config(tmp_path, trust_remote_code=False)
    assert stock.get_text_config().global_head_dim != ours.get_text_config().global_head_dim


def test_a_block_of_every_hit_is_dropped_beside_an_eagle_head() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(inspect.unwrap(Scheduler.__init__))
    assert "use_eagle=self.use_eagle" in source  # KVCacheManager hands it on to the coordinator, which drops the block


def test_the_class_of_published_checkpoints_takes_no_adapter() -> None:
    from vllm.model_executor.models.gemma4_mm import Gemma4ForConditionalGeneration

    with without(lora.LORA_ADAPTERS):
        assert not getattr(Gemma4ForConditionalGeneration, "supports_lora", False)
