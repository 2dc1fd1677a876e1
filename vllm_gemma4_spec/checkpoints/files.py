"""A checkpoint folder read from its headers alone: which tensor lies where, and whether the set is whole."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.checkpoints import BLOCK
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.json_file import read_object

INDEX = "model.safetensors.index.json"
ALGORITHMS = ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD")

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
_FLOATS = ("BF16", "F16", "F32")
_MAX_HEADER = 100_000_000  # safetensors' own limit

# ModelOpt 0.42.0's name of the low-rank factors -> the one that other exporters and our layers use
_LORA = {f".weight_quantizer._svdquant_lora_{x}": f".svdquant_lora_{x}" for x in "ab"}


def canonical(name: str) -> str:
    """``...weight_quantizer._svdquant_lora_a`` -> ``...svdquant_lora_a``; other names as they are."""
    for old, new in _LORA.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it; ``start`` and ``end`` are bytes from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.name} ({self.file.name})"


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name.

    Raises:
        CheckpointError: the file cannot be read, is no safetensors file or ends too early.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else _MAX_HEADER + 1
            header = json.loads(stream.read(length)) if length <= min(size, _MAX_HEADER) else None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: no safetensors header; the file is cut short or damaged, download it again")
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            described = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end - begin))
        except (KeyError, TypeError, ValueError):
            described = False
        if not described:
            raise CheckpointError(f"{file}: its header does not describe {name!r}; the file is damaged")
        info = TensorInfo(name, dtype, tuple(shape), file, 8 + length + begin, 8 + length + end)
        wanted = math.prod(info.shape) * _BYTES.get(info.dtype, 0)
        if info.end > size:
            raise CheckpointError(
                f"{info}: the file ends {info.end - size} bytes before the tensor does; download {file} again"
            )
        if info.dtype in _BYTES and info.bytes != wanted:
            raise CheckpointError(
                f"{info}: {info.bytes} bytes for {info.dtype} {list(info.shape)}; the file is damaged"
            )
        out[name] = info
    return out


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    out: dict[str, TensorInfo] = {}
    for file in files:
        out |= read_header(file)
    return out


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, CheckpointError, "name a folder that holds a Hugging Face checkpoint")


@dataclass(frozen=True)
class Quantized:
    """The tensors of one NVFP4 linear, keyed by suffix: ``weight``, ``weight_scale``, ``weight_scale_2``,
    ``input_scale``, ``pre_quant_scale``, ``svdquant_lora_a``, ``svdquant_lora_b``."""

    module: str
    parts: Mapping[str, TensorInfo]

    def check(self) -> None:
        """Every part is there and fits the others.

        Raises:
            CheckpointError: names the file and the tensor.
        """
        weight = self.parts.get("weight")
        some = next(iter(self.parts.values()))
        for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
            if suffix not in self.parts:
                raise CheckpointError(
                    f"{self.module}.{suffix}: missing from the checkpoint, while {some} is there; "
                    "a shard is lost or the export stopped early"
                )
        assert weight is not None
        if weight.dtype != "U8" or len(weight.shape) != 2:
            raise CheckpointError(
                f"{weight}: {weight.dtype} {list(weight.shape)}, expected U8 [N, K/2] of packed NVFP4"
            )
        rows, columns = weight.shape[0], weight.shape[1] * 2
        self._expect("weight_scale", ("F8_E4M3",), (rows, columns // BLOCK), f" (one per {BLOCK} columns)")
        for suffix in ("weight_scale_2", "input_scale"):
            info = self.parts[suffix]
            if info.dtype != "F32" or math.prod(info.shape) != 1:
                raise CheckpointError(f"{info}: {info.dtype} {list(info.shape)}, expected one F32 number")
        self._expect("pre_quant_scale", _FLOATS, (columns,), f" for the {columns} inputs of {weight.name}")
        factors = [self.parts.get(f"svdquant_lora_{x}") for x in "ab"]
        if any(factors):
            if factors[0] is None or factors[1] is None:
                there = factors[0] or factors[1]
                raise CheckpointError(f"{there}: its partner is missing; SVDQuant needs both low-rank factors")
            rank = factors[0].shape[0] if factors[0].shape else 0
            self._expect("svdquant_lora_a", _FLOATS, (rank, columns), "")
            self._expect("svdquant_lora_b", _FLOATS, (rows, rank), "")

    def _expect(self, suffix: str, dtypes: tuple[str, ...], shape: tuple[int, ...], why: str) -> None:
        info = self.parts.get(suffix)
        if info is not None and (info.dtype not in dtypes or info.shape != shape):
            raise CheckpointError(
                f"{info}: {info.dtype} {list(info.shape)}, expected {' or '.join(dtypes)} {list(shape)}{why}"
            )


def quantized_modules(tensors: Mapping[str, TensorInfo]) -> dict[str, Quantized]:
    """Every linear that has an NVFP4 tensor of ModelOpt's, by module name, unchecked."""
    suffixes = {"weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"}
    suffixes |= {"svdquant_lora_a", "svdquant_lora_b"}
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, _, suffix = canonical(name).rpartition(".")
        if suffix in suffixes:
            parts.setdefault(module, {})[suffix] = info
    return {m: Quantized(m, found) for m, found in parts.items() if _is_nvfp4(m, found, tensors)}


