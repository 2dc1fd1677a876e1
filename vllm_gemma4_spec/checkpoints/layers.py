"""What a quantized layer is: its algorithm, its block size and the tensors that belong to it.

Loading, ``inspect``, ``repair``, ``plan`` and ``quantize`` take it from here, so that none of them promises what
another refuses. Only names, dtypes and shapes are looked at, never values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_gemma4_spec.checkpoints import BLOCK
from vllm_gemma4_spec.checkpoints.tensor_info import TensorInfo
from vllm_gemma4_spec.errors import CheckpointError

# ModelOpt's `quant_algo`s with 4-bit floats and one scale for BLOCK columns. W4A16_NVFP4 has no input_scale.
NVFP4 = ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4")
WEIGHT_ONLY = ("W4A16_NVFP4",)
MIXED = "MIXED_PRECISION"

FLOATS = ("BF16", "F16", "F32")

# ModelOpt 0.42.0's name of the low-rank factors -> the one that other exporters and our layers use
_LORA = {f".weight_quantizer._svdquant_lora_{x}": f".svdquant_lora_{x}" for x in "ab"}
_EXPERT = re.compile(r"\.experts\.\d+\.")
_INSIDE = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?")
_TOWER = re.compile(r"\.(?:vision_tower|audio_tower|embed_vision|embed_audio)\.")
# Of all experts at once, as compressed-tensors writes some 26B's
_STACKED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)_(packed|scale|shape)")
_SUFFIXES = frozenset(
    {"weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"}
)


def canonical(name: str) -> str:
    """A tensor's name as it is loaded: ``...weight_quantizer._svdquant_lora_a`` -> ``...svdquant_lora_a``, and a
    26B's ``...moe.experts.`` (a name from before the release of transformers' Gemma 4) -> ``...experts.``."""
    for old, new in _LORA.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name.replace(".moe.experts.", ".experts.")


def stacked_experts(name: str) -> tuple[str, tuple[str, ...], str] | None:
    """What a tensor of all experts at once holds: ``….experts.gate_up_proj_packed`` -> (``….experts``, (``gate_proj``,
    ``up_proj``), ``weight_packed``), the names that one expert's tensors have; None for other tensors."""
    found = _STACKED.fullmatch(name)
    if found is None:
        return None
    projections = ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)
    return found[1], projections, f"weight_{found[3]}"


def packed_integers(tensors: Iterable[TensorInfo], *, experts: bool = False) -> TensorInfo | None:
    """The first tensor in packed integers (AWQ, GPTQ, compressed-tensors' W4A16), or the first of experts; None where
    there is none."""
    ends = ("qweight", "_packed")
    words = (t for t in tensors if t.dtype == "I32" and t.name.endswith(ends))
    return next((t for t in words if ".experts." in t.name or not experts), None)


def missing_tower(config: Mapping[str, Any], tensors: Iterable[str]) -> bool:
    """Whether a model of text and images has a vision tower by its config and none in its shards."""
    architectures = config.get("architectures")
    whole = isinstance(architectures, list) and "Gemma4ForConditionalGeneration" in architectures
    return whole and bool(config.get("vision_config")) and not any("vision_tower." in name for name in tensors)


def algorithm(section: Mapping[str, Any]) -> str:
    """``quant_algo`` of a quantization config, upper case; empty where it names none."""
    return str(section.get("quant_algo") or "").upper()


def layer_algorithms(section: Mapping[str, Any]) -> dict[str, str]:
    """Module -> algorithm of a MIXED_PRECISION config (``quantized_layers``); {} for other configs.

    Raises:
        CheckpointError: ``quantized_layers`` is not what it must be, or a block size is not BLOCK.
    """
    if algorithm(section) != MIXED:
        return {}
    found = section.get("quantized_layers")
    if not isinstance(found, Mapping) or not found or not all(isinstance(e, Mapping) for e in found.values()):
        raise CheckpointError(f"quantization config: {MIXED} needs 'quantized_layers', an object of modules")
    for module, entry in found.items():
        check_block(entry, f"quantized_layers: {module}")
    return {canonical(f"{module}.").removesuffix("."): algorithm(entry) for module, entry in found.items()}


