"""Gemma 4's shapes from a config, and the bytes of its weights as vLLM 0.19.1 lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from vllm_gemma4_spec import settings
from vllm_gemma4_spec.checkpoints import files, layers
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.hf_config.normal_form import normalized
from vllm_gemma4_spec.ops.plan import configs
from vllm_gemma4_spec.ops.plan.configs import PlanError

# Bytes per weight. NVFP4: 4 bits and one 8-bit scale for each block of 16.
WEIGHT_BYTES = {"float32": 4.0, "bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16}

# Bytes of a number in the KV cache, by --kv-dtype.
KV_BYTES = {"bf16": 2.0, "fp8": 1.0, "float32": 4.0}


@dataclass(frozen=True)
class Matrix:
    """One weight matrix (``copies`` of them for experts) with its name inside the checkpoint."""

    name: str
    elements: int
    copies: int = 1


@dataclass(frozen=True)
class Model:
    """A Gemma 4 text model: its config's fields, the format of its weights, and what is left in bf16.

    ``scaled``: its linears have a ``pre_quant_scale`` (NVFP4_AWQ). ``by_layer``: the format of each module, by
    :func:`layers.short` name, where headers or the config tell it; what it does not name is unquantized.
    """

    name: str
    text: Any
    weights: str
    unquantized: tuple[str, ...] = ()
    files_bytes: int | None = None
    scaled: bool = False
    by_layer: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def layers(self) -> int:
        return int(self.text.num_hidden_layers)

    def is_full(self, layer: int) -> bool:
        return bool(self.text.layer_types[layer] == "full_attention")

    @property
    def first_shared(self) -> int:
        """The first layer that reuses an earlier layer's KV."""
        return self.layers - int(getattr(self.text, "num_kv_shared_layers", 0) or 0)

    def attention(self, layer: int) -> tuple[int, int]:
        """``(KV heads, head size)`` of a layer."""
        text = self.text
        if not self.is_full(layer):
            return int(text.num_key_value_heads), int(text.head_dim)
        heads = text.num_global_key_value_heads if text.attention_k_eq_v else None
        return int(heads or text.num_key_value_heads), int(text.global_head_dim or text.head_dim)

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """What one forward pass multiplies with, experts apart: K is stored again as V where K = V, and layers
        that reuse KV have a K and a V all the same (``QKVParallelLinear`` of vLLM 0.19.1).
        """
        text, hidden = self.text, int(self.text.hidden_size)
        out = []
        for i in range(self.layers):
            at = f"model.language_model.layers.{i}"
            kv_heads, size = self.attention(i)
            heads = int(text.num_attention_heads)
            out.append(Matrix(f"{at}.self_attn.qkv_proj", hidden * size * (heads + 2 * kv_heads)))
            out.append(Matrix(f"{at}.self_attn.o_proj", hidden * size * heads))
            wide = 2 if getattr(text, "use_double_wide_mlp", False) and i >= self.first_shared > 0 else 1
            out.append(Matrix(f"{at}.mlp", 3 * hidden * int(text.intermediate_size) * wide))
            if text.enable_moe_block:
                out.append(Matrix(f"{at}.router.proj", hidden * int(text.num_experts)))
            if text.hidden_size_per_layer_input:
                per_layer = int(text.hidden_size_per_layer_input)
                out.append(Matrix(f"{at}.per_layer_input_gate", hidden * per_layer))
                out.append(Matrix(f"{at}.per_layer_projection", hidden * per_layer))
        if text.hidden_size_per_layer_input:
            width = self.layers * int(text.hidden_size_per_layer_input)
            out.append(Matrix("model.language_model.per_layer_model_projection", hidden * width))
        return tuple(out)

    @cached_property
    def experts(self) -> tuple[Matrix, ...]:
        """The expert matrices: ``elements`` of one expert, ``copies`` experts."""
        text = self.text
        if not text.enable_moe_block:
            return ()
        one = 3 * int(text.hidden_size) * int(text.moe_intermediate_size)
        return tuple(
            Matrix(f"model.language_model.layers.{i}.experts", one, int(text.num_experts)) for i in range(self.layers)
        )

    def _format(self, matrix: Matrix) -> str:
        """As the checkpoint says module by module; else routers and whatever its ignore list names stay in bf16."""
        if self.by_layer:
            name = layers.short(matrix.name).replace(".qkv_proj", ".q_proj")
            return next((k for m, k in self.by_layer.items() if m == name or m.startswith(f"{name}.")), "bf16")
        plain = "router" in matrix.name or any(_ignored(matrix.name, p) for p in self.unquantized)
        return "bf16" if plain and self.weights != "float32" else self.weights

    def _bytes(self, matrix: Matrix) -> float:
        """Of one copy."""
        return matrix.elements * WEIGHT_BYTES[self._format(matrix)]

    @property
    def _wide(self) -> float:
        """Bytes of an unquantized number: embeddings are not quantized."""
        return WEIGHT_BYTES["float32" if self.weights == "float32" else "bf16"]

    @property
    def head_bytes(self) -> float:
        """The output matrix, which is the embedding table."""
        return int(self.text.vocab_size) * int(self.text.hidden_size) * self._wide

    @property
    def weight_bytes(self) -> float:
        """Memory of the text model: matrices, experts, embeddings, per-layer embeddings (norms are left out)."""
        total = sum(self._bytes(m) for m in self.matrices) + self.head_bytes
        total += sum(self._bytes(m) * m.copies for m in self.experts)
        if self.text.hidden_size_per_layer_input:
            width = self.layers * int(self.text.hidden_size_per_layer_input)
            total += int(self.text.vocab_size_per_layer_input) * width * self._wide
        return total

    def copies(self, marlin: bool, memory: float, drafter: bool) -> float:
        """Bytes of weights that kernels of this package hold a second time, in an order of their own.

        On a drafter: its NVFP4 linears where vLLM has Marlin, and lm_head in NVFP4. On a target: ``o_proj`` where it
        has a ``pre_quant_scale`` and the card has room.
        """
        quantized = [m for m in self.matrices if marlin and self._format(m) == "nvfp4"]
        if drafter:
            narrow = WEIGHT_BYTES["nvfp4"] / WEIGHT_BYTES["bf16"]
            head = 0.0 if self.weights == "float32" else self.head_bytes * narrow
            return head + sum(self._bytes(m) for m in quantized)
        if not self.scaled or memory < settings.ROOMY:
            return 0.0
        return sum(self._bytes(m) for m in quantized if m.name.endswith("o_proj"))

    def read_bytes(self, tokens: int) -> float:
        """Weight bytes that a pass over ``tokens`` tokens reads once: of the experts those that at least one
        token picks, if all are equally likely; of the (per-layer) embeddings only rows, which are left out.
        """
        total = sum(self._bytes(m) for m in self.matrices) + self.head_bytes
        for matrix in self.experts:
            chance = 1 - (1 - int(self.text.top_k_experts) / matrix.copies) ** tokens
            total += self._bytes(matrix) * matrix.copies * chance
        return total

    def kv_read_bytes(self, context: int, kv_bytes: float) -> float:
        """KV bytes that one token at position ``context`` reads: every layer, its window at most."""
        total = 0.0
        for i in range(self.layers):
            heads, size = self.attention(i)
            seen = context if self.is_full(i) else min(context, int(self.text.sliding_window))
            total += 2 * heads * size * kv_bytes * seen
        return total


