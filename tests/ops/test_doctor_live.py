"""``doctor --url`` of real servers, each wrong in a way of its own: exit code and text."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny_tokenizer
from tests.support.commands import demo_server, gemma4_spec, post, printed, vllm_server
from vllm_gemma4_spec.demo.build import Pair
from vllm_gemma4_spec.ops import server
from vllm_gemma4_spec.registry import PATCHES

pytestmark = pytest.mark.slow
CHAT = {"model": "gemma4-demo", "messages": [{"role": "user", "content": "Count from 2 to 9."}], "temperature": 0}


def asked(url: str, *options: str) -> dict[str, tuple[str, str, str]]:
    """What is found of the server: name without a process id -> state, text, advice.

    The exit code is 1 where anything is a problem, here as well: another PyTorch than vLLM asks for.
    """
    done = gemma4_spec("doctor", "--url", url, "--json", *options)
    found = printed("doctor", done)["findings"]
    assert done.returncode == any(f["state"] == "problem" for f in found)
    return {f["name"].split(" (")[0]: (f["state"], f["found"], f["advice"]) for f in found if f["section"] == "server"}


def problems(found: dict[str, tuple[str, str, str]]) -> list[str]:
    return sorted(name for name, (state, *_) in found.items() if state == "problem")


@contextlib.contextmanager
def stopped(url: str, process: str) -> Iterator[None]:
    """A process of the server does not run for a while."""
    (pid,) = (
        int(s.labels["pid"])
        for s in server.samples(url)
        if s.name == "gemma4_spec_process" and s.labels["process"].startswith(process)
    )
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_all_well(speculating_server: str) -> None:
    post(f"{speculating_server}/v1/chat/completions", CHAT | {"max_tokens": 40})
    found = asked(speculating_server, "--workers", "1")
    assert problems(found) == [], found
    assert list(found) == [
        "vllm", "model", "reasoning parser", "tool call parser", "engine", "speculation",
        "APIServer", "EngineCore", "workers",
    ]  # fmt: skip
    for name in ("APIServer", "EngineCore"):
        assert found[name][1] == f"{len(PATCHES)} patches on"
    assert re.match(r"gemma4-demo, /\S+/target, gemma4", found["model"][1])
    assert re.match(r"answers: one token in \d", found["engine"][1])
    drafting = r"draft_model with /\S+/drafter, k = 3, \d+ drafts verified, acceptance length \d\.\d\d, "
    assert re.match(drafting + r"acceptance by position from 0: \d+% \d+% \d+%$", found["speculation"][1])


def test_a_missing_worker(speculating_server: str) -> None:
    found = asked(speculating_server, "--workers", "2")
    assert problems(found) == ["workers"]


def test_a_silent_engine(speculating_server: str) -> None:
    with stopped(speculating_server, "EngineCore"):
        found = asked(speculating_server, "--patience", "3")
        assert problems(found) == ["engine"]
        assert found["engine"][1].startswith("no token within 3 s; ")
        assert "stopped" in found["engine"][2]
    assert problems(asked(speculating_server)) == []


def test_a_silent_api_server(speculating_server: str) -> None:
    with stopped(speculating_server, "APIServer"):
        done = gemma4_spec("doctor", "--url", speculating_server)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "no answer within 10 s" in done.stderr


def test_no_speculation(plain_server: str) -> None:
    found = asked(plain_server)
    assert problems(found) == ["speculation"]
    assert "--speculative-config" in found["speculation"][2]
    assert problems(asked(plain_server, "--no-speculation")) == []


def test_no_parsers(pair: Pair, tmp_path: Path) -> None:
    with demo_server(pair, tmp_path / "log", speculates=False, parsers=False) as url:
        found = asked(url, "--no-speculation")
    assert problems(found) == ["reasoning parser", "tool call parser"]
    assert found["tool call parser"][1] == "none"


def test_every_patch_off(pair: Pair, tmp_path: Path) -> None:
    with demo_server(pair, tmp_path / "log", speculates=False, VLLM_GEMMA4_SPEC="0") as url:
        found = asked(url, "--no-speculation")
    assert problems(found) == ["APIServer", "EngineCore"]
    for name in problems(found):
        assert found[name][1] == "no patch on"
        assert "unset VLLM_GEMMA4_SPEC" in found[name][2]


def test_without_the_plugin(pair: Pair, tmp_path: Path) -> None:
    with demo_server(pair, tmp_path / "log", speculates=False, VLLM_PLUGINS="") as url:
        found = asked(url)
    assert problems(found) == ["plugin", "speculation"]
    assert found["model"][1] == "gemma4-demo"


def test_another_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tmp_path / "llama"
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=512, **shape)).save_pretrained(model)
    tiny_tokenizer.save(model)
    with vllm_server(model, tmp_path / "log") as url:
        found = asked(url, "--no-speculation")
    assert problems(found) == [], found
    assert found["model"] == ("note", f"{model}, llama", found["model"][2])
    assert "no Gemma 4" in found["model"][2]


def test_v2_model_runner(pair: Pair, tmp_path: Path) -> None:
    """Refused at the start with one line; where the patch that refuses it is off, doctor says it."""
    log, v2 = tmp_path / "log", {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    with pytest.raises(AssertionError), demo_server(pair, log, speculates=False, **v2):
        pass
    assert len([line for line in log.read_text().splitlines() if "V2 model runner" in line]) == 1
    v2 |= {"VLLM_GEMMA4_SPEC_PATCH_ENGINE_CHECKS": "0"}
    with demo_server(pair, log, speculates=False, **v2) as url:
        found = asked(url, "--no-speculation")
    assert problems(found) == ["APIServer", "EngineCore", "model runner"]
    assert found["model runner"][1] == "V2"
    assert "VLLM_USE_V2_MODEL_RUNNER" in found["model runner"][2]
    assert found["EngineCore"][2].endswith("unset VLLM_GEMMA4_SPEC_PATCH_ENGINE_CHECKS")
