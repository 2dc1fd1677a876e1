"""One form of a Gemma 4 ``config.json``, whichever release of transformers wrote it.

Up to transformers 5.14 a text config names the sizes of its full-attention layers ``global_head_dim`` and
``num_global_key_value_heads``. From 5.15 on it names them layer by layer under ``per_layer_config``, whose keys are
padded with zeros to one width ("05"), and from 5.17 on the rotary embedding of a vision tower, the same as before, is
called ``axial``. :func:`normalized` turns both into the first form, which vLLM 0.19.1 and transformers 5.5 read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_gemma4_spec.errors import CheckpointError

# The same fields sit in targets, drafters and the assistants that draft from the target's hidden states.
MODEL_TYPES = ("gemma4", "gemma4_text", "gemma4_assistant")

_FULL, _SLIDING = "full_attention", "sliding_attention"
# field of a layer -> its name for full layers in the form that is read here
_SIZES = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}


def normalized(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``config`` in the form that vLLM 0.19.1 reads; configs of other models come back unchanged.

    Args:
        config: what a ``config.json`` holds; it is not changed.
        where: the file's name, for errors.

    Raises:
        CheckpointError: both forms are there and differ, a size would have to be guessed, or layers of one kind differ
            in a way that vLLM 0.19.1 cannot build. Names ``where`` and the field.
    """
    out = dict(config)
    if out.get("model_type") not in MODEL_TYPES:
        return out
    if out["model_type"] == "gemma4_text":
        return _text(out, where)
    for key, read in (("text_config", _text), ("vision_config", _vision)):
        section = out.get(key)
        if section is not None and not isinstance(section, Mapping):
            raise CheckpointError(f"{where}: {key} must be an object")
        if section:
            out[key] = read(dict(section), f"{where}: {key}")
    return out


def _text(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A text config without ``per_layer_config``, its four sizes named."""
    overrides = _overrides(config, where)
    shared = _FULL in (config.get("layer_types") or [_FULL])
    if overrides is None:
        _require(config, where, *(("head_dim", "global_head_dim") if shared else ("head_dim",)))
        return config
    types = config.get("layer_types")
    if not isinstance(types, list) or len(types) != config.get("num_hidden_layers"):
        raise CheckpointError(f"{where}: per_layer_config without one layer_types entry for each of num_hidden_layers")
    _reject_others(config, overrides, where)
    for field, full_name in _SIZES.items():
        sizes = {kind: _one_size(config, overrides, types, kind, field, where) for kind in (_SLIDING, _FULL)}
        _set_sizes(config, field, full_name, sizes, where)
    del config["per_layer_config"]
    return config


def _overrides(config: Mapping[str, Any], where: str) -> dict[int, Mapping[str, Any]] | None:
    """``per_layer_config`` by layer number; None where the config has none."""
    found = config.get("per_layer_config")
    if found is None:
        return None
    if not isinstance(found, Mapping) or not all(isinstance(entry, Mapping) for entry in found.values()):
        raise CheckpointError(f"{where}: per_layer_config must be an object of layer numbers and objects")
    out: dict[int, Mapping[str, Any]] = {}
    for key, entry in found.items():
        if not str(key).isdecimal() or int(key) >= int(config.get("num_hidden_layers") or 0):
            raise CheckpointError(f"{where}: per_layer_config names layer {key!r}, which the model does not have")
        if int(key) in out:
            raise CheckpointError(f"{where}: per_layer_config names layer {int(key)} twice; leave one of them out")
        out[int(key)] = entry
    return out


def _require(config: Mapping[str, Any], where: str, *fields: str) -> None:
    for field in fields:
        if config.get(field) is None:
            raise CheckpointError(
                f"{where}: {field} is missing and would have to be guessed; take it from the model this one was made of"
            )


def _reject_others(config: Mapping[str, Any], overrides: Mapping[int, Mapping[str, Any]], where: str) -> None:
    """Per-layer fields that have no other name may repeat the model's own value, no more."""
    for layer, entry in overrides.items():
        for field, value in entry.items():
            plain = not value if field == "skip" else config.get(field) == value
            if field not in _SIZES and not plain:
                raise CheckpointError(
                    f"{where}: per_layer_config gives layer {layer} its own {field}; vLLM 0.19.1 has one for all layers"
                )


def _one_size(
    config: Mapping[str, Any],
    overrides: Mapping[int, Mapping[str, Any]],
    types: list[Any],
    kind: str,
    field: str,
    where: str,
) -> int | None:
    """The ``field`` that all layers of a kind share; None where the model has no such layer."""
    first: tuple[int, int] | None = None
    for layer, name in enumerate(types):
        if name != kind:
            continue
        value = overrides.get(layer, {}).get(field, config.get(field))
        if value is None:
            _require({}, f"{where}: layer {layer}", field)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: layer {layer} has {field} {value!r}; it must be a positive whole number")
        if first is not None and value != first[1]:
            raise CheckpointError(
                f"{where}: per_layer_config gives {kind} layers {first[0]} and {layer} different {field}s "
                f"({first[1]} and {value}); vLLM 0.19.1 builds all layers of a kind alike"
            )
        first = first or (layer, value)
    return first[1] if first else None


def _set_sizes(config: dict[str, Any], field: str, full_name: str, sizes: Mapping[str, int | None], where: str) -> None:
    sliding, full = sizes[_SLIDING], sizes[_FULL]
    given = config.get(full_name)
    # Without attention_k_eq_v neither transformers nor vLLM reads num_global_key_value_heads.
    read = field == "head_dim" or bool(config.get("attention_k_eq_v"))
    if given is not None and full is not None and given != full and read:
        raise CheckpointError(
            f"{where}: {full_name} is {given} and per_layer_config gives full layers {field} {full}; "
            "keep the one that the weights have and delete the other"
        )
    if sliding is not None:
        config[field] = sliding
    if full is None:
        return
    if read:
        config[full_name] = full
    elif sliding is not None and full != sliding:
        raise CheckpointError(
            f"{where}: per_layer_config gives full layers {field} {full} beside {sliding} without attention_k_eq_v; "
            "vLLM 0.19.1 cannot build that"
        )


def _vision(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A vision config whose rotary embedding has the name that transformers 5.5 knows."""
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("rope_type") == "axial":
        if rope.get("rope_theta") is None:
            _require({}, where, "rope_theta of rope_parameters")
        config["rope_parameters"] = {**rope, "rope_type": "default"}
    return config
