"""``bench`` of real servers: what is measured, and what is said of requests that fail."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.commands import demo_server, gemma4_spec, in_process, printed
from vllm_gemma4_spec.demo.build import Pair
from vllm_gemma4_spec.ops import server
from vllm_gemma4_spec.ops.bench import report

pytestmark = pytest.mark.slow
LONG = "Count from 2 to 9. " * 100  # more than --max-model-len


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    return written(tmp_path, ["Count from 2 to 9.", "List three colours."])


def written(folder: Path, prompts: Sequence[str]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    return file


def finished(url: str) -> float:
    """Requests that the server has answered."""
    return sum(s.value for s in server.samples(url) if s.name == "vllm:request_success_total")


def test_what_is_measured(speculating_server: str, prompt_file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    options = ["--concurrency", "1,2", "--tokens", "12", "--requests", "3", "--json", "--plot", str(picture)]
    options += ["--warmups", "2", "--rate", "2", "--prompts", str(prompt_file), "--input-tokens", "40"]
    before = finished(speculating_server)
    done = gemma4_spec("bench", "--url", speculating_server, *options)
    assert done.returncode == 0, done.stderr
    found = printed("bench", done)
    assert finished(speculating_server) - before == 2 * (3 + 2)
    (about,) = found["servers"]
    assert (about["model"], about["vllm"], about["method"], about["k"]) == ("gemma4-demo", "0.19.1", "draft_model", 3)
    assert [r["concurrency"] for r in found["summary"]] == [1, 2]
    for row in found["summary"]:
        assert (row["requests"], row["errors"]) == (3, 0)
        assert 3 * 40 <= row["input_tokens"] <= 3 * 60  # and the chat template's
        assert 3 <= row["output_tokens"] <= 3 * 12
        assert row["aggregate_tok_s"] > 0
        assert row["latency_ms"] >= row["ttft_ms"] > 0
        for each in ("latency", "ttft", "itl"):
            of = row[f"{each}_percentiles"]
            assert 0 < of["p50"] <= of["p90"] <= of["p99"], each
        assert row["ttft_percentiles"]["p99"] <= row["latency_percentiles"]["p99"]
        assert len(row["accepted_by_position"]) == 3  # k
        assert row["accepted_by_position"] == sorted(row["accepted_by_position"], reverse=True)
        assert row["acceptance_length"] == pytest.approx(1 + sum(row["accepted_by_position"]))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_two_servers_run_for_run(speculating_server: str, plain_server: str, prompt_file: Path) -> None:
    options = ["--url", speculating_server, "--against", plain_server, "--prompts", str(prompt_file)]
    options += ["--concurrency", "1", "--tokens", "12", "--requests", "2", "--repeats", "2"]
    found = printed("bench", gemma4_spec("bench", *options, "--json"))
    assert [r["url"] for r in found["runs"]] == [speculating_server, plain_server] * 2
    with_drafts, without = found["summary"]
    assert len(with_drafts["accepted_by_position"]) == 3
    assert without["acceptance_length"] is None
    assert with_drafts["output_tokens"] == without["output_tokens"]  # greedy: the same answers
    (ratio,) = found["ratios"]
    speeds = [r["aggregate_tok_s"] for r in found["runs"]]
    pairs = [speeds[0] / speeds[1], speeds[2] / speeds[3]]
    assert ratio["aggregate_tok_s"]["lowest"] == pytest.approx(min(pairs))
    assert ratio["aggregate_tok_s"]["highest"] == pytest.approx(max(pairs))
    shown = report.markdown(report.Report.model_validate(found))
    assert shown.startswith(f"- A: {speculating_server}, ")
    assert f"- B: {plain_server}, gemma4-demo, vLLM 0.19.1, " in shown
    assert "| A over B, concurrency |" in shown


def test_one_bad_prompt_is_named_and_the_others_are_measured(speculating_server: str, tmp_path: Path) -> None:
    file = written(tmp_path, ["Count from 2 to 9.", LONG, "List three colours."])
    options = ["--concurrency", "1", "--requests", "3", "--tokens", "12"]
    done = gemma4_spec("bench", "--url", speculating_server, "--prompts", str(file), *options)
    assert done.returncode == 1, done.stderr
    assert "| 1 of 3 |" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "failed on A" in line)
    assert line.startswith("1 failed on A: HTTP 400; ")
    assert "maximum context length" in line
    assert line.endswith("(prompt 2)")
    assert "\x1b[" not in done.stdout
    assert done.stderr == ""  # no progress bar where nobody watches


def test_a_limit_that_every_request_passes_is_said_once(speculating_server: str, prompt_file: Path) -> None:
    options = ["--concurrency", "2", "--requests", "4", "--tokens", "600", "--prompts", str(prompt_file)]
    done = gemma4_spec("bench", "--url", speculating_server, *options)
    assert done.returncode == 1, done.stderr
    assert "| A | 2 | 0.0 | - | - | - | - | 0, 0 | 4 of 4 |" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "failed on A" in line)
    assert line.startswith("4 failed on A: HTTP 400; ")
    assert "600" in line
    assert "512" in line


@pytest.fixture
def mute_server(pair: Pair, tmp_path: Path) -> Iterator[str]:
    """Every token of it is one that ends an answer."""
    model = tmp_path / "mute"
    model.mkdir()
    for file in pair.target.iterdir():
        os.symlink(file, model / file.name)
    ends = model / "generation_config.json"
    ends.unlink()
    vocabulary = json.loads((pair.target / "config.json").read_text())["vocab_size"]
    ends.write_text(json.dumps({"eos_token_id": list(range(vocabulary))}))
    mute = Pair(pair.folder, model, pair.drafter, pair.assistant, pair.measured)
    with demo_server(mute, tmp_path / "log", speculates=False) as url:
        yield url


def test_empty_answers_are_no_tokens(mute_server: str, prompt_file: Path) -> None:
    options = ["--concurrency", "1", "--requests", "2", "--tokens", "12", "--prompts", str(prompt_file), "--json"]
    done = gemma4_spec("bench", "--url", mute_server, *options)
    assert done.returncode == 1, done.stderr
    (row,) = printed("bench", done)["summary"]
    assert (row["errors"], row["output_tokens"], row["aggregate_tok_s"], row["latency_ms"]) == (2, 0, 0, None)
    assert done.stderr.splitlines() == [f"2 failed on {mute_server}: empty answer (prompt 1)"]


def test_wrong_models_and_one_server_twice_are_said_before_anything_runs(speculating_server: str) -> None:
    other = speculating_server.replace("127.0.0.1", "localhost")
    wrong = {
        ("--model", "nobody"): f"--model nobody: {speculating_server} serves gemma4-demo",
        ("--against", other): f"--against {other} is the same server as --url {speculating_server}",
    }
    before = finished(speculating_server)
    for options, words in wrong.items():
        done = in_process("bench", "--url", speculating_server, *options)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert words in done.stderr
    assert finished(speculating_server) == before
