"""Drafters that do not fit are refused in one line, before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vllm_gemma4_spec
from tests.support import tiny_models
from tests.support.engine import engine
from vllm_gemma4_spec.errors import DrafterError
from vllm_gemma4_spec.spec_decode.config_validation import check_folder


def error(target: Path, drafter: Path | str, **speculative: Any) -> str:
    with (
        pytest.raises(DrafterError) as caught,
        engine(target, Path(drafter), 2, speculative={"model": str(drafter)} | speculative),
    ):
        pass
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_no_such_folder(tiny: dict[str, Path], tmp_path: Path) -> None:
    assert error(tiny["target"], tmp_path / "none").endswith("no such folder; give a model folder or a hub id")


def test_folder_without_config(tiny: dict[str, Path], tmp_path: Path) -> None:
    assert "config.json: no such file; give a folder that holds a model" in error(tiny["target"], tmp_path)


def test_config_that_is_not_json(tiny: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not JSON" in error(tiny["target"], tmp_path)


def test_another_vocabulary(tiny: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_models.drafter_config(vocab_size=256, vocab_size_per_layer_input=256)
    other = tiny_models.save(config, tmp_path / "other")
    assert "has another vocabulary size than target" in error(tiny["target"], other)


def test_another_tensor_parallel_size(tiny: dict[str, Path]) -> None:
    assert "draft_tensor_parallel_size is 2" in error(tiny["target"], tiny["drafter"], draft_tensor_parallel_size=2)


def test_pipeline_parallelism(tiny: dict[str, Path]) -> None:
    with (
        pytest.raises(DrafterError, match=r"pipeline_parallel_size is 2; .* use tensor parallelism"),
        engine(tiny["target"], tiny["drafter"], 2, pipeline_parallel_size=2, distributed_executor_backend="mp"),
    ):
        pass


def test_adaptive_k_beside_data_parallelism(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_GEMMA4_SPEC_ADAPTIVE_K", "0.2")
    vllm_gemma4_spec.apply()
    speculative = {"method": "draft_model", "model": str(tiny["drafter"]), "num_speculative_tokens": 2}
    args = EngineArgs(
        str(tiny["target"]), data_parallel_size=2, skip_tokenizer_init=True, speculative_config=speculative
    )
    with pytest.raises(DrafterError, match=r"ADAPTIVE_K is set and data_parallel_size is 2; .*: unset VLLM_GEMMA4_"):
        args.create_engine_config()


def test_kv_connector(tiny: dict[str, Path]) -> None:
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with (
        pytest.raises(DrafterError, match=r"KV connector ExampleConnector beside a draft model: .* leave one of them"),
        engine(tiny["target"], tiny["drafter"], 2, kv_transfer_config=connector),
    ):
        pass


def config_of(target: Path, speculative: dict[str, Any], **options: Any) -> Any:
    """What the arguments become; no engine is started."""
    from vllm.engine.arg_utils import EngineArgs

    vllm_gemma4_spec.apply()
    common = {"dtype": "float32", "max_model_len": 256, "skip_tokenizer_init": True}
    args = EngineArgs(str(target), speculative_config={"num_speculative_tokens": 2} | speculative, **common | options)
    return args.create_engine_config()


CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline_parallel_size is 2"),
        ({"data_parallel_size": 2}, "ADAPTIVE_K is set and data_parallel_size is 2"),
        ({"kv_transfer_config": CONNECTOR}, "KV connector ExampleConnector beside a draft model"),
        (
            {"kv_offloading_size": 1.0, "disable_hybrid_kv_cache_manager": True},
            r"KV connector OffloadingConnector \(of kv_offloading_size 1.0\) beside",
        ),
    ],
    ids=["pipeline", "data parallel", "connector", "offloading"],
)
@pytest.mark.parametrize("method", [{"method": "draft_model"}, {}], ids=["draft_model", "method left out"])
def test_the_finished_config_decides(
    tiny: dict[str, Path],
    method: dict[str, str],
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM fills in the method, and makes a connector of an option, after the arguments have been read."""
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_ADAPTIVE_K", "0.2")
    with pytest.raises(DrafterError, match=message):
        config_of(tiny["target"], method | {"model": str(tiny["drafter"])}, **options)


def test_what_vllm_reads_itself_is_left_to_it(tiny: dict[str, Path], tmp_path: Path) -> None:
    """A file (GGUF) and a folder in Mistral's format have no config.json and are not refused for that."""
    gguf, mistral = tmp_path / "drafter.gguf", tmp_path / "mistral"
    gguf.touch()
    mistral.mkdir()
    (mistral / "params.json").write_text("{}")
    for drafter in (gguf, mistral):
        with pytest.raises(Exception) as caught:  # noqa: PT011  vLLM's own, of whatever kind: neither holds a model
            config_of(tiny["target"], {"method": "draft_model", "model": str(drafter)})
        assert not isinstance(caught.value, DrafterError)


def test_other_models_are_not_refused(tmp_path: Path) -> None:
    """A Llama that drafts for a Llama, with a connector."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, max_position_embeddings=256, **shape)
    ).save_pretrained(tmp_path)
    for method in ({"method": "draft_model"}, {}):
        made = config_of(tmp_path, method | {"model": str(tmp_path)}, kv_transfer_config=CONNECTOR)
        assert (made.speculative_config.method, made.kv_transfer_config.kv_connector) == (
            "draft_model",
            "ExampleConnector",
        )


def test_sleep_that_would_lose_the_drafter(tiny: dict[str, Path]) -> None:
    """Refused before anything is paused or discarded; level 1 is the GPU worker's to do (a CPU ignores it)."""
    with engine(tiny["target"], tiny["drafter"], 2) as llm:
        core = llm.llm_engine.engine_core
        with pytest.raises(DrafterError, match="sleep level 2 discards the drafter's weights"):
            core.sleep(2)
        assert not core.is_sleeping()


def test_without_a_draft_model_nothing_is_looked_at(tiny: dict[str, Path]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    vllm_gemma4_spec.apply()
    args = EngineArgs(str(tiny["target"]), dtype="float32", skip_tokenizer_init=True, kv_transfer_config=CONNECTOR)
    made = args.create_engine_config()
    assert (made.speculative_config, made.kv_transfer_config.kv_connector) == (None, "ExampleConnector")


def test_other_mistakes_are_vllms_to_name(tiny: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        config_of(tiny["target"], {"model": str(tiny["drafter"]), "num_speculative_tokens": 0})


def test_a_hub_id_is_no_missing_folder() -> None:
    check_folder("someone/some-model")
