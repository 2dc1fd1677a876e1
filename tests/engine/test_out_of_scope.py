"""Models that no patch is for, in the real engine with the whole package on: stock vLLM's answers and settings.

Every function that a patch puts in place is watched (``tests/support/straight.py``): outside its scope it calls the
original once, with the very objects it was given, and keeps nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.engine import acceptance, engine, generate, random_prompts
from tests.support.straight import Watch, instances
from vllm_gemma4_spec import registry
from vllm_gemma4_spec.checkpoints import nvfp4
from vllm_gemma4_spec.patching.engine import Patcher

PROMPTS = random_prompts((3, 40, 100))
KINDS = ("llama", "qwen3", "gemma3")
# What acts on the CPU whatever the model, because 0.19.1 cannot speculate there at all.
CPU = {"cpu-runner: vllm.v1.worker.cpu_worker:CPUModelRunner"}
_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def _build(kind: str) -> Any:
    import transformers

    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHAPE))
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SHAPE))
    layers = ["sliding_attention"] * 3 + ["full_attention"]
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_SHAPE, sliding_window=32, layer_types=layers, query_pre_attn_scalar=32)
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("others")
    for kind in KINDS:
        torch.manual_seed(0)
        _build(kind).float().save_pretrained(folder / kind)
    return {kind: folder / kind for kind in KINDS}


@contextlib.contextmanager
def _patches(patcher: Patcher | None) -> Iterator[None]:
    """``patcher``'s patches in this process in place of the package's own; none of any if None."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # once per process: it would apply the package's own later
    ours = registry.PATCHER
    ours.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "PATCHER", patcher or Patcher(()))  # what `vllm_gemma4_spec.apply` applies
        try:
            yield
        finally:
            if patcher is not None:
                patcher.undo()
    ours.apply()


@contextlib.contextmanager
def _watched() -> Iterator[Watch]:
    watch = Watch()
    before = set(instances())  # of other tests
    with _patches(Patcher(watch.patches(registry.PATCHER.known))):
        yield watch
    kept = set(instances()) - before
    assert not {thing for thing in kept if not thing.startswith("vllm_gemma4_spec.cpu")}, kept


# Names, times and addresses of this run.
_EACH_RUN = {"instance_id", "static_forward_context", "static_all_moe_layers", "engine_id"}
# How often layers were built; rotary embeddings of an earlier engine in this process are taken again.
_EACH_RUN |= {"enabled_custom_ops", "disabled_custom_ops"}


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """A config as values by their place in it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (f.name for f in dataclasses.fields(value) if f.name not in _EACH_RUN and "port" not in f.name)
        parts = {name: getattr(value, name, None) for name in names}
    elif isinstance(value, dict):
        parts = {str(name): part for name, part in value.items()}
    elif isinstance(value, (list, tuple)):
        parts = {str(number): part for number, part in enumerate(value)}
    elif hasattr(value, "to_json_string"):
        return {where: value.to_json_string()}
    else:
        plain = value is None or isinstance(value, (str, int, float, Enum, torch.dtype))
        return {where: value if plain else type(value).__qualname__}
    return {place: found for name, part in parts.items() for place, found in _flat(part, f"{where}.{name}").items()}


def _settings(llm: Any) -> dict[str, Any]:
    """The finished config and what start-up made of it: KV cache groups and the scheduler's limits."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    limits = {k: v for k, v in vars(scheduler).items() if isinstance(v, (bool, int, float, str))}
    return {
        **_flat(llm.llm_engine.vllm_config, "config"),
        **_flat(scheduler.kv_cache_config, "groups"),
        **_flat(limits, "scheduler"),
    }


def _config(model: Path, **options: Any) -> dict[str, Any]:
    """What stock or patched vLLM makes of the arguments, before any engine is started."""
    from vllm.engine.arg_utils import EngineArgs

    return _flat(EngineArgs(model=str(model), dtype="float32", max_model_len=512, **options).create_engine_config())


_stock: dict[str, tuple[Any, dict[str, Any]]] = {}


def stock(models: dict[str, Path], kind: str) -> tuple[Any, dict[str, Any]]:
    """Answers and settings of stock vLLM without speculation."""
    if kind not in _stock:
        with _patches(None), engine(models[kind]) as llm:
            _stock[kind] = generate(llm, PROMPTS, 12), _settings(llm)
    return _stock[kind]


