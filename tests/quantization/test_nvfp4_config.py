"""Which config and linear method a checkpoint gets: both config files, every --quantization, bad values."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import engine as _engine
from tests.support.fresh import run
from vllm_gemma4_spec.errors import CheckpointError

assert _engine

FIXTURES = Path(__file__).parents[1] / "checkpoints" / "fixtures"


@pytest.fixture(scope="module", autouse=True)
def _patched() -> None:
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()


def vllm_config(folder: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "skip_tokenizer_init": True}
    return EngineArgs(str(folder), **settings | options).create_engine_config()


def only(form: str, source: Path, target: Path) -> Path:
    """A copy with one of the two config forms: ``flat`` in config.json, or ``legacy`` hf_quant_config.json.

    ``nested`` is the legacy content inside config.json.
    """
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    legacy = target / "hf_quant_config.json"
    if form == "flat":
        legacy.unlink()
    elif form == "legacy":
        del config["quantization_config"]
    else:
        config["quantization_config"] = json.loads(legacy.read_text())
        legacy.unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("quantization", [None, "modelopt", "modelopt_fp4"])
@pytest.mark.parametrize("form", ["flat", "legacy", "nested"])
@pytest.mark.parametrize(("name", "algorithm"), [("31b-awq-full", "NVFP4_AWQ"), ("31b-svdquant", "NVFP4_SVD")])
def test_every_way_to_name_it(name: str, algorithm: str, form: str, quantization: str | None, tmp_path: Path) -> None:
    from vllm_gemma4_spec.quantization import Nvfp4Config

    config = vllm_config(only(form, FIXTURES / name, tmp_path / "m"), quantization=quantization)
    assert config.model_config.quantization == "modelopt_fp4"
    assert type(config.quant_config) is Nvfp4Config
    assert config.quant_config.quant_algo == algorithm
    assert config.quant_config.group_size == 16
    assert config.quant_config.exclude_modules == ["lm_head"]


def test_a_worker_unpickles_it(tmp_path: Path) -> None:
    """In a process that has neither patched vLLM nor imported its quantization yet."""
    config = vllm_config(FIXTURES / "31b-awq-full").quant_config
    assert pickle.loads(pickle.dumps(config)).quant_algo == "NVFP4_AWQ"
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    code = """
    import pickle, sys; c = pickle.load(open(sys.argv[1], "rb")); assert c.quant_algo == "NVFP4_AWQ"
    import vllm_gemma4_spec; vllm_gemma4_spec.apply()
    import vllm.model_executor.layers.quantization.modelopt as m; assert m.ModelOptNvFp4Config is type(c)
    print("same")
    """
    done = run(code, str(tmp_path / "config.pickle"))
    assert done.stdout.strip().endswith("same"), done.stderr[-800:]


def test_other_algorithms_keep_their_classes() -> None:
    """FP8 and MXFP8 never reach our class."""
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.layers.quantization import modelopt as stock

    assert quantization.get_quantization_config("modelopt") is stock.ModelOptFp8Config
    assert quantization.get_quantization_config("modelopt_mxfp8") is stock.ModelOptMxFp8Config
    fp8 = quantization.get_quantization_config("modelopt").from_config(
        {"quant_algo": "FP8", "quant_method": "modelopt"}
    )
    assert type(fp8) is stock.ModelOptFp8Config


def test_undo_gives_vllm_its_class_back() -> None:
    from vllm.model_executor.layers.quantization import modelopt as stock

    import vllm_gemma4_spec

    ours = stock.ModelOptNvFp4Config
    vllm_gemma4_spec.undo()
    try:
        assert stock.ModelOptNvFp4Config.__module__ == stock.__name__
        with pytest.raises(ValueError, match="currently only supports"):
            stock.ModelOptNvFp4Config.from_config({"quant_algo": "NVFP4_AWQ", "quant_method": "modelopt"})
    finally:
        vllm_gemma4_spec.apply()
    assert stock.ModelOptNvFp4Config is ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_algo": "NVFP4_FOO"}, "quant_algo NVFP4_FOO: not an NVFP4 format"),
        ({"group_size": 32}, "group_size 32; NVFP4 has one scale per 16"),
        ({"config_groups": {"group_0": {"weights": {"group_size": 64}}}}, "group_size 64"),
    ],
)
def test_bad_config(change: dict[str, Any], message: str) -> None:
    from vllm_gemma4_spec.quantization import Nvfp4Config

    flat = {"quant_algo": "NVFP4_AWQ", "quant_method": "modelopt", "ignore": ["lm_head"]}
    with pytest.raises(CheckpointError, match=message) as caught:
        Nvfp4Config.from_config(flat | change)
    assert "\n" not in str(caught.value)


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])


def incomplete(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight_scale_2"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"\(model\.safetensors\): the file ends \d+ bytes before"),
        (incomplete, r"model\.layers\.0\.mlp\.down_proj\.weight_scale_2: missing from the checkpoint"),
    ],
)
def test_a_damaged_checkpoint_ends_the_server_with_one_line(
    damage: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any process is started or any weight is read; elsewhere than in the command it is an exception."""
    from vllm_gemma4_spec.quantization import Nvfp4Config

    damage(shutil.copytree(FIXTURES / "31b-awq-full", tmp_path / "m"))
    config = Nvfp4Config.from_config({"quant_algo": "NVFP4_AWQ", "quant_method": "modelopt", "ignore": ["lm_head"]})
    with pytest.raises(CheckpointError, match=message):
        config.maybe_update_config(str(tmp_path / "m"))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve"])
    with pytest.raises(SystemExit, match=f"^vllm-gemma4-spec: .*{message}[^\n]*$"):
        config.maybe_update_config(str(tmp_path / "m"))
    with pytest.raises(SystemExit, match=r"^vllm-gemma4-spec: quant_algo NVFP4_FOO: [^\n]*$"):
        Nvfp4Config.from_config({"quant_algo": "NVFP4_FOO", "quant_method": "modelopt", "ignore": []})


