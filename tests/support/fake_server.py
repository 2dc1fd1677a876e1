"""A web server that answers as vLLM's does to ``/version``, ``/metrics``, ``/v1/models`` and ``/v1/completions``."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vllm_gemma4_spec.registry import PATCHES

ALL_ON = {p.name: 1 for p in PATCHES}
INFO = {
    "model": "/models/gemma-4-31B-it", "model_type": "gemma4", "quantization": "modelopt", "method": "draft_model",
    "k": "3", "drafter": "/models/gemma-4-E4B-it", "runner": "V1", "reasoning_parser": "gemma4",
    "tool_call_parser": "gemma4",
}  # fmt: skip


def _sample(name: str, value: float, **labels: str) -> str:
    inside = ",".join(f'{k}="{v}"' for k, v in labels.items())
    return f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"


@dataclass
class State:
    """What the server says; a test changes it while it runs."""

    processes: Mapping[str, Mapping[str, int]] = field(
        default_factory=lambda: {"APIServer": ALL_ON, "EngineCore": ALL_ON}
    )
    info: Mapping[str, str] = field(default_factory=lambda: dict(INFO))
    drafts: int = 1000
    accepted: tuple[int, ...] = (800, 600, 400)
    started: float = 1.0
    more: tuple[str, ...] = ()
    up: bool = True
    models: tuple[str, ...] = ("gemma-4",)
    engine: str = "answers"
    """or ``silent``, ``busy`` (others get tokens), or the text of an error"""
    tokens: int = 7

    def metrics(self) -> str:
        lines = [_sample("vllm:num_requests_running", 1, model_name="gemma-4", engine="0"), *self.more]
        lines.append(_sample("vllm:generation_tokens_total", self.tokens, engine="0"))
        lines.append(_sample("process_start_time_seconds", self.started))
        if self.accepted:
            lines.append(_sample("vllm:spec_decode_num_drafts_total", self.drafts, engine="0"))
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        lines += [_sample(name, n, engine="0", position=str(i)) for i, n in enumerate(self.accepted)]
        for pid, (process, patches) in enumerate(self.processes.items(), 100):
            who = {"process": process, "pid": str(pid)}
            lines.append(_sample("gemma4_spec_process", 1, **who, version="0.1.0"))
            lines += [_sample("gemma4_spec_patch_on", on, **who, patch=patch) for patch, on in patches.items()]
        if self.info:
            lines.append(_sample("gemma4_spec_server", 1, **self.info))
        return "\n".join(lines) + "\n"


@contextlib.contextmanager
def fake_server(state: State) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pages = {
                "/version": json.dumps({"version": "0.19.1"}),
                "/metrics": state.metrics(),
                "/v1/models": json.dumps({"data": [{"id": name} for name in state.models]}),
            }
            known = state.up and self.path in pages
            self.send_response(200 if known else 503)
            self.end_headers()
            self.wfile.write(pages[self.path].encode() if known else b"")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if state.engine in ("silent", "busy"):
                state.tokens += state.engine == "busy"
                ended.wait()
                return
            fine = state.engine == "answers"
            self.send_response(200 if fine else 400)
            self.end_headers()
            self.wfile.write(json.dumps({} if fine else {"error": {"message": state.engine}}).encode())

        def log_message(self, *_: object) -> None:
            pass

    ended = threading.Event()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        ended.set()
        httpd.shutdown()
        httpd.server_close()
