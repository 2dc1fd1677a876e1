"""What parsing costs: processor time per streamed token against the length of the answer, the plugin beside stock.

The engine's outputs are played back through vLLM's own stream generator, so that the numbers hold what a client waits
for: the parser, vLLM's chunks, and their JSON. `plain` is a server without parsers. The three take turns on the same
answers, in blocks: a few runs that do not count, then some of which the median counts. So a busy machine is slow for
all alike, and each finds Python's caches as a server that has nothing else to do leaves them. Ratios are medians over
the blocks.

`--before` adds the package as another checkout has it, in the same process and the same blocks: what a change costs.
Beside it stands the present package once more, loaded as that one is (`again`): by what two equal ones differ.

`--request` adds whole requests: from the request object to the last byte, with template, tokenizer, detokenizer and
stop strings, all that a server does but sampling.

Example: GEMMA4_ARTIFACTS=… python benchmarks/chat_cost.py --request --out chat-cost.json --figure chat-cost.svg
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_gemma4_spec.registry import PATCHER

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the played server is the tests'
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

# Kind of answer -> fields of the request beside the message ("tools" stands for the tests' two).
KINDS: dict[str, dict[str, Any]] = {
    "reasoning": {},
    "content": {},
    "content, tools offered": {"tools": True},
    "content, a stop string": {"stop": ["zzzzzzzz"]},
    "a call": {"tools": True},
    "many calls": {"tools": True},
}


def answer(kind: str, encode: Any, length: int) -> list[int]:
    """A script of about ``length`` tokens."""
    words = "The quick brown fox jumps over the lazy dog, and so on. "
    body = encode(words * (length // 10 + 10))
    if kind == "reasoning":
        head, tail = encode("<|channel>thought\n"), encode("<channel|>Yes.")
    elif kind == "a call":
        head, tail = encode('<|tool_call>call:get{city:<|"|>'), encode('<|"|>}<tool_call|>')
    elif kind == "many calls":
        call = encode('<|tool_call>call:get{city:<|"|>Paris<|"|>,n:12,o:{a:[1,2,true]}}<tool_call|>')
        return (call * (length // len(call) + 1))[: max(length - length % len(call), len(call))]
    else:
        head, tail = [], []
    return [*head, *body[: max(length - len(head) - len(tail), 1)], *tail]


async def outputs(tokens: list[int], texts: list[str], prompt: list[int], step: int) -> AsyncIterator[Any]:
    """RequestOutputs as the engine gives them, ``step`` tokens each."""
    from vllm.outputs import CompletionOutput, RequestOutput

    for at in range(0, len(tokens), step):
        end = at + step >= len(tokens)
        output = CompletionOutput(
            index=0,
            text="".join(texts[at : at + step]),
            token_ids=tokens[at : at + step],
            cumulative_logprob=None,
            logprobs=None,
            finish_reason="length" if end else None,
        )
        yield RequestOutput("r", None, prompt, None, [output], end)


def request(fields: dict[str, Any]) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    from tests.chat.scenarios import TOOLS
    from tests.chat.server import MODEL

    fields = {**fields, "tools": TOOLS} if "tools" in fields else fields
    return ChatCompletionRequest(model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True, **fields)


async def stream(server: Any, generator: Any, fields: dict[str, Any], tokens: list[int], step: int) -> float:
    """Seconds of processor time for one streamed answer, from the engine's outputs on."""
    from tests.chat.server import MODEL

    serving, tokenizer = server.app.state.openai_serving_chat, server.engine.tokenizer
    asked = request(fields)
    parser = serving.reasoning_parser_cls(tokenizer) if serving.reasoning_parser_cls else None
    texts = [tokenizer.decode([t], skip_special_tokens=False) for t in tokens]
    prompt = tokenizer.encode("<|turn>model\n", add_special_tokens=False)
    metadata = SimpleNamespace(final_usage_info=None)
    results = [result async for result in outputs(tokens, texts, prompt, step)]

    async def played() -> AsyncIterator[Any]:
        for result in results:
            yield result

    started = time.process_time()
    async for _ in generator(serving, asked, played(), "r", MODEL, [], tokenizer, metadata, parser):
        pass
    return time.process_time() - started


