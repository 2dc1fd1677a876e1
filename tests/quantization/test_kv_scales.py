"""``k_scale`` and ``v_scale`` of a checkpoint: loaded for target and drafter, and applied.

A CPU has no fp8 cache, so the layers are the real ones with TRITON_ATTN's implementation, loaded but not run; the
kernel runs in Triton's interpreter. ``tests/gpu/test_fp8_cache.py`` runs both together.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.configs import vllm_config
from tests.support.fresh import interpreted
from tests.support.kv_scales import with_kv_scales


def test_the_kernel_drops_the_scales_of_fp8_queries(tmp_path: Path) -> None:
    """Why queries must stay in 16 bits. Should this fail, a newer vLLM has fixed its kernel."""
    interpreted("tests.quantization.kv_scales_by_triton", tmp_path / "out.pt")
    results = torch.load(tmp_path / "out.pt")
    right = results["float32", 1.0]
    error = {case: float((out - right).abs().mean() / right.abs().mean()) for case, out in results.items()}
    assert error["float32", 4.0] < 0.01  # a power of two moves no rounding but that of the smallest
    assert error["fp8", 1.0] < 0.1  # rounded queries and weights
    assert error["fp8", 4.0] > 0.5


def attention_layers(folder: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The attention layers of the model in ``folder``, loaded by vLLM with an fp8 cache as on CUDA."""
    import vllm.model_executor.layers.attention.attention as attention
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.attention.backends import triton_attn

    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    platform = SimpleNamespace(is_cuda=lambda: True, fp8_dtype=lambda: torch.float8_e4m3fn)
    monkeypatch.setattr(triton_attn, "current_platform", platform)
    monkeypatch.setattr(attention, "get_attn_backend", lambda *_, **__: triton_attn.TritonAttentionBackend)
    config = EngineArgs(
        str(folder),
        dtype="bfloat16",
        max_model_len=256,
        max_num_batched_tokens=256,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
    ).create_engine_config()
    config.cache_config.cache_dtype = "fp8"  # the CPU platform has put "auto" there
    try:
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{folder}.store", 0, "gloo")
            initialize_model_parallel(1, 1)
            get_model(vllm_config=config, prefix=prefix)
    finally:
        cleanup_dist_env_and_memory()
    return dict(config.compilation_config.static_forward_context)


@pytest.mark.parametrize(("kind", "prefix"), [("target", ""), ("drafter", "draft_model")])
def test_scales_are_loaded_and_applied(
    tiny: dict[str, Path], kind: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that reuse KV read it with the scales it was written with, not with their own."""
    folder = with_kv_scales(tiny[kind], tmp_path / "scaled", k_scale=4.0, v_scale=2.0)
    layers = attention_layers(folder, prefix, monkeypatch)
    assert len(layers) == {"target": 6, "drafter": 12}[kind]
    assert sum(layer.kv_sharing_target_layer_name is not None for layer in layers.values()) == (
        6 if kind == "drafter" else 0
    )
    for name, layer in layers.items():
        assert name.startswith(prefix)
        assert (layer._k_scale_float, layer._v_scale_float) == (4.0, 2.0), name
        assert (layer._k_scale.item(), layer._v_scale.item()) == (4.0, 2.0), name
        assert layer.query_quant is None


def test_scales_of_one_change_nothing(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_kv_scales(tiny["drafter"], tmp_path / "plain", k_scale=1.0, v_scale=1.0)
    layers = attention_layers(folder, "", monkeypatch)
    assert all(layer.query_quant is not None for layer in layers.values())


def test_waking_up_sets_the_scales_again() -> None:
    from vllm_gemma4_spec.quantization.kv_scales import init_fp8_kv_scales

    layer = SimpleNamespace(_k_scale=torch.tensor(4.0), _v_scale=torch.tensor(2.0))
    layer._k_scale_float, layer._v_scale_float = 4.0, 2.0

    def original(self: Any) -> None:
        for scale in (layer._k_scale, layer._v_scale):
            scale.fill_(1.0)

    context = {"attention": layer, "experts": SimpleNamespace()}
    runner = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=context), vllm_config=vllm_config()
    )
    init_fp8_kv_scales(original)(runner)
    assert (layer._k_scale.item(), layer._v_scale.item()) == (4.0, 2.0)
