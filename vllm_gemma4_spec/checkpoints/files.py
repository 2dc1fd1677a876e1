"""A checkpoint folder read from its headers alone: which tensor lies where, and whether the set is whole."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.checkpoints import layers
from vllm_gemma4_spec.checkpoints.layers import Quantized
from vllm_gemma4_spec.checkpoints.tensor_info import TensorInfo
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.hf_config.normal_form import normalized
from vllm_gemma4_spec.json_file import read_object

INDEX = "model.safetensors.index.json"

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
_MAX_HEADER = 100_000_000  # safetensors' own limit


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


def _section(config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("quantization", config)
    return dict(found) if isinstance(found, dict) else {}


def quantization(written: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``written``, config.json's flat ``quantization_config``, or ``quantization`` of hf_quant_config.json where that
    is empty; {} if neither. ModelOpt 0.42.0 writes the layers of MIXED_PRECISION into the second alone.

    Raises:
        CheckpointError: both are there and name different algorithms.
    """
    flat = _section(written)
    legacy = folder / "hf_quant_config.json"
    beside = _section(_read_json(legacy)) if legacy.is_file() else {}
    ours, theirs = layers.algorithm(flat), layers.algorithm(beside)
    if ours and theirs and ours != theirs:
        raise CheckpointError(
            f"{legacy}: quant_algo {theirs}, and config.json beside it says {ours}; keep what the tensors have and "
            "delete the other"
        )
    key = "quantized_layers"
    if ours == layers.MIXED and key not in flat and key in beside:
        flat[key] = beside[key]
    return flat or beside


class Checkpoint:
    """A local checkpoint folder. Nothing but JSON and headers is read until a tensor is asked for.

    Raises:
        CheckpointError: the folder or one of its files cannot be used; names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; name a folder that holds a Hugging Face checkpoint")
        file = self.folder / "config.json"
        self.config = normalized(_read_json(file), str(file))

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

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """See :func:`quantization`."""
        return quantization(self.quantization_config, self.folder)

    @cached_property
    def quantized(self) -> dict[str, Quantized]:
        """Every linear and expert in one of ModelOpt's formats, by module name, unchecked."""
        return layers.describe(self.tensors, self.quantization)

    def check(self) -> None:
        """Every quantized layer is whole.

        Raises:
            CheckpointError: names the file and the tensor.
        """
        layers.check(self.quantized)

    def shards(self) -> Iterator[tuple[Path, list[TensorInfo]]]:
        """Each file with its tensors in file order."""
        for file in self.files:
            yield file, sorted((t for t in self.tensors.values() if t.file == file), key=lambda t: t.start)