class Patches:
    """Which of several patches of the chat output is on; each has a patcher of its own."""

    def __init__(self, **patches: tuple[Any, Any]) -> None:
        self._patches = patches
        self._on = "overlay"

    def use(self, name: str) -> None:
        """Undo the one that is on, and apply this one; a name without a patch is stock."""
        if name == self._on:
            return
        for applied, way in ((False, self._on), (True, name)):
            if way in self._patches:
                patcher, patch = self._patches[way]
                (patcher.apply if applied else patcher.undo)([patch])
        self._on = name


async def whole(server: Any, patches: Patches, way: str, fields: dict[str, Any], tokens: list[int], step: int) -> float:
    """Seconds of processor time for one request, up to the last byte of its stream."""
    from tests.chat.server import by

    patches.use(way)
    asked = request({**fields, "max_completion_tokens": len(tokens)})
    server.script(tokens, cut=by(step))
    started = time.process_time()
    async for chunk in await server.app.state.openai_serving_chat.create_chat_completion(asked):
        assert not chunk.startswith('data: {"error"'), chunk
    return time.process_time() - started


def load_checkout(folder: Path, into: Path, name: str) -> tuple[Any, Any]:
    """The package of a checkout under another name: its patcher and its patch of the chat output."""
    source = folder / "vllm_gemma4_spec"
    for file in (*source.rglob("*.py"), *source.rglob("*.json")):
        copy = into / name / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text().replace("vllm_gemma4_spec", name))
    if str(into) not in sys.path:
        sys.path.insert(0, str(into))
    patch = importlib.import_module(f"{name}.chat.patches").CHAT_OUTPUT
    return importlib.import_module(f"{name}.registry").PATCHER, patch


