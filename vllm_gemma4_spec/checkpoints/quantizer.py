"""Runs ModelOpt 0.42.0 on a Gemma 4 model, on GPU or CPU, and writes a checkpoint without NaN scales.

Also a program (``python -m vllm_gemma4_spec.checkpoints.quantizer``), so that the command line can run it
with the interpreter of another environment.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vllm_gemma4_spec.checkpoints import nvfp4

# recipe -> attribute of modelopt.torch.quantization
RECIPES = {
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "awq-lite": "NVFP4_AWQ_LITE_CFG",
    "awq-clip": "NVFP4_AWQ_CLIP_CFG",
    "awq-full": "NVFP4_AWQ_FULL_CFG",
    "svdquant": "NVFP4_SVDQUANT_DEFAULT_CFG",
}

# Kept in the model's own dtype, as vLLM builds them without quantization.
_EXCLUDED = ("*vision_tower*", "*embed_vision*", "*audio_tower*", "*embed_audio*")


def fake_quantize(x: Tensor, block_size: int, amax: Tensor, *_: Any) -> Tensor:
    """What ModelOpt's CUDA kernel does to a tensor: NVFP4 with dynamic block scales, back in ``x``'s dtype.

    Takes the arguments of ``dynamic_block_quantize_op``; the formats after ``amax`` must be E2M1 and E4M3.
    """
    scale_2 = amax.float().amax() / (nvfp4.CODE_MAX * nvfp4.SCALE_MAX)
    scale_2 = torch.where(scale_2 > 0, scale_2, torch.full_like(scale_2, 1e-12))
    blocks = x.float().unflatten(-1, (-1, block_size))
    scale = (blocks.abs().amax(-1) / (nvfp4.CODE_MAX * scale_2)).clamp(max=nvfp4.SCALE_MAX).to(torch.float8_e4m3fn)
    step = scale.float() * scale_2
    step = torch.where(step >= 1e-5, step, torch.ones_like(step))  # the kernel's guard
    one = torch.ones((), device=x.device)
    codes = nvfp4.encode(blocks.flatten(-2), step, one)
    table = torch.tensor(nvfp4.E2M1, device=x.device)
    values = table[nvfp4.unpack(codes).int()].unflatten(-1, (-1, block_size))
    return (values * step.unsqueeze(-1)).flatten(-2).to(x.dtype)


def _clamped(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``NVFP4QTensor.get_weights_scaling_factor`` with the clamp that 0.42.0 lacks."""

    @functools.wraps(original)
    def clamped(*args: Any, keep_high_precision: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor]:
        scale, scale_2 = original(*args, keep_high_precision=True, **kwargs)
        if not keep_high_precision:
            scale = scale.nan_to_num(nan=1.0).clamp(max=nvfp4.SCALE_MAX).to(torch.float8_e4m3fn)
        return scale, scale_2

    return clamped


@contextmanager
def modelopt_mended(*, clamp: bool = True) -> Iterator[None]:
    """ModelOpt 0.42.0 able to run without CUDA and, with ``clamp``, unable to write a NaN block scale."""
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.qtensor import nvfp4_tensor

    tensor_class = nvfp4_tensor.NVFP4QTensor
    changes: list[tuple[Any, str, Any]] = []
    if not torch.cuda.is_available():
        changes += [(tensor_quant, "dynamic_block_quantize_op", fake_quantize)]
        changes += [(nvfp4_tensor, "fp4_compatible", lambda: False)]
    if clamp:
        method = "get_weights_scaling_factor"
        changes += [(tensor_class, method, staticmethod(_clamped(getattr(tensor_class, method))))]
    kept = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def quantize(model: Any, recipe: str, forward: Callable[[Any], None], rank: int | None = None) -> Any:
    """Quantize ``model`` in place with ModelOpt's configuration for ``recipe`` and return it.

    ``forward`` runs the calibration text through the model it is given; ``rank`` is SVDQuant's (ModelOpt: 32).
    """
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, RECIPES[recipe]))
    config["quant_cfg"].update({pattern: {"enable": False} for pattern in _EXCLUDED})
    if rank is not None and recipe == "svdquant":
        config["algorithm"]["lowrank"] = rank
    return mtq.quantize(model, config, forward)


def export(model: Any, folder: str) -> None:
    """Write the quantized ``model`` as ModelOpt's Hugging Face export does."""
    from modelopt.torch.export import export_hf_checkpoint

    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=folder)
