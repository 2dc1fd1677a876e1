"""What people have beside ModelOpt's NVFP4: stacked INT4 experts, AWQ, GGUF, models without towers, sharded folders."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from tests.checkpoints import reference, tiny
from tests.quantization import forms
from tests.quantization.comparison import FIXTURES, TOKENS, engine_logprobs
from tests.support.engine import engine
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.inspection import inspect
from vllm_gemma4_spec.cli import _checks
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.ops.plan import model as plan_model
from vllm_gemma4_spec.quantization import loading

GROUP = 32
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True, "dynamic": False}

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _patched() -> None:
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()


def vllm_config(folder: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    settings = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 64, "skip_tokenizer_init": True}
    return EngineArgs(str(folder), **settings | options).create_engine_config()


def integers(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[…, K] -> int32 [K/8] words, bfloat16 scales of :data:`GROUP` columns, and what they stand for in float32."""
    blocks = weight.float().unflatten(-1, (-1, GROUP))
    scale = (blocks.abs().amax(-1, keepdim=True) / 7).bfloat16()
    codes = (blocks / scale.float()).round().clamp(-8, 7)
    flat = codes.flatten(-2).to(torch.int8)
    packed = pack_to_int32(flat.flatten(0, -2), 4).unflatten(0, flat.shape[:-1])
    return packed, scale.squeeze(-1), (codes * scale.float()).flatten(-2)


