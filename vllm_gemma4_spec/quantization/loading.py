"""Between a checkpoint's files and vLLM's model: checked first, names brought to those that vLLM 0.19.1 loads."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.checkpoints import files, layers, outcome
from vllm_gemma4_spec.errors import CheckpointError, stop
from vllm_gemma4_spec.hf_config import parser

_MODELOPT = ("modelopt", "modelopt_fp4", "modelopt_mixed")

# Revision and cache folder of the model whose quantization config is being made; vLLM hands on its name alone.
asked: contextvars.ContextVar[tuple[str | None, str | None]] = contextvars.ContextVar("asked", default=(None, None))


def local(model_name: str) -> Path | None:
    """The checkpoint's folder if its weights are here: the name itself, or the Hub's cache with every shard in it."""
    if Path(model_name).is_dir():
        return Path(model_name)
    try:
        revision, cache = asked.get()
        folder = Path(snapshot_download(model_name, revision=revision, cache_dir=cache, local_files_only=True))
        whole = all(file.is_file() for file in files.Checkpoint(folder).files)
    except (OSError, ValueError, CheckpointError):
        return None
    return folder if whole else None  # a download that was cut goes on when vLLM loads


def quantization_config(original: staticmethod[..., Any]) -> staticmethod[..., Any]:
    """``VllmConfig._get_quantization_config``: says which revision, and where downloads are; a Gemma 4 whose shards
    cannot be served as they are ends here, before a process starts.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original.__func__)
    def wrapper(model_config: Any, load_config: Any) -> Any:
        gemma = scope.gemma4_model(model_config)
        if not gemma and getattr(model_config, "quantization", None) not in _MODELOPT:
            return original.__func__(model_config, load_config)
        token = asked.set((model_config.revision, load_config.download_dir))
        try:
            if gemma and getattr(load_config, "load_format", None) != "dummy":
                _check_forms(model_config)
            _name_layers(model_config)
            return original.__func__(model_config, load_config)
        except CheckpointError as error:
            stop(error)
        finally:
            asked.reset(token)

    return staticmethod(wrapper)


def _name_layers(model_config: Any) -> None:
    """MIXED_PRECISION whose layers hf_quant_config.json alone names, as ModelOpt 0.42.0 writes it.

    0.19.1 reads that file for a target; for a drafter it ends in "hf_overrides must be a dict".

    Raises:
        CheckpointError: the file is damaged, or names another algorithm.
    """
    key, section = "quantized_layers", getattr(model_config.hf_config, "quantization_config", None)
    if model_config.quantization != "modelopt_mixed" or not isinstance(section, dict):
        return
    if "quantization" in section or key in section:
        return
    folder = local(model_config.model)
    if folder is not None:
        found = files.quantization(section, folder)
    else:
        beside = get_hf_file_to_dict("hf_quant_config.json", model_config.model, model_config.revision) or {}
        found = beside.get("quantization", {})
    if key in found:
        section[key] = found[key]


def _check_forms(model_config: Any) -> None:
    """What the headers of a Gemma 4's shards alone rule out; what its config does where they are not here yet.

    Raises:
        CheckpointError: a GGUF file; a vision tower that no shard holds would be served untrained; packed integers on a
            CPU without a kernel for them.
    """
    if getattr(model_config, "quantization", None) == "gguf":
        raise CheckpointError(f"{model_config.model}: {parser.GGUF}")
    folder = local(model_config.model)
    if folder is None or not any(folder.glob("*.safetensors")):
        section = getattr(model_config.hf_config, "quantization_config", None)
        if isinstance(section, dict) and outcome.in_integers(section) and not _integer_kernel():
            raise CheckpointError(f"{model_config.model} (config.json): {outcome.INTEGER_LINEARS}")
        return
    checkpoint = files.Checkpoint(folder)
    text_alone = getattr(model_config, "runner_type", None) == "draft" or not _has_tower(model_config)
    if not text_alone and layers.missing_tower(checkpoint.config, checkpoint.tensors):
        raise CheckpointError(f"{folder}: {outcome.NO_TOWER}")
    found = layers.packed_integers(checkpoint.tensors.values(), experts=True) if current_platform.is_cpu() else None
    if found is not None:
        raise CheckpointError(f"{found}: {outcome.INTEGER_EXPERTS}")
    found = layers.packed_integers(checkpoint.tensors.values())
    if found is not None and not _integer_kernel():
        raise CheckpointError(f"{found}: {outcome.INTEGER_LINEARS}")