def check_block(entry: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for a group size that no backend here takes."""
    size = entry.get("group_size")
    if algorithm(entry) in NVFP4 and size not in (None, BLOCK, str(BLOCK)):
        raise CheckpointError(
            f"{where}: group_size {size}; NVFP4 has one scale per {BLOCK} columns in every backend of vLLM 0.19.1, "
            f"quantize the model again with blocks of {BLOCK}"
        )


@dataclass(frozen=True)
class Quantized:
    """The tensors of one linear (or one projection of one expert), keyed by suffix: ``weight``, ``weight_scale``,
    ``weight_scale_2``, ``input_scale``, ``pre_quant_scale``, ``svdquant_lora_a``, ``svdquant_lora_b``.

    Attributes:
        module: its name in the checkpoint.
        algorithm: one of :data:`NVFP4`, or ``FP8`` (one float8 scale for the whole weight).
    """

    module: str
    parts: Mapping[str, TensorInfo]
    algorithm: str = "NVFP4"

    @property
    def is_nvfp4(self) -> bool:
        return self.algorithm in NVFP4

    @property
    def is_expert(self) -> bool:
        return _EXPERT.search(f".{self.module}.") is not None

    @property
    def scalars(self) -> tuple[TensorInfo, ...]:
        """The scales for a whole tensor that it has."""
        names = ("weight_scale_2", "input_scale") if self.is_nvfp4 else ("weight_scale", "input_scale")
        return tuple(self.parts[name] for name in names if name in self.parts)

    def needed(self) -> tuple[str, ...]:
        """Suffixes that it cannot do without. Experts that calibration never reached have no ``input_scale``."""
        weight = ("weight", "weight_scale", "weight_scale_2") if self.is_nvfp4 else ("weight", "weight_scale")
        free = self.algorithm in WEIGHT_ONLY or (self.is_nvfp4 and self.is_expert)
        return weight if free else (*weight, "input_scale")

    def check(self) -> None:
        """Every part is there and fits the others.

        Raises:
            CheckpointError: names the file and the tensor.
        """
        some = next(iter(self.parts.values()))
        for suffix in self.needed():
            if suffix not in self.parts:
                raise CheckpointError(
                    f"{self.module}.{suffix}: missing from the checkpoint, while {some} is there; "
                    "a shard is lost or the export stopped early"
                )
        if not self.is_nvfp4:
            self._check_fp8()
            return
        weight = self.parts["weight"]
        if weight.dtype != "U8" or len(weight.shape) != 2:
            raise CheckpointError(
                f"{weight}: {weight.dtype} {list(weight.shape)}, expected U8 [N, K/2] of packed NVFP4"
            )
        rows, columns = weight.shape[0], weight.shape[1] * 2
        scale = self.parts["weight_scale"]
        if len(scale.shape) == 2 and scale.shape[0] == rows and 0 < scale.shape[1] < columns // BLOCK:
            raise CheckpointError(
                f"{scale}: one scale per {columns // scale.shape[1]} columns; every backend of vLLM 0.19.1 takes "
                f"{BLOCK}, quantize the model again with blocks of {BLOCK}"
            )
        self._expect("weight_scale", ("F8_E4M3",), (rows, columns // BLOCK), f" (one per {BLOCK} columns)")
        for info in self.scalars:
            _one_number(info)
        self._expect("pre_quant_scale", FLOATS, (columns,), f" for the {columns} inputs of {weight.name}")
        self._check_factors(rows, columns)

    def _check_fp8(self) -> None:
        weight = self.parts["weight"]
        if weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
            raise CheckpointError(f"{weight}: {weight.dtype} {list(weight.shape)}, expected F8_E4M3 [N, K] of FP8")
        for info in self.scalars:
            _one_number(info)

    def _check_factors(self, rows: int, columns: int) -> None:
        a, b = (self.parts.get(f"svdquant_lora_{x}") for x in "ab")
        if a is None and b is None:
            return
        if a is None or b is None:
            raise CheckpointError(f"{a or b}: its partner is missing; SVDQuant needs both low-rank factors")
        rank = a.shape[0] if a.shape else 0
        self._expect("svdquant_lora_a", FLOATS, (rank, columns), "")
        self._expect("svdquant_lora_b", FLOATS, (rows, rank), "")

    def _expect(self, suffix: str, dtypes: tuple[str, ...], shape: tuple[int, ...], why: str) -> None:
        info = self.parts.get(suffix)
        if info is not None and (info.dtype not in dtypes or info.shape != shape):
            raise CheckpointError(
                f"{info}: {info.dtype} {list(info.shape)}, expected {' or '.join(dtypes)} {list(shape)}{why}"
            )


def _one_number(info: TensorInfo) -> None:
    if info.dtype != "F32" or math.prod(info.shape) != 1:
        raise CheckpointError(f"{info}: {info.dtype} {list(info.shape)}, expected one F32 number")


def check(modules: Mapping[str, Quantized]) -> None:
    """:meth:`Quantized.check` of all."""
    for module in modules.values():
        module.check()


def describe(tensors: Mapping[str, TensorInfo], section: Mapping[str, Any]) -> dict[str, Quantized]:
    """Every linear that has a tensor of ModelOpt's NVFP4 or FP8, by module name, unchecked.

    Args:
        section: the quantization config; it says which layers have no ``input_scale`` by design.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, _, suffix = canonical(name).rpartition(".")
        if suffix in _SUFFIXES:
            parts.setdefault(module, {})[suffix] = info
    packed = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    named, whole = layer_algorithms(section), algorithm(section)
    out = {}
    for module, found in parts.items():
        if module in packed:  # compressed-tensors
            continue
        expected = (named.get(module) or named.get(module.partition(".experts.")[0] + ".experts", "")) or whole
        if _is_nvfp4(found):
            out[module] = Quantized(module, found, expected if expected in NVFP4 else "NVFP4")
        elif expected == "FP8" and "weight_scale" in found:
            out[module] = Quantized(module, found, "FP8")
    return out


def _is_nvfp4(parts: Mapping[str, TensorInfo]) -> bool:
    """Told from FP8 and MXFP8; also where one of the tensors is missing."""
    weight, scale = parts.get("weight"), parts.get("weight_scale")
    if weight is None:
        return "weight_scale_2" in parts or (scale is not None and len(scale.shape) == 2)
    return "weight_scale_2" in parts or (weight.dtype == "U8" and "weight_scale" in parts)


def short(module: str) -> str:
    """A module's name inside the language model, whichever class the checkpoint has: ``layers.0.mlp.down_proj``."""
    return _INSIDE.sub("", canonical(f"{module}.").removesuffix("."))


def config_formats(section: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """What a quantization config alone says: the format of all layers, and of each where it names them one by one.

    Formats are ``nvfp4`` and ``fp8``; None stands for one that is neither. With a list of layers, the first value is
    the widest-spread of theirs, and layers that are not in the list are unquantized.
    """
    named = {short(module): _format(name) for module, name in layer_algorithms(section).items()}
    if named:
        other = next((name for module, name in layer_algorithms(section).items() if not _format(name)), None)
        if other is not None:
            return None, {}
        kinds = [kind for kind in named.values() if kind]
        return max(sorted(set(kinds)), key=kinds.count), {module: kind for module, kind in named.items() if kind}
    if algorithm(section):
        return _format(algorithm(section)), {}
    groups = section.get("config_groups")
    weights = (
        [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    )
    found = {_bits_format(w) for w in weights}
    if not weights and str(section.get("quant_method")).lower() in ("fp8", "modelopt_fp4", "nvfp4"):
        return ("fp8" if str(section["quant_method"]).lower() == "fp8" else "nvfp4"), {}
    return (found.pop() if len(found) == 1 else None), {}


def _bits_format(weights: Any) -> str | None:
    """Of one group of compressed-tensors."""
    if not isinstance(weights, Mapping) or weights.get("type") != "float":
        return None
    return {"4": "nvfp4", "8": "fp8"}.get(str(weights.get("num_bits")))


def _format(name: str) -> str | None:
    return "nvfp4" if name in NVFP4 else "fp8" if name.startswith("FP8") else None


def tensor_formats(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Module -> ``nvfp4``, ``fp8``, ``bf16`` or ``float32`` of every weight matrix of the language model, by headers.

    Matrices of other dtypes (INT4) are left out.
    """
    out = {}
    for name, info in tensors.items():
        module = short(name.removesuffix(".weight").removesuffix(".weight_packed"))
        kind = {"U8": "nvfp4", "F8_E4M3": "fp8", "F32": "float32", "BF16": "bf16", "F16": "bf16"}.get(info.dtype)
        is_weight = name.endswith((".weight", ".weight_packed", ".experts.gate_up_proj", ".experts.down_proj"))
        if is_weight and kind and len(info.shape) >= 2 and not _TOWER.search(f".{module}"):
            out[module] = kind
    return out


def float_modules(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[str]:
    """Modules whose weight is a matrix of floating point numbers: linears, embeddings and stacked experts.

    Args:
        tensors: (name, safetensors' dtype, shape).
    """
    return sorted(
        canonical(name).removesuffix(".weight") for name, dtype, shape in tensors if dtype in FLOATS and len(shape) >= 2
    )
