"""The demo's run: serve the pair with speculation, ask through the OpenAI client, read what was accepted."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gemma4_spec.demo import measure
from vllm_gemma4_spec.demo.build import Pair
from vllm_gemma4_spec.demo.data import Dialogue
from vllm_gemma4_spec.demo.server import Server, ServerError
from vllm_gemma4_spec.errors import Gemma4SpecError

if TYPE_CHECKING:
    from openai import OpenAI

MODEL = "gemma4-demo"
DRAFTS = 3
# Kind and thinking of the questions that are asked; each is a held-out one.
ASKED = (("arithmetic", True), ("counting", False), ("listing", True), ("tool call", True), ("tool answer", False))


class DemoError(Gemma4SpecError):
    """The demo found something that is not as it should be."""


@dataclass(frozen=True)
class Answer:
    """What the server made of one answer; ``calls`` are (function name, arguments)."""

    reasoning: str
    content: str
    calls: list[tuple[str, dict[str, Any]]]
    ended: str | None


@dataclass(frozen=True)
class Drafting:
    """The server's speculation counters since it started."""

    drafts: int
    proposed: int
    accepted: int
    accepted_at: list[int] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        return 1 + self.accepted / self.drafts if self.drafts else 1.0


def serve_arguments(pair: Pair, speculate: bool, drafter: str = "drafter") -> list[str]:
    """What follows ``vllm serve``: the flags of the usual Gemma 4 deployment.

    ``drafter``: "drafter", the E4B-like model, or "assistant".

    Eager, because compiling takes longer than all that the demo asks of models this small.
    """
    arguments = [str(pair.target), "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"]
    arguments += ["--enable-prefix-caching", "--enable-chunked-prefill", "--max-num-seqs", "8"]
    arguments += ["--reasoning-parser", "gemma4", "--tool-call-parser", "gemma4", "--enable-auto-tool-choice"]
    if speculate:
        methods = {"drafter": ("draft_model", pair.drafter), "assistant": ("mtp", pair.assistant)}
        method, model = methods[drafter]
        speculation = {"method": method, "model": str(model), "num_speculative_tokens": DRAFTS}
        arguments += ["--speculative-config", json.dumps(speculation)]
    return arguments


def require_vllm() -> None:
    """
    Raises:
        DemoError: vLLM or its OpenAI client is not installed.
    """
    for module in ("vllm", "openai"):
        if importlib.util.find_spec(module) is None:
            raise DemoError(f"{module} is not installed in this Python; run `make setup` in the checkout")


def questions() -> list[Dialogue]:
    """One held-out question of each wanted kind."""
    stream = measure.held_out(400)
    return [next(d for d in stream if (d.kind, d.thinking) == wanted) for wanted in ASKED]


def connect(server: Server) -> OpenAI:
    from openai import DefaultHttpxClient, OpenAI

    # The server is on this machine: a proxy named in the environment must not come between.
    http = DefaultHttpxClient(trust_env=False)
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120, http_client=http)


def ask(client: OpenAI, question: Dialogue, stream: bool, arrived: Callable[[str], None] = lambda text: None) -> Answer:
    """Ask greedily; ``arrived`` is given each piece of reasoning and content as it comes, when streamed.

    Raises:
        DemoError: the server refused the request or broke off.
    """
    from openai import OpenAIError

    request: dict[str, Any] = {
        "model": MODEL,
        "messages": _json_arguments(question.messages),
        "temperature": 0,
        "max_tokens": 160,
        "extra_body": {"chat_template_kwargs": {"enable_thinking": question.thinking}},
    }
    if question.tools:
        request["tools"] = question.tools
    try:
        if stream:
            return _join(client.chat.completions.create(**request, stream=True), arrived)
        (choice,) = client.chat.completions.create(**request).choices
    except OpenAIError as error:
        raise DemoError(f"vllm serve did not answer a question ({question.kind}): {error}") from None
    message = choice.message
    made = [(c.function.name, c.function.arguments) for c in message.tool_calls or [] if c.type == "function"]
    return _answer(_reasoning(message), message.content or "", made, choice.finish_reason)


