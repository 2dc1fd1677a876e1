"""Forms that exporters newer than the fixtures write: equal to the reference, cut by ranks, exact when speculating."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.checkpoints import reference
from tests.quantization import forms
from tests.quantization.comparison import FIXTURES, TOKENS, edited, engine_logprobs, per_expert, text_only
from tests.quantization.test_nvfp4_speculation import LIMITS, PROMPTS
from tests.support.engine import acceptance, engine, generate
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.inspection import inspect
from vllm_gemma4_spec.checkpoints.repairing import repair
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.quantization import loading

FAST = ("MIXED_PRECISION of 0.42.0", "experts never calibrated", "W4A16_NVFP4")
TOLERANCE = 1e-4


def _marked(names: Any, fast: tuple[str, ...]) -> list[Any]:
    return [pytest.param(n, marks=() if n in fast else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("form", _marked(forms.FORMS, FAST))
def test_logprobs_equal_the_reference(form: str, tmp_path: Path) -> None:
    folder = forms.FORMS[form](tmp_path / "model")
    layers: dict[str, float] = {}
    ours = engine_logprobs(folder, layers, **text_only(folder))
    torch.testing.assert_close(ours, reference.logprobs(folder, TOKENS), atol=TOLERANCE, rtol=0)
    assert layers or form == "FP8"  # whose layers are vLLM's own
    assert max(layers.values(), default=0.0) < 1e-5
    report = inspect(Checkpoint(folder))
    assert report.with_overlay.startswith("loads it on any backend")
    assert report.machines["CPU"].startswith("emulated")


def test_layers_of_mixed_precision_are_found_in_either_config(tmp_path: Path) -> None:
    """ModelOpt 0.42.0 writes them into hf_quant_config.json alone, later releases into both."""
    folder = forms.mixed_beside(tmp_path / "model")
    beside = Checkpoint(folder)
    whole = Checkpoint(forms.mixed(tmp_path / "whole"))
    assert beside.quantization["quantized_layers"] == whole.quantization["quantized_layers"]
    assert {m: q.algorithm for m, q in beside.quantized.items()} == {m: q.algorithm for m, q in whole.quantized.items()}
    assert {q.algorithm for q in beside.quantized.values()} == {"NVFP4", "FP8"}
    repaired = repair(beside, tmp_path / "out")
    assert repaired.changes
    assert inspect(Checkpoint(tmp_path / "out")).clean
    (folder / "hf_quant_config.json").unlink()
    with pytest.raises(CheckpointError, match="MIXED_PRECISION needs 'quantized_layers'"):
        inspect(Checkpoint(folder))


def test_layers_of_mixed_precision_are_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first shard is there."""
    named = {"model.layers.0.mlp.down_proj": {"quant_algo": "FP8"}}
    asked = []

    def answer(file: str, model: str, revision: str | None) -> dict[str, Any]:
        asked.append((file, model, revision))
        return {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": named}}

    monkeypatch.setattr(loading, "local", lambda model: None)
    monkeypatch.setattr(loading, "get_hf_file_to_dict", answer)
    config = SimpleNamespace(quantization_config={"quant_algo": "MIXED_PRECISION", "quant_method": "modelopt"})
    model = SimpleNamespace(quantization="modelopt_mixed", model="org/name", revision="r", hf_config=config)
    for _ in range(2):  # the second finds them
        loading._name_layers(model)
    assert asked == [("hf_quant_config.json", "org/name", "r")]
    assert config.quantization_config["quantized_layers"] == named


@pytest.mark.slow
@pytest.mark.parametrize("form", forms.FORMS)
def test_two_ranks(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("VLLM_SLEEP_WHEN_IDLE", "1")
    folder = forms.FORMS[form](tmp_path / "model")
    ours = engine_logprobs(folder, tensor_parallel_size=2, distributed_executor_backend="mp", **text_only(folder))
    torch.testing.assert_close(ours, reference.logprobs(folder, TOKENS), atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["W4A16_NVFP4", "MIXED_PRECISION", "MIXED_PRECISION of 0.42.0"])
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_greedy_output_equals_plain_decoding(form: str, role: str, tmp_path: Path) -> None:
    folder = forms.FORMS[form](tmp_path / "model")
    target, drafter = (folder, FIXTURES / "e4b-awq-lite") if role == "target" else (FIXTURES / "31b-awq-full", folder)
    with engine(target, **LIMITS) as llm:
        wanted = generate(llm, PROMPTS, 24)
    with engine(target, drafter, k=3, **LIMITS) as llm:
        before = acceptance(llm)
        assert generate(llm, PROMPTS, 24) == wanted
        assert (acceptance(llm) - before).drafts > 0


Tensors = dict[str, torch.Tensor]


def _halved(tensors: Tensors) -> Tensors:
    """Blocks of 32, as ModelOpt writes them where the config asks for it."""
    return {k: v[:, ::2].contiguous() if k.endswith("weight_scale") else v for k, v in tensors.items()}


def _section(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "blocks of 32 by the config": (
        lambda p: _section(forms.weight_only(p), group_size=32),
        "group_size 32; NVFP4 has one scale per 16 columns .*blocks of 16",
    ),
    "blocks of 32 by the tensors": (
        lambda p: edited(forms.weight_only(p.with_name("source")), p, _halved),
        r"weight_scale \(model.safetensors\): one scale per 32 columns; .*blocks of 16",
    ),
    "blocks of 32 in one layer": (
        lambda p: _section(
            forms.mixed(p), quantized_layers={"model.layers.0.mlp": {"quant_algo": "NVFP4", "group_size": 32}}
        ),
        "quantized_layers: model.layers.0.mlp: group_size 32",
    ),
    "an algorithm of one layer": (
        lambda p: _section(forms.mixed(p), quantized_layers={"model.layers.0.mlp": {"quant_algo": "INT4_AWQ"}}),
        "model.layers.0.mlp: quant_algo INT4_AWQ is not known here",
    ),
    "no layers": (lambda p: _section(forms.mixed(p), quantized_layers={}), "MIXED_PRECISION needs 'quantized_layers'"),
    "a scale of a linear is lost": (
        lambda p: edited(
            FIXTURES / "26b-mm-awq-lite",
            p,
            lambda t: {k: v for k, v in per_expert(t).items() if not k.endswith("0.self_attn.o_proj.input_scale")},
        ),
        r"o_proj\.input_scale: missing from the checkpoint",
    ),
}


@pytest.mark.parametrize("case", _marked(BAD, ("blocks of 32 by the tensors", "an algorithm of one layer")))
def test_bad_input_is_one_line_in_any_program(case: str, tmp_path: Path) -> None:
    """Not wrapped by pydantic, which makes several lines of a ValueError."""
    make, message = BAD[case]
    folder = make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message) as raised:
        engine_logprobs(folder, **text_only(folder))
    assert "\n" not in str(raised.value)
    assert re.search("quantize|missing|known here|needs", str(raised.value))
