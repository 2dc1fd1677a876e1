"""A checkpoint is data: nothing in it is executed, and no path in it leads out of its folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from vllm_gemma4_spec.checkpoints.files import INDEX, Checkpoint
from vllm_gemma4_spec.checkpoints.inspection import inspect
from vllm_gemma4_spec.checkpoints.repairing import repair
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.ops.plan import model

FIXTURE = Path(__file__).parent / "fixtures" / "31b-nvfp4"


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with pickles under every name that loaders know and code that its config points to; and the file
    that would appear if any of it ran."""
    folder, mark = tmp_path / "checkpoint", tmp_path / "executed"
    shutil.copytree(FIXTURE, folder)
    for name in ("pytorch_model.bin", "model.pt", "modelopt_state.pth", "training_args.bin", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(f"import os\nos.system('touch {mark}')\nEvil = None\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder, mark


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_no_tool_executes_anything_of_a_checkpoint(hostile: tuple[Path, Path], tmp_path: Path) -> None:
    folder, mark = hostile
    assert inspect(Checkpoint(folder)).tensors
    repair(Checkpoint(folder), tmp_path / "repaired")
    assert model.load(folder).weights == "nvfp4"
    assert not mark.exists()


def test_the_quantizer_executes_nothing_of_its_source(hostile: tuple[Path, Path]) -> None:
    """Its source is unquantized, so this one is refused; loading it would be transformers' ``from_pretrained``."""
    from vllm_gemma4_spec.checkpoints import quantizer

    folder, mark = hostile
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises((CheckpointError, OSError)):
        quantizer._load(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/hostname", "sub/../../outside.safetensors", "..", "", 7, None, ["a"], "a\0b"],
)
def test_no_path_of_an_index_leads_out_of_the_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(FIXTURE, folder)
    (folder / "sub").mkdir()
    shutil.copy(FIXTURE / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match=r"names no file of this folder|no safetensors header"):
        inspect(Checkpoint(folder))


def test_vllm_ignores_files_of_an_index_outside_the_folder(tmp_path: Path) -> None:
    """What vLLM's own loader does: it takes files of the folder, and of those the ones that the index names."""
    from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

    inside = str(tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../outside.safetensors", "b": "model.safetensors"}}))
    assert filter_duplicate_safetensors_files([inside], str(tmp_path), INDEX) == [inside]


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "nul", "[]", "\ufeff{}", "9" * 5000])
def test_json_that_is_no_config_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as refused:
        inspect(Checkpoint(tmp_path))
    assert str(refused.value).isprintable()
