"""Checkpoints in the forms that exporters newer than the fixtures write, made from the fixtures' own tensors.

``tests/checkpoints/test_exporters.py`` compares the real ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import reference
from tests.quantization.comparison import FIXTURES, edited, per_expert

Tensors = dict[str, torch.Tensor]


def _written(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    return folder


def weight_only(folder: Path) -> Path:
    """W4A16_NVFP4: ModelOpt 0.45 and later."""
    made = edited(FIXTURES / "31b-nvfp4", folder, lambda t: {k: v for k, v in t.items() if "input_scale" not in k})
    return _written(made, lambda c: c["quantization_config"].update(quant_algo="W4A16_NVFP4"))


def never_calibrated(folder: Path) -> Path:
    """A 26B whose experts 1 and 3 no calibration text reached, under the names of a published one."""

    def edit(tensors: Tensors) -> Tensors:
        lost = (".experts.1.", ".experts.3.")
        kept = {k: v for k, v in per_expert(tensors).items() if not (k.endswith("input_scale") and _any(k, lost))}
        return {k.replace(".experts.", ".moe.experts."): v for k, v in kept.items()}

    return edited(FIXTURES / "26b-mm-awq-lite", folder, edit)


def stripped(folder: Path) -> Path:
    """A 26B without towers and without any ``input_scale`` of experts, in the text class."""

    def edit(tensors: Tensors) -> Tensors:
        lost = ("vision_tower.", "embed_vision.")
        kept = {k: v for k, v in per_expert(tensors).items() if not _any(k, lost)}
        return {k: v for k, v in kept.items() if not (".experts." in k and k.endswith("input_scale"))}

    made = edited(FIXTURES / "26b-mm-awq-lite", folder, edit)
    return _written(made, lambda c: c.update(architectures=["Gemma4ForCausalLM"]))


def stripped_31b(folder: Path) -> Path:
    """A 31B with attention in NVFP4 too and its towers left out, in the text class beside the whole model's config."""
    whole = json.loads((FIXTURES / "26b-mm-awq-lite" / "config.json").read_text())

    def change(config: dict[str, Any]) -> None:
        text = dict(config)
        quantization = text.pop("quantization_config")
        config.clear()
        config.update(whole | {"text_config": text, "quantization_config": quantization})
        config["architectures"] = ["Gemma4ForCausalLM"]

    inside = "model.language_model."
    made = edited(FIXTURES / "31b-nvfp4", folder, lambda t: {k.replace("model.", inside, 1): v for k, v in t.items()})
    return _written(made, change)


def mixed(folder: Path) -> Path:
    """MIXED_PRECISION: E4B's attention in NVFP4 with NaN scales and lone q_proj, MLPs in FP8, one of them in bf16."""
    source = FIXTURES / "e4b-awq-clip"
    weights = reference.fold(source)
    algorithms: dict[str, dict[str, Any]] = {}

    def edit(tensors: Tensors) -> Tensors:
        out = dict(tensors)
        for name in [k for k in tensors if k.endswith(".weight_scale_2")]:
            module = name.removesuffix(".weight_scale_2")
            if ".mlp." not in module:
                algorithms[module] = {"quant_algo": "NVFP4", "group_size": 16}
                continue
            for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"):
                out.pop(f"{module}.{suffix}", None)
            weight = weights[f"{module}.weight"]
            if ".layers.1." in module:
                out[f"{module}.weight"] = weight.bfloat16()
                continue
            out |= _eight_bits(module, weight)
            algorithms[module] = {"quant_algo": "FP8"}
        return out

    made = edited(source, folder, edit)
    # The fixture's own scales are NaN here and there: what the reference repairs, loading must repair too.
    assert any(np.isnan(reference.e4m3(raw)).any() for d, raw in reference.read(made).values() if d == "F8_E4M3")
    new = {"quant_algo": "MIXED_PRECISION", "quantized_layers": algorithms, "ignore": [], "quant_method": "modelopt"}
    return _written(made, lambda c: c.update(quantization_config=new))


def mixed_beside(folder: Path) -> Path:
    """The same as ModelOpt 0.42.0 writes it: the layers stand in hf_quant_config.json alone."""
    made = mixed(folder)
    config = json.loads((made / "config.json").read_text())
    producer = {"name": "modelopt", "version": "0.42.0"}
    named = config["quantization_config"].pop("quantized_layers")
    config["quantization_config"]["producer"] = producer
    section = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": named}
    beside = {"producer": producer, "quantization": section}
    (made / "config.json").write_text(json.dumps(config))
    (made / "hf_quant_config.json").write_text(json.dumps(beside))
    return made


def _eight_bits(module: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    made = {
        "weight": (weight / scale).to(torch.float8_e4m3fn),
        "weight_scale": scale,
        "input_scale": torch.tensor(0.01),
    }
    return {f"{module}.{suffix}": value for suffix, value in made.items()}


def eight_bits(folder: Path) -> Path:
    """ModelOpt's FP8 of a whole E4B: layers that reuse KV have a lone q_proj."""
    source = FIXTURES / "e4b-awq-lite"
    weights = reference.fold(source)

    def edit(tensors: Tensors) -> Tensors:
        modules = [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]
        out = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in modules}
        for module in modules:
            out |= _eight_bits(module, weights[f"{module}.weight"])
        return out

    made = edited(source, folder, edit)
    return _written(made, lambda c: c["quantization_config"].update(quant_algo="FP8"))


def _any(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)


FORMS: dict[str, Callable[[Path], Path]] = {
    "W4A16_NVFP4": weight_only,
    "experts never calibrated": never_calibrated,
    "stripped": stripped,
    "stripped 31B": stripped_31b,
    "MIXED_PRECISION": mixed,
    "MIXED_PRECISION of 0.42.0": mixed_beside,
    "FP8": eight_bits,
}