@dataclass(frozen=True)
class Assistant(Model):
    """An MTP assistant: queries alone, no KV of its own, an output matrix of its own.

    ``backbone``: the target's hidden size. ``head_rows``: rows of the output matrix that one token reads, centroids
    included.
    """

    backbone: int = 0
    head_rows: int = 0

    @property
    def first_shared(self) -> int:
        return 0

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        text, hidden = self.text, int(self.text.hidden_size)
        out = [Matrix("pre_projection", 2 * self.backbone * hidden), Matrix("post_projection", self.backbone * hidden)]
        for i in range(self.layers):
            queries = hidden * int(text.num_attention_heads) * self.attention(i)[1]
            at = f"model.layers.{i}"
            out += [Matrix(f"{at}.self_attn.q_proj", queries), Matrix(f"{at}.self_attn.o_proj", queries)]
            out.append(Matrix(f"{at}.mlp", 3 * hidden * int(text.intermediate_size)))
        return tuple(out)

    @property
    def by_centroids(self) -> bool:
        return self.head_rows != int(self.text.vocab_size)

    def copies(self, marlin: bool, memory: float, drafter: bool) -> float:
        """The NVFP4 copy of a head that is read whole; its linears have none."""
        narrow = WEIGHT_BYTES["nvfp4"] / WEIGHT_BYTES["bf16"]
        return 0.0 if self.by_centroids or self.weights == "float32" else self.head_bytes * narrow

    def read_bytes(self, tokens: int) -> float:
        rows = min(int(self.text.vocab_size), self.head_rows * tokens) / int(self.text.vocab_size)
        return super().read_bytes(tokens) - self.head_bytes * (1 - rows)


