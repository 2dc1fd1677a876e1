"""What the benchmark makes of results and of mistakes, without a server."""

from __future__ import annotations

import asyncio
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.support.commands import environment, free_port, gemma4_spec, in_process, interrupted_start
from tests.support.fake_server import State, fake_server
from vllm_gemma4_spec.ops.bench import connections, measure, prompts, report


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "w5 w6 w7"}, {"question_id": 1, "turns": ["w8 w9 w10 w11", "w3"]}]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def test_prompts_of_every_kind(prompt_file: Path) -> None:
    assert prompts.read(prompt_file, 3) == ["w5 w6 w7", "w8 w9 w10 w11", "w5 w6 w7"]


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "No such file"), ("", "no prompts"), ("nonsense\n", "line 1"), ('{"turns": []}\n', "line 1")],
)
def test_unreadable_prompts_are_one_line(tmp_path: Path, content: str | None, word: str) -> None:
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(report.BenchError, match=word) as error:
        prompts.read(file, 1)
    assert len(str(error.value).splitlines()) == 1


def test_no_server_is_one_line(prompt_file: Path) -> None:
    done = gemma4_spec("bench", "--url", f"http://127.0.0.1:{free_port()}", "--prompts", str(prompt_file))
    assert done.returncode == 2
    assert "no answer" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


class _Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "someone"}]}')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[str]:
    """OpenAI's list of models and nothing else."""
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Models)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_ctrl_c_while_the_benchmark_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between fork and the constructor's end nobody else knows the process."""
    started = interrupted_start(monkeypatch, "input()")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), measure._Benchmark(None):
        pytest.fail("the block was entered")
    assert started[0].returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_leaves_no_process_behind(other_server: str, prompt_file: Path) -> None:
    command = [sys.executable, "-c", "from vllm_gemma4_spec.cli import main; main()", "bench"]
    command += ["--url", other_server, "--prompts", str(prompt_file)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children: list[psutil.Process] = []
    end = time.monotonic() + 120
    while not children and process.poll() is None and time.monotonic() < end:
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.05)
    assert children, process.communicate()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "Traceback" not in process.communicate()[1]
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert gone


def made_run(url: str, speed: float, latency: float, accepted: tuple[float, ...] = (0.8, 0.2)) -> report.Run:
    return report.Run(
        url=url,
        concurrency=2,
        requests=4,
        errors=0,
        output_tokens=100,
        aggregate_tok_s=speed,
        request_tok_s=None if url == "c" else speed / 2,
        latency_ms=latency,
        ttft_ms=1.0,
        itl_ms=1.0,
        accepted_by_position=accepted,
    )


def test_a_wrong_model_is_said_before_anything_runs() -> None:
    with fake_server(State()) as url:
        done = in_process("bench", "--url", url, "--model", "nobody")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"--model nobody: {url} serves gemma-4" in done.stderr


def test_two_addresses_of_one_server_are_noticed() -> None:
    with fake_server(State()) as url:
        other = url.replace("127.0.0.1", "localhost")
        done = in_process("bench", "--url", url, "--against", other)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "is the same server as" in done.stderr


def test_an_empty_answer_is_no_tokens_and_an_error() -> None:
    """As ``vllm bench serve`` writes them: answered, refused, stopped at once, thoughts alone."""
    result = {
        "duration": 2.0,
        "output_lens": [10, 0, 1, 20],
        "ttfts": [0.1, 0.0, 0.1, 0.1],
        "itls": [[0.1] * 9, [], [], [0.1] * 19],
        "errors": ["", "Bad Request", "", ""],
        "generated_texts": ["words", "", "", ""],
    }
    run, failed = measure.read_result(report.Server(url="a", model="m"), 2, result)
    assert failed == [(1, "Bad Request"), (2, measure.EMPTY)]
    assert (run.requests, run.errors, run.output_tokens, run.aggregate_tok_s) == (4, 2, 30, 15.0)
    assert run.latency_percentiles
    assert list(run.latency_percentiles.model_dump().values()) == pytest.approx([1000, 2000, 2000])


def test_a_connection_that_brought_an_error_is_not_used_again() -> None:
    """The server closes it without a word, after it answered; with a connection kept, the next request would break."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            bad = self.rfile.read(int(self.headers["Content-Length"])) == b"bad"
            self.send_response(400 if bad else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
            self.close_connection = bad

        def log_message(self, *_: object) -> None:
            pass

    async def ask(url: str) -> list[int]:
        async with aiohttp.ClientSession() as session:
            codes = []
            for body in (b"good", b"bad", b"good", b"bad", b"good"):
                async with session.post(url, data=body) as response:
                    codes.append(response.status)
            return codes

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aiohttp.ClientResponse, "start", aiohttp.ClientResponse.start)  # put back at the end
        connections.leave_after_a_refusal()
        codes = asyncio.run(ask(f"http://127.0.0.1:{httpd.server_port}"))
    httpd.shutdown()
    httpd.server_close()
    assert codes == [200, 400, 200, 400, 200]


def test_every_output_says_what_was_measured() -> None:
    a = report.Server(url="a", model="m", vllm="0.19.1", plugin="0.1.0", method="draft_model", drafter="E4B", k=3)
    run = made_run("a", 30, 100)
    failure = report.Failure(url="a", count=2, message="HTTP 400; too long (prompt 3)")
    made = report.Report(
        date="2026-11-28", servers=[a], tokens=9, failures=[failure], summary=[run], ratios=[], runs=[run]
    )
    shown = report.markdown(made)
    assert "- A: a, m, vLLM 0.19.1, vllm-gemma4-spec 0.1.0, draft_model with E4B, k = 3" in shown
    assert "2026-11-28" in shown
    assert "2 failed on A: HTTP 400; too long (prompt 3)" in shown


def test_summary_has_medians_and_sums() -> None:
    runs = [made_run("a", 30, 100), made_run("a", 50, 300, (1.0, 0.6)), made_run("a", 90, 200, ())]
    (row,) = report.summary(runs)
    assert (row.aggregate_tok_s, row.latency_ms) == (50, 200)
    assert (row.requests, row.output_tokens) == (12, 300)
    assert row.accepted_by_position == pytest.approx((0.9, 0.4))
    assert row.acceptance_length is None


def test_ratios_are_those_of_runs_side_by_side() -> None:
    """The machine grew slower by half after the first pair: medians of each server alone would not show 3, 2, 2."""
    speeds = [("a", 90), ("b", 30), ("a", 30), ("b", 15), ("a", 20), ("b", 10)]
    (ratio,) = report.ratios([made_run(url, speed, 100) for url, speed in speeds], "a", "b")
    assert ratio.aggregate_tok_s == report.Spread(median=2, lowest=2, highest=3)
    assert ratio.latency_ms == report.Spread(median=1, lowest=1, highest=1)
    (unknown,) = report.ratios([made_run("a", 90, 1), made_run("c", 30, 1)], "a", "c")
    assert unknown.request_tok_s is None
