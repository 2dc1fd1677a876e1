"""NVFP4 as the compressed-tensors library writes it: 26B-like with its experts, and 31B-like, in the real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file

from tests.checkpoints import reference, tiny
from tests.quantization.comparison import TOKENS, edited, engine_logprobs, swapped_nibbles
from tests.support.stock import without
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.inspection import inspect
from vllm_gemma4_spec.quantization import patches as quantization

TOLERANCE = 1e-3  # as in test_nvfp4_engine.py
_NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
WEIGHTS = _NVFP4 | {"dynamic": False, "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
INPUTS = WEIGHTS | {"dynamic": "local"}
SCHEME = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**WEIGHTS))

Tensors = dict[str, torch.Tensor]


def compressed(base: str, weight: torch.Tensor, largest: torch.Tensor) -> Tensors:
    """One linear by the library; ``largest`` is the largest weight of everything that shares its global scale."""
    blocks = weight.float().unflatten(-1, (-1, 16))
    gparam = generate_gparam(-largest.float(), largest.float())
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), SCHEME.weights, gparam)
    parts = {"weight": weight.float(), "weight_scale": scale, "weight_global_scale": gparam}
    out = NVFP4PackedCompressor.compress(parts, SCHEME)
    out |= {"input_global_scale": torch.tensor([200.0])}
    return {f"{base}.{name}": value for name, value in out.items()}


def checkpoint(kind: str, folder: Path, activations: bool) -> Path:
    """A random Gemma 4 model, its linears and experts compressed; ``activations`` as W4A4 declares them."""
    model = tiny.build(kind)
    model.save_pretrained(folder)
    tensors: Tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        base = name.removesuffix(".weight")
        if ".experts." in name:
            root, _, projection = name.rpartition(".")
            stacks = {"down_proj": value}
            if projection == "gate_up_proj":
                stacks = dict(zip(("gate_proj", "up_proj"), value.chunk(2, dim=1), strict=True))
            for part, stack in stacks.items():
                for expert, weight in enumerate(stack):
                    tensors |= compressed(f"{root}.{expert}.{part}", weight, value[expert].abs().max())
        elif name.endswith(("_proj.weight", "_gate.weight", "_projection.weight")):
            fused = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
            group = [n for n in fused if fused.get(base.rpartition(".")[2]) == fused[n]]
            members = [f"{base.rpartition('.')[0]}.{n}.weight" for n in group] or [name]
            state = model.state_dict()
            tensors |= compressed(base, value, torch.stack([state[m].abs().max() for m in members if m in state]).max())
        else:
            tensors[name] = value
    if not activations:
        tensors = {name: value for name, value in tensors.items() if not name.endswith("input_global_scale")}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": INPUTS if activations else None}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*router.*"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_modelopt(folder: Path, target: Path) -> Path:
    """The same weights under ModelOpt's names, which the reference reads."""

    def renamed(tensors: Tensors) -> Tensors:
        out = {}
        for name, value in tensors.items():
            if name.endswith("weight_global_scale"):
                out[name.replace("weight_global_scale", "weight_scale_2")] = (1 / value).reshape(())
            elif not name.endswith("input_global_scale"):
                out[name.replace("weight_packed", "weight")] = value
        return out

    return edited(folder, target, renamed)


def test_the_reference_is_the_librarys_decoding(tmp_path: Path) -> None:
    folder = checkpoint("31b", tmp_path / "model", activations=True)
    tensors, folded = load_file(folder / "model.safetensors"), reference.fold(as_modelopt(folder, tmp_path / "renamed"))
    bases = [n.removesuffix("_packed") for n in tensors if n.endswith("weight_packed")]
    assert len(bases) == 26
    for base in bases:
        parts = {n.rpartition(".")[2]: v for n, v in tensors.items() if n.rpartition(".")[0] == base.rpartition(".")[0]}
        theirs = NVFP4PackedCompressor.decompress(parts, SCHEME)["weight"].float()
        torch.testing.assert_close(folded[base], theirs, atol=1e-6, rtol=0.01)  # the library decodes in bf16


@pytest.mark.parametrize(
    ("kind", "activations"),
    [
        ("26b", True),
        pytest.param("26b", False, marks=pytest.mark.slow),
        pytest.param("31b", True, marks=pytest.mark.slow),
        pytest.param("e4b", True, marks=pytest.mark.slow),
    ],
)
def test_logprobs_equal_the_reference(kind: str, activations: bool, tmp_path: Path) -> None:
    """Weight-only, as Marlin computes both W4A4 and W4A16."""
    folder = checkpoint(kind, tmp_path / "model", activations)
    truth = reference.logprobs(as_modelopt(folder, tmp_path / "renamed"), TOKENS)
    torch.testing.assert_close(engine_logprobs(folder), truth, atol=TOLERANCE, rtol=0)
    wrong = edited(tmp_path / "renamed", tmp_path / "wrong", lambda t: {n: swapped_nibbles(v) for n, v in t.items()})
    assert (reference.logprobs(wrong, TOKENS) - truth).abs().max() > 100 * TOLERANCE
    report = inspect(Checkpoint(folder))
    assert report.algorithm == "nvfp4-pack-quantized"


@pytest.mark.slow
def test_stock_has_no_nvfp4_on_a_cpu(tmp_path: Path) -> None:
    (patch,) = (p for p in quantization.PATCHES if p.name == "compressed-nvfp4")
    folder = checkpoint("31b", tmp_path / "model", activations=True)
    with without(patch), pytest.raises(ValueError, match="NVFP4"):
        engine_logprobs(folder)


@pytest.mark.slow
def test_nan_block_scales_are_repaired_here_too(tmp_path: Path) -> None:
    """In an expert and in a linear, codes intact; the reference applies the rule."""

    def broken(tensors: Tensors) -> Tensors:
        for name in ("mlp.down_proj", "experts.1.up_proj"):
            scale = tensors[f"model.layers.0.{name}.weight_scale"]
            scale.view(torch.uint8)[3, 1] = 0xFF
        return tensors

    folder = edited(checkpoint("26b", tmp_path / "model", activations=True), tmp_path / "broken", broken)
    truth = reference.logprobs(as_modelopt(folder, tmp_path / "renamed"), TOKENS)
    torch.testing.assert_close(engine_logprobs(folder), truth, atol=TOLERANCE, rtol=0)