def test_experts_in_bf16_are_not_taken_for_quantized_ones() -> None:
    config = vllm_config(FIXTURES / "26b-mm-awq-lite", hf_overrides={"architectures": ["Gemma4ForCausalLM"]})
    assert "model.language_model.layers.0.experts.gate_up_proj" in config.quant_config.float_modules
    assert "model.language_model.layers.0.mlp.gate_proj" not in config.quant_config.float_modules


def test_a_drafter_with_its_own_quantization() -> None:
    """``"quantization": "modelopt"`` in the speculative config, and a target with another scheme."""
    speculative = {
        "method": "draft_model",
        "model": str(FIXTURES / "e4b-awq-lite"),
        "num_speculative_tokens": 2,
        "quantization": "modelopt",
    }
    config = vllm_config(FIXTURES / "31b-svdquant", speculative_config=speculative)
    draft = config.speculative_config.draft_model_config
    assert draft.quantization == "modelopt_fp4"
    made = type(config).get_quantization_config(draft, config.load_config)
    assert (config.quant_config.quant_algo, made.quant_algo) == ("NVFP4_SVD", "NVFP4_AWQ")


def test_the_revision_that_was_asked_for_is_read(tmp_path: Path) -> None:
    """Of a model in the Hub's cache: which weights are quantized may differ from one revision to the next."""
    from vllm.config import LoadConfig
    from vllm.config.vllm import VllmConfig

    import vllm_gemma4_spec
    from vllm_gemma4_spec.quantization import loading

    vllm_gemma4_spec.apply()
    root, fixture = tmp_path / "models--org--model", FIXTURES / "31b-awq-full"
    tensors = load_file(fixture / "model.safetensors")
    floats = {}
    for revision, extra in (("a" * 40, {}), ("b" * 40, {"model.layers.0.more.weight": torch.zeros(2, 2).bfloat16()})):
        snapshot = root / "snapshots" / revision
        shutil.copytree(fixture, snapshot)
        save_file(tensors | extra, snapshot / "model.safetensors")
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text("a" * 40)
        section = json.loads((fixture / "config.json").read_text())["quantization_config"]
        model = SimpleNamespace(
            model="org/model",
            revision=revision,
            quantization="modelopt_fp4",
            dtype=torch.bfloat16,
            hf_config=SimpleNamespace(quantization_config=section),
        )
        made = VllmConfig._get_quantization_config(model, LoadConfig(download_dir=str(tmp_path)))
        floats[revision] = made.float_modules
    assert floats["b" * 40] - floats["a" * 40] == {"model.layers.0.more"}
    index = root / "snapshots" / ("b" * 40) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}))
    token = loading.asked.set(("b" * 40, str(tmp_path)))
    assert loading.local("org/model") is None  # the download was cut; vLLM goes on with it
    loading.asked.reset(token)
