"""vLLM's own server code over an engine that plays back scripted tokens.

Real: the FastAPI application, every serving class, the renderer with tokenizer and template, the output processor with
its detokenizer, stop strings and logprobs. Played: what the engine core would sample, and how it cuts it into steps.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

MODEL = "gemma-4-test"
ENDS = (1, 106, 50)  # generation_config.json
Cut = Callable[[int], list[int]]


def by(size: int) -> Cut:
    """Deltas of ``size`` tokens."""
    return lambda length: [min(size, length - at) for at in range(0, length, size)]


ONE_BY_ONE = by(1)


def all_at_once(length: int) -> list[int]:
    return [length]


def random_cut(seed: int) -> Cut:
    def cut(length: int) -> list[int]:
        rng, out = np.random.default_rng(seed), []
        while sum(out) < length:
            out.append(min(int(rng.integers(1, 7)), length - sum(out)))
        return out

    return cut


@dataclass
class HFConfig:
    model_type: str = "gemma4"


@dataclass
class ModelConfig:
    """What the serving classes read of vLLM's ModelConfig."""

    model: str
    tokenizer: str
    task: str = "generate"
    runner_type: str = "generate"
    trust_remote_code: bool = False
    tokenizer_mode: str = "auto"
    max_model_len: int = 20000
    tokenizer_revision: str | None = None
    revision: str | None = None
    multimodal_config: Any = None
    hf_config: Any = field(default_factory=HFConfig)
    hf_text_config: Any = field(default_factory=HFConfig)
    logits_processors: list[str] | None = None
    logits_processor_pattern: str | None = None
    allowed_local_media_path: str = ""
    allowed_media_domains: list[str] | None = None
    encoder_config: Any = None
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] = field(default_factory=dict)
    media_io_kwargs: dict[str, Any] = field(default_factory=dict)
    skip_tokenizer_init: bool = False
    is_encoder_decoder: bool = False
    is_multimodal_model: bool = False
    renderer_num_workers: int = 1
    enable_prompt_embeds: bool = False
    io_processor_plugin: str | None = None
    served_model_name: str = MODEL

    def get_diff_sampling_param(self) -> dict[str, Any]:
        return {}

    def get_vocab_size(self) -> int:
        return 262144


class ScriptedEngine:
    """An engine client whose every request gets ``script`` (a list per choice), in steps that ``cut`` sizes."""

    def __init__(self, folder: str) -> None:
        from vllm.renderers.hf import HfRenderer
        from vllm.tokenizers.registry import cached_tokenizer_from_config

        self.model_config = ModelConfig(model=folder, tokenizer=folder)
        parallel = SimpleNamespace(_api_process_rank=0, data_parallel_size=1)
        self.vllm_config = SimpleNamespace(model_config=self.model_config, parallel_config=parallel, lora_config=None)
        self.tokenizer = cached_tokenizer_from_config(self.model_config)
        self.renderer = HfRenderer(self.vllm_config, self.tokenizer)
        self.io_processor = None
        self.input_processor = None
        self.errored = False
        self.dead_error = RuntimeError("dead")
        self.script: list[Sequence[int]] = [[]]
        self.cut: Cut = by(1)
        self.requests: list[Any] = []  # sampling params of the requests seen
        self.prompts: list[list[int]] = []

    async def is_tracing_enabled(self) -> bool:
        return False

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def _end(self, tokens: Sequence[int], params: Any) -> tuple[list[int], Any, Any]:
        """Where the engine core would stop, and why."""
        from vllm.v1.engine import FinishReason

        for n, token in enumerate(tokens, 1):
            if token in (params.stop_token_ids or ()):
                return list(tokens[:n]), FinishReason.STOP, token
            if not params.ignore_eos and token in ENDS:
                return list(tokens[:n]), FinishReason.STOP, None if token == ENDS[0] else token
            if n == params.max_tokens:
                return list(tokens[:n]), FinishReason.LENGTH, None
        raise AssertionError("a script must end with an end-of-sequence token or reach max_tokens")

    async def generate(self, prompt: Any, params: Any, request_id: str, **_: Any) -> AsyncIterator[Any]:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
        from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
        from vllm.v1.engine.parallel_sampling import ParentRequest

        self.requests.append(params)
        self.prompts.append(list(prompt["prompt_token_ids"]))
        processor = OutputProcessor(self.tokenizer, log_stats=False)
        queue = RequestOutputCollector(params.output_kind, request_id)
        request = EngineCoreRequest(
            request_id, list(prompt["prompt_token_ids"]), None, params, None, time.time(), None, None, None
        )
        request.external_req_id = request_id
        names = [request_id]
        if params.n == 1:
            processor.add_request(request, None, None, 0, queue)
        else:
            parent = ParentRequest(request)
            names = []
            for index in range(params.n):
                child = copy.copy(request)
                child.request_id, child.sampling_params = parent.get_child_info(index)
                processor.add_request(child, None, parent, index, queue)
                names.append(child.request_id)
        scripts = [self._end(self.script[i % len(self.script)], params) for i in range(params.n)]
        steps = []
        for name, (tokens, reason, stop) in zip(names, scripts, strict=True):
            at, mine = 0, []
            for size in self.cut(len(tokens)):
                end = at + size == len(tokens)
                mine.append((name, tokens[at : at + size], reason if end else None, stop if end else None))
                at += size
            steps.append(mine)
        stopped: set[str] = set()
        for k in range(max(map(len, steps))):
            outputs = [
                EngineCoreOutput(
                    mine[k][0],
                    mine[k][1],
                    new_logprobs=_logprobs(mine[k][1]) if params.logprobs is not None else None,
                    finish_reason=mine[k][2],
                    stop_reason=mine[k][3],
                )
                for mine in steps
                if k < len(mine) and mine[k][0] not in stopped
            ]
            done = processor.process_outputs(outputs)
            stopped.update(done.reqs_to_abort)
            while (output := queue.get_nowait()) is not None:
                yield output