@pytest.mark.parametrize("kind", ["llama", "gemma3", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_plain_decoding(models: dict[str, Path], kind: str) -> None:
    want, settings = stock(models, kind)
    with _watched() as watch, engine(models[kind]) as llm:
        assert generate(llm, PROMPTS, 12) == want
        assert _settings(llm) == settings
        del llm
    assert not watch.acted
    # The watch stands where calls come through.
    for target in ("Scheduler.__init__", "BlockTable.add_row", "GPUModelRunner.sample_tokens", "allocate_slots"):
        assert any(name.endswith(target) for name in watch.straight), (target, watch.straight)


def _speculative(model: Path) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_a_draft_model(models: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model as its own drafter. 0.19.1 cannot do it on a CPU: there, what makes it speculate acts, and no more."""
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_CHECK", "1")
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_ADAPTIVE_K", "0.3")
    want, _ = stock(models, kind)
    asked = {"speculative_config": _speculative(models[kind])}
    with _patches(None):
        config = _config(models[kind], **asked)
    with _watched() as watch:
        assert _config(models[kind], **asked) == config
        with engine(models[kind], models[kind]) as llm:
            before = acceptance(llm)
            assert generate(llm, PROMPTS, 12) == want
            counts = acceptance(llm) - before
            del llm
    assert counts.accepted == counts.proposed > 0
    assert set(watch.acted) == CPU
    for target in ("propose", "_get_slot_mapping", "prepare_next_token_ids_padded", "create_speculative_config"):
        assert any(name.endswith(target) for name in watch.straight), (target, watch.straight)


def test_several_groups_are_refused_as_in_stock(models: dict[str, Path]) -> None:
    """Gemma 3 as a drafter: vLLM's own assertion, since no patch is for it."""
    with (
        _watched() as watch,
        pytest.raises(AssertionError, match="All drafting layers should belong to the same kv cache group"),
        engine(models["gemma3"], models["gemma3"]),
    ):
        pass
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    assert set(watch.acted) == CPU


@pytest.mark.slow  # numba compiles the look-up
@pytest.mark.parametrize("kind", KINDS)
def test_ngram(models: dict[str, Path], kind: str) -> None:
    want, _ = stock(models, kind)
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with _patches(None):
        config = _config(models[kind], speculative_config=dict(speculative))
    with _watched() as watch:
        assert _config(models[kind], speculative_config=dict(speculative)) == config
        with engine(models[kind], speculative_config=dict(speculative)) as llm:
            assert generate(llm, PROMPTS, 12) == want
            del llm
    assert set(watch.acted) == CPU


def _to_nvfp4(source: Path, target: Path, plain: Path) -> None:
    """``source`` as ModelOpt would write it in NVFP4 (``target``), and its float32 values (``plain``)."""
    for folder in (target, plain):
        shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    packed, floats = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            packed[name] = floats[name] = tensor
            continue
        base, scale_2 = name.removesuffix("weight"), torch.tensor(2.0**-10)
        scale = nvfp4.block_scale(tensor, scale_2)
        codes = nvfp4.encode(tensor, scale, scale_2)
        floats[name] = nvfp4.dequantize(codes, scale, scale_2)
        packed |= {name: codes, f"{base}weight_scale": scale, f"{base}weight_scale_2": scale_2}
        packed[f"{base}input_scale"] = torch.tensor(0.01)
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    save_file(floats, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}}
    config["quantization_config"] |= {"config_groups": groups, "producer": {"name": "modelopt", "version": "0.42.0"}}
    (target / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen3", "gemma3"))])
def test_nvfp4(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """The format is in scope, the model is not: the answers are those of the same values in float32, and nothing but
    what loads the format acts. Stock has no NVFP4 on a CPU."""
    _to_nvfp4(models[kind], tmp_path / "nvfp4", tmp_path / "plain")
    with _patches(None), engine(tmp_path / "plain") as llm:
        want, settings = generate(llm, PROMPTS, 12), _settings(llm)
    watch = Watch()
    with _patches(Patcher(watch.patches(registry.PATCHER.known))), engine(tmp_path / "nvfp4") as llm:
        assert generate(llm, PROMPTS, 12) == want
        made = {k: v for k, v in _settings(llm).items() if not k.startswith("config")}
        assert made == {k: v for k, v in settings.items() if not k.startswith("config")}
        del llm
    assert {name.partition(":")[0] for name in watch.acted} == {"modelopt-nvfp4"}
