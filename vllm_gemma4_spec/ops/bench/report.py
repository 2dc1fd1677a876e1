"""What a benchmark measured: runs, their medians, ratios of pairs, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from vllm_gemma4_spec.errors import Gemma4SpecError
from vllm_gemma4_spec.ops.output import Output


class BenchError(Gemma4SpecError):
    """Prompts that cannot be read, or a benchmark that did not run."""


class Run(Output):
    """One run at one concurrency, or the medians of several. null: the server does not say."""

    url: str
    concurrency: int
    """requests at once"""
    requests: int
    """a sum in the summary, as are errors and output_tokens"""
    errors: int
    output_tokens: int
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
    acceptance_rate: float | None = None
    """accepted share of all drafted tokens, 0 to 1"""
    acceptance_length: float | None = None
    """tokens per step, the target's own counted"""
    accepted_by_position: tuple[float, ...] = ()
    """share of drafts accepted up to each position, 0 to 1; empty without speculation"""


class Spread(Output):
    """Of the ratios of pairs of runs."""

    median: float
    lowest: float
    highest: float


class Ratio(Output):
    """`--url` over `--against` at one concurrency, run for run; null: no pair of runs has both figures."""

    concurrency: int
    aggregate_tok_s: Spread | None
    """above 1: the first is faster"""
    request_tok_s: Spread | None
    """above 1: the first is faster"""
    latency_ms: Spread | None
    """below 1: the first is faster"""


class Report(Output):
    """Everything of one call."""

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
            if name in ("requests", "errors", "output_tokens"):
                row[name] = sum(values)
            elif name == "accepted_by_position":
                row[name] = tuple(median(v) for v in zip(*filter(None, values), strict=True))
            elif name not in row:
                known = [v for v in values if v is not None]
                row[name] = median(known) if known else None
        rows.append(Run.model_validate(row))
    return rows


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


def markdown(rows: Sequence[Run], compared: Sequence[Ratio] = ()) -> str:
    """The servers, the published table, what the server said about speculation, and ratios."""
    names = dict(zip(dict.fromkeys(r.url for r in rows), "AB", strict=False))
    lines = [f"- {name}: {url}" for url, name in names.items()]
    lines += [
        "",
        "| | at once | tok/s | per request | latency s | TTFT ms | ITL ms | errors |",
        "|" + "---|" * 8,
    ]
    for r in rows:
        lines.append(
            f"| {names[r.url]} | {r.concurrency} | {_cell(r.aggregate_tok_s)} | {_cell(r.request_tok_s)} "
            f"| {_cell(r.latency_ms, 2, 1e-3)} | {_cell(r.ttft_ms, 0)} | {_cell(r.itl_ms)} "
            f"| {r.errors} of {r.requests} |"
        )
    spec = [r for r in rows if r.acceptance_length is not None]
    if spec:
        lines += ["", "| | at once | tokens per step | accepted | by position |", "|" + "---|" * 5]
        for r in spec:
            positions = " ".join(f"{share:.0%}" for share in r.accepted_by_position)
            lines.append(
                f"| {names[r.url]} | {r.concurrency} | {_cell(r.acceptance_length, 2)} "
                f"| {_cell(r.acceptance_rate, 1, 100)} % | {positions} |"
            )
    if compared:
        lines += ["", "| A over B, at once | tok/s | per request | latency |", "|" + "---|" * 4]
        for c in compared:
            cells = [_ratio(s) for s in (c.aggregate_tok_s, c.request_tok_s, c.latency_ms)]
            lines.append(f"| {c.concurrency} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
