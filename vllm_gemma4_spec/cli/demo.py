"""``vllm-gemma4-spec demo``: the main job on this machine, from nothing to answers and acceptance figures."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_gemma4_spec.demo.build import Pair
    from vllm_gemma4_spec.demo.data import Dialogue
    from vllm_gemma4_spec.demo.run import Answer, Drafting


def command(
    models: Annotated[
        Path | None,
        typer.Option(
            "--models", help="Folder of the pair.", show_default="$VLLM_GEMMA4_SPEC_DEMO_DIR or the user's cache"
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Serve once more without speculation and compare the answers.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds until a server must be ready.")] = 300.0,
    speculation: Annotated[bool, typer.Option("--speculation/--no-speculation", hidden=True)] = True,
) -> None:
    """Serve a small trained Gemma 4 pair with `vllm serve`, ask it, and show what speculation did.

    Makes the pair first if it is not there (see `demo-models`). Every answer is asked for twice, streamed and
    not, and both must be the same. Any failure ends with one line and a non-zero exit code.

    Example: vllm-gemma4-spec demo --check
    """
    from vllm_gemma4_spec.cli.demo_models import ensure_with_bar
    from vllm_gemma4_spec.demo import build, run

    console = Console()
    run.require_vllm()
    pair, _ = ensure_with_bar(models.expanduser().absolute() if models else build.default_folder())
    questions = run.questions()
    logs = Path(tempfile.mkdtemp(prefix="vllm-gemma4-spec-demo-"))
    # Removed only after success: every error names the log in it.
    with _terminated_like_interrupted():
        answers, drafting = _serve_and_ask(
            console, pair, questions, logs / "server.log", speculation, timeout, show=True
        )
        if speculation:
            _show_drafting(console, drafting, logs / "server.log")
        if check:
            log = logs / "plain-server.log"
            plain, _ = _serve_and_ask(console, pair, questions, log, False, timeout, show=False)
            for question, answer, other in zip(questions, answers, plain, strict=True):
                run.check_same(question, answer, other, ("speculative", "plain"), log)
            console.print(f"{len(plain)} of {len(plain)} answers equal those of plain decoding")
    shutil.rmtree(logs)


def _serve_and_ask(
    console: Console,
    pair: Pair,
    questions: list[Dialogue],
    log: Path,
    speculate: bool,
    timeout: float,
    show: bool,
) -> tuple[list[Answer], Drafting]:
    """Answers to all questions and the counters, from a server that is gone afterwards."""
    from vllm_gemma4_spec.demo import run
    from vllm_gemma4_spec.demo.server import Server

    kind = "with speculation" if speculate else "without speculation"
    answers = []
    with console.status(f"vllm serve {kind}: starting") as status:

        def waiting(seconds: float) -> None:
            status.update(f"vllm serve {kind}: starting, {seconds:.0f} s  (log: {log})")

        with Server(run.serve_arguments(pair, speculate), log, timeout, waiting) as server:
            client = run.connect(server)
            for question in questions:
                status.update(f"asking: {question.kind}")
                whole = run.ask(client, question, stream=False)
                streamed = run.ask(client, question, stream=True)
                if show:
                    _show(console, question, whole)
                run.check_shape(question, whole, log)
                run.check_same(question, whole, streamed, ("non-streamed", "streamed"), log)
                answers.append(whole)
            drafting = run.drafting(server.get("/metrics"))
            status.update("stopping vllm serve")
    return answers, drafting


def _show(console: Console, question: Dialogue, answer: Answer) -> None:
    from vllm_gemma4_spec.demo import run

    body = Table.grid(padding=(0, 2))
    for message in question.messages:
        if message.get("content"):
            body.add_row(Text(message["role"], style="bold"), Text(message["content"]))
    if answer.reasoning:
        body.add_row(Text("reasoning", style="bold magenta"), Text(answer.reasoning.strip(), style="magenta"))
    for name, arguments in answer.calls:
        written = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
        body.add_row(Text("tool call", style="bold yellow"), Text(f"{name}({written})", style="yellow"))
    if answer.content:
        body.add_row(Text("answer", style="bold green"), Text(answer.content, style="green"))
    right = "right" if run.is_right(question, answer) else "not the expected answer"
    console.print(Panel(body, title=question.kind, subtitle=right, title_align="left", subtitle_align="right"))


def _show_drafting(console: Console, drafting: Drafting, log: Path) -> None:
    """
    Raises:
        DemoError: the server drafted nothing.
    """
    from vllm_gemma4_spec.demo.run import DemoError

    if not drafting.drafts:
        raise DemoError(f"the server proposed no drafts: speculation was not on; its log: {log}")
    table = Table("draft position", "proposed", "accepted", "share", title="speculation, from /metrics")
    for position, accepted in enumerate(drafting.accepted_at, 1):
        table.add_row(str(position), str(drafting.drafts), str(accepted), f"{accepted / drafting.drafts:.1%}")
    table.add_row("all", str(drafting.proposed), str(drafting.accepted), f"{drafting.accepted / drafting.proposed:.1%}")
    console.print(table, f"acceptance length {drafting.acceptance_length:.2f}")


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that no server outlives this command."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
