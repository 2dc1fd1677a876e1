"""A config in the form of transformers 5.15 and later is the same config; a contradiction is one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma4Config, Gemma4TextConfig

from tests.checkpoints import tiny
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.hf_config.normal_form import normalized
from vllm_gemma4_spec.ops.plan import model as plan_model

SIZES = ("head_dim", "global_head_dim", "num_key_value_heads", "num_global_key_value_heads")


def as_written_later(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5.24 saves of a config: see ``_update_heterogeneous_to_dict_output`` there."""
    out = json.loads(json.dumps(config))
    text = out.get("text_config", out)
    full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    entry = {"head_dim": text.pop("global_head_dim")}
    heads = text.pop("num_global_key_value_heads")
    if text["attention_k_eq_v"] and heads is not None:
        entry["num_key_value_heads"] = heads
    entry = {field: value for field, value in entry.items() if value != text[field]}
    text["per_layer_config"] = {str(i).zfill(len(str(max(full)))): entry for i in full} if entry else {}
    vision = out.get("vision_config")
    if vision:
        vision["rope_parameters"] = {"rope_theta": 100.0, "rope_type": "axial"}
    return out


def text(kind: str, **changes: Any) -> dict[str, Any]:
    """A whole text config, as transformers 5.5 saves it."""
    made: dict[str, Any] = Gemma4TextConfig(**(tiny.text_config(kind) | changes)).to_dict()
    return made


@pytest.mark.parametrize("layers", [4, 12])  # keys "1" and "01"
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_both_forms_are_one(kind: str, layers: int) -> None:
    old = text(kind, num_hidden_layers=layers, layer_types=["sliding_attention", "full_attention"] * (layers // 2))
    new = as_written_later(old)
    if layers > 10:
        assert "01" in new["per_layer_config"]
    found = normalized(new, "config.json")
    assert {k: found[k] for k in SIZES[:3]} == {k: old[k] for k in SIZES[:3]}
    assert not old["attention_k_eq_v"] or found[SIZES[3]] == old[SIZES[3]]
    assert "per_layer_config" not in found
    assert normalized(old, "config.json") == old
    assert normalized(found, "config.json") == found


def test_a_multimodal_config_and_its_tower() -> None:
    old = Gemma4Config(text_config=text("31b"), vision_config={}, audio_config=None).to_dict()
    found = normalized(as_written_later(old), "config.json")
    assert found["vision_config"]["rope_parameters"] == {"rope_theta": 100.0, "rope_type": "default"}
    assert found["text_config"]["global_head_dim"] == 64


def test_sizes_that_do_not_differ_leave_no_entry() -> None:
    """5.24 drops what equals the model's own value: then ``per_layer_config`` is there and empty."""
    new = as_written_later(text("e4b", global_head_dim=32))
    assert new["per_layer_config"] == {}
    assert normalized(new, "config.json")["global_head_dim"] == 32


def test_every_layer_may_be_named() -> None:
    """``serialize_explicit_per_layer_config`` of transformers writes all of them."""
    new = as_written_later(text("31b"))
    new["per_layer_config"] = {str(i): {"head_dim": 64 if i % 2 else 32} for i in range(4)}
    assert normalized(new, "config.json")["global_head_dim"] == 64


def test_plan_sees_the_same_sizes(tmp_path: Path) -> None:
    old = text("31b", num_hidden_layers=12, layer_types=["sliding_attention", "full_attention"] * 6)
    models = []
    for name, config in (("old", old), ("new", as_written_later(old))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        models.append(plan_model.load(tmp_path / name))
    first, second = models
    assert [first.attention(i) for i in range(12)] == [second.attention(i) for i in range(12)]
    assert first.kv_read_bytes(1000, 2.0) == second.kv_read_bytes(1000, 2.0)


Edit = Callable[[dict[str, Any]], None]


def _set(**values: Any) -> Edit:
    return lambda c: c.update(values)


def _layer(number: str, **values: Any) -> Edit:
    return lambda c: c["per_layer_config"].update({number: values})


BAD: dict[str, tuple[Edit, str]] = {
    "both forms, head sizes": (_set(global_head_dim=128), "global_head_dim is 128 and per_layer_config gives .* 64"),
    "both forms, KV heads": (_set(num_global_key_value_heads=2), "num_global_key_value_heads is 2 .* 1"),
    "a layer twice": (_layer("01", head_dim=64), "names layer 1 twice"),
    "a layer that is not there": (_layer("7", head_dim=64), "names layer '7', which"),
    "no number": (_layer("x", head_dim=64), "names layer 'x', which"),
    "full layers differ": (_layer("3", head_dim=32, num_key_value_heads=1), "layers 1 and 3 different head_dims"),
    "a sliding layer differs": (_layer("2", head_dim=64), "sliding_attention layers 0 and 2 different head_dims"),
    "another field": (
        _layer("1", head_dim=64, num_key_value_heads=1, intermediate_size=8),
        "its own intermediate_size",
    ),
    "KV heads that are not read": (_set(attention_k_eq_v=False), "without attention_k_eq_v"),
    "no head_dim": (lambda c: c.pop("head_dim"), "head_dim is missing and would have to be guessed"),
    "no layer types": (lambda c: c.pop("layer_types"), "without one layer_types entry"),
    "no object": (_set(per_layer_config=[1]), "per_layer_config must be an object"),
    "no size": (_layer("1", head_dim="64"), "head_dim '64'; it must be a positive whole number"),
    "neither form": (lambda c: c.pop("per_layer_config"), "global_head_dim is missing and would have to be guessed"),
}


@pytest.mark.parametrize("name", BAD)
def test_contradictions_are_one_line(name: str, tmp_path: Path) -> None:
    edit, message = BAD[name]
    config = as_written_later(text("31b"))
    edit(config)
    with pytest.raises(CheckpointError, match=message) as raised:
        normalized(config, "folder/config.json")
    assert str(raised.value).startswith("folder/config.json: ")
    assert "\n" not in str(raised.value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(plan_model.PlanError, match=message):
        plan_model.load(tmp_path)


@pytest.mark.skipif(not os.environ.get("GEMMA4_ARTIFACTS"), reason="GEMMA4_ARTIFACTS names no genuine configs")
def test_the_genuine_configs_are_left_alone() -> None:
    found = sorted(Path(os.environ["GEMMA4_ARTIFACTS"], "gemma4", "models").glob("*/config.json"))
    assert len(found) == 3
    for file in found:
        config = json.loads(file.read_text())
        assert normalized(config, str(file)) == config
        later = normalized(as_written_later(config), str(file))["text_config"]
        assert re.fullmatch("gemma4_text", later["model_type"])
        assert [later[k] for k in SIZES[:2]] == [256, 512]


def test_other_models_pass_through() -> None:
    config = {"model_type": "llama", "per_layer_config": {"x": 1}}
    assert normalized(config, "config.json") == config
