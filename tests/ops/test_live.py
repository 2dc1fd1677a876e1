"""`top` and the Grafana dashboard, from the metrics of a real server."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pty
import re
import select
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import promql_parser
import pytest

from tests.support.commands import MAIN, demo_server, environment, free_port, gemma4_spec, in_process, printed
from tests.support.fake_server import State, fake_server
from vllm_gemma4_spec.demo.build import Pair
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


def test_rates_between_two_samples() -> None:
    one = live.sample_server(samples(10, [8, 4], 100), 5.0)
    two = live.sample_server(samples(30, [26, 8], 150), 7.0)
    rates = live.between(one, two)
    assert rates.accepted_by_position == (0.9, 0.2)
    assert rates.acceptance_length == pytest.approx(2.1)
    assert rates.output_tok_s == 50  # both engines
    assert live.between(two, two).acceptance_length is None


def test_latencies_and_prefix_hits_are_those_of_the_interval() -> None:
    names = ("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds")

    def at(scale: float) -> list[Sample]:
        out = [Sample(f"{n}_{end}", {}, v * scale) for n in names for end, v in (("sum", 0.5), ("count", 10))]
        out += [Sample("vllm:prefix_cache_queries_total", {}, 100 * scale)]
        return [*out, Sample("vllm:prefix_cache_hits_total", {}, 25 * scale), *samples(10, [8], 100 * scale)]

    now = live.between(live.sample_server(at(1), 0.0), live.sample_server(at(3), 1.0))
    assert (now.ttft_ms, now.itl_ms, now.prefix_hits, now.k) == (pytest.approx(50), pytest.approx(50), 0.25, 1)
    restarted = live.between(
        live.sample_server([*at(9), Sample("vllm:prompt_tokens_total", {}, 9)], 0.0), live.sample_server(at(1), 1.0)
    )
    assert restarted.output_tok_s == 200


def test_a_server_that_is_not_vllm_is_said() -> None:
    with fake_server(State()) as url:
        shown = in_process("top", "--url", url, "--interval", "0.1").stdout
    assert "gemma-4, draft_model, k = 3" in shown

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"go_goroutines 7\n")

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    done = in_process("top", "--url", f"http://127.0.0.1:{httpd.server_port}", "--interval", "0.1")
    httpd.shutdown()
    httpd.server_close()
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "not vLLM" in done.stderr


Play = Callable[[Callable[[], str], Callable[[bytes], object]], None]


def _terminal(command: list[str], play: Play) -> tuple[int, str]:
    """Runs ``command`` in a terminal of its own; ``play`` gets what was shown so far, and a way to type."""
    ours, theirs = pty.openpty()
    env = environment() | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = bytearray()

    def read() -> str:
        while select.select([ours], [], [], 0.1)[0]:
            try:
                shown.extend(os.read(ours, 65536))
            except OSError:  # the terminal's other end is closed
                break
        return shown.decode(errors="replace")

    try:
        play(read, lambda data: os.write(ours, data))
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            read()
        return process.wait(1), read()
    finally:
        process.kill()
        os.close(ours)


def until(read: Callable[[], str], word: str) -> None:
    end = time.monotonic() + 60
    while word not in read():
        assert time.monotonic() < end, read()[-2000:]


def test_top_survives_a_restart_and_q_ends_it() -> None:
    state, stop = State(), threading.Event()

    def play(read: Callable[[], str], write: Callable[[bytes], object]) -> None:
        until(read, "position 2")
        state.up = False
        until(read, "waiting for it")
        state.up, state.accepted = True, (9, 8, 7, 6, 5)
        until(read, "position 4")
        write(b"x")
        write(b"q")

    with fake_server(state) as url:
        counting = threading.Thread(target=_count_up, args=(state, stop), daemon=True)
        counting.start()
        try:
            code, shown = _terminal([*MAIN, "top", "--url", url, "--interval", "0.1"], play)
        finally:
            stop.set()
            counting.join()
    assert code == 0
    assert "Traceback" not in shown


def _count_up(state: State, stop: threading.Event) -> None:
    """Drafts go on being verified, so that there is something to show in each interval."""
    while not stop.wait(0.02):
        state.drafts += 10
        state.accepted = tuple(n + 9 - i for i, n in enumerate(state.accepted))


@pytest.mark.slow
def test_top_survives_a_restart_of_a_real_server(pair: Pair, tmp_path: Path) -> None:
    """It speculates, goes away, and comes back without speculation."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def play(read: Callable[[], str], write: Callable[[bytes], object]) -> None:
        while "position 2" not in read():
            _complete(url)
        running.close()
        until(read, "waiting for it")
        running.enter_context(demo_server(pair, tmp_path / "second", speculates=False, port=port))
        until(read, "no speculation")
        write(b"q")

    with contextlib.ExitStack() as running:
        running.enter_context(demo_server(pair, tmp_path / "first", port=port))
        code, shown = _terminal([*MAIN, "top", "--url", url, "--interval", "0.5"], play)
    assert code == 0
    assert "gemma4-demo, draft_model, k = 3" in shown
    assert "Traceback" not in shown


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
    rates = printed("top", done)
    assert rates["processes"] == 2
    assert rates["patches"]["draft-groups"] == 2
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
def test_the_dashboard_asks_for_metrics_that_exist(speculating_server: str) -> None:
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