def w4a16(kind: str, folder: Path) -> tuple[Path, Tensors]:
    """A tiny model as compressed-tensors' W4A16 with all experts in one tensor, and the weights it stands for."""
    tiny.build(kind).save_pretrained(folder)
    tensors, truth = {}, load_file(folder / "model.safetensors")
    for name, value in list(truth.items()):
        stacked = ".experts." in name
        if not stacked and not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        packed, scale, truth[name] = integers(value)
        base = f"{name}_" if stacked else name.removesuffix("weight") + "weight_"
        tensors |= {f"{base}packed": packed, f"{base}scale": scale, f"{base}shape": torch.tensor(value.shape)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4, "input_activations": None}},
        "ignore": ["lm_head", "re:.*router.*", "re:.*per_layer.*"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, truth


class _LoadedError(Exception):
    """The weights are loaded and nothing has been made of them yet."""


def test_stacked_experts_reach_vllms_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's own methods for CUDA, which the CPU has no kernel for: stopped after loading."""
    from vllm.model_executor.model_loader import base_loader

    from vllm_gemma4_spec.checkpoints import layers

    folder, _ = w4a16("26b", tmp_path / "model")
    found: Tensors = {}

    def loaded(model: Any, *_: Any) -> None:
        found.update({name: p.data.clone() for name, p in model.named_parameters() if ".experts." in name})
        raise _LoadedError

    monkeypatch.setattr(layers, "packed_integers", lambda tensors, experts=False: None)
    monkeypatch.setattr(base_loader, "process_weights_after_loading", loaded)
    dtype = torch.get_default_dtype()
    try:
        with pytest.raises(_LoadedError), engine(folder, dtype="bfloat16", max_model_len=64):
            pass
    finally:
        torch.set_default_dtype(dtype)  # vLLM's own way back is not taken after an exception
    written = load_file(folder / "model.safetensors")
    for part in ("packed", "scale"):
        for theirs, ours in (("gate_up_proj", "w13"), ("down_proj", "w2")):
            for layer in (0, 1):
                wanted = written[f"model.layers.{layer}.experts.{theirs}_{part}"].transpose(1, 2)
                assert torch.equal(found[f"model.layers.{layer}.moe.experts.{ours}_weight_{part}"], wanted)


@pytest.mark.slow
def test_linears_in_integers_are_right(tmp_path: Path) -> None:
    """vLLM's own CPU kernel, in bfloat16: as near to float32 as the same weights unquantized are."""
    if not loading._integer_kernel():
        pytest.skip("vLLM's build for this CPU has no kernel for packed integers")
    folder, truth = w4a16("31b", tmp_path / "model")
    plain = shutil.copytree(folder, tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    save_file({name: value.bfloat16().contiguous() for name, value in truth.items()}, plain / "model.safetensors")
    wanted = reference.logprobs(plain, TOKENS)
    ours, theirs = (engine_logprobs(f, dtype="bfloat16") for f in (folder, plain))
    assert (ours - wanted).abs().mean() < 1.5 * (theirs - wanted).abs().mean()


def _awq(folder: Path) -> Path:
    shutil.copytree(FIXTURES / "26b-mm-awq-lite", folder, ignore=shutil.ignore_patterns("hf_quant_config.json"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Gemma4ForCausalLM"]}
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    (folder / "config.json").write_text(json.dumps(config))
    words = torch.zeros(64, 4, dtype=torch.int32)
    name = "model.language_model.layers.0.experts.0.gate_proj.qweight"
    save_file({name: words, "model.vision_tower.x": words.clone()}, folder / "model.safetensors")
    return folder


def _without_tower(folder: Path) -> Path:
    made = forms.stripped_31b(folder)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"architectures": ["Gemma4ForConditionalGeneration"]}))
    return made


def _eight_bits(folder: Path, **section: Any) -> Path:
    """A model whose config says so; the shards are not looked at before."""
    shutil.copytree(FIXTURES / "31b-nvfp4", folder, ignore=shutil.ignore_patterns("hf_quant_config.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return folder


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
DYNAMIC = {
    "weights": FLOAT8 | {"strategy": "channel"},
    "input_activations": FLOAT8 | {"strategy": "token", "dynamic": True},
}
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "MXFP8 on a CPU": (
        lambda p: _eight_bits(p, quant_method="modelopt", quant_algo="MXFP8", ignore=[]),
        r"MXFP8: neither vLLM 0\.19\.1 nor this package multiplies with it on a CPU; serve it on a GPU, or take",
    ),
    "FP8_DYNAMIC on a CPU": (
        lambda p: _eight_bits(
            p,
            quant_method="compressed-tensors",
            format="float-quantized",
            config_groups={"group_0": DYNAMIC | {"targets": ["Linear"]}},
            ignore=["lm_head"],
        ),
        r"^compressed-tensors FP8: neither vLLM 0\.19\.1 nor this package multiplies with it on a CPU; serve it on",
    ),
    "stacked INT4 experts on a CPU": (
        lambda p: w4a16("26b", p)[0],
        r"layers\.0\.experts\.\w+_packed \(model\.safetensors\): experts in packed integers; .* on a CPU: serve it on",
    ),
    "AWQ experts on a CPU": (
        _awq,
        r"experts\.0\.gate_proj\.qweight \(model\.safetensors\): experts in packed integers",
    ),
    "no shard holds the tower": (
        _without_tower,
        r"config\.json has a vision tower and no shard holds it; .*--hf-overr",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_a_process_starts(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    folder = make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message) as raised:
        vllm_config(folder)
    assert "\n" not in str(raised.value)


LINEARS = r"linears in packed integers; .*cpu_gemm_wna16.* AVX-512 alone: serve it on .* or take NVFP4 or bf16$"


@pytest.mark.parametrize("kernel", [False, True])
def test_linears_in_integers_need_a_kernel(kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's build for AVX2 has none: an AttributeError at the first pass."""
    monkeypatch.setattr(loading, "_integer_kernel", lambda: kernel)
    folder, _ = w4a16("31b", tmp_path / "model")
    if kernel:
        assert vllm_config(folder).model_config.quantization == "compressed-tensors"
        return
    with pytest.raises(CheckpointError, match=r"_proj\.weight_packed \(model\.safetensors\): " + LINEARS):
        vllm_config(folder)
    (folder / "model.safetensors").unlink()  # as a model that is not downloaded yet: told from its config
    with pytest.raises(CheckpointError, match=r"model \(config\.json\): " + LINEARS):
        vllm_config(folder)


def test_the_kernel_is_looked_for_where_the_layers_take_it_from() -> None:
    from vllm import _custom_ops

    if loading._integer_kernel():
        assert callable(torch.ops._C.cpu_gemm_wna16)
        return
    empty = torch.empty(0, 0)
    with pytest.raises(AttributeError, match="cpu_gemm_wna16"):
        _custom_ops.cpu_gemm_wna16(empty, empty, empty, None, None, None, 8, "vec")


def test_inspect_says_the_same(tmp_path: Path) -> None:
    report = inspect(Checkpoint(w4a16("26b", tmp_path / "int4")[0]))
    assert report.vllm_alone == "fails while loading: it does not know the names of the experts"
    assert report.machines["CPU"] == "refused: no kernel for experts in packed integers"
    assert report.with_overlay == "loads it"
    linears = inspect(Checkpoint(w4a16("31b", tmp_path / "linears")[0]))
    assert linears.machines["CPU"].startswith(
        "vLLM's own kernel where the CPU has AVX-512; refused elsewhere: no kernel"
    )
    towers = inspect(Checkpoint(_without_tower(tmp_path / "towers")))
    assert towers.with_overlay.startswith("refuses it: config.json has a vision tower and no shard holds it")


def test_the_way_out_of_a_missing_tower(tmp_path: Path) -> None:
    folder = _without_tower(tmp_path / "model")
    made = vllm_config(folder, hf_overrides={"architectures": ["Gemma4ForCausalLM"]})
    assert made.model_config.architecture == "Gemma4ForCausalLM"


def test_plan_counts_a_31b_without_towers(tmp_path: Path) -> None:
    folder = forms.stripped_31b(tmp_path / "model")
    read, tensors = plan_model.load(folder), Checkpoint(folder).tensors
    held = sum(t.bytes for t in tensors.values() if len(t.shape) == 2)
    keys = tensors["model.language_model.layers.1.self_attn.k_proj.weight"].bytes * 9 / 8
    assert read.weight_bytes == held + 2 * keys  # vLLM holds the K of both full layers a second time, as V


def _gguf(file: Path, architecture: str = "gemma4") -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(file, architecture)
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


GGUF = r"gemma\.gguf: a GGUF file; vLLM 0\.19\.1 reads no Gemma 4 from one: serve the checkpoint as safetensors"


def test_gguf_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the `vllm` command and as an exception elsewhere; the tools name the file, too."""
    from vllm.config import ModelConfig

    file = _gguf(tmp_path / "gemma.gguf")
    with pytest.raises(CheckpointError, match=f"{GGUF}$"):
        vllm_config(file)
    with pytest.raises(CheckpointError, match=f"{GGUF}$"):  # as a drafter's config is made
        ModelConfig(str(file))
    with pytest.raises(CheckpointError, match=r"gemma\.gguf: a GGUF file, which is not read here; name a folder"):
        _checks.checkpoint(file)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve", str(file)])
    with pytest.raises(SystemExit, match=f"^vllm-gemma4-spec: [^\n]*{GGUF}$"):
        vllm_config(file)


def test_gguf_of_a_repository_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``org/model:Q4_0``, whose config.json is read and whose file vLLM would download."""
    from huggingface_hub import constants
    from vllm.config import LoadConfig, ModelConfig
    from vllm.config.vllm import VllmConfig

    snapshot = tmp_path / "models--org--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    tiny.build("31b").config.save_pretrained(snapshot)
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = ModelConfig("org/model:Q4_0", quantization="gguf", skip_tokenizer_init=True)
    with pytest.raises(CheckpointError, match=r"^org/model:Q4_0: a GGUF file; vLLM 0\.19\.1 reads no Gemma 4"):
        VllmConfig._get_quantization_config(config, LoadConfig(load_format="gguf"))


def test_gguf_is_one_line_where_transformers_reads_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Python 3.10, where it finds no distribution for the module gguf, and so no version of it."""
    from packaging.version import InvalidVersion
    from transformers.utils import import_utils
    from vllm.config import ModelConfig

    monkeypatch.delitem(import_utils.PACKAGE_DISTRIBUTION_MAPPING, "gguf", raising=False)
    import_utils.is_gguf_available.cache_clear()
    with pytest.raises(InvalidVersion):
        vllm_config(_gguf(tmp_path / "other.gguf", "other"))
    file = _gguf(tmp_path / "gemma.gguf")
    for make in (vllm_config, lambda file: ModelConfig(str(file))):
        with pytest.raises(CheckpointError, match=f"{GGUF}$"):
            make(file)


def test_another_models_gguf_is_left_to_vllm(tmp_path: Path) -> None:
    said = "GGUF model with architecture other is not supported yet"
    if sys.version_info < (3, 11):
        said = "Invalid version: 'N/A'"  # stock: see above
    with pytest.raises(ValueError, match=said):
        vllm_config(_gguf(tmp_path / "other.gguf", "other"))


@pytest.mark.slow
@pytest.mark.parametrize("program", ["vllm_gemma4_spec.demo.vllm_command serve", "another.py"])
def test_gguf_given_to_a_program(program: str, tmp_path: Path) -> None:
    """Exit code 1 and the line last; no traceback in the `vllm` command."""
    file = _gguf(tmp_path / "gemma.gguf")
    (tmp_path / "another.py").write_text("import sys, vllm\nvllm.LLM(sys.argv[1])\n")
    command = ["-m", *program.split()] if " " in program else [str(tmp_path / program)]
    done = subprocess.run([sys.executable, *command, str(file)], capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()
    assert re.search(f"{GGUF}$", said[-1])
    assert (program == "another.py") == any("Traceback" in line for line in said)


def _sharded(folder: Path) -> Path:
    """Two shards and an index; only the config beside them."""
    folder.mkdir()
    shutil.copy(FIXTURES / "31b-awq-full" / "config.json", folder)
    tensors = load_file(FIXTURES / "31b-awq-full" / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.slow
def test_shards_without_optional_files(tmp_path: Path) -> None:
    """No hf_quant_config.json, generation_config.json or metadata of the index; layers lie across both shards."""
    folder = _sharded(tmp_path / "model")
    wanted = reference.logprobs(folder, TOKENS)
    torch.testing.assert_close(engine_logprobs(folder), wanted, atol=1e-4, rtol=0)
    assert inspect(Checkpoint(folder)).shards == 2


def test_a_shard_that_is_not_here_is_named(tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: cannot be read \(No such file"):
        vllm_config(folder)


def test_a_params_json_folder_is_named(tmp_path: Path) -> None:
    """Mistral's form: no Gemma 4 has it, and no tool takes it for one."""
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; name a folder that holds a Hugging Face"):
        Checkpoint(tmp_path)