def _is_nvfp4(module: str, parts: Mapping[str, TensorInfo], tensors: Mapping[str, TensorInfo]) -> bool:
    """Told from FP8, MXFP8 and compressed-tensors; also where one of the tensors is missing."""
    if f"{module}.weight_packed" in tensors:  # compressed-tensors
        return False
    weight, scale = parts.get("weight"), parts.get("weight_scale")
    if weight is None:
        return "weight_scale_2" in parts or (scale is not None and len(scale.shape) == 2)
    return "weight_scale_2" in parts or (weight.dtype == "U8" and "weight_scale" in parts)


def float_modules(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Modules whose weight is a matrix of floating point numbers: linears, embeddings and stacked experts."""
    return sorted(
        name.removesuffix(".weight") for name, info in tensors.items() if info.dtype in _FLOATS and len(info.shape) >= 2
    )


class Checkpoint:
    """A local checkpoint folder. Nothing but JSON and headers is read until a tensor is asked for.

    Raises:
        CheckpointError: the folder or one of its files cannot be used; names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; name a folder that holds a Hugging Face checkpoint")
        self.config = _read_json(self.folder / "config.json")

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        """Tensor -> file, of the index. A file beside the index has no folder in its name."""
        index = self.folder / INDEX
        found = _read_json(index).get("weight_map", {})
        if not isinstance(found, dict):
            raise CheckpointError(f"{index}: weight_map must be an object of tensor and file names")
        for name, file in found.items():
            if not isinstance(file, str) or file != Path(file).name or file in ("", ".."):
                raise CheckpointError(f"{index}: {name!r} lies in {file!r}, which names no file of this folder")
        return found

    @cached_property
    def files(self) -> list[Path]:
        """The shards, by name; those of the index where there is one."""
        index = self.folder / INDEX
        if not index.is_file():
            found = sorted(self.folder.glob("*.safetensors"))
        else:
            found = [self.folder / name for name in sorted(set(self._weight_map.values()))]
        if not found:
            raise CheckpointError(f"{self.folder}: no *.safetensors file")
        return found

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor, by name; complete against the index."""
        tensors = read_headers(self.files)
        for name, file in (self._weight_map if (self.folder / INDEX).is_file() else {}).items():
            if name not in tensors:
                raise CheckpointError(f"{name}: the index promises it in {file}, which does not hold it")
        return tensors

    @property
    def quantization_config(self) -> dict[str, Any]:
        """config.json's ``quantization_config``; {} without one."""
        found = self.config.get("quantization_config") or {}
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.folder / 'config.json'}: quantization_config must be an object")
        return found

    @property
    def quantization(self) -> dict[str, Any]:
        """``quantization`` of hf_quant_config.json, or config.json's flat ``quantization_config``; {} if neither."""
        flat = self.quantization_config
        legacy = self.folder / "hf_quant_config.json"
        if not flat and legacy.is_file():
            flat = _read_json(legacy)
        section = flat.get("quantization", flat)
        return dict(section) if isinstance(section, dict) else {}

    @cached_property
    def quantized(self) -> dict[str, Quantized]:
        return quantized_modules(self.tensors)

    def check(self) -> None:
        """Every NVFP4 linear is whole.

        Raises:
            CheckpointError: names the file and the tensor.
        """
        for module in self.quantized.values():
            module.check()

    def shards(self) -> Iterator[tuple[Path, list[TensorInfo]]]:
        """Each file with its tensors in file order."""
        for file in self.files:
            yield file, sorted((t for t in self.tensors.values() if t.file == file), key=lambda t: t.start)
