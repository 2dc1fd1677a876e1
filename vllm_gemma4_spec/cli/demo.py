"""``vllm-gemma4-spec demo``: the main job on this machine, from nothing to answers and acceptance rates."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_gemma4_spec.cli import _rich as rich
from vllm_gemma4_spec.cli._tables import show
from vllm_gemma4_spec.ops.output import Output

if TYPE_CHECKING:
    from vllm_gemma4_spec.demo.build import Pair
    from vllm_gemma4_spec.demo.data import Dialogue
    from vllm_gemma4_spec.demo.run import Answer, Drafting


class Call(Output):
    """A tool call."""

    name: str
    arguments: dict[str, Any]


class Asked(Output):
    """One question and its answer, the same streamed and not."""

    kind: str
    messages: list[dict[str, Any]]
    reasoning: str
    content: str
    calls: list[Call]
    right: bool


class Acceptance(Output):
    """What became of one drafter's drafts."""

    drafts: int
    """proposals of k tokens for one request"""
    proposed: int
    """draft tokens"""
    accepted: int
    """draft tokens"""
    accepted_by_position: list[int]
    """drafts accepted up to each position, position 0 first"""
    acceptance_length: float
    """mean tokens that a step with drafts adds to a request, the target's own counted"""


class Report(Acceptance):
    """The whole demo; the fields of its own drafts are the E4B-like drafter's."""

    answers: list[Asked]
    assistant: Acceptance | None
    """the same questions with the MTP assistant; null without speculation, and with --keep"""
    equal_to_plain: bool | None
    """answers equal those without speculation; null without --check"""


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
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the server up afterwards, until Ctrl-C, and say how to ask it.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds until a server must be ready.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/reference/json.md has the schema.")] = False,
    speculation: Annotated[bool, typer.Option("--speculation/--no-speculation", hidden=True)] = True,
) -> None:
    """Serve a small trained Gemma 4 pair with `vllm serve`, ask it, and show what speculation did.

    Makes the pair first if it is not there (see `demo-models`). Every answer is
    asked for twice, streamed and not, and both must be the same. A second
    server drafts with an MTP assistant in place of the E4B-like drafter and
    must give the same answers. Any failure ends with one line and a non-zero
    exit code.

    Example: vllm-gemma4-spec demo --check
    """
    from vllm_gemma4_spec.cli.demo_models import ensure_with_bar
    from vllm_gemma4_spec.demo import build, run

    console = rich.Console(stderr=as_json)
    run.require_vllm()
    pair, _ = ensure_with_bar(models.expanduser().absolute() if models else build.default_folder())
    questions = run.questions()
    # Removed only after success: every error names the log in it.
    logs = Path(tempfile.mkdtemp(prefix="vllm-gemma4-spec-demo-"))
    drafter = "drafter" if speculation else None
    log = logs / "server.log"
    answers, drafting = _serve_and_ask(console, pair, questions, log, drafter, timeout, show=not as_json, keep=keep)
    assistant = None
    if speculation:
        _require_drafts(drafting, log)
        if not as_json and not keep:
            _show_drafting(console, "E4B-like drafter", drafting)
    if speculation and not keep:
        log = logs / "assistant-server.log"
        others, assistant = _serve_and_ask(console, pair, questions, log, "assistant", timeout, show=False)
        _require_drafts(assistant, log)
        _check_all(questions, answers, others, ("drafter's", "assistant's"), log)
        if not as_json:
            _show_drafting(console, "MTP assistant", assistant)
    if check:
        log = logs / "plain-server.log"
        plain, _ = _serve_and_ask(console, pair, questions, log, None, timeout, show=False)
        _check_all(questions, answers, plain, ("speculative", "plain"), log)
        console.print(f"{len(plain)} of {len(plain)} answers equal those of plain decoding")
    if as_json:
        report = _report(questions, answers, drafting, assistant, True if check else None)
        typer.echo(report.model_dump_json(indent=2))
    shutil.rmtree(logs)


def _check_all(
    questions: list[Dialogue], answers: list[Answer], others: list[Answer], names: tuple[str, str], log: Path
) -> None:
    from vllm_gemma4_spec.demo import run

    for question, answer, other in zip(questions, answers, others, strict=True):
        run.check_same(question, answer, other, names, log)


def _numbers(drafting: Drafting) -> dict[str, Any]:
    return {
        "drafts": drafting.drafts,
        "proposed": drafting.proposed,
        "accepted": drafting.accepted,
        "accepted_by_position": drafting.accepted_at,
        "acceptance_length": drafting.acceptance_length,
    }


