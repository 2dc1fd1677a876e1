"""What parsing costs: processor seconds per streamed answer against its length, with the overlay and without.

The engine's outputs are played back token by token through vLLM's own stream generator, so that the numbers hold what
a client waits for: the parser, vLLM's chunks, and their JSON. `plain` is a server without parsers.

Example: GEMMA4_ARTIFACTS=… python benchmarks/chat_cost.py --tokens 1000 2000 4000 8000 --out cost.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the played server is the tests'
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

KINDS = ("reasoning", "content", "a call", "many calls")


def answer(kind: str, encode: Any, length: int) -> list[int]:
    """A script of about ``length`` tokens."""
    words = "The quick brown fox jumps over the lazy dog, and so on. "
    body = encode(words * (length // 10 + 10))
    if kind == "content":
        return body[:length]
    if kind == "reasoning":
        return [*encode("<|channel>thought\n"), *body[: length - 10], *encode("<channel|>Yes.")]
    if kind == "a call":
        head, tail = encode('<|tool_call>call:get{city:<|"|>'), encode('<|"|>}<tool_call|>')
        return [*head, *body[: length - len(head) - len(tail)], *tail]
    call = encode('<|tool_call>call:get{city:<|"|>Paris<|"|>,n:12,o:{a:[1,2,true]}}<tool_call|>')
    return (call * (length // len(call) + 1))[: length - length % len(call)]


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


async def stream(server: Any, kind: str, tokens: list[int], step: int) -> float:
    """Seconds of processor time for one streamed answer."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    from tests.chat.scenarios import TOOLS
    from tests.chat.server import MODEL

    serving, tokenizer = server.app.state.openai_serving_chat, server.engine.tokenizer
    request = ChatCompletionRequest(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True, tools=TOOLS if "call" in kind else None
    )
    parser = serving.reasoning_parser_cls(tokenizer) if serving.reasoning_parser_cls else None
    texts = [tokenizer.decode([t], skip_special_tokens=False) for t in tokens]
    prompt = tokenizer.encode("<|turn>model\n", add_special_tokens=False)
    metadata = SimpleNamespace(final_usage_info=None)
    started = time.process_time()
    results = outputs(tokens, texts, prompt, step)
    async for _ in serving.chat_completion_stream_generator(
        request, results, "r", MODEL, [], tokenizer, metadata, parser
    ):
        pass
    return time.process_time() - started


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    from tests.chat import tokenizer as tokenizers_
    from tests.chat.server import Server
    from vllm_gemma4_spec.patches.chat import CHAT_OUTPUT

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write = tokenizers_.write_genuine if tokenizers_.artifacts() else tokenizers_.write_small
        path = str(write(Path(folder)))
        servers = {"plain": await Server(path, "", None).start(), "parsed": await Server(path).start()}
        logging.disable(logging.CRITICAL)
        for kind in KINDS:
            for length in args.tokens:
                tokens = answer(kind, servers["plain"].engine.tokenizer.encode, length)
                tokens = [t for t in tokens if t != 2]
                row: dict[str, Any] = {"kind": kind, "tokens": len(tokens), "step": args.step}
                names = [n for n in ("plain", "stock", "overlay") if n != "stock" or length <= args.stock_limit]
                seconds: dict[str, list[float]] = {name: [] for name in names}
                for _ in range(args.repeat):  # in turn, so that a busy machine is slow for all alike
                    for name in names:
                        if name == "overlay":
                            CHAT_OUTPUT.apply()
                        server = servers["plain" if name == "plain" else "parsed"]
                        await stream(server, kind, tokens[:50], args.step)  # warm: patching has emptied caches
                        seconds[name].append(await stream(server, kind, tokens, args.step))
                        if name == "overlay":
                            CHAT_OUTPUT.undo()
                row |= {name: min(times) for name, times in seconds.items()}
                print(report(row), flush=True)
                rows.append(row)
    return rows


def report(row: dict[str, Any]) -> str:
    parts = [f"{row['kind']:12} {row['tokens']:6} tokens"]
    for name in ("plain", "stock", "overlay"):
        if name in row:
            parts.append(f"{name} {row[name]:8.3f} s ({1e6 * row[name] / row['tokens']:7.1f} us a token)")
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 1000, 2000, 4000, 8000])
    parser.add_argument("--step", type=int, default=1, help="tokens in one delta (default 1)")
    parser.add_argument("--repeat", type=int, default=3, help="runs; the fastest counts (default 3)")
    parser.add_argument("--stock-limit", type=int, default=8000, help="longest answer for the stock parsers")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    rows = asyncio.run(measure(args))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
