"""An assistant that does not fit its target, and options that it cannot serve under, end in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_gemma4_spec
from tests.mtp import pairs
from tests.support.stock import without
from vllm_gemma4_spec.errors import CheckpointError, DrafterError
from vllm_gemma4_spec.mtp.patches import MTP_ASSISTANT, MTP_CHECKS


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs.save(pairs.KINDS["31b"]().target, tmp_path_factory.mktemp("mtp") / "target")


@pytest.fixture(autouse=True)
def _applied() -> None:
    vllm_gemma4_spec.apply()  # another test may have undone a patch


def configure(target: Path, assistant: Path, *, engine: dict[str, Any] | None = None, **speculative: Any) -> Any:
    """The speculative config that the engine would start with."""
    from vllm.engine.arg_utils import EngineArgs

    asked = {"model": str(assistant), "num_speculative_tokens": 3} | speculative
    args = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 1024} | (engine or {})
    return EngineArgs(str(target), speculative_config=asked, **args).create_engine_config().speculative_config


def refusal(target: Path, assistant: Path, **options: Any) -> str:
    with pytest.raises((DrafterError, CheckpointError)) as caught:
        configure(target, assistant, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("method", [{}, {"method": "mtp"}, {"method": "draft_model"}])
def test_the_method_is_mtp_given_or_not(target: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    config = configure(target, pairs.save_assistant(pairs.KINDS["31b"](), tmp_path), **method)
    assert config.method == "mtp"
    assert config.num_speculative_tokens == 3
    draft = config.draft_model_config
    assert draft.get_hidden_size() == 64  # the target's: what a pass takes and gives
    assert draft.hf_text_config.hidden_size == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone_hidden_size": 48}, "backbone_hidden_size is 48, hidden_size of target"),
        ({"vocab_size": 256}, "vocab_size is 256, vocab_size of target"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"num_global_key_value_heads": 2}, "full layers' KV heads is 2"),
        ({"head_dim": 64}, "head_dim is 64"),
        ({"global_head_dim": 32}, "global_head_dim is 32"),
        ({"sliding_window": 32}, "sliding_window is 32"),
        ({"num_attention_heads": 3}, "3 query heads are no multiple"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"use_ordered_embeddings": True, "num_centroids": 100}, "do not divide into 100 centroids"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_another_targets_assistant(target: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assistant = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path, **changes)
    assert words in refusal(target, assistant)


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], kind: str = "31b") -> Path:
    pairs.save_assistant(pairs.KINDS[kind](), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_missing_tensor(target: Path, tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda t: t.pop("model.layers.2.self_attn.q_norm.weight"))
    assert "tensor model.layers.2.self_attn.q_norm.weight is missing" in refusal(target, folder)


def test_keys_of_its_own(target: Path, tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(2, 2)}))
    assert "k_proj.weight: keys and values are the target's" in refusal(target, folder)


def test_an_unknown_tensor(target: Path, tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda t: t.update({"model.layers.4.layer_scalar": torch.ones(1)}))
    assert "model.layers.4.layer_scalar: no tensor of a Gemma 4 assistant's network" in refusal(target, folder)


def test_a_tensor_of_another_shape(target: Path, tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda t: t.update({"pre_projection.weight": torch.ones(32, 96)}))
    assert "pre_projection.weight is [32, 96], its config.json says [32, 128]" in refusal(target, folder)


def test_no_files(target: Path, tmp_path: Path) -> None:
    (pairs.save_assistant(pairs.KINDS["31b"](), tmp_path) / "model.safetensors").unlink()
    assert "no .safetensors file" in refusal(target, tmp_path)


def test_a_file_that_ends_early(target: Path, tmp_path: Path) -> None:
    file = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors" in refusal(target, tmp_path)


@pytest.mark.parametrize("k", [0, -1, 33, True, "many"])
def test_draft_length(target: Path, tmp_path: Path, k: Any) -> None:
    assistant = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path)
    text = refusal(target, assistant, num_speculative_tokens=k)
    assert f"num_speculative_tokens is {k!r}; an assistant drafts 1 to 32" in text


def test_pipeline_parallelism(target: Path, tmp_path: Path) -> None:
    assistant = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path)
    text = refusal(target, assistant, engine={"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"})
    assert text.startswith("pipeline_parallel_size is 2; ")
    assert text.endswith("use tensor parallelism")


def test_another_tensor_parallel_size(target: Path, tmp_path: Path) -> None:
    assistant = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path)
    assert "draft_tensor_parallel_size is 2" in refusal(target, assistant, draft_tensor_parallel_size=2)


def test_no_such_folder(target: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(target, tmp_path / "none", method="mtp")


def test_per_layer_configuration_of_later_transformers(target: Path, tmp_path: Path) -> None:
    """From 5.15 on what differs per layer is keyed by numbers; the patch config-form reads it."""
    folder = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path)
    values = json.loads((folder / "config.json").read_text())
    text = values["text_config"]
    full = {"head_dim": text.pop("global_head_dim"), "num_key_value_heads": text.pop("num_global_key_value_heads")}
    sliding = {"head_dim": text.pop("head_dim"), "num_key_value_heads": text.pop("num_key_value_heads")}
    text["per_layer_config"] = {"0": sliding, "1": sliding, "2": sliding, "3": full}
    (folder / "config.json").write_text(json.dumps(values))
    read = configure(target, folder).draft_model_config.hf_text_config
    assert (read.head_dim, read.global_head_dim) == (32, 64)
    assert (read.num_key_value_heads, read.num_global_key_value_heads) == (2, 1)


def command(*words: object) -> Any:
    from typer.testing import CliRunner

    from vllm_gemma4_spec import cli

    if "inspect" not in {c.name for c in cli.app.registered_commands}:
        cli._register([])
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def inspected(folder: Path) -> Any:
    return command("inspect", folder)


def test_inspect_knows_an_assistant(tmp_path: Path) -> None:
    done = inspected(pairs.save_assistant(pairs.KINDS["e2b"](), tmp_path))
    assert done.exit_code == 0, done.output
    assert "Gemma4AssistantForCausalLM" in done.output
    assert "refuses it: Gemma 4's MTP assistants came with 0.21.0" in done.output
    assert "drafts with it for its own target" in done.output


def test_inspect_names_what_is_missing(tmp_path: Path) -> None:
    folder = edited(tmp_path, lambda t: t.pop("masked_embedding.token_ordering"), kind="e2b")
    done = inspected(folder)
    assert "tensor masked_embedding.token_ordering is missing" in str(done.exception) + done.output


def test_quantize_writes_an_assistant_in_nvfp4(target: Path, tmp_path: Path) -> None:
    """Linear layers alone; what becomes one matrix in the engine has one global scale."""
    from vllm_gemma4_spec.checkpoints import nvfp4

    source = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path / "bf16")
    done = command("quantize", source, tmp_path / "nvfp4", "--recipe", "w4a16")
    assert done.exit_code == 0, done.output
    assert "W4A16_NVFP4" in done.output
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("bf16", "nvfp4"))
    layers = {name.removesuffix(".weight_scale_2") for name in after if name.endswith(".weight_scale_2")}
    assert len(layers) == 4 * 5 + 2  # q, o, gate, up and down of four layers; pre_projection and post_projection
    for layer in layers:
        parts = [after[f"{layer}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2")]
        weight = before[f"{layer}.weight"]
        assert (nvfp4.dequantize(*parts) - weight).norm() < 0.12 * weight.norm(), layer
    assert {n for n in before if n.removesuffix(".weight") not in layers} == {
        n for n in after if n.rsplit(".", 1)[0] not in layers
    }
    gate, up = (after[f"model.layers.0.mlp.{part}_proj.weight_scale_2"] for part in ("gate", "up"))
    assert gate == up
    assert configure(target, tmp_path / "nvfp4").draft_model_config.quantization == "modelopt_fp4"


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--recipe", "awq-lite"], "give --recipe w4a16"), (["--fit", "1GiB"], "give --recipe w4a16")],
)
def test_other_recipes_are_not_an_assistants(tmp_path: Path, options: list[str], words: str) -> None:
    source = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path / "bf16")
    done = command("quantize", source, tmp_path / "out", *options)
    assert words in str(done.exception) + done.output


def test_stock_does_not_know_assistants(target: Path, tmp_path: Path) -> None:
    assistant = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path)
    with without(MTP_ASSISTANT), pytest.raises(Exception, match=r"gemma4_assistant|Gemma4Assistant"):
        configure(target, assistant)


def test_stock_takes_another_targets_assistant(target: Path, tmp_path: Path) -> None:
    assistant = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path, sliding_window=32)
    with without(MTP_CHECKS):
        assert configure(target, assistant).method == "mtp"