def _report(
    questions: list[Dialogue],
    answers: list[Answer],
    drafting: Drafting,
    assistant: Drafting | None,
    equal_to_plain: bool | None,
) -> Report:
    from vllm_gemma4_spec.demo import run

    return Report(
        answers=[
            Asked(
                kind=question.kind,
                messages=question.messages,
                reasoning=answer.reasoning,
                content=answer.content,
                calls=[Call(name=name, arguments=arguments) for name, arguments in answer.calls],
                right=run.is_right(question, answer),
            )
            for question, answer in zip(questions, answers, strict=True)
        ],
        **_numbers(drafting),
        assistant=Acceptance(**_numbers(assistant)) if assistant else None,
        equal_to_plain=equal_to_plain,
    )


def _serve_and_ask(
    console: rich.Console,
    pair: Pair,
    questions: list[Dialogue],
    log: Path,
    drafter: str | None,
    timeout: float,
    show: bool,
    keep: bool = False,
) -> tuple[list[Answer], Drafting]:
    """Answers to all questions and the counters, from a server that is gone afterwards."""
    from vllm_gemma4_spec.demo import run
    from vllm_gemma4_spec.demo.server import Server

    kind = {"drafter": "with an E4B-like drafter", "assistant": "with an MTP assistant"}.get(drafter or "", "plain")
    answers = []
    with console.status(f"vllm serve {kind}: starting") as status:

        def waiting(seconds: float) -> None:
            status.update(f"vllm serve {kind}: starting, {seconds:.0f} s  (log: {log})")

        with Server(
            run.serve_arguments(pair, drafter is not None, drafter or "drafter"), log, timeout, waiting
        ) as server:
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
            if keep:
                status.stop()
                if drafting.drafts and show:
                    _show_drafting(console, "E4B-like drafter", drafting)
                _keep(console, server.url)
                status.start()
            status.update("stopping vllm serve")
    return answers, drafting


def _keep(console: rich.Console, url: str) -> None:
    """Until Ctrl-C; says how to ask the server and look at it."""
    body = {
        "model": "gemma4-demo",
        "messages": [{"role": "user", "content": "Count from 9 to 12."}],
        "temperature": 0,  # as the demo asked; and vLLM compiles nothing for it, which takes 10 s on a CPU
        "stream": True,
    }
    command = sys.argv[0]  # as it was called: in a checkout it is not in PATH
    console.print(
        f"\nThe server stays up at {url} until Ctrl-C. In another terminal:\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'\n"
        f"  {command} doctor --url {url}\n"
        f"  {command} top --url {url}\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


def _show(console: rich.Console, question: Dialogue, answer: Answer) -> None:
    from vllm_gemma4_spec.demo import run

    body = rich.Table.grid(padding=(0, 2))
    for message in question.messages:
        if message.get("content"):
            body.add_row(rich.Text(message["role"], style="bold"), rich.Text(message["content"]))
    if answer.reasoning:
        body.add_row(rich.Text("reasoning", style="bold magenta"), rich.Text(answer.reasoning.strip(), style="magenta"))
    for name, arguments in answer.calls:
        written = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
        body.add_row(rich.Text("tool call", style="bold yellow"), rich.Text(f"{name}({written})", style="yellow"))
    if answer.content:
        body.add_row(rich.Text("answer", style="bold green"), rich.Text(answer.content, style="green"))
    right = "right" if run.is_right(question, answer) else "not the expected answer"
    console.print(rich.Panel(body, title=question.kind, subtitle=right, title_align="left", subtitle_align="right"))


def _require_drafts(drafting: Drafting, log: Path) -> None:
    """
    Raises:
        DemoError: the server drafted nothing.
    """
    from vllm_gemma4_spec.demo.run import DemoError

    if not drafting.drafts:
        raise DemoError(f"the server proposed no drafts: speculation was not on; its log: {log}")


def _show_drafting(console: rich.Console, name: str, drafting: Drafting) -> None:
    table = rich.Table("position, from 0", "proposed", "accepted", "share", title=f"{name}: drafts, from /metrics")
    for position, accepted in enumerate(drafting.accepted_at):
        table.add_row(str(position), str(drafting.drafts), str(accepted), f"{accepted / drafting.drafts:.1%}")
    table.add_row("all", str(drafting.proposed), str(drafting.accepted), f"{drafting.accepted / drafting.proposed:.1%}")
    show(console, table)
    console.print(f"acceptance length {drafting.acceptance_length:.2f}")
