"""Adapters on ``Gemma4ForConditionalGeneration``: answers are those of the model with the adapter merged in.

transformers owns the merged model; its weights are served without LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4ForConditionalGeneration

from tests.support import tiny_multimodal
from tests.support.engine import acceptance, engine, generate, random_prompts
from tests.support.tiny_models import drafter_config, target_config
from vllm_gemma4_spec.errors import CheckpointError

RANK, TOKENS = 4, 16
PROMPTS = random_prompts((5, 40, 100))
PLACE = "model.language_model.layers"
LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": False}
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
# What adapters call a layer: PEFT on transformers 5 (unsloth too), transformers 4.5x's order, the text class.
NAMES = {
    "peft": "base_model.model.model.language_model.layers",
    "language_model first": "base_model.model.language_model.model.layers",
    "text class": "base_model.model.model.layers",
}


def adapter(folder: Path, model: Path, place: str) -> Path:
    """Random weights for ``MODULES`` of every layer that has them; K in full layers of 31B is V, too."""
    g = torch.Generator().manual_seed(5)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.startswith(f"{PLACE}.") and module.endswith(MODULES):
            rows, columns = weight.shape
            base = module.replace(PLACE, place)
            tensors[f"{base}.lora_A.weight"] = torch.randn(RANK, columns, generator=g) / columns**0.5
            tensors[f"{base}.lora_B.weight"] = torch.randn(rows, RANK, generator=g) / RANK**0.5
    folder.mkdir(parents=True)
    return write(folder, tensors)


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    settings |= {"target_modules": [m.rpartition(".")[2] for m in MODULES], "base_model_name_or_path": ""}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def merged(folder: Path, model: Path, lora: Path) -> Path:
    """The model with ``W + 2 B A``, saved by transformers."""
    made = Gemma4ForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    tensors, state = load_file(lora / "adapter_model.safetensors"), made.state_dict()
    with torch.no_grad():
        for name in tensors:
            if name.endswith("lora_A.weight"):
                base = name.removesuffix(".lora_A.weight")
                key = base.removeprefix("base_model.model.") + ".weight"
                state[key] += 2 * tensors[f"{base}.lora_B.weight"] @ tensors[name]
    made.save_pretrained(folder)
    tiny_multimodal.processor(made.config.text_config.vocab_size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A 31B-like and an E4B-like target, each with an adapter in PEFT's names and the merged model."""
    out = {}
    for kind, config in (("31b", target_config), ("e4b", drafter_config)):
        folder = tmp_path_factory.mktemp(kind)
        out[kind] = tiny_multimodal.save(config(), folder / "model")
        out[f"{kind}-adapter"] = adapter(folder / "adapter", out[kind], NAMES["peft"])
        out[f"{kind}-merged"] = merged(folder / "merged", out[kind], out[f"{kind}-adapter"])
    return out


def answers(llm: Any, folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """One batch, half of it with the adapter: answers without and with it."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    request = LoRARequest(folder.parent.name, 1, str(folder))
    prompts = [{"prompt_token_ids": p} for p in PROMPTS for _ in range(2)]
    outputs = llm.generate(prompts, params, lora_request=[None, request] * len(PROMPTS), use_tqdm=False)
    ids = [list(o.outputs[0].token_ids) for o in outputs]
    return ids[::2], ids[1::2]


@pytest.mark.parametrize("kind", ["31b", pytest.param("e4b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("speculative", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_adapter_gives_the_merged_models_answers(
    models: dict[str, Path], tiny: dict[str, Path], kind: str, speculative: bool
) -> None:
    with engine(models[f"{kind}-merged"], **OPTIONS) as llm:
        want = generate(llm, PROMPTS, TOKENS)
    with engine(models[kind], tiny["target"] if speculative else None, **OPTIONS, **LORA) as llm:
        plain, adapted = answers(llm, models[f"{kind}-adapter"])
        if speculative:
            assert acceptance(llm).proposed > 0
    assert adapted == want
    assert plain != want


@pytest.mark.slow
@pytest.mark.parametrize("names", [n for n in NAMES if n != "peft"])
def test_other_names_of_the_same_layers(models: dict[str, Path], tmp_path: Path, names: str) -> None:
    renamed = adapter(tmp_path / "adapter", models["31b"], NAMES[names])
    with engine(models["31b-merged"], **OPTIONS) as llm:
        want = generate(llm, PROMPTS, TOKENS)
    with engine(models["31b"], **OPTIONS, **LORA) as llm:
        assert answers(llm, renamed)[1] == want


Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
TOWER = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.lora_A.weight"
BAD: dict[str, tuple[Edit, str]] = {
    "a tower": (lambda t: t | {TOWER: torch.zeros(RANK, 32)}, "vision_tower.*adapts a tower"),
    "another depth": (
        lambda t: {k.replace("layers.0.", "layers.60."): v for k, v in t.items()},
        r"has no language_model\.model\.layers\.60\.\S+ that takes an adapter; it was made for another base",
    ),
    "another width": (
        lambda t: {k: torch.zeros(RANK, 8) if k.endswith("q_proj.lora_A.weight") else v for k, v in t.items()},
        "q_proj.lora_A.weight has 8 inputs, .* has 64; it was made for another base",
    ),
    "other heads": (
        lambda t: {k: torch.zeros(8, RANK) if k.endswith("k_proj.lora_B.weight") else v for k, v in t.items()},
        "k_proj.lora_B.weight has 8 outputs, .* has",
    ),
}


def test_what_fits_no_layer_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    good = load_file(models["31b-adapter"] / "adapter_model.safetensors")
    with engine(models["31b"], **OPTIONS, **LORA) as llm:
        for i, (name, (edit, message)) in enumerate(BAD.items()):
            folder = tmp_path / name
            folder.mkdir()
            write(folder, {k: v.contiguous() for k, v in edit(good).items()})
            with pytest.raises(CheckpointError, match=message) as raised:
                llm.llm_engine.add_lora(LoRARequest(name, 2 + i, str(folder)))
            assert str(raised.value).startswith(f"{folder}/adapter_model.safetensors: ")
        assert llm.llm_engine.add_lora(LoRARequest("good", 1, str(models["31b-adapter"])))