def _logprobs(tokens: Sequence[int]) -> Any:
    from vllm.v1.outputs import LogprobsLists

    ids = np.array([[t] for t in tokens])
    return LogprobsLists(ids, np.array([[-0.001 * t] for t in tokens]), np.ones(len(tokens), dtype=int))


class Server:
    """One server: its application, its serving objects, and answers in one plain form."""

    def __init__(self, folder: str, reasoning: str = "gemma4", tools: str | None = "gemma4") -> None:
        self.folder, self.reasoning, self.tools = folder, reasoning, tools
        self.engine = ScriptedEngine(folder)
        self.app: Any = None

    async def start(self) -> Server:
        from vllm.entrypoints.openai.api_server import build_app, init_app_state
        from vllm.entrypoints.openai.cli_args import make_arg_parser
        from vllm.parser import _WrappedParser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        words = ["--model", self.folder, "--served-model-name", MODEL]
        words += ["--reasoning-parser", self.reasoning] if self.reasoning else []
        words += ["--enable-auto-tool-choice", "--tool-call-parser", self.tools] if self.tools else []
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
        args.structured_outputs_config.reasoning_parser = self.reasoning
        self.app = build_app(args, ("generate",))
        await init_app_state(self.engine, self.app.state, args, ("generate",))
        # vLLM keeps the classes in a global; several servers in this process must not share it.
        parser = self.app.state.openai_serving_responses.parser
        if parser is _WrappedParser:
            own = {
                "reasoning_parser_cls": parser.reasoning_parser_cls,
                "tool_parser_cls": parser.tool_parser_cls,
            }
            self.app.state.openai_serving_responses.parser = type("OwnParser", (_WrappedParser,), own)
        return self

    def use_template(self, template: str | None) -> None:
        """Another chat template than the tokenizer's; None: that one again."""
        state = self.app.state
        for serving in (
            state.openai_serving_render,
            state.openai_serving_chat,
            state.openai_serving_responses,
            state.anthropic_serving_messages,
        ):
            serving.chat_template = template

    def script(self, *tokens: Sequence[int], cut: Cut = ONE_BY_ONE) -> None:
        self.engine.script, self.engine.cut = list(tokens), cut

    async def chat(self, **fields: Any) -> list[dict[str, Any]]:
        """/v1/chat/completions; one :func:`answer` per choice."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(model=MODEL, **fields)
        result = await self.app.state.openai_serving_chat.create_chat_completion(request)
        if not request.stream:
            assert hasattr(result, "choices"), result
            return [whole_choice(c.model_dump(), result.usage.completion_tokens) for c in result.choices]
        chunks = [json.loads(line[6:]) async for line in result if not line.startswith("data: [DONE]")]
        return streamed_choices(chunks)


def answer(**fields: Any) -> dict[str, Any]:
    """The plain form: reasoning, content (text), calls ([name, arguments]), finish_reason, usage, logprobs."""
    out = {"reasoning": "", "content": "", "calls": [], "finish_reason": None, "usage": None, "logprobs": []}
    return {**out, **fields}


def whole_choice(choice: dict[str, Any], usage: int) -> dict[str, Any]:
    message = choice["message"]
    return answer(
        reasoning=message.get("reasoning") or "",
        content=message.get("content") or "",
        calls=[[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls") or ()],
        finish_reason=choice["finish_reason"],
        stop_reason=choice.get("stop_reason"),
        usage=usage,
        logprobs=[p["token"] for p in (choice.get("logprobs") or {}).get("content") or ()],
    )


def streamed_choices(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the chunks as a client does."""
    out: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in chunks:
        assert "error" not in chunk, chunk
        if chunk.get("usage"):
            usage = chunk["usage"]["completion_tokens"]
        for choice in chunk["choices"]:
            mine = out.setdefault(choice["index"], answer(stop_reason=None))
            delta = choice["delta"]
            mine["reasoning"] += delta.get("reasoning") or ""
            mine["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                function = call.get("function") or {}
                if call["index"] == len(mine["calls"]):
                    assert call.get("id"), call
                    assert call.get("type") == "function", call
                    mine["calls"].append(["", ""])
                elif call["index"] > len(mine["calls"]):
                    raise AssertionError(f"call {call['index']} before the one in front of it: {call}")
                mine["calls"][call["index"]][0] += function.get("name") or ""
                mine["calls"][call["index"]][1] += function.get("arguments") or ""
            mine["logprobs"] += [p["token"] for p in (choice.get("logprobs") or {}).get("content") or ()]
            if choice.get("finish_reason"):
                assert mine["finish_reason"] is None, "two finishes"
                mine["finish_reason"] = choice["finish_reason"]
                mine["stop_reason"] = choice.get("stop_reason")
    for mine in out.values():
        mine["usage"] = usage
    return [out[i] for i in sorted(out)]


_LOOP: list[asyncio.AbstractEventLoop] = []


def run(coroutine: Any) -> Any:
    """Run in the one event loop of all these tests: vLLM's renderer keeps to the first it meets."""
    if not _LOOP:
        _LOOP.append(asyncio.new_event_loop())
    return _LOOP[0].run_until_complete(coroutine)


def close() -> None:
    """End what vLLM's renderers left running in the loop."""
    while _LOOP:
        loop = _LOOP.pop()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:  # gather() of nothing looks for another loop on Python 3.11
            loop.run_until_complete(asyncio.wait(tasks))
        loop.close()
