"""One client library against one server: what its user sees, as JSON. Run in the clients' own environment.

    python drive.py NAME URL

Every client asks for reasoning, runs a tool loop of two rounds (a call, then the answer to its result) and asks for an
object of a schema; each streamed and not, as far as it can.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

MODEL = "gemma4-demo"
QUESTION = "Anna has 3 apples and buys 4 more. How many apples does Anna have now?"
ROUNDS = ("What is the weather in Oslo?",)  # each: a call, then the answer to its result; the demo pair knows no more
RESULT = "sunny, 21 degrees"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "The weather in a city.", "parameters": PARAMETERS}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
CAPITAL = "What is the capital of Norway?"
Seen = dict[str, Any]


def get_weather(city: str) -> str:
    """The weather in a city."""
    CALLED.append(city)
    return RESULT


CALLED: list[str] = []


def openai_chat(url: str) -> Seen:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="-")
    tools = [{"type": "function", "function": FUNCTION}]

    def ask(stream: bool, messages: list[Any], **more: Any) -> dict[str, Any]:
        request: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 160, "messages": messages, **more}
        if not stream:
            return client.chat.completions.create(**request).choices[0].message.model_dump(exclude_none=True)
        with client.chat.completions.stream(**request) as events:
            reasoning = "".join(
                getattr(e.chunk.choices[0].delta, "reasoning", None) or ""
                for e in events
                if e.type == "chunk" and e.chunk.choices
            )
            message = events.get_final_completion().choices[0].message.model_dump(exclude_none=True)
        message.pop("parsed", None)
        for call in message.get("tool_calls") or ():
            call["function"].pop("parsed_arguments", None)
            call.pop("index", None)
        return {**message, "reasoning": reasoning}

    def turn(stream: bool, messages: list[Any]) -> Turn:
        message = ask(stream, messages, tools=tools, reasoning_effort="low")
        messages.append(message)
        calls = [(c["id"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls") or ()]
        return message.get("content") or "", calls

    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    return both(
        lambda s: ask(s, [{"role": "user", "content": QUESTION}], reasoning_effort="low"),
        lambda s: tool_loop(functools.partial(turn, s), _tool_message),
        lambda s: ask(s, [{"role": "user", "content": CAPITAL}], response_format=schema)["content"],
    )


# What an assistant said, and its calls: ids and arguments.
Turn = tuple[str, list[tuple[str, dict[str, Any]]]]


def _user_message(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _tool_message(call_id: str, told: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": told}


def tool_loop(
    turn: Callable[[list[Any]], Turn], result: Callable[[str, str], Any], user: Callable[[str], Any] = _user_message
) -> str:
    """The last answer: questions are asked, and results sent back, until nothing is called any more.

    Args:
        turn: sends the messages and appends the answer to them.
        result: makes the message of a call's result.
        user: makes the message of a question.
    """
    messages: list[Any] = []
    text = ""
    for question in ROUNDS:
        messages.append(user(question))
        for _ in range(3):
            text, calls = turn(messages)
            messages += [result(call_id, get_weather(**arguments)) for call_id, arguments in calls]
            if not calls:
                break
    return text


def both(
    plain: Callable[[bool], dict[str, Any]], loop: Callable[[bool], str], structured: Callable[[bool], Any]
) -> Seen:
    """Everything, not streamed and streamed; an error is what a user sees as well."""
    out: Seen = {}
    for name, stream in (("whole", False), ("streamed", True)):
        seen: Seen = {}
        message = plain(stream)
        seen["reasoning"], seen["content"] = message.get("reasoning") or "", message.get("content") or ""
        CALLED.clear()
        seen["last"] = loop(stream)
        seen["called"] = list(CALLED)
        value = structured(stream)
        seen["structured"] = json.loads(value) if isinstance(value, str) else value
        out[name] = seen
    return out


def openai_responses(url: str) -> Seen:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="-")
    tools = [{"type": "function", **FUNCTION}]

    def ask(stream: bool, items: Any, **more: Any) -> Any:
        request: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 160, "input": items, **more}
        if not stream:
            return client.responses.create(**request)
        with client.responses.stream(**request) as events:
            for _ in events:
                pass
            return events.get_final_response()

    def plain(stream: bool) -> dict[str, Any]:
        response = ask(stream, QUESTION, reasoning={"effort": "low"})
        thought = [part.text for item in response.output if item.type == "reasoning" for part in item.content or ()]
        return {"reasoning": "".join(thought), "content": response.output_text}

    def turn(stream: bool, items: list[Any]) -> Turn:
        response = ask(stream, items, tools=tools, reasoning={"effort": "low"})
        items += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in response.output]
        calls = [item for item in response.output if item.type == "function_call"]
        return response.output_text, [(call.call_id, json.loads(call.arguments)) for call in calls]

    def result(call_id: str, told: str) -> dict[str, Any]:
        return {"type": "function_call_output", "call_id": call_id, "output": told}

    def loop(stream: bool) -> str:
        return tool_loop(functools.partial(turn, stream), result)

    schema = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    return both(plain, loop, lambda s: ask(s, CAPITAL, text=schema).output_text)


def anthropic_messages(url: str) -> Seen:
    import anthropic

    client = anthropic.Anthropic(base_url=url, api_key="-")
    tools: Any = [{"name": "get_weather", "description": FUNCTION["description"], "input_schema": PARAMETERS}]
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}

    def ask(stream: bool, messages: Any, **more: Any) -> Any:
        request: Any = {"model": MODEL, "max_tokens": 1200, "messages": messages, **more}
        request.setdefault("extra_body", {"temperature": 0})
        if not stream:
            return client.messages.create(**request)
        with client.messages.stream(**request) as events:
            return events.get_final_message()

    def plain(stream: bool) -> dict[str, Any]:
        message = ask(stream, [{"role": "user", "content": QUESTION}], thinking=thinking)
        texts = {
            kind: "".join(getattr(b, kind) for b in message.content if b.type == kind) for kind in ("thinking", "text")
        }
        return {"reasoning": texts["thinking"], "content": texts["text"]}

    def turn(stream: bool, messages: list[Any]) -> Turn:
        message = ask(stream, messages, tools=tools, thinking=thinking)
        messages.append({"role": "assistant", "content": message.content})
        calls = [(b.id, b.input) for b in message.content if b.type == "tool_use"]
        return "".join(b.text for b in message.content if b.type == "text"), calls

    def result(call_id: str, told: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call_id, "content": told}]}

    def loop(stream: bool) -> str:
        return tool_loop(functools.partial(turn, stream), result)

    def structured(stream: bool) -> Any:
        tool: Any = {"name": "city", "input_schema": CITY}
        choice: Any = {"type": "tool", "name": "city"}
        message = ask(stream, [{"role": "user", "content": CAPITAL}], tools=[tool], tool_choice=choice)
        return next(b.input for b in message.content if b.type == "tool_use")

    return both(plain, loop, structured)


def _langchain(model: Any, thinks: Any, schema_method: str) -> Seen:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    weather = tool(get_weather)

    def ask(stream: bool, chain: Any, messages: list[Any]) -> Any:
        if not stream:
            return chain.invoke(messages)
        chunks = list(chain.stream(messages))
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole = whole + chunk
        return whole

    def plain(stream: bool) -> dict[str, Any]:
        message = ask(stream, thinks, [HumanMessage(QUESTION)])
        thought = [b.get("reasoning") or "" for b in message.content_blocks if b["type"] == "reasoning"]
        return {"reasoning": "".join(thought), "content": message.text}

    def turn(stream: bool, messages: list[Any]) -> Turn:
        message = ask(stream, thinks.bind_tools([weather]), messages)
        messages.append(message)
        return message.text, [(call["id"], call["args"]) for call in message.tool_calls]

    def result(call_id: str, told: str) -> Any:
        return ToolMessage(told, tool_call_id=call_id)

    def loop(stream: bool) -> str:
        return tool_loop(functools.partial(turn, stream), result, HumanMessage)

    def structured(stream: bool) -> Any:
        chain = model.with_structured_output({"title": "city", "description": "-", **CITY}, method=schema_method)
        return list(chain.stream(CAPITAL))[-1] if stream else chain.invoke(CAPITAL)

    return both(plain, loop, structured)


def langchain_openai(url: str) -> Seen:
    from langchain_openai import ChatOpenAI

    how: dict[str, Any] = {"model": MODEL, "base_url": f"{url}/v1", "api_key": "-", "temperature": 0, "max_tokens": 160}
    model = ChatOpenAI(**how)
    return _langchain(
        model, ChatOpenAI(**how, use_responses_api=True, reasoning={"effort": "low", "summary": "auto"}), "json_schema"
    )


def langchain_anthropic(url: str) -> Seen:
    from langchain_anthropic import ChatAnthropic

    how: dict[str, Any] = {"model": MODEL, "base_url": url, "api_key": "-", "max_tokens": 1200}
    thinks = ChatAnthropic(
        **how, thinking={"type": "enabled", "budget_tokens": 1024}, model_kwargs={"extra_body": {"temperature": 0}}
    )
    return _langchain(ChatAnthropic(**how, temperature=0), thinks, "function_calling")


def litellm(url: str) -> Seen:
    import litellm as library

    tools = [{"type": "function", "function": FUNCTION}]

    def ask(stream: bool, messages: list[Any], **more: Any) -> Any:
        request: dict[str, Any] = {
            "model": f"hosted_vllm/{MODEL}",
            "api_base": f"{url}/v1",
            "temperature": 0,
            "max_tokens": 160,
        }
        reply = library.completion(**request, messages=messages, stream=stream, **more)
        if stream:
            reply = library.stream_chunk_builder(list(reply), messages=messages)
        return reply.choices[0].message

    def plain(stream: bool) -> dict[str, Any]:
        message = ask(stream, [{"role": "user", "content": QUESTION}], reasoning_effort="low")
        return {"reasoning": getattr(message, "reasoning_content", None), "content": message.content}

    def turn(stream: bool, messages: list[Any]) -> Turn:
        message = ask(stream, messages, tools=tools, reasoning_effort="low")
        messages.append(message.model_dump(exclude_none=True))
        calls = [(call.id, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
        return message.content or "", calls

    def loop(stream: bool) -> str:
        return tool_loop(functools.partial(turn, stream), _tool_message)

    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    return both(plain, loop, lambda s: ask(s, [{"role": "user", "content": CAPITAL}], response_format=schema).content)


def openai_agents(url: str) -> Seen:
    import agents
    from openai import AsyncOpenAI
    from openai.types.shared import Reasoning
    from pydantic import BaseModel

    class City(BaseModel):
        city: Literal["Oslo", "Rome"]

    agents.set_tracing_disabled(True)
    events = asyncio.new_event_loop()  # one for all requests: the client's connections belong to it
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="-")
    model = agents.OpenAIResponsesModel(MODEL, client)
    thinks = agents.ModelSettings(temperature=0, max_tokens=160, reasoning=Reasoning(effort="low", summary="auto"))

    def run(stream: bool, agent: Any, given: Any) -> Any:
        async def go() -> Any:
            if not stream:
                return await agents.Runner.run(agent, given)
            result = agents.Runner.run_streamed(agent, given)
            async for _ in result.stream_events():
                pass
            return result

        return events.run_until_complete(go())

    def plain(stream: bool) -> dict[str, Any]:
        result = run(stream, agents.Agent("a", model=model, model_settings=thinks), QUESTION)
        items = [item.raw_item for item in result.new_items if item.type == "reasoning_item"]
        return {"reasoning": "".join(p.text for i in items for p in i.summary), "content": result.final_output}

    def loop(stream: bool) -> str:
        agent = agents.Agent("a", model=model, model_settings=thinks, tools=[agents.function_tool(get_weather)])
        given: list[Any] = []
        for question in ROUNDS:
            result = run(stream, agent, [*given, {"role": "user", "content": question}])
            given = result.to_input_list()
        return str(result.final_output)

    def structured(stream: bool) -> Any:
        settings = agents.ModelSettings(temperature=0, max_tokens=160)
        agent = agents.Agent("a", model=model, model_settings=settings, output_type=City)
        return run(stream, agent, CAPITAL).final_output.model_dump()

    return both(plain, loop, structured)


def pydantic_ai(url: str) -> Seen:
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIResponsesModel, OpenAIResponsesModelSettings
    from pydantic_ai.providers.openai import OpenAIProvider

    class City(BaseModel):
        city: Literal["Oslo", "Rome"]

    model = OpenAIResponsesModel(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="-"))
    thinks = OpenAIResponsesModelSettings(
        temperature=0, max_tokens=160, openai_reasoning_effort="low", openai_reasoning_summary="auto"
    )

    def run(stream: bool, agent: Any, given: str, history: Any = None) -> tuple[Any, list[Any]]:
        async def go() -> tuple[Any, list[Any]]:
            if not stream:
                result = await agent.run(given, message_history=history)
                return result.output, result.all_messages()
            async with agent.run_stream(given, message_history=history) as streamed:
                return await streamed.get_output(), streamed.all_messages()

        return asyncio.run(go())

    def plain(stream: bool) -> dict[str, Any]:
        output, messages = run(stream, Agent(model, model_settings=thinks), QUESTION)
        thought = [p.content for m in messages for p in m.parts if p.part_kind == "thinking"]
        return {"reasoning": "".join(thought), "content": output}

    def loop(stream: bool) -> str:
        agent = Agent(model, model_settings=thinks, tools=[get_weather])
        output, history = "", None
        for question in ROUNDS:
            output, history = run(stream, agent, question, history)
        return str(output)

    def structured(stream: bool) -> Any:
        settings = OpenAIResponsesModelSettings(temperature=0, max_tokens=160)
        agent = Agent(model, output_type=NativeOutput(City), model_settings=settings)
        return run(stream, agent, CAPITAL)[0].model_dump()

    return both(plain, loop, structured)


def instructor(url: str) -> Seen:
    import instructor as library
    from openai import OpenAI
    from pydantic import BaseModel

    class City(BaseModel):
        city: Literal["Oslo", "Rome"]

    client = library.from_openai(OpenAI(base_url=f"{url}/v1", api_key="-"), mode=library.Mode.TOOLS)
    schemas = library.from_openai(OpenAI(base_url=f"{url}/v1", api_key="-"), mode=library.Mode.JSON_SCHEMA)
    out: Seen = {}
    for name, stream in (("whole", False), ("streamed", True)):
        seen: Seen = {}
        for key, made in (("tools", client), ("structured", schemas)):
            request: dict[str, Any] = {
                "model": MODEL,
                "temperature": 0,
                "max_tokens": 160,
                "messages": [{"role": "user", "content": CAPITAL}],
                "response_model": City,
                "max_retries": 0,
            }
            create = made.chat.completions
            value = list(create.create_partial(**request))[-1] if stream else create.create(**request)
            seen[key] = value.model_dump()
        out[name] = seen
    return out


def llama_index(url: str) -> Seen:
    from llama_index.core.llms import ChatMessage, TextBlock
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    def model(**more: Any) -> Any:
        how: dict[str, Any] = {"model": MODEL, "api_base": f"{url}/v1", "api_key": "-", "is_chat_model": True}
        return OpenAILike(
            **how,
            is_function_calling_model=True,
            temperature=0,
            max_tokens=160,
            context_window=1000,
            additional_kwargs=more,
        )

    thinks = model(extra_body={"reasoning_effort": "low"})
    weather = FunctionTool.from_defaults(get_weather)

    def chat(stream: bool, messages: list[Any]) -> Any:
        return list(thinks.stream_chat(messages))[-1] if stream else thinks.chat(messages)

    def plain(stream: bool) -> dict[str, Any]:
        reply = chat(stream, [ChatMessage(role="user", content=QUESTION)])
        blocks = reply.message.blocks
        thought = "".join(getattr(b, "content", None) or "" for b in blocks if b.block_type == "thinking")
        return {"reasoning": thought, "content": "".join(b.text for b in blocks if isinstance(b, TextBlock))}

    def turn(stream: bool, messages: list[Any]) -> Turn:
        if stream:
            reply = list(thinks.stream_chat_with_tools([weather], chat_history=messages))[-1]
        else:
            reply = thinks.chat_with_tools([weather], chat_history=messages)
        messages.append(reply.message)
        calls = thinks.get_tool_calls_from_response(reply, error_on_no_tool_call=False)
        return str(reply.message.content or ""), [(call.tool_id, call.tool_kwargs) for call in calls]

    def result(call_id: str, told: str) -> Any:
        return ChatMessage(role="tool", content=told, additional_kwargs={"tool_call_id": call_id})

    def loop(stream: bool) -> str:
        return tool_loop(functools.partial(turn, stream), result, lambda text: ChatMessage(role="user", content=text))

    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}

    def structured(stream: bool) -> Any:
        made = model(response_format=schema)
        messages = [ChatMessage(role="user", content=CAPITAL)]
        reply = list(made.stream_chat(messages))[-1] if stream else made.chat(messages)
        return str(reply.message.content)

    return both(plain, loop, structured)


CLIENTS: dict[str, Callable[[str], Seen]] = {
    f.__name__: f
    for f in (
        openai_chat,
        openai_responses,
        anthropic_messages,
        langchain_openai,
        langchain_anthropic,
        litellm,
        openai_agents,
        pydantic_ai,
        instructor,
        llama_index,
    )
}


def _shows(package: str, api: str, structured: str, reasoning: bool = True) -> Seen:
    return {"name": package, "api": api, "structured": structured, "reasoning": reasoning}


# Client -> its package, the API that it asks, how it asks for an object, and whether it is asked for reasoning.
SHOWS: dict[str, Seen] = {
    "openai_chat": _shows("openai", "chat completions", "JSON schema"),
    "openai_responses": _shows("openai", "responses", "JSON schema"),
    "anthropic_messages": _shows("anthropic", "messages", "forced tool"),
    "langchain_openai": _shows("langchain-openai", "responses; chat completions for objects", "JSON schema"),
    "langchain_anthropic": _shows("langchain-anthropic", "messages", "forced tool"),
    "litellm": _shows("litellm", "chat completions", "JSON schema"),
    "openai_agents": _shows("openai-agents", "responses", "JSON schema"),
    "pydantic_ai": _shows("pydantic-ai-slim", "responses", "JSON schema"),
    "instructor": _shows("instructor", "chat completions", "forced tool and JSON schema", False),
    "llama_index": _shows("llama-index-llms-openai-like", "chat completions", "JSON schema"),
}

if __name__ == "__main__":
    client, address = sys.argv[1:]
    version = importlib.metadata.version(SHOWS[client]["name"])
    print(json.dumps({"version": version, **CLIENTS[client](address)}))
