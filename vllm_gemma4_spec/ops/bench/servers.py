"""Which servers are measured: every result says what it is of."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vllm_gemma4_spec.ops import live, server
from vllm_gemma4_spec.ops.bench.report import BenchError, Server


def models(url: str, api_key: str | None = None) -> list[str]:
    """The names that an OpenAI-compatible server offers.

    Raises:
        ServerError: nothing answers, or not such a server.
    """
    address = f"{server.base_url(url)}/v1/models"
    try:
        found = [str(row["id"]) for row in json.loads(server.get(address, api_key))["data"]]
        return [found[0], *found[1:]]
    except (ValueError, KeyError, IndexError, TypeError):
        raise server.ServerError(f"{address}: no list of models; is this an OpenAI-compatible server?") from None


def identify(url: str, model: str | None, api_key: str | None = None) -> Server:
    """What runs behind ``url``; a server that is not vLLM leaves most of it empty.

    Raises:
        ServerError: nothing answers, or not an OpenAI-compatible server.
        BenchError: it does not serve ``model``.
    """
    names = models(url, api_key)
    if model is not None and model not in names:
        raise BenchError(f"--model {model}: {url} serves {', '.join(names)}")
    try:
        version = server.version(url, api_key)
        samples = server.samples(url, api_key)
    except server.ServerError:  # not vLLM
        return Server(url=url, model=model or names[0])
    sample = live.sample_server(samples, 0.0)
    plugin = next((s.labels.get("version", "") for s in samples if s.name == "gemma4_spec_process"), "")
    return Server(
        url=url,
        model=model or names[0],
        vllm=version,
        plugin=plugin,
        method=sample.server.get("method", ""),
        drafter=sample.server.get("drafter", ""),
        k=len(sample.accepted),
        started=sample.values.get("process_start_time_seconds"),
    )


def different(servers: Sequence[Server]) -> None:
    """
    Raises:
        BenchError: two addresses lead to one server: their API servers started in the same hundredth of a second.
    """
    starts = [s.started for s in servers if s.started is not None]
    if len(servers) > 1 and len(set(starts)) < len(starts):
        raise BenchError(f"--against {servers[1].url} is the same server as --url {servers[0].url}; start another")
