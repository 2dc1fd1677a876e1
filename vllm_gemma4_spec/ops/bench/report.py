"""What a benchmark measured: runs, their medians, ratios of pairs, and the table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from vllm_gemma4_spec.errors import Gemma4SpecError
from vllm_gemma4_spec.ops.output import Output


class BenchError(Gemma4SpecError):
    """Prompts that cannot be read, or a benchmark that did not run."""


class Server(Output):
    """What was measured; empty or 0: the server does not say."""

    url: str
    model: str
    """the name asked for"""
    vllm: str = ""
    """version"""
    plugin: str = ""
    """version"""
    method: str = ""
    """draft_model, eagle, …"""
    drafter: str = ""
    k: int = 0
    """num_speculative_tokens"""
    started: float | None = None
    """seconds since 1970"""

    def __str__(self) -> str:
        parts = [self.url, self.model]
        parts += [f"vLLM {self.vllm}"] if self.vllm else []
        parts += [f"vllm-gemma4-spec {self.plugin}"] if self.plugin else []
        if self.vllm:
            by = f"{self.method or 'speculation'}{' with ' + self.drafter if self.drafter else ''}"
            parts.append(f"{by}, k = {self.k}" if self.k else "no speculation")
        return ", ".join(parts)


class Failure(Output):
    """Requests that failed in one way."""

    url: str
    count: int
    message: str
    """what the server says of the first of them"""


class Percentiles(Output):
    """Milliseconds, over all answers of a run."""

    p50: float
    p90: float
    p99: float


class Run(Output):
    """One run at one concurrency, or the medians of several. null: the server does not say."""

    url: str
    concurrency: int
    """requests at once"""
    requests: int
    """a sum in the summary, as are errors and output_tokens"""
    errors: int
    """refused, broken off, or answered with nothing"""
    output_tokens: int
    input_tokens: int | None = None
    """of all prompts; a sum, too"""
    aggregate_tok_s: float
    """output tokens of all requests over the run's duration"""
    request_tok_s: float | None
    """mean over requests of tokens / latency"""
    latency_ms: float | None
    """mean time to the whole answer"""
    ttft_ms: float | None
    """mean time to the first token"""
    itl_ms: float | None
    """mean time between two deltas, which hold several tokens with speculation"""
    latency_percentiles: Percentiles | None = None
    ttft_percentiles: Percentiles | None = None
    itl_percentiles: Percentiles | None = None
    acceptance_rate: float | None = None
    """accepted share of all drafted tokens, 0 to 1"""
    acceptance_length: float | None = None
    """mean tokens that a step with drafts adds to a request, the target's own counted"""
    accepted_by_position: tuple[float, ...] = ()
    """share of drafts accepted up to each position, 0 to 1, position 0 first; empty without speculation"""


class Spread(Output):
    """Of the ratios of pairs of runs."""

    median: float
    lowest: float
    highest: float


class Ratio(Output):
    """`--url` over `--against` at one concurrency, run for run; null: no pair of runs has both results."""

    concurrency: int
    aggregate_tok_s: Spread | None
    """above 1: the first is faster"""
    request_tok_s: Spread | None
    """above 1: the first is faster"""
    latency_ms: Spread | None
    """below 1: the first is faster"""


class Report(Output):
    """Everything of one call."""

    date: str
    """when it began, ISO 8601"""
    servers: list[Server]
    """A, and B with --against"""
    tokens: int
    """the most of an answer"""
    failures: list[Failure]
    """one entry per server and kind of error"""
    summary: list[Run]
    """medians over repeats, one entry per server and concurrency"""
    ratios: list[Ratio]
    """empty without --against"""
    runs: list[Run]
    """each run, in the order they ran"""


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _same(runs: Sequence[Run]) -> Iterator[tuple[str, int, list[Run]]]:
    for url, concurrency in dict.fromkeys((r.url, r.concurrency) for r in runs):
        yield url, concurrency, [r for r in runs if (r.url, r.concurrency) == (url, concurrency)]


def summary(runs: Sequence[Run]) -> list[Run]:
    """One row per server and concurrency: medians over repeats, sums of errors and counts."""
    rows = []
    for url, concurrency, own in _same(runs):
        row: dict[str, object] = {"url": url, "concurrency": concurrency}
        for name in Run.model_fields:
            values = [getattr(r, name) for r in own]
            if name in ("requests", "errors", "output_tokens", "input_tokens"):
                row[name] = None if None in values else sum(values)
            elif name.endswith("_percentiles"):
                known = [v for v in values if v is not None]
                row[name] = _medians(known) if known else None
            elif name == "accepted_by_position":
                row[name] = tuple(median(v) for v in zip(*filter(None, values), strict=True))
            elif name not in row:
                known = [v for v in values if v is not None]
                row[name] = median(known) if known else None
        rows.append(Run.model_validate(row))
    return rows


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Of seconds; each is the smallest value that so many per cent do not exceed."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p90, p99 = (1e3 * ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.5, 0.9, 0.99))
    return Percentiles(p50=p50, p90=p90, p99=p99)


