"""A ``vllm serve`` of one's own: started on a free loopback port, waited for, and always taken down again."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from vllm_gemma4_spec import interrupts
from vllm_gemma4_spec.errors import Gemma4SpecError

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
STOP_SECONDS = 20.0
KILL_SECONDS = 2.0
VLLM_SERVE = (sys.executable, "-m", "vllm_gemma4_spec.demo.vllm_command", "serve")
# The last line of a traceback, or a line that vLLM logs as an error.
_ERROR = re.compile(
    r"^(?:\([^)]*\) )?(?:ERROR\b.*?\] )?(?:[\w.]+(?:Error|Exception|Interrupt): .*|vllm-gemma4-spec: .*)$"
)


def environment() -> dict[str, str]:
    """Of the server: this process's, and unless that sets it, a small KV cache, no telemetry, no model hub, and vLLM's
    cache beside the demo's models, where one command removes both."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    ours = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return ours | {"VLLM_CACHE_ROOT": str(cache / "vllm-gemma4-spec" / "vllm")} | dict(os.environ)


class ServerError(Gemma4SpecError):
    """The server did not start, did not stay up, or did not answer as it should."""


class Server:
    """Context manager around ``vllm serve ARGUMENTS``; all its processes are gone when the block is left.

    The server runs in a session of its own, so that Ctrl-C reaches this process alone, which then stops the
    server's whole process group.

    Args:
        arguments: what follows ``vllm serve``; host and port are added.
        log: file that takes the server's output.
        timeout: seconds until the server must be ready.
        waiting: called with the seconds waited so far, about twice a second.
        program: what is run in place of ``vllm serve``.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        timeout: float = 600.0,
        waiting: Callable[[float], None] = lambda seconds: None,
        program: Sequence[str] = VLLM_SERVE,
    ) -> None:
        self.program = list(program)
        self.arguments = list(arguments)
        self.log = log
        self.timeout = timeout
        self.waiting = waiting
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self._port = reserved_port()
        port = self._port.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [*self.program, *self.arguments, "--host", "127.0.0.1", "--port", str(port)]
        try:
            with self.log.open("wb") as output, interrupts.held():
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    start_new_session=True,
                )
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the process that was started, the leader of the group; 0 before and after."""
        return self._process.pid if self._process is not None else 0

    def get(self, path: str) -> str:
        """The body of a GET, straight to the server whatever proxies the environment names.

        Raises:
            ServerError: no answer, or not one of status 200.
        """
        try:
            with _DIRECT.open(self.url + path, timeout=30) as answer:
                return str(answer.read().decode())
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"vllm serve: GET {path} failed ({error}); its log: {self.log}") from None

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        started = time.monotonic()
        while (waited := time.monotonic() - started) < self.timeout:
            if process.poll() is not None:
                raise ServerError(
                    f"vllm serve ended with exit code {process.returncode} before it was ready: "
                    f"{last_error(self.log)}; its log: {self.log}"
                )
            with contextlib.suppress(ServerError):
                self.get("/health")
                return
            self.waiting(waited)
            time.sleep(0.5)
        raise ServerError(f"vllm serve was not ready after {self.timeout:.0f} s; its log: {self.log}")

    def wait(self, seconds: float) -> int | None:
        """The exit code once the server has ended by itself; None if it has not after ``seconds``."""
        if self._process is None:
            return None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Ask the process group to end, then make it."""
        process, self._process = self._process, None
        if process is None:
            return
        group = process.pid  # a session's leader is the leader of its group
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
        try:
            _wait_until_gone(process, group, STOP_SECONDS)
        finally:
            # Also when a second Ctrl-C cuts the waiting short.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            process.wait()
            self._port.close()
            _wait_until_gone(process, group, KILL_SECONDS)


def _wait_until_gone(process: subprocess.Popen[bytes], group: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        process.poll()  # reaps the leader, which would count as one of the group otherwise
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)


def reserved_port() -> socket.socket:
    """A socket at a free port, which nobody else is given until it is closed.

    Servers bind with one of these options, too, so one that is told the port can take it; nothing listens at this one.
    """
    held = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        held.setsockopt(socket.SOL_SOCKET, option, 1)
    held.bind(("127.0.0.1", 0))
    return held


def last_error(log: Path) -> str:
    """The first error that a server's log ends with, as one line: later ones only follow from it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if _ERROR.match(line.strip())]
    if errors:
        return re.sub(r"^.*?\] ", "", errors[0].strip())[:300]
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it wrote nothing")
