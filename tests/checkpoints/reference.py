"""The float32 truth of an exported checkpoint, decoded bit by bit and without the package under test.

Quantized weights become plain matrices, with pre_quant_scale and the low-rank branch folded in exactly:

    x * p @ R.T + ((x * p) @ A.T) @ B.T  =  x @ ((R + B A) * p).T

transformers then computes the logits.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_gemma4_spec.hf_config.normal_form import normalized

_BITS = {"BF16": np.uint16, "U8": np.uint8, "F8_E4M3": np.uint8, "F32": np.float32}


def e2m1(code: np.ndarray) -> np.ndarray:
    """One sign, two exponent bits of bias 1, one mantissa bit; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    size = np.where(exponent == 0, 0.5 * mantissa, (1 + 0.5 * mantissa) * 2.0 ** (exponent.astype(int) - 1))
    return np.where(sign == 1, -size, size).astype(np.float32)


def e4m3(byte: np.ndarray) -> np.ndarray:
    """float8_e4m3fn: bias 7, no infinities, 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7))
    size = np.where((byte & 0x7F) == 0x7F, np.nan, size)
    return np.where(sign == 1, -size, size).astype(np.float32)


def read(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Every tensor as (dtype, its raw bits)."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + o for o in entry["data_offsets"])
                raw = np.frombuffer(data[begin:end], _BITS[entry["dtype"]])
                out[name] = entry["dtype"], raw.reshape(entry["shape"])
    return out


def _float(dtype: str, raw: np.ndarray) -> np.ndarray:
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).reshape(raw.shape)
    return e4m3(raw) if dtype == "F8_E4M3" else raw.astype(np.float32)


Float = type[np.floating[Any]]


def decode(packed: np.ndarray, scale: np.ndarray, scale_2: np.ndarray, dtype: Float = np.float32) -> np.ndarray:
    """[N, K/2] bytes and [N, K/16] scales -> [N, K] in ``dtype``; a NaN scale by the repair rule."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    blocks = e2m1(codes).reshape(packed.shape[0], -1, 16)
    factor = e4m3(scale)
    destroyed = (codes.reshape(blocks.shape) == 7).all(-1)
    rule = np.where(destroyed, 0.0, np.where(scale == 0xFF, -448.0, 448.0))
    factor = np.where(np.isnan(factor), rule, factor)
    return (blocks * (factor.astype(dtype) * scale_2.astype(dtype))[..., None]).reshape(codes.shape)


def fold(folder: Path, dtype: Float = np.float32) -> dict[str, torch.Tensor]:
    """A state dict for transformers in ``dtype``; computed in float64 and rounded once."""
    tensors = read(folder)
    out = {}
    tensors = {name.replace(".moe.experts.", ".experts."): tensor for name, tensor in tensors.items()}
    for name, (form, raw) in tensors.items():
        if name.endswith(".weight_packed"):  # compressed-tensors: the global scale divides
            base = name.removesuffix("weight_packed")
            scale = 1 / tensors[base + "weight_global_scale"][1].astype(np.float64)
            weight = decode(raw, tensors[base + "weight_scale"][1], scale, np.float64)
            out[base + "weight"] = torch.from_numpy(np.ascontiguousarray(weight, dtype))
        elif form == "U8":
            base = name.removesuffix("weight")
            scales = (tensors[base + suffix][1] for suffix in ("weight_scale", "weight_scale_2"))
            weight = decode(raw, *scales, np.float64)
            for a_name in (base + "weight_quantizer._svdquant_lora_a", base + "svdquant_lora_a"):
                if a_name in tensors:
                    a, b = _float(*tensors[a_name]), _float(*tensors[a_name[:-1] + "b"])
                    weight = weight + b.astype(np.float64) @ a
            if base + "pre_quant_scale" in tensors:
                weight = weight * _float(*tensors[base + "pre_quant_scale"])
            out[name] = torch.from_numpy(np.ascontiguousarray(weight, dtype))
        elif form == "F8_E4M3" and name.endswith(".weight"):  # FP8: one scale for the whole weight
            weight = e4m3(raw).astype(np.float64) * tensors[f"{name}_scale"][1]
            out[name] = torch.from_numpy(np.ascontiguousarray(weight, dtype))
        elif form == "BF16" and not any(s in name for s in ("pre_quant_scale", "svdquant")):
            out[name] = torch.from_numpy(np.ascontiguousarray(_float(form, raw), dtype))
    return _stack_experts(out)


def _stack_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``experts.E.gate_proj`` and so on -> transformers' ``experts.gate_up_proj`` [E, 2I, H], ``experts.down_proj``."""
    roots = {name.split(".experts.0.")[0] + ".experts." for name in state if ".experts.0." in name}
    for root in roots:
        count = sum(name.startswith(root) and name.endswith(".gate_proj.weight") for name in state)
        one = lambda e, p: state.pop(f"{root}{e}.{p}.weight")  # noqa: B023, E731
        pairs = [(torch.cat((one(e, "gate_proj"), one(e, "up_proj"))), one(e, "down_proj")) for e in range(count)]
        state[root + "gate_up_proj"] = torch.stack([p[0] for p in pairs])
        state[root + "down_proj"] = torch.stack([p[1] for p in pairs])
    return state


def model(folder: Path, double: bool = False) -> Any:
    """transformers' float32 model with the folded weights; float64 if ``double``."""
    from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

    config = json.loads((folder / "config.json").read_text())
    config = normalized(config, "config.json")
    config.pop("quantization_config", None)
    config |= {"dtype": "float32"}
    multimodal = config["architectures"] == ["Gemma4ForConditionalGeneration"]
    kind = Gemma4ForConditionalGeneration if multimodal else Gemma4ForCausalLM
    state = fold(folder, np.float64 if double else np.float32)
    if not multimodal and "text_config" in config:  # the text class beside a whole model's config
        config = config["text_config"] | {"dtype": "float32"}
        state = {name.replace("model.language_model.", "model."): tensor for name, tensor in state.items()}
        state = {name: t for name, t in state.items() if not name.startswith(("model.vision", "model.embed_vision"))}
    made = kind((Gemma4Config if multimodal else Gemma4TextConfig)(**config)).float().eval()
    if double:
        made.double().set_experts_implementation("eager")  # the grouped product knows no float64
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    made.tie_weights()
    return made


def logprobs(folder: Path, tokens: list[int], double: bool = False) -> torch.Tensor:
    """[len(tokens) - 1, V], float32: what each token but the first was predicted with.

    ``double``: float64 throughout, the truth that float32 rounds.
    """
    made = model(folder, double)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        if double:  # transformers' norms, rotations and logits go through float32 by name
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        logits = made(input_ids=torch.tensor([tokens])).logits[0, :-1]
    return torch.log_softmax(logits, -1)