async def block(once: Callable[[], Awaitable[float]], size: int) -> float:
    """The median of some runs after others, as many as answers of ``size`` tokens allow."""
    runs = max(1, min(9, 1000 // size))
    for _ in range(min(5, runs) if size <= 4000 else 0):
        await once()
    return statistics.median([await once() for _ in range(runs)])


async def compare(measured: Any, ways: dict[str, Any], tokens: list[int], blocks: int, *rest: Any) -> dict[str, Any]:
    """Microseconds a token for each way, and the plugin's ratio to stock."""
    fields, step = rest
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    names = [*ways]
    for i in range(blocks):
        for way in names[i % len(names) :] + names[: i % len(names)]:
            seconds[way].append(await block(lambda way=way: measured(*ways[way], fields, tokens, step), len(tokens)))
    row: dict[str, Any] = {"tokens": len(tokens), "step": step, "blocks": blocks}
    row |= {way: round(1e6 * statistics.median(seconds[way]) / len(tokens), 2) for way in ways}
    if "stock" in ways:
        differences = [o - s for o, s in zip(seconds["overlay"], seconds["stock"], strict=True)]
        row["more, us an answer"] = round(1e6 * statistics.median(differences), 1)
    for way in (way for way in ("stock", "before", "again") if way in ways):
        ratios = [o / other for o, other in zip(seconds["overlay"], seconds[way], strict=True)]
        row[f"overlay/{way}"] = round(statistics.median(ratios), 3)
    return row


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    from tests.chat import tokenizer as tokenizers_
    from tests.chat.server import Server
    from vllm_gemma4_spec.chat.patches import CHAT_OUTPUT

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write = tokenizers_.write_genuine if tokenizers_.artifacts() else tokenizers_.write_small
        path = str(write(Path(folder)))
        servers = {"plain": await Server(path, "", None).start(), "parsed": await Server(path).start()}
        logging.disable(logging.CRITICAL)
        PATCHER.apply([CHAT_OUTPUT])
        overlay = OpenAIServingChat.chat_completion_stream_generator
        stock = overlay.__wrapped__  # type: ignore[attr-defined]
        ways: dict[str, Any] = {
            "plain": (servers["plain"], stock),
            "stock": (servers["parsed"], stock),
            "overlay": (servers["parsed"], overlay),
        }
        known = {"overlay": (PATCHER, CHAT_OUTPUT)}
        if args.before:
            for way, checkout in (("before", args.before), ("again", Path(__file__).resolve().parents[1])):
                known[way] = load_checkout(checkout, Path(folder) / "copies", f"{way}_spec")
                generator = importlib.import_module(f"{way}_spec.chat.completions").stream_generator
                ways[way] = (servers["parsed"], generator(stock))
        encode = servers["plain"].engine.tokenizer.encode
        gc.collect()
        gc.freeze()  # vLLM's modules: collecting them again and again would be most of the time
        parts: dict[str, Any] = {"stream": (stream, args.tokens)} if args.tokens else {}
        parts |= {"request": (whole, args.request_tokens)} if args.request else {}
        for part, (measured, lengths) in parts.items():
            if part == "request":  # a server without parsers would refuse tools
                patches = Patches(**known)
                ways = {way: (servers["parsed"], patches, way) for way in ("stock", *known)}
            for kind, length, step in itertools.product(args.kinds, lengths, args.step):
                tokens = [t for t in answer(kind, encode, length) if t != 2]
                blocks = args.blocks if length <= 1000 else max(1, args.blocks * 1000 // length)
                row = {"part": part, "kind": kind}
                row |= await compare(measured, ways, tokens, blocks, KINDS[kind], step)
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                rows.append(row)
                if args.out:  # at once: a long run may be broken off
                    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def draw(rows: list[dict[str, Any]], figure: Path) -> None:
    """One panel per kind: the time of a token against the length, token by token, as a multiple of `plain`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step = min(row["step"] for row in rows)
    fig, axes = plt.subplots(2, 3, figsize=(12, 6.5), sharex=True)
    for kind, ax in zip(KINDS, axes.flat, strict=True):
        mine = [row for row in rows if (row["part"], row["kind"], row["step"]) == ("stream", kind, step)]
        for way, style in (("plain", "--"), ("stock", "-"), ("overlay", "-")):
            ax.plot([r["tokens"] for r in mine], [r[way] / r["plain"] for r in mine], style, marker=".", label=way)
        ax.set(title=kind, xscale="log", yscale="log" if kind == "a call" else "linear")
        if kind != "a call":
            ax.set_ylim(bottom=0)
    for ax in axes[1]:
        ax.set_xlabel("tokens of the answer")
    for ax in axes[:, 0]:
        ax.set_ylabel("processor time a token / plain")
    axes[0][0].legend()
    fig.tight_layout()
    fig.savefig(figure, metadata={"Date": None} if figure.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[12, 30, 60, 125, 250, 500, 1000, 2000, 4000, 8000], help="lengths"
    )
    parser.add_argument("--step", type=int, nargs="+", default=[1, 4], help="tokens in one delta (default 1 and 4)")
    parser.add_argument(
        "--kinds", nargs="+", choices=[*KINDS], default=[*KINDS], help="kinds of answers (default: all)"
    )
    parser.add_argument(
        "--blocks", type=int, default=15, help="blocks; fewer of answers above 1,000 tokens (default 15)"
    )
    parser.add_argument("--before", type=Path, help="another checkout of this project, measured beside")
    parser.add_argument("--request", action="store_true", help="measure whole requests, too")
    parser.add_argument("--request-tokens", type=int, nargs="+", default=[12, 60, 250], help="lengths for them")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--figure", type=Path, help="draw them (needs matplotlib)")
    args = parser.parse_args()
    rows = asyncio.run(measure(args))
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