def _join(chunks: Any, arrived: Callable[[str], None]) -> Answer:
    reasoning, content, ended = "", "", None
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            thought, text = _reasoning(choice.delta), choice.delta.content or ""
            reasoning += thought
            content += text
            arrived(thought or text)
            for part in choice.delta.tool_calls or []:
                call = calls.setdefault(part.index, ["", ""])
                call[0] += part.function.name or ""
                call[1] += part.function.arguments or ""
            ended = choice.finish_reason or ended
    return _answer(reasoning, content, [(name, text) for name, text in calls.values()], ended)


def _answer(reasoning: str, content: str, calls: list[tuple[str, str]], ended: str | None) -> Answer:
    made = []
    for name, text in calls:
        try:
            made.append((name, json.loads(text)))
        except ValueError:
            raise DemoError(f"vllm serve gave arguments of {name} that are no JSON: {text!r}") from None
    return Answer(reasoning, content, made, ended)


def _reasoning(message: Any) -> str:
    """vLLM's own field beside OpenAI's: ``reasoning``."""
    return (message.model_extra or {}).get("reasoning") or ""


def _json_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages carry a call's arguments as JSON text, the template's as a mapping."""
    out = []
    for message in messages:
        calls = [
            {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
            for c in message.get("tool_calls", [])
        ]
        out.append({**message, "tool_calls": calls} if calls else message)
    return out


def is_right(question: Dialogue, answer: Answer) -> bool:
    """Whether the answer is the one right answer, reasoning included."""
    reasoning = question.reasoning if question.thinking else ""
    return (answer.reasoning.strip(), answer.content.strip(), answer.calls) == (
        reasoning,
        question.content,
        question.calls,
    )


def drafting(metrics: str) -> Drafting:
    """Read the speculation counters from the text of ``/metrics``."""
    from prometheus_client.parser import text_string_to_metric_families

    sums: dict[str, int] = {}
    at: dict[int, int] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:spec_decode_num_")
            if name == "accepted_tokens_per_pos_total":
                position = int(sample.labels["position"])
                at[position] = at.get(position, 0) + int(sample.value)
            elif name in ("drafts_total", "draft_tokens_total", "accepted_tokens_total"):
                sums[name] = sums.get(name, 0) + int(sample.value)
    return Drafting(
        sums.get("drafts_total", 0),
        sums.get("draft_tokens_total", 0),
        sums.get("accepted_tokens_total", 0),
        [at[position] for position in sorted(at)],
    )


def check_same(question: Dialogue, one: Answer, other: Answer, names: tuple[str, str], log: Path) -> None:
    """
    Raises:
        DemoError: the two answers differ; names the first field that does.
    """
    for part in ("reasoning", "content", "calls", "ended"):
        a, b = getattr(one, part), getattr(other, part)
        if a != b:
            raise DemoError(
                f"{question.kind}: {part} of the {names[0]} answer is {a!r}, of the {names[1]} answer {b!r}; "
                f"the server's log: {log}"
            )


def check_shape(question: Dialogue, answer: Answer, log: Path) -> None:
    """
    Raises:
        DemoError: reasoning, content or a tool call is missing where the question asks for one.
    """
    wanted = {"reasoning": question.thinking, "content": bool(question.content), "calls": bool(question.calls)}
    for part, needed in wanted.items():
        if needed and not getattr(answer, part):
            raise DemoError(f"{question.kind}: the answer has no {part}; the server's log: {log}")


__all__ = [
    "Answer",
    "DemoError",
    "Drafting",
    "ServerError",
    "ask",
    "check_same",
    "check_shape",
    "connect",
    "drafting",
    "is_right",
    "questions",
    "require_vllm",
    "serve_arguments",
]
