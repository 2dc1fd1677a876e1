"""A model's text config from a folder, a ``config.json`` or a Hub id, read without transformers (4 s of imports)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_gemma4_spec.errors import Gemma4SpecError
from vllm_gemma4_spec.json_file import read_object

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

# Field of transformers' Gemma4TextConfig -> its default; None: may be absent. A test compares them.
_DEFAULTS: dict[str, int | None] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 512,
    "max_position_embeddings": 131_072,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
    "num_global_key_value_heads": None,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}
_MAY_BE_ZERO = {"num_kv_shared_layers", "hidden_size_per_layer_input", "vocab_size_per_layer_input"}
_SWITCHES = ("attention_k_eq_v", "enable_moe_block", "use_double_wide_mlp")  # default False
_MOE = ("num_experts", "top_k_experts", "moe_intermediate_size")
_KINDS = ("sliding_attention", "full_attention")


ASSISTANT = "gemma4_assistant"  # an MTP assistant's model_type
_ASSISTANT_DEFAULTS = {
    "backbone_hidden_size": 1536,
    "num_centroids": 2048,
    "centroid_intermediate_top_k": 32,
}


class PlanError(Gemma4SpecError):
    """A config that cannot be read or planned with."""


def read(path: Path) -> dict[str, Any]:
    return read_object(path, PlanError, "give a model folder, its config.json or a Hub id")


def published() -> dict[str, dict[str, Any]]:
    """Hub id -> text config of Google's published models (``published.json``)."""
    table = json.loads(Path(__file__).with_name("published.json").read_text())
    return {name: row for name, row in table.items() if not name.startswith("_")}


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it has downloaded (its variables, its default)."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def find(model: str) -> tuple[str, Path | None, dict[str, Any]]:
    """Name, file (None: from the bundled table) and raw config of ``model``.

    Args:
        model: a model folder, a ``config.json``, or a Hub id such as ``google/gemma-4-31B-it``, which is looked up in
            the local Hugging Face cache and then in the bundled table. Nothing is downloaded.

    Raises:
        PlanError: nothing readable there.
    """
    path = Path(model)
    if path.is_dir() or path.is_file() or not _HUB_ID.fullmatch(model):
        file = path / "config.json" if path.is_dir() else path
        return file.absolute().parent.name, file, read(file)
    name = model.partition("/")[2]
    repository = _hub_cache() / f"models--{model.replace('/', '--')}" / "snapshots"
    cached = sorted(repository.glob("*/config.json"), key=lambda f: f.stat().st_mtime)
    if cached:
        return name, cached[-1], read(cached[-1])
    for known, row in published().items():
        if known.lower() == model.lower():
            return name, None, row if "model_type" in row else {"model_type": "gemma4_text", **row}
    raise PlanError(
        f"{model}: no such folder, not in the Hugging Face cache and not one of {', '.join(published())}; "
        "download it or give its config.json"
    )


def text(raw: dict[str, Any], where: str) -> SimpleNamespace:
    """The fields of the text model that shapes follow from, with transformers' defaults.

    Raises:
        PlanError: not a Gemma 4 config, or a field that cannot be.
    """
    kind = raw.get("model_type")
    if kind not in ("gemma4", "gemma4_text", ASSISTANT):
        raise PlanError(f"{where}: model_type is {kind!r}; plan knows gemma4, gemma4_text and {ASSISTANT}")
    given = raw if kind == "gemma4_text" else raw.get("text_config") or {}
    if not isinstance(given, dict):
        raise PlanError(f"{where}: text_config must be an object")
    if kind == ASSISTANT:  # all of its layers read the target's KV; per-layer embeddings it has none
        given = {**given, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    out: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = given.get(name)
        value = default if value is None else value
        low = 0 if name in _MAY_BE_ZERO else 1
        if value is not None and (type(value) is not int or not low <= value < 2**31):
            raise PlanError(f"{where}: {name} is {value!r}; it must be a whole number of at least {low}")
        out[name] = value
    for name in _SWITCHES:
        value = given.get(name)
        if value not in (None, True, False):
            raise PlanError(f"{where}: {name} is {value!r}; it must be true or false")
        out[name] = bool(value)
    if out["enable_moe_block"] and any(out[name] is None for name in _MOE):
        raise PlanError(f"{where}: a mixture of experts needs {', '.join(_MOE)}")
    if given.get("use_bidirectional_attention") == "all":
        out["sliding_window"] = out["sliding_window"] // 2 + 1  # transformers' rule: half to each side
    out["layer_types"] = _layer_types(given, out["num_hidden_layers"], where)
    if out["num_kv_shared_layers"] >= out["num_hidden_layers"]:
        raise PlanError(f"{where}: num_kv_shared_layers leaves no layer with KV of its own")
    return SimpleNamespace(**out)


def assistant(raw: dict[str, Any], where: str) -> dict[str, int | bool]:
    """An assistant's own fields, with transformers' defaults; ``use_ordered_embeddings``: it has a head by centroids.

    Raises:
        PlanError: a field that cannot be.
    """
    out: dict[str, int | bool] = {"use_ordered_embeddings": bool(raw.get("use_ordered_embeddings"))}
    for name, default in _ASSISTANT_DEFAULTS.items():
        value = raw.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 2**31:
            raise PlanError(f"{where}: {name} is {value!r}; it must be a whole number of at least 1")
        out[name] = value
    return out


def _layer_types(given: dict[str, Any], layers: int, where: str) -> list[str]:
    types = given.get("layer_types")
    if types is None:
        if layers > 10_000:
            raise PlanError(f"{where}: num_hidden_layers is {layers}")
        every = given.get("full_every", 6)  # of the bundled table; 6 is transformers' default
        types = [_KINDS[(i + 1) % every == 0] for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(t not in _KINDS for t in types):
        raise PlanError(f"{where}: layer_types must name {' or '.join(_KINDS)} for each of {layers} layers")
    return [*types[:-1], _KINDS[1]]  # transformers makes the last layer a full one
