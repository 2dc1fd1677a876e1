"""Checkpoints as ModelOpt exports them, with random weights, of any Gemma 4 text config and any size.

Tensors and names are ModelOpt 0.42.0's. Codes and block scales are drawn, not encoded: at full size encoding would take
longer than what is measured.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK = 32  # of NVFP4_SVD's factors, as ModelOpt's default
# Root mean square of the E2M1 values that random codes stand for.
_CODE_RMS = 2.93


def tiny_config(kind: str, **changes: Any) -> dict[str, Any]:
    """31B- or E4B-like with widths that four ranks and Marlin's tiles divide."""
    from tests.support import tiny_models

    widths: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    widths |= {"num_key_value_heads": 2, "num_hidden_layers": 6}
    if kind == "E4B":
        widths |= {"hidden_size_per_layer_input": 128, "num_hidden_layers": 12, "num_kv_shared_layers": 6}
        config = tiny_models.drafter_config(**widths | changes)
    else:
        config = tiny_models.target_config(**widths | changes)
    return dict(config.to_dict())


def tensors(
    config: dict[str, Any], algorithm: str, seed: int = 0, device: str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, in the model's order: ``(name, tensor on the CPU)``.

    Args:
        algorithm: NVFP4, NVFP4_AWQ (ModelOpt folds most ``pre_quant_scale`` into the norm before; what follows no
            norm keeps its own) or NVFP4_SVD.
        device: where the numbers are drawn.
    """
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    with torch.device("meta"):
        model = Gemma4ForCausalLM(Gemma4TextConfig(**config))
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return made.normal_(0.0, size, generator=generator)

    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        if name == "lm_head.weight":
            continue
        if name.endswith("layer_scalar"):
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        elif "norm" in name:
            yield name, (1 + 0.1 * normal(*shape)).cpu()
        elif not name.endswith(_QUANTIZED):
            size = 1.5 if name.endswith("embed_tokens.weight") else 1.0  # also lm_head: logits of about that size
            yield name, normal(*shape, size=size * shape[-1] ** -0.5).cpu()
        else:
            yield from _linear(name, shape, algorithm, generator, device)


_QUANTIZED = ("_proj.weight", "per_layer_input_gate.weight", "per_layer_projection.weight")
_QUANTIZED += ("per_layer_model_projection.weight",)
# Linears that read one input share pre_quant_scale, the first low-rank factor and weight_scale_2 in an export.
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def _linear(
    name: str, shape: tuple[int, ...], algorithm: str, generator: torch.Generator, device: str
) -> Iterator[tuple[str, torch.Tensor]]:
    base, (rows, columns) = name.removesuffix("weight"), shape
    parent, _, last = base.removesuffix(".").rpartition(".")
    shared = torch.Generator(device=device).manual_seed(zlib.crc32(f"{parent}.{_FUSED.get(last, last)}".encode()))
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device, generator=generator)
    # Bytes 0x30 to 0x3F of e4m3 are 0.5 to 1.875.
    scale = torch.randint(0x30, 0x40, (rows, columns // 16), dtype=torch.uint8, device=device, generator=generator)
    yield f"{base}weight", codes.cpu()
    yield f"{base}weight_scale", scale.cpu().view(torch.float8_e4m3fn)
    yield f"{base}weight_scale_2", torch.tensor(columns**-0.5 / (_CODE_RMS * 1.15))
    yield f"{base}input_scale", torch.tensor(0.01)
    if algorithm == "NVFP4_SVD" or (algorithm == "NVFP4_AWQ" and last not in _FUSED):
        drawn = torch.rand(columns, device=device, generator=shared)
        yield f"{base}pre_quant_scale", (0.7 + 0.6 * drawn).bfloat16().cpu()
    if algorithm == "NVFP4_SVD":
        a = torch.randn(RANK, columns, device=device, generator=shared) * columns**-0.5
        b = torch.randn(rows, RANK, device=device, generator=generator) * 0.1
        yield f"{base}weight_quantizer._svdquant_lora_a", a.bfloat16().cpu()
        yield f"{base}weight_quantizer._svdquant_lora_b", b.bfloat16().cpu()


def save(
    config: dict[str, Any], folder: Path, algorithm: str, seed: int = 0, device: str = "cpu", shard: int = 4 << 30
) -> Path:
    """Write the checkpoint in files of about ``shard`` bytes, with its index and config."""
    folder.mkdir(parents=True)
    where: dict[str, str] = {}
    total = 0
    batch: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(batch, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(batch, name))
        batch.clear()

    size = 0
    for name, tensor in tensors(config, algorithm, seed, device):
        nbytes = tensor.numel() * tensor.element_size()
        if batch and size + nbytes > shard:
            write()
            size = 0
        batch[name] = tensor
        size, total = size + nbytes, total + nbytes
    write()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = config | {
        "architectures": ["Gemma4ForCausalLM"],
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            "ignore": ["lm_head"],
            "producer": {"name": "modelopt", "version": "0.42.0"},
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
