"""`top` and the Grafana dashboard, from the metrics of a real server."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import promql_parser
import pytest

from tests.support.commands import free_port, gemma4_spec, printed
from vllm_gemma4_spec.ops import live, server
from vllm_gemma4_spec.ops.server import Sample

DASHBOARD = json.loads((Path(__file__).parents[2] / "overlays" / "grafana.json").read_text())
_SPEC = "vllm:spec_decode_num"


def samples(drafts: float, accepted: list[float], tokens: float) -> list[Sample]:
    per_position = [
        Sample(f"{_SPEC}_accepted_tokens_per_pos_total", {"position": str(i)}, a) for i, a in enumerate(accepted)
    ]
    return [
        Sample(f"{_SPEC}_drafts_total", {}, drafts),
        Sample("vllm:generation_tokens_total", {"engine": "0"}, tokens),
        Sample("vllm:generation_tokens_total", {"engine": "1"}, tokens),
        *per_position,
    ]


def test_rates_between_two_looks() -> None:
    one = live.look(samples(10, [8, 4], 100), 5.0)
    two = live.look(samples(30, [26, 8], 150), 7.0)
    figures = live.between(one, two)
    assert figures.accepted_by_position == (0.9, 0.2)
    assert figures.acceptance_length == pytest.approx(2.1)
    assert figures.output_tok_s == 50  # both engines
    assert live.between(two, two).acceptance_length is None


def test_no_server_is_one_line() -> None:
    done = gemma4_spec("top", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def _complete(url: str, prompt: int = 3, max_tokens: int = 9) -> None:
    model = json.loads(server.get(f"{url}/v1/models"))["data"][0]["id"]
    body = {"model": model, "prompt": [5] * prompt, "max_tokens": max_tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=120).read()


@pytest.mark.slow
def test_top_of_a_real_server(speculating_server: str) -> None:
    done = gemma4_spec("top", "--url", speculating_server, "--interval", "0.2", "--json")
    assert done.returncode == 0, done.stderr
    figures = printed("top", done)
    assert figures["processes"] == 2
    assert figures["patches"]["draft-groups"] == 2
    text = gemma4_spec("top", "--url", speculating_server, "--interval", "0.2").stdout
    assert "in all 2 processes" in text
    assert "\x1b[" not in text


def test_every_query_of_the_dashboard_is_promql() -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    for query in queries:
        promql_parser.parse(query.replace("$__rate_interval", "1m"))
    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse("sum(rate(x[1m])")


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.slow
def test_drafts_skipped_in_the_worker_are_shown_by_the_api_server(speculating_server: str) -> None:
    """Up to the maximum length of 512: the last few steps go without drafts."""

    def skipped() -> list[float]:
        return [s.value for s in server.samples(speculating_server) if s.name == "gemma4_spec_drafts_skipped_total"]

    before = sum(skipped())
    _complete(speculating_server, prompt=500, max_tokens=12)
    assert len(skipped()) == 2  # API server and engine core
    assert 0 < sum(skipped()) - before <= 2 * 3


@pytest.mark.slow
def test_the_dashboard_asks_for_figures_that_exist(speculating_server: str) -> None:
    _complete(speculating_server)
    known = {s.name for s in server.samples(speculating_server)}
    asked = {
        name
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:vllm:|gemma4_spec_)\w+", target["expr"])
    }
    assert len(asked) >= 9
    assert asked <= known