def _integer_kernel() -> bool:
    """Whether vLLM has a kernel for linears in packed integers here; its CPU build for AVX2 has none."""
    if not current_platform.is_cpu():
        return True
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def _has_tower(model_config: Any) -> bool:
    """Whether vLLM builds the vision tower: not for the text class, nor where no image is allowed."""
    if "Gemma4ForConditionalGeneration" not in (getattr(model_config.hf_config, "architectures", None) or []):
        return False
    limits = getattr(model_config, "multimodal_config", None)
    return limits is not None and any(limits.get_limit_per_prompt(kind) for kind in ("image", "video"))


def _each_expert(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of all experts at once as one per expert; others as they are, under the names that vLLM loads."""
    stacked = layers.stacked_experts(name)
    if stacked is None:
        yield name, tensor
        return
    root, projections, part = stacked
    if part == "weight_shape":  # no kernel reads it
        return
    for expert, weight in enumerate(tensor):
        for projection, rows in zip(projections, weight.chunk(len(projections)), strict=True):
            yield f"{root}.{expert}.{projection}.{part}", rows


def checked_weights(original: Callable[..., Iterator[tuple[str, Tensor]]]) -> Callable[..., Any]:
    """``DefaultModelLoader.get_all_weights``; models that are neither ModelOpt's nor Gemma 4 pass through untouched.

    The headers of all shards are compared before the first tensor is read, so a cut or incomplete download
    is named by file and tensor instead of loading for minutes.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def get_all_weights(self: Any, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        stream = original(self, model_config, model)
        if model_config.quantization not in _MODELOPT:
            gemma = scope.gemma4_model(model_config)
            return _loadable(stream) if gemma else stream
        _, shards, safetensors = self._prepare_weights(model_config.model, None, model_config.revision, True, None)
        if safetensors:
            tensors = files.read_headers(Path(f) for f in sorted(shards))
            written = getattr(model_config.hf_config, "quantization_config", None) or {}
            section = files.quantization(written, Path(shards[0]).parent)
            layers.check(layers.describe(tensors, section))
        return _loadable(stream)

    return get_all_weights


def _loadable(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        yield from _each_expert(layers.canonical(name), tensor)


def known_algorithm(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_normalize_quantization_config`` that lets hf_quant_config.json's NVFP4_AWQ, NVFP4_SVD and others through.

    vLLM raises for an algorithm it does not know before any quantization config is asked.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def _normalize_quantization_config(self: Any, config: Any) -> Any:
        found = getattr(config, "quantization_config", None) or {}
        section, producer = (found.get(key) for key in ("quantization", "producer"))
        if isinstance(section, dict) and isinstance(producer, dict) and producer.get("name") == "modelopt":
            algorithm = layers.algorithm(section)
            if algorithm == layers.MIXED or (algorithm in layers.NVFP4 and algorithm != "NVFP4"):
                found["quant_method"] = "modelopt"
                return found
        return original(self, config)

    return _normalize_quantization_config


def refused_on_cpu(original: Any) -> Any:
    """``from_config`` of a quantization config: formats without a CPU kernel end in one line, before weights load.

    0.19.1 fails while it builds the first layer, in the kernel's own words.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    Patch: ``compressed-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_compressed_tensors.py::test_stock_has_no_nvfp4_on_a_cpu``. Related upstream change:
    #35733 (emulation, in 0.20.0).
    """

    def from_config(cls: Any, config: dict[str, Any]) -> Any:
        section = config.get("quantization", config)
        method = str(config.get("quant_method") or "modelopt")
        found = outcome.fp8_without_kernel(section, method) if isinstance(section, dict) else None
        if found and current_platform.is_cpu():
            stop(
                CheckpointError(
                    f"{method} {found}: neither vLLM 0.19.1 nor this package multiplies with it on a CPU; serve it "
                    "on a GPU, or take the checkpoint in NVFP4, ModelOpt's FP8 or bf16"
                )
            )
        return original.__func__(cls, config)

    return classmethod(from_config)
