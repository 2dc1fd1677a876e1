"""The tensors of an assistant's checkpoint, told from the headers of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.checkpoints.files import Checkpoint, read_headers
from vllm_gemma4_spec.checkpoints.tensor_info import TensorInfo
from vllm_gemma4_spec.errors import CheckpointError, DrafterError
from vllm_gemma4_spec.hf_config.normal_form import normalized

_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
# What belongs to a quantized matrix beside its weight, or stands in its weight's place.
_QUANTIZED = {
    *("weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_shape"),
    *("input_scale", "input_global_scale", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"),
}


def expected(config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of an unquantized assistant.

    Args:
        config: a ``gemma4_assistant`` config.
    """
    text, backbone = config.text_config, config.backbone_hidden_size
    hidden, inner = text.hidden_size, text.intermediate_size
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (text.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "pre_projection.weight": (hidden, 2 * backbone),
        "post_projection.weight": (backbone, hidden),
    }
    if config.use_ordered_embeddings:
        out["masked_embedding.centroids.weight"] = (config.num_centroids, hidden)
        out["masked_embedding.token_ordering"] = (text.vocab_size,)
    for i, kind in enumerate(text.layer_types):
        dim = text.head_dim if kind == "sliding_attention" else text.global_head_dim
        queries, layer = text.num_attention_heads * dim, f"model.layers.{i}"
        out |= {f"{layer}.{name}.weight": (hidden,) for name in _NORMS}
        out |= {
            f"{layer}.layer_scalar": (1,),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.q_norm.weight": (dim,),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    return out


def check(folder: Path, config: Any) -> None:
    """Compare the headers of ``folder``'s files with the network.

    Raises:
        DrafterError: names a tensor that is missing, of another shape, or none of an assistant's.
        CheckpointError: a file cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DrafterError(f"assistant {folder}: no .safetensors file; download the model again")
    compare(read_headers(files), config, str(folder))


def compare_checkpoint(checkpoint: Checkpoint) -> None:
    """:func:`check` of a checkpoint whose headers have been read.

    Raises:
        DrafterError: as :func:`check`.
        CheckpointError: its config.json is none of an assistant's.
    """
    from vllm_gemma4_spec.mtp.config import Gemma4AssistantConfig

    file = str(checkpoint.folder / "config.json")
    plain = normalized(checkpoint.config, file)
    try:
        config = Gemma4AssistantConfig.from_dict(plain)
        expected(config)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises many kinds for a malformed config
        raise CheckpointError(f"{file}: cannot be read as an assistant's ({str(error).splitlines()[0]})") from None
    compare(checkpoint.tensors, config, str(checkpoint.folder))


def compare(tensors: Mapping[str, TensorInfo], config: Any, folder: str) -> None:
    """:func:`check` of headers that have been read."""
    want = expected(config)
    have = {name: info for name, info in tensors.items() if name != "lm_head.weight"}  # tied, when it is written
    owners = {name.rsplit(".", 1)[0] for name in have if name.rsplit(".", 1)[-1] in _QUANTIZED}
    for name, shape in want.items():
        module, _, part = name.rpartition(".")
        if module in owners and part == "weight":
            continue  # its loader checks a quantized matrix
        info = have.get(name)
        if info is None:
            raise DrafterError(f"assistant {folder}: tensor {name} is missing; download the model again")
        if info.shape != shape:
            raise DrafterError(f"assistant {folder}: {name} is {list(info.shape)}, its config.json says {list(shape)}")
    for name in have:
        module, _, part = name.rpartition(".")
        if name not in want and not (f"{module}.weight" in want and part in _QUANTIZED):
            forbidden = any(f".{p}." in name for p in ("k_proj", "v_proj", "k_norm", "v_norm"))
            why = "keys and values are the target's" if forbidden else "no tensor of a Gemma 4 assistant's network"
            raise DrafterError(f"assistant {folder}: {name}: {why}; is this another model's file?")
