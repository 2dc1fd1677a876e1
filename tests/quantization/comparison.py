"""An exported checkpoint in the real engine beside the float32 reference: on a CPU for most tests, on a GPU for
``tests/gpu/test_checkpoints.py``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import reference
from tests.support.engine import engine

FIXTURES = Path(__file__).parents[1] / "checkpoints" / "fixtures"
WIDE_FIXTURES = FIXTURES.with_name("wide")  # the genuine head sizes, which a CPU cannot attend with
TOKENS = [5, 9, 20, 31, 44, 17, 8, 60, 3, 71, 12, 33, 50, 6, 24, 18, 40, 7, 29, 11, 62, 35]


def layer_errors(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest relative error of every quantized linear's output against its folded float32 weight.

    Norms after each linear hide a wrong global scale from the logits; here nothing does.
    """
    out = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, "modelopt_checked") or not hasattr(layer, "input_size"):
            continue
        base, _, last = name.removeprefix("language_model.").rpartition(".")
        members = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(
            last, (last,)
        )
        names = [f"{base}.{m}.weight" for m in members]
        if last == "qkv_proj" and names[1] in weights and names[2] not in weights:
            names[2] = names[1]  # full layers of 31B: V is K
        parts = [weights[n] for n in names if n in weights]
        wanted = torch.cat(parts)
        x = torch.randn(3, layer.input_size, generator=torch.Generator().manual_seed(1)).to(layer.params_dtype)
        with torch.inference_mode():
            ours = layer.quant_method.apply(layer, x.to(layer.weight.device))[:, : len(wanted)].cpu()
        truth = x.double() @ wanted.double().T
        out[name] = ((ours - truth).abs().max() / truth.abs().max()).item()
    return out


def engine_logprobs(folder: Path, layers: dict[str, float] | None = None, **options: Any) -> torch.Tensor:
    """float32 [len(TOKENS) - 1, V]: the whole distribution that each prompt token was predicted with."""
    from vllm import SamplingParams

    settings: dict[str, Any] = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 1}
    settings |= {"num_gpu_blocks_override": 64, "max_logprobs": -1}
    with engine(folder, **settings | options) as llm:
        if layers is not None:
            weights = {k.replace("language_model.", ""): v for k, v in reference.fold(folder).items()}
            layers |= llm.apply_model(lambda model: layer_errors(model, weights))[0]
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
        (out,) = llm.generate([{"prompt_token_ids": TOKENS}], sampling, use_tqdm=False)
    return torch.stack([torch.tensor([row[t].logprob for t in range(len(row))]) for row in out.prompt_logprobs[1:]])


def text_only(folder: Path) -> dict[str, Any]:
    """A multimodal checkpoint without image processor serves text through its language model."""
    architectures = json.loads((folder / "config.json").read_text())["architectures"]
    return {"hf_overrides": {"architectures": ["Gemma4ForCausalLM"]}} if "ForCond" in architectures[0] else {}


def edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    save_file({k: v.contiguous() for k, v in edit(tensors).items()}, target / "model.safetensors")
    return target


def without(*parts: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {k: v for k, v in tensors.items() if not any(p in k for p in parts)}


def each(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., dict[str, torch.Tensor]]:
    return lambda tensors: {k: change(v) if k.endswith(suffix) else v for k, v in tensors.items()}


def swapped_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return (packed << 4) | (packed >> 4) if packed.dtype == torch.uint8 else packed


def saturated(scale: torch.Tensor) -> torch.Tensor:
    return scale.float().nan_to_num(nan=448.0).to(scale.dtype)


MISTAKES: dict[str, tuple[str, Callable[..., dict[str, torch.Tensor]]]] = {
    "pre_quant_scale ignored": ("e4b-awq-lite", without("pre_quant_scale")),
    "pre_quant_scale divides": ("31b-awq-full", each("pre_quant_scale", lambda s: (1 / s.float()).bfloat16())),
    "o_proj's alone ignored": ("31b-awq-full", without("o_proj.pre_quant_scale")),
    "nibbles swapped": ("31b-nvfp4", each("_proj.weight", swapped_nibbles)),
    "weight_scale_2 of the gates twice": ("31b-nvfp4", each("gate_proj.weight_scale_2", lambda s: s * 2)),
    "block scales one block off": (
        "31b-nvfp4",
        each("weight_scale", lambda s: s.view(torch.uint8).roll(1, 1).view(s.dtype)),
    ),
    "low-rank branch dropped": ("31b-svdquant", without("svdquant")),
    "low-rank branch of o_proj dropped": ("31b-svdquant", without("o_proj.weight_quantizer")),
    "low-rank branch without pre_quant_scale": ("31b-svdquant", without("pre_quant_scale")),
    "NaN scales saturated, codes lost": ("e4b-awq-clip", each("weight_scale", saturated)),
}


def mistakes(folder: Path) -> dict[str, Callable[..., dict[str, torch.Tensor]]]:
    """The decoding mistakes that can be made with what this checkpoint has."""
    names = load_file(folder / "model.safetensors")
    out = {"nibbles swapped": each("_proj.weight", swapped_nibbles)}
    if any("pre_quant_scale" in n for n in names):
        out |= {
            "pre_quant_scale ignored": without("pre_quant_scale"),
            "pre_quant_scale divides": each("pre_quant_scale", lambda s: (1 / s.float()).bfloat16()),
        }
    if any("svdquant" in n for n in names):
        out["low-rank branch dropped"] = without("svdquant")
    return out


def per_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """26B as later ModelOpt versions export it: every expert in NVFP4, one NaN block scale with intact codes."""
    from vllm_gemma4_spec.checkpoints import nvfp4

    out = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            out[name] = tensor
            continue
        root = name.rpartition(".")[0]
        stacks = {"down_proj": tensor}
        if name.endswith("gate_up_proj"):
            stacks = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True))
        for projection, stack in stacks.items():
            for expert, weight in enumerate(stack):
                scale_2 = stack[expert].abs().max().float() / 2688 if projection == "down_proj" else None
                scale_2 = tensor[expert].abs().max().float() / 2688 if scale_2 is None else scale_2
                scale = nvfp4.block_scale(weight, scale_2)
                base = f"{root}.{expert}.{projection}"
                out |= {f"{base}.weight": nvfp4.encode(weight, scale, scale_2), f"{base}.weight_scale": scale}
                out |= {f"{base}.weight_scale_2": scale_2, f"{base}.input_scale": torch.tensor(0.01)}
    broken = out[next(k for k in out if k.endswith("experts.1.up_proj.weight_scale"))]
    broken.view(torch.uint8)[3, 1] = 0x7F
    return out
