"""vLLM's layers with random ModelOpt tensors, and what they must give, without the package's own decoder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from tests.gpu.parts import REHEARSAL
from vllm_gemma4_spec.checkpoints import nvfp4

DEVICE = "cpu" if REHEARSAL else "cuda"
Tensors = dict[str, torch.Tensor]
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Rows of a linear's first member in which :func:`tensors` puts NaN scales, and scales far apart.
ODD_ROWS = (0, 1, 2, 7, 9)


@contextmanager
def world() -> Iterator[None]:
    """One rank, and vLLM patched, for layers without an engine."""
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    import vllm.model_executor.layers.quantization.modelopt  # noqa: F401
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    if DEVICE == "cuda":
        torch.cuda.set_device(0)
        torch.backends.cuda.matmul.allow_tf32 = False
    with set_current_vllm_config(VllmConfig()):
        store = f"file://{tempfile.mkdtemp()}/store"
        init_distributed_environment(1, 0, store, 0, "nccl" if DEVICE == "cuda" else "gloo")
        initialize_model_parallel(1, 1)
        if DEVICE == "cuda":
            from vllm.v1.worker.workspace import init_workspace_manager

            init_workspace_manager(torch.device("cuda", 0))
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


def packed(weight: torch.Tensor, scale_2: torch.Tensor) -> Tensors:
    """``weight`` [N, K] in NVFP4 under the names of ModelOpt's export."""
    scale = nvfp4.block_scale(weight, scale_2)
    out = {"weight": nvfp4.encode(weight, scale, scale_2), "weight_scale": scale, "weight_scale_2": scale_2}
    return out | {"input_scale": torch.tensor(0.01, device=weight.device)}


def tensors(rows: int, columns: int, seed: int, rank: int) -> Tensors:
    """Random tensors of one linear: NaN scales of all three sorts, and scales as far apart as the format allows.

    The three: codes intact, codes intact under a negative NaN, codes destroyed.
    """
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, device=DEVICE) * columns**-0.5
    out = packed(weight, torch.tensor(6 * columns**-0.5 / 2688, device=DEVICE))
    codes = out["weight_scale"].view(torch.uint8)
    codes[0, 1], codes[7, 3], codes[9, 0] = 0x7F, 0xFF, 0x7F
    out["weight"][9, :8] = 0x77
    codes[1, :], codes[2, 0], codes[3, :] = 0x7E, 0x01, 0x00  # 448, 2 ** -9, 0
    shared = torch.Generator(device=DEVICE).manual_seed(99)
    # rounded once, so that reference and layer read the same numbers
    out["pre_quant_scale"] = (torch.rand(columns, generator=shared, device=DEVICE) + 0.5).bfloat16()
    if rank:
        a = torch.randn(rank, columns, generator=shared, device=DEVICE) * columns**-0.5
        b = torch.randn(rows, rank, generator=generator, device=DEVICE) * 0.3
        out |= {"svdquant_lora_a": a.bfloat16(), "svdquant_lora_b": b.bfloat16()}
    return out


def decoded(parts: Tensors, *, swapped: bool = False, saturated: bool = False) -> torch.Tensor:
    """float32 [N, K]: ``E2M1 * scale * scale_2``.

    A NaN scale is 448 with its sign, or 0 where all sixteen codes are 7. The mistakes that a layer must stay far from:
    ``swapped`` takes the odd column from the low nibble, ``saturated`` makes every NaN scale 448.
    """
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=DEVICE)
    low, high = (parts["weight"] & 15).int(), (parts["weight"] >> 4).int()
    codes = torch.stack((high, low) if swapped else (low, high), dim=-1).flatten(-2).unflatten(-1, (-1, 16))
    byte, scale = parts["weight_scale"].view(torch.uint8), parts["weight_scale"].float()
    nan, destroyed = (byte & 0x7F) == 0x7F, (codes == 7).all(-1)
    rule = torch.where(byte == 0xFF, -448.0, 448.0)
    if not saturated:
        rule = torch.where(destroyed, 0.0, rule)
    scale = torch.where(nan, rule, scale) * parts["weight_scale_2"]
    return (table[codes] * scale[..., None]).flatten(-2)


def weights(members: Sequence[Tensors], **mistake: bool) -> torch.Tensor:
    """float32 [sum of N, K]."""
    return torch.cat([decoded(parts, **mistake) for parts in members])


def linear(
    name: str,
    kind: str,
    columns: int,
    outputs: Sequence[int],
    members: Sequence[Tensors],
    drafter: bool = False,
    streams: bool = False,
) -> Any:
    """vLLM's layer in bfloat16 with ``members`` loaded through its weight loaders.

    Args:
        kind: ``row`` (o_proj, down_proj) or ``merged`` (qkv_proj, gate_up_proj).
        drafter: prepared as a draft model's layers are.
        streams: prepared as a target's, of which all batches that can stream do.
    """
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_gemma4_spec.kernels import stream_gemm
    from vllm_gemma4_spec.quantization import Nvfp4Config, small_batch_layers

    algorithm = "NVFP4_SVD" if "svdquant_lora_a" in members[0] else "NVFP4_AWQ"
    config = Nvfp4Config.from_config({"quant_algo": algorithm, "quant_method": "modelopt", "ignore": []})
    with set_default_torch_dtype(torch.bfloat16), torch.device(DEVICE):
        if kind == "row":
            layer = RowParallelLinear(columns, outputs[0], bias=False, quant_config=config, prefix=f"layers.0.{name}")
        else:
            layer = MergedColumnParallelLinear(
                columns, [*outputs], bias=False, quant_config=config, prefix=f"layers.0.{name}"
            )
    for index, parts in enumerate(members):
        for suffix, value in parts.items():
            param = getattr(layer, suffix)
            param.weight_loader(param, value.clone(), *([] if kind == "row" else [index]))
    if streams and not REHEARSAL:
        layer.stream_wanted = True
    with (
        small_batch_layers._drafter() if drafter else nullcontext(),
        mock.patch.object(stream_gemm, "faster", return_value=stream_gemm.ALL) if streams else nullcontext(),
    ):
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def relative(y: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((y.float() - truth).norm() / truth.norm())