def _medians(of: Sequence[Percentiles]) -> Percentiles:
    return Percentiles(p50=median(p.p50 for p in of), p90=median(p.p90 for p in of), p99=median(p.p99 for p in of))


def ratios(runs: Sequence[Run], url: str, against: str) -> list[Ratio]:
    """``url`` over ``against``, each run with the one that followed it on the other server."""
    by = {(u, c): own for u, c, own in _same(runs)}
    out = []
    for concurrency in dict.fromkeys(r.concurrency for r in runs):
        pairs = list(zip(by[url, concurrency], by[against, concurrency], strict=True))
        out.append(
            Ratio(
                concurrency=concurrency,
                aggregate_tok_s=_spread([(a.aggregate_tok_s, b.aggregate_tok_s) for a, b in pairs]),
                request_tok_s=_spread([(a.request_tok_s, b.request_tok_s) for a, b in pairs]),
                latency_ms=_spread([(a.latency_ms, b.latency_ms) for a, b in pairs]),
            )
        )
    return out


def _spread(pairs: Sequence[tuple[float | None, float | None]]) -> Spread | None:
    values = [a / b for a, b in pairs if a and b]
    return Spread(median=median(values), lowest=min(values), highest=max(values)) if values else None


def _cell(value: float | None, digits: int = 1, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    wide = f" ({spread.lowest:.2f}-{spread.highest:.2f})" if spread.lowest != spread.highest else ""
    return f"{spread.median:.2f}x{wide}"


def _three(found: Percentiles | None, digits: int = 0) -> str:
    return "-" if found is None else " / ".join(f"{v:.{digits}f}" for v in (found.p50, found.p90, found.p99))


def markdown(made: Report) -> str:
    """The servers and the date, the table, percentiles, what the server said about speculation, ratios, failures."""
    rows = made.summary
    names = dict(zip((s.url for s in made.servers), "AB", strict=False))
    lines = [f"- {names[s.url]}: {s}" for s in made.servers]
    lines += [f"- {made.date}, answers of at most {made.tokens} tokens, greedy", ""]
    lines += [
        "| | concurrency | tok/s | per request | latency s | TTFT ms | inter-token ms | tokens in, out | errors |"
    ]
    lines += ["|" + "---|" * 9]
    for r in rows:
        inside = "-" if r.input_tokens is None else f"{r.input_tokens / max(1, r.requests):.0f}"
        lines.append(
            f"| {names[r.url]} | {r.concurrency} | {_cell(r.aggregate_tok_s)} | {_cell(r.request_tok_s)} "
            f"| {_cell(r.latency_ms, 2, 1e-3)} | {_cell(r.ttft_ms, 0)} | {_cell(r.itl_ms)} "
            f"| {inside}, {r.output_tokens / max(1, r.requests - r.errors):.0f} | {r.errors} of {r.requests} |"
        )
    lines += ["", "| p50 / p90 / p99 | concurrency | latency ms | TTFT ms | inter-token latency ms |", "|" + "---|" * 5]
    for r in rows:
        three = (_three(r.latency_percentiles), _three(r.ttft_percentiles), _three(r.itl_percentiles, 1))
        lines.append(f"| {names[r.url]} | {r.concurrency} | {' | '.join(three)} |")
    spec = [r for r in rows if r.acceptance_length is not None]
    if spec:
        lines += ["", "| | concurrency | acceptance length | accepted | by position, from 0 |", "|" + "---|" * 5]
        for r in spec:
            positions = " ".join(f"{share:.0%}" for share in r.accepted_by_position)
            lines.append(
                f"| {names[r.url]} | {r.concurrency} | {_cell(r.acceptance_length, 2)} "
                f"| {_cell(r.acceptance_rate, 1, 100)} % | {positions} |"
            )
    if made.ratios:
        lines += ["", "| A over B, concurrency | tok/s | per request | latency |", "|" + "---|" * 4]
        for c in made.ratios:
            cells = [_ratio(s) for s in (c.aggregate_tok_s, c.request_tok_s, c.latency_ms)]
            lines.append(f"| {c.concurrency} | " + " | ".join(cells) + " |")
    lines += [""] * bool(made.failures)
    lines += [f"{f.count} failed on {names[f.url]}: {f.message}" for f in made.failures]
    return "\n".join(lines)
