"""Gemma 4 at full size from its published configs alone: text-only, NVFP4, random finite weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

MODELS = {"31B": "gemma-4-31B-it", "26B-A4B": "gemma-4-26B-A4B-it", "E4B": "gemma-4-E4B-it"}


def artifacts() -> Path:
    """The folder with ``gemma4/models/*/config.json``."""
    folder = os.environ.get("GEMMA4_ARTIFACTS")
    if not folder:
        raise SystemExit("GEMMA4_ARTIFACTS is unset: it must name the folder that holds gemma4/models")
    return Path(folder)


def text_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """The published config of the language model.

    Args:
        layers: keep this many layers only (for a quick run; times of such a model mean little).
    """
    published = json.loads((artifacts() / "gemma4/models" / MODELS[name] / "config.json").read_text())
    config: dict[str, Any] = published["text_config"]
    if layers:
        config["num_hidden_layers"] = layers
        config["layer_types"] = config["layer_types"][:layers]
        config["num_kv_shared_layers"] = min(config["num_kv_shared_layers"], layers // 2)
    return config


def write_model(name: str, folder: Path, layers: int | None = None, algorithm: str = "NVFP4") -> Path:
    """A folder with the config of ``Gemma4ForCausalLM`` in ModelOpt's ``algorithm``; there are no weights in it."""
    config = text_config(name, layers)
    config |= {
        "architectures": ["Gemma4ForCausalLM"],
        "tie_word_embeddings": True,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            "group_size": 16,
            "ignore": ["lm_head", "*router*"],
            "producer": {"name": "modelopt"},
        },
    }
    return _written(config, folder)


def _written(config: dict[str, Any], folder: Path) -> Path:
    """At once: several engines of a run write and read the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"config.{os.getpid()}"
    part.write_text(json.dumps(config, indent=1))
    part.replace(folder / "config.json")
    return folder


# Hidden size, inner size, query heads and whether the head goes by centroids, as published.
_ASSISTANTS = {"31B": (1024, 8192, 32, False), "26B-A4B": (1024, 8192, 16, False), "E4B": (256, 2048, 4, True)}


def write_assistant(target: str, folder: Path) -> Path:
    """A folder with the config of the MTP assistant of ``target``, in bfloat16; there are no weights in it."""
    published = json.loads((artifacts() / "gemma4/models" / MODELS[target] / "config.json").read_text())["text_config"]
    hidden, inner, heads, centroids = _ASSISTANTS[target]
    text = published | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "use_double_wide_mlp": False,
        "final_logit_softcapping": None,
        "dtype": "bfloat16",
    }
    config = {
        "model_type": "gemma4_assistant",
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": published["hidden_size"],
        "use_ordered_embeddings": centroids,
        "num_centroids": 2048,
        "centroid_intermediate_top_k": 32,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "text_config": text,
    }
    return _written(config, folder)


@torch.no_grad()
def random_weights(model: torch.nn.Module, *_: Any, **__: Any) -> None:
    """In the place of vLLM's ``initialize_dummy_weights``, which leaves NVFP4 codes and scales uninitialized.

    Codes are random bytes, block scales 1, global scales such that a product keeps its input's size. With
    ``GEMMA4_SHAPES_LOUD`` the norms behind attention and MLP have that weight in place of 1.
    """
    torch.manual_seed(0)
    loud = float(os.environ.get("GEMMA4_SHAPES_LOUD", "1"))
    louder: set[int] = set()  # a layer comes before its norms
    fan_in = {id(m): m.weight.shape[-1] * 2 for m in model.modules() if hasattr(m, "weight_scale_2")}
    for module in model.modules():
        behind = {id(getattr(module, f"post_{part}_layernorm", None)) for part in ("attention", "feedforward")}
        louder |= behind - {id(None)}
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in module._non_persistent_buffers_set:
                continue
            if value.dtype == torch.uint8:
                value.random_(0, 256)
            elif "weight_scale_2" in name:
                value.fill_(1.0 / (3.0 * fan_in.get(id(module), 2048) ** 0.5))
            elif "scale" in name and "layer_scalar" not in name:
                value.copy_(torch.ones_like(value, dtype=torch.float32).to(value.dtype))
            elif "Norm" in type(module).__name__ or name == "layer_scalar":
                value.fill_(loud if id(module) in louder else 1.0)
            elif value.is_floating_point():
                value.normal_(0.0, 0.02)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes that a decode step of one token must read.

    That is everything but the embedding tables that it looks rows up in, and of experts those that a token is sent to.
    """
    total, seen = 0, set()
    shares = {
        f"{prefix}.{name}": module.top_k / module.local_num_experts
        for prefix, module in model.named_modules()
        if hasattr(module, "local_num_experts")
        for name, _ in module.named_parameters(recurse=False)
    }
    if hasattr(model, "centroid_head"):  # an assistant: rows of the target's table, and of a head by centroids few
        shares["model.embed_tokens.weight"] = 0.0
        if (head := model.centroid_head) is not None:
            shares["centroid_head.weight"] = head.top_k / len(head.centroids)
    for name, value in model.named_parameters():
        if value.data_ptr() in seen or ("per_layer" in name and "embed_tokens" in name) or ".rows_" in name:
            continue  # rows_*: the weight a second time, in another order
        seen.add(value.data_ptr())
        # Tied embeddings are read once, as the lm_head.
        total += round(value.numel() * value.element_size() * shares.get(name, 1.0))
    return total