def _ignored(name: str, pattern: str) -> bool:
    """ModelOpt's ``exclude_modules`` and compressed-tensors' ``ignore``: globs, or a part of the name."""
    pattern = pattern.removeprefix("re:").rstrip("*").rstrip(".")
    short = pattern.removeprefix("*").removeprefix("model.language_model.").removeprefix("model.")
    return bool(short) and (fnmatch(name, f"*{short}*") or name.startswith(pattern + "."))


@dataclass(frozen=True)
class _Weights:
    """What a checkpoint's weights are; the fields of :class:`Model` of the same names."""

    weights: str
    unquantized: tuple[str, ...] = ()
    scaled: bool = False
    by_layer: Mapping[str, str] = field(default_factory=dict)


def _weights(config: dict[str, Any], folder: Path | None) -> _Weights:
    """From config.json or hf_quant_config.json, and from the headers of the shards where all of them are there."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    written = config.get("quantization_config") or text.get("quantization_config") or {}
    if not isinstance(written, dict) or not isinstance(written.get("quantization", written), dict):
        raise PlanError(f"{folder}: quantization config must be an object")
    quant = files.quantization(written, folder) if folder else written.get("quantization", written)
    dtype = str((text or config).get("dtype") or config.get("torch_dtype") or "bfloat16")
    if not quant:
        return _Weights("float32" if dtype == "float32" else "bf16")
    names = quant.get("exclude_modules") or quant.get("ignore")
    left = tuple(map(str, names)) if isinstance(names, list) else ()
    kind, by_layer = layers.config_formats(quant)
    if kind is None:
        what = layers.algorithm(quant) or quant.get("format") or quant.get("quant_method")
        raise PlanError(
            f"{folder}: weights quantized by {what!r}; choose their format with --target-weights or --drafter-weights"
        )
    scaled = "AWQ" in layers.algorithm(quant) or any("AWQ" in a for a in layers.layer_algorithms(quant).values())
    return _Weights(kind, left, scaled, _headers(folder) or by_layer)


def _headers(folder: Path | None) -> dict[str, str]:
    """Format by module as the shards have it; {} where they are not all there (a config alone, a cut download)."""
    if folder is None or not any(folder.glob("*.safetensors")):
        return {}
    checkpoint = Checkpoint(folder)
    if not all(file.is_file() for file in checkpoint.files):
        return {}
    return layers.tensor_formats(checkpoint.tensors)


def load(model: str | Path, weights: str | None = None) -> Model:
    """Read a model's config.

    Args:
        model: a model folder, a ``config.json`` or a Hub id (see :func:`configs.find`).
        weights: a key of :data:`WEIGHT_BYTES` that overrides what the checkpoint says.

    Raises:
        PlanError: nothing readable there, or not a Gemma 4 model.
    """
    name, file, raw = configs.find(str(model))
    try:
        raw = normalized(raw, str(file or model)) if file else raw
    except CheckpointError as error:
        raise PlanError(str(error)) from None
    text = configs.text(raw, str(file or model))
    try:
        found = _Weights(weights) if weights else _weights(raw, file.parent if file else None)
    except CheckpointError as error:
        raise PlanError(str(error)) from None
    if found.weights not in WEIGHT_BYTES:
        raise PlanError(f"weights {found.weights!r}: choose from {', '.join(WEIGHT_BYTES)}")
    shards = sum(p.stat().st_size for p in file.parent.glob("*.safetensors")) if file else 0
    return _made(name, text, found, shards or None, raw, str(file or model))


@cache
def published(name: str, weights: str) -> Model:
    """A model of the bundled table (:func:`configs.published`), whatever a local cache holds."""
    row = configs.published()[name]
    raw = row if "model_type" in row else {"model_type": "gemma4_text", **row}
    return _made(name, configs.text(raw, name), _Weights(weights), None, raw, name)


def _made(name: str, text: Any, found: _Weights, shards: int | None, raw: dict[str, Any], where: str) -> Model:
    fields = (name, text, found.weights, found.unquantized, shards, found.scaled, found.by_layer)
    if raw["model_type"] == configs.ASSISTANT:
        own = configs.assistant(raw, where)
        rows = int(text.vocab_size)
        if own["use_ordered_embeddings"]:
            rows = own["num_centroids"] + rows // own["num_centroids"] * own["centroid_intermediate_top_k"]
        return Assistant(*fields, own["backbone_hidden_size"], rows)
    return Model(*fields)
