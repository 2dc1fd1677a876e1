"""A real Prometheus with the overlay's configuration scrapes a server, and answers every query of the dashboard."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import free_port

OVERLAYS = Path(__file__).parents[2] / "overlays"
DASHBOARD = json.loads((OVERLAYS / "grafana.json").read_text())
QUERIES = {target["expr"]: panel["title"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
METRICS = sorted({name for query in QUERIES for name in re.findall(r"(?:vllm:|gemma4_spec_)\w+", query)})
PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus (Debian's package) is not here")


def samples(seconds: float) -> str:
    """Every metric that the dashboard asks for, rising; the labels are vLLM's."""
    lines = []
    for name in METRICS:
        labels = ['engine="0",model_name="gemma-4"'] if name.startswith("vllm:") else ['process="EngineCore",pid="7"']
        if name.endswith("_bucket"):
            labels = [f'{labels[0]},le="{le}"' for le in ("0.1", "1.0", "+Inf")]
        elif name.endswith("_per_pos_total"):
            labels = [f'{labels[0]},position="{position}"' for position in range(3)]
        elif name.startswith("gemma4_spec_nan"):
            labels = [f'{labels[0]},repair="saturated"']
        elif name == "vllm:request_success_total":
            labels = [f'{labels[0]},finished_reason="{reason}"' for reason in ("stop", "error")]
        for step, each in enumerate(labels, 1):
            share = step / len(labels) if name.endswith("_bucket") else 1 / step
            lines.append(f"{name}{{{each}}} {seconds * 10 * share}")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def served() -> Iterator[int]:
    start = time.monotonic()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(samples(time.monotonic() - start).encode())

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield httpd.server_port
    finally:
        httpd.shutdown()
        httpd.server_close()


def ask(url: str, query: str) -> list[Any]:
    for name, value in {"$instance": ".*", "$model_name": ".*", "$__rate_interval": "30s"}.items():
        query = query.replace(name, value)
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode({'query': query})}", timeout=10) as response:
        found: list[Any] = json.load(response)["data"]["result"]
    return found


def test_every_query_has_an_answer(tmp_path: Path) -> None:
    text = (OVERLAYS / "monitoring" / "prometheus.yml").read_text()
    port = free_port()
    with served() as target:
        config = tmp_path / "prometheus.yml"
        assert '"vllm:8000"' in text
        config.write_text(text.replace("vllm:8000", f"127.0.0.1:{target}").replace("interval: 5s", "interval: 1s"))
        command = [str(PROMETHEUS), f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            url, end = f"http://127.0.0.1:{port}/api/v1/query", time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(0.5)
                with contextlib.suppress(OSError):
                    if ask(url, f"changes({METRICS[-1]}[30s]) >= 2"):
                        break
            for query, title in QUERIES.items():
                found = ask(url, query)
                values = [float(series["value"][1]) for series in found]
                assert values, f"{title}: {query}: no answer; {(tmp_path / 'log').read_text()[-2000:]}"
                assert all(map(math.isfinite, values)), f"{title}: {values}"
                if "per_pos" in query:
                    shares = {series["metric"]["position"]: float(series["value"][1]) for series in found}
                    assert shares["0"] > shares["1"] > shares["2"] > 0
        finally:
            process.terminate()
            process.wait(30)
