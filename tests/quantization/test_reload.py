"""Weights loaded again into a running engine: afterwards it answers as one that was started with them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import reference
from tests.quantization.comparison import FIXTURES, TOKENS, each, edited, per_expert, text_only, without
from tests.quantization.test_nvfp4_compressed_tensors import as_modelopt, checkpoint
from tests.support import tiny_models
from tests.support.engine import engine
from tests.support.stock import without as without_patch
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.quantization.patches import PATCHES

TOLERANCE = 1e-3
FAST = ["31b-awq-full", "26b-mm-awq-lite"]
NAMES = [
    *FAST,
    *(pytest.param(p.name, marks=pytest.mark.slow) for p in sorted(FIXTURES.iterdir()) if p.name not in FAST),
]
OPTIONS: dict[str, Any] = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 1, "max_logprobs": -1}
OPTIONS |= {"num_gpu_blocks_override": 64}


def logprobs(llm: Any) -> torch.Tensor:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    with torch.compiler.set_stance("force_eager"):
        (out,) = llm.generate([{"prompt_token_ids": TOKENS}], sampling, use_tqdm=False)
    return torch.stack([torch.tensor([row[t].logprob for t in range(len(row))]) for row in out.prompt_logprobs[1:]])


def reload(llm: Any, folder: Path) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nothing has written yet holds NaN
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    finally:
        torch.use_deterministic_algorithms(False)


def halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other values under the same names: global scales, norms, and the codes of half the rows."""
    tensors = each("weight_scale_2", lambda s: s / 2)(tensors)
    tensors = each("layernorm.weight", lambda w: (w.float() * 1.1).to(w.dtype))(tensors)
    return each("_proj.weight", lambda w: torch.cat((w[: len(w) // 2].flip(0), w[len(w) // 2 :])))(tensors)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_new_weights_and_of_the_old_again(name: str, tmp_path: Path) -> None:
    first = FIXTURES / name
    second = edited(first, tmp_path / "second", halved)
    with engine(first, **OPTIONS, **text_only(first)) as llm:
        before = logprobs(llm)
        reload(llm, second)
        torch.testing.assert_close(logprobs(llm), reference.logprobs(second, TOKENS), atol=TOLERANCE, rtol=0)
        reload(llm, first)
        torch.testing.assert_close(logprobs(llm), before, atol=0, rtol=0)
    assert (reference.logprobs(second, TOKENS) - before).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("weights", ["packed", "dequantized"])
def test_experts(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new weights lack the input scales of an expert that calibration never reached."""
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_NVFP4_WEIGHTS", weights)
    first = edited(FIXTURES / "26b-mm-awq-lite", tmp_path / "first", per_expert)
    scales = [f"experts.0.{name}.input_scale" for name in ("gate_proj", "up_proj", "down_proj")]
    second = edited(first, tmp_path / "second", lambda tensors: without(*scales)(halved(tensors)))
    with engine(first, **OPTIONS, **text_only(first)) as llm:
        before = logprobs(llm)
        reload(llm, second)
        torch.testing.assert_close(logprobs(llm), reference.logprobs(second, TOKENS), atol=TOLERANCE, rtol=0)
        reload(llm, first)
        torch.testing.assert_close(logprobs(llm), before, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["26b", "e4b"])
def test_compressed_tensors(kind: str, tmp_path: Path) -> None:
    """Its global scales divide. An E4B's layers that reuse KV have no keys and values of their own."""
    first = checkpoint(kind, tmp_path / "first", activations=True)
    norms = each("layernorm.weight", lambda w: (w.float() * 1.1).to(w.dtype))
    second = edited(first, tmp_path / "second", lambda t: norms(each("weight_global_scale", lambda s: s * 2)(t)))
    wanted = reference.logprobs(as_modelopt(second, tmp_path / "renamed"), TOKENS)
    with engine(first, **OPTIONS) as llm:
        before = logprobs(llm)
        reload(llm, second)
        torch.testing.assert_close(logprobs(llm), wanted, atol=TOLERANCE, rtol=0)
        reload(llm, first)
        torch.testing.assert_close(logprobs(llm), before, atol=0, rtol=0)
    assert (wanted - before).abs().max() > 100 * TOLERANCE


def test_stock_routes_by_uninitialised_memory_once_a_26b_was_loaded_again(tmp_path: Path) -> None:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    model = tiny_models.save(tiny_models.target_config(**experts), tmp_path / "model")
    (patch,) = [p for p in PATCHES if p.name == "modelopt-nvfp4"]
    for left_out in (without_patch(patch), contextlib.nullcontext()):
        with left_out, engine(model, **OPTIONS) as llm:
            before = logprobs(llm)
            for _ in range(2):
                reload(llm, model)
                after = logprobs(llm)
        assert torch.equal(after, before) == isinstance(left_out, contextlib.nullcontext)
        assert after.isnan().any() != torch.equal(after, before)


def test_what_the_new_weights_lack_or_have_more(tmp_path: Path) -> None:
    """Scales that are gone multiply by one; one that was not there before has no place in a compiled model."""
    with_scales = FIXTURES / "31b-awq-full"
    plain = edited(with_scales, tmp_path / "plain", without("pre_quant_scale"))
    with engine(with_scales, **OPTIONS) as llm:
        reload(llm, plain)
        torch.testing.assert_close(logprobs(llm), reference.logprobs(plain, TOKENS), atol=TOLERANCE, rtol=0)


def test_refused_weights_leave_the_old_ones(tmp_path: Path) -> None:
    """Whatever the reload had done before: read nothing, loaded half of a layer, or written layers before the last."""
    with_scales = FIXTURES / "31b-awq-full"
    plain = edited(with_scales, tmp_path / "plain", without("pre_quant_scale"))
    last = "layers.1.mlp.down_proj.pre_quant_scale"
    scale = load_file(with_scales / "model.safetensors")
    (last,) = [name for name in scale if name.endswith(last)]
    half = edited(plain, tmp_path / "half", lambda tensors: halved(tensors) | {last: scale[last]})
    (tmp_path / "empty").mkdir()
    with engine(plain, **OPTIONS) as llm:
        before = logprobs(llm)
        with pytest.raises(RuntimeError, match="Cannot find any model weights"):
            reload(llm, tmp_path / "empty")
        torch.testing.assert_close(logprobs(llm), before, atol=0, rtol=0)
        with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.pre_quant_scale: .* that has none"):
            reload(llm, half)
        torch.testing.assert_close(logprobs(llm), before, atol=0, rtol=0)
        llm.collective_rpc("reload_weights")  # without a path: the checkpoint that it had before
        torch.testing.assert_close(logprobs(llm), before, atol=0, rtol=0)


def test_no_step_with_weights_of_two_checkpoints(tmp_path: Path) -> None:
    """Where the old weights cannot be read again: an error for every step, until a whole checkpoint is loaded."""
    with_scales = FIXTURES / "31b-awq-full"
    plain = edited(with_scales, tmp_path / "plain", without("pre_quant_scale"))
    moved = tmp_path / "moved"
    with engine(plain, **OPTIONS) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        before = logprobs(llm)
        plain.rename(moved)
        for reason in ("cannot be read again", "came from no checkpoint"):
            with pytest.raises(CheckpointError, match=r"pre_quant_scale: .* that has none"):
                reload(llm, with_scales)
            with pytest.raises(CheckpointError, match=rf"refused half way.*pre_quant_scale.*{reason}"):
                worker.execute_model(None)
            # As a trainer gives them.
            worker.reload_weights(weights_iterator=load_file(moved / "model.safetensors").items())
            torch.testing.assert_close(logprobs(llm), before, atol=0, rtol=0)


@pytest.mark.slow
def test_weights_that_one_rank_refuses_are_refused_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHDYNAMO_DISABLE", "VLLM_SLEEP_WHEN_IDLE", "VLLM_ALLOW_INSECURE_SERIALIZATION"):
        monkeypatch.setenv(name, "1")
    first = FIXTURES / "31b-svdquant"
    folders = [str(edited(first, tmp_path / "second", halved)), str(tmp_path / "none")]
    (tmp_path / "none").mkdir()

    def load_by_rank(worker: Any) -> None:
        worker.reload_weights(weights_path=folders[worker.rank])

    with engine(first, **OPTIONS, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        before = logprobs(llm)
        with pytest.raises(Exception, match=r"another rank has refused|Cannot find any model weights"):
            llm.collective_rpc(load_by_rank)
        torch.testing.assert_close(logprobs(llm), before, atol=0, rtol=0)
        reload(llm, first)  # hears this call's answers, not those of the one before


@pytest.mark.slow
def test_nan_scales_of_the_new_weights_are_repaired_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the first load: repaired by the rule, and not loaded at all in strict mode."""
    broken = FIXTURES / "31b-awq-full"  # ModelOpt's own NaN scales
    whole = edited(broken, tmp_path / "whole", each("weight_scale", lambda s: s.float().nan_to_num(0.0).to(s.dtype)))
    with engine(whole, **OPTIONS) as llm:
        reload(llm, broken)
        torch.testing.assert_close(logprobs(llm), reference.logprobs(broken, TOKENS), atol=TOLERANCE, rtol=0)
        reload(llm, whole)
        monkeypatch.setenv("VLLM_GEMMA4_SPEC_NAN_SCALES", "strict")
        with pytest.raises(CheckpointError, match="NaN block scales in"):
            reload(llm, broken)
