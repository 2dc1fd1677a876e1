"""What clients send back of a conversation, as the messages that the chat templates know. Nothing of vLLM in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

_ROLES = ("system", "developer", "user", "assistant", "tool")
_ITEMS = ("message", "reasoning", "function_call", "function_call_output")
_SAID = ("output_text", "refusal", "text", "input_text")
_PARTIAL = ("in_progress", "incomplete")
Message = dict[str, Any]


class HistoryError(ValueError):
    """An item of a conversation that no prompt can be made of; a server answers it with HTTP 400."""


class _Calls:
    """The calls made so far, and which of them have their result."""

    def __init__(self) -> None:
        self._answered: dict[str, bool] = {}

    def made(self, call_id: Any, where: str) -> None:
        if call_id is not None and not isinstance(call_id, str):
            raise HistoryError(f"{where}: the call id {call_id!r} is no text")
        if call_id in self._answered:
            raise HistoryError(f"{where}: the call id {call_id!r} is used twice")
        if call_id:
            self._answered[call_id] = False

    def answered(self, call_id: Any, where: str) -> None:
        if not isinstance(call_id, str) or call_id not in self._answered:
            raise HistoryError(f"{where}: a result for the call {call_id!r}, which no message before it makes")
        if self._answered[call_id]:
            raise HistoryError(f"{where}: a second result for the call {call_id!r}")
        self._answered[call_id] = True


def prepare(messages: MutableSequence[Any], name: str = "messages") -> None:
    """Check the messages of a chat and complete them in place: ``reasoning_content`` is ``reasoning``, a refusal is
    what was said, results stand behind the message that calls.

    Args:
        name: what errors call the list.

    Raises:
        HistoryError: an unknown role, arguments that are no JSON object, a result for no call, an id used twice.
    """
    calls = _Calls()
    for i, message in enumerate(messages):
        if not isinstance(message, MutableMapping):
            continue
        where, role = f"{name}[{i}]", message.get("role")
        if role not in _ROLES:
            raise HistoryError(f"{where}: the role {role!r} is none of {', '.join(_ROLES)}")
        _read_content(message, f"{where}.content")
        if role == "assistant":
            if not message.get("reasoning") and isinstance(message.get("reasoning_content"), str):
                message["reasoning"] = message["reasoning_content"]
            if not message.get("content") and isinstance(message.get("refusal"), str):
                message["content"] = message["refusal"]
            if message.get("tool_calls") is not None:
                message["tool_calls"] = _listed(message["tool_calls"], where)
                for n, call in enumerate(message["tool_calls"]):
                    _check_call(call, calls, f"{where}.tool_calls[{n}]")
        elif role == "tool" and message.get("tool_call_id"):
            calls.answered(message["tool_call_id"], where)
    ordered: list[Any] = []
    for message in messages:
        result = isinstance(message, Mapping) and message.get("role") == "tool" and message.get("tool_call_id")
        ordered.insert(_behind_call(ordered, result) if result else len(ordered), message)
    if any(a is not b for a, b in zip(ordered, messages, strict=True)):
        messages[:] = ordered


def _read_content(message: MutableMapping[str, Any], where: str) -> None:
    """Make a list of parts that are validated only as they are read; what has been read once is gone otherwise."""
    content = message.get("content")
    if not isinstance(content, Iterator):
        return
    parts: list[Any] = []
    try:
        for part in content:
            parts.append(part)  # not extend(): how many there are says which one is wrong
    except ValueError as error:
        raise HistoryError(f"{where}[{len(parts)}]: cannot be read: {error}") from None
    message["content"] = parts


def _listed(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, Iterable) or isinstance(calls, (str, Mapping)):
        raise HistoryError(f"{where}: tool_calls is no list")
    try:
        return list(calls)  # pydantic's iterators can be read once, and find only now what does not fit
    except ValueError as error:
        raise HistoryError(f"{where}: tool_calls cannot be read: {error}") from None


def _check_call(call: Any, calls: _Calls, where: str) -> None:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise HistoryError(f"{where}: a call needs a function with a name")
    calls.made(call.get("id"), where)
    check_arguments(function.get("arguments"), where)


def check_arguments(arguments: Any, where: str) -> None:
    """
    Raises:
        HistoryError: neither a JSON object nor nothing.
    """
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise HistoryError(f"{where}: the arguments are no JSON ({error})") from None
    if arguments and not isinstance(arguments, Mapping):
        raise HistoryError(f"{where}: the arguments are no JSON object")


def readable_items(items: Sequence[Any]) -> list[Any]:
    """Items of ``/v1/responses`` as clients send them, with what vLLM's types ask for beyond: ids, status, lists.

    Raises:
        HistoryError: an unknown type or role, or a part that is missing.
    """
    return [_readable(item, i) for i, item in enumerate(items)]


def _readable(item: Any, i: int) -> Message:
    where = f"input[{i}]"
    if not isinstance(item, dict):
        raise HistoryError(f"{where}: not an object")
    kind = item.get("type") or "message"
    if kind not in _ITEMS:
        raise HistoryError(f"{where}: items of the type {kind!r} are not known ({', '.join(_ITEMS)} are)")
    if kind == "reasoning":
        read = {"id": f"rs_{i}", "summary": [], **{k: v for k, v in item.items() if v is not None}}
        read["content"] = [
            {**part, "type": "reasoning_text"} for part in _parts(read.get("content"), f"{where}.content")
        ]
        _parts(read["summary"], f"{where}.summary")
        if read.pop("encrypted_content", None) and not _texts(read):
            raise HistoryError(f"{where}: encrypted reasoning cannot be read here, and there is no other")
        return read
    needed = {"function_call": ("call_id", "name"), "function_call_output": ("call_id",)}.get(kind, ("role",))
    for field in needed:
        if not isinstance(item.get(field), str) or not item[field]:
            raise HistoryError(f"{where}: {field} is missing")
    if kind == "function_call":
        arguments = item.get("arguments") or "{}"
        return {**item, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}
    if kind == "function_call_output":
        output = item.get("output")
        if isinstance(output, list):
            output = [_result_part(part) for part in output]
        return {**item, "output": output if isinstance(output, (str, list)) else json.dumps(output)}
    return _readable_message(item, i, where)


def _readable_message(item: Message, i: int, where: str) -> Message:
    content, role = item.get("content"), item["role"]
    if role not in _ROLES or role == "tool":
        raise HistoryError(f"{where}: the role {role!r} is none of {', '.join(_ROLES[:-1])}")
    if content is None or isinstance(content, str):
        return {**item, "content": content or ""}
    if role != "assistant":
        parts = _parts(content, f"{where}.content")
        return {**item, "content": [{**p, "type": "input_text"} if p.get("type") == "text" else p for p in parts]}
    texts = []
    for n, part in enumerate(_parts(content, f"{where}.content")):
        kind = part.get("type", "output_text")
        if kind not in _SAID:
            raise HistoryError(f"{where}.content[{n}]: the assistant says no part of the type {kind!r}")
        texts.append(str(part.get("text") or part.get("refusal") or ""))
    return {
        "type": "message",
        "id": item.get("id") or f"msg_{i}",
        "role": role,
        "status": item.get("status") or "completed",
        "content": [{"type": "output_text", "text": text, "annotations": []} for text in texts],
    }


def _result_part(part: Any) -> Any:
    """A part of a result; of those that are text, vLLM's types know one."""
    if isinstance(part, str):
        return {"type": "input_text", "text": part}
    is_text = isinstance(part, dict) and part.get("type") in ("text", "output_text")
    return {"type": "input_text", "text": str(part.get("text") or "")} if is_text else part


def _parts(given: Any, where: str) -> list[Message]:
    parts = given or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise HistoryError(f"{where}: no list of parts")
    return parts


def from_items(items: Sequence[Any], before: Sequence[Message] = ()) -> list[Message]:
    """Items of ``/v1/responses`` as messages: all that the assistant says up to a result is one of them.

    Args:
        items: input items and output items, as dicts or as objects of the ``openai`` package.
        before: messages before them.

    Raises:
        HistoryError: as :func:`prepare`.
    """
    messages, calls = list(before), _Calls()
    for message in messages:
        for call in message.get("tool_calls") or ():
            calls.made(call["id"], "previous_response_id")
        if message["role"] == "tool":
            calls.answered(message["tool_call_id"], "previous_response_id")
    item: Mapping[str, Any] = {}
    for i, given in enumerate(items):
        item = given if isinstance(given, Mapping) else given.model_dump(exclude_none=True)
        where, kind = f"input[{i}]", item.get("type") or "message"
        if kind == "function_call_output":
            calls.answered(item["call_id"], where)
            _insert_result(messages, item)
        elif kind == "function_call":
            calls.made(item["call_id"], where)
            check_arguments(item["arguments"], where)
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            _turn(messages).setdefault("tool_calls", []).append(call)
        elif kind == "reasoning":
            _add(messages, "reasoning", _texts(item))
        elif item.get("role") == "assistant":
            _add(messages, "content", _text(item.get("content")))
        else:
            messages.append({"role": item["role"], "content": item.get("content")})
    if item.get("status") in _PARTIAL and messages and messages[-1]["role"] == "assistant":
        messages[-1]["status"] = item["status"]  # vLLM lets the model go on with it
    return messages


def _turn(messages: list[Message]) -> Message:
    """The message of the assistant that is being put together."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _add(messages: list[Message], field: str, text: str) -> None:
    if text:
        turn = _turn(messages)
        turn[field] = (turn.get(field) or "") + text


def _insert_result(messages: list[Message], item: Mapping[str, Any]) -> None:
    result = {"role": "tool", "tool_call_id": item["call_id"], "content": item.get("output")}
    messages.insert(_behind_call(messages, item["call_id"]), result)


def _behind_call(messages: Sequence[Any], call_id: Any) -> int:
    """Where the result of a call belongs: templates look for it right behind the message that calls."""
    at = len(messages)
    while at and not _calls(messages[at - 1], call_id):
        at -= 1
    while at < len(messages) and isinstance(messages[at], Mapping) and messages[at].get("role") == "tool":
        at += 1
    return at


def _calls(message: Any, call_id: Any) -> bool:
    if not isinstance(message, Mapping):
        return False
    return any(call.get("id") == call_id for call in message.get("tool_calls") or ())


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    # An empty list is one of pydantic's iterators here.
    return "".join(str(part.get("text") or part.get("refusal") or "") for part in content)


def _texts(item: Mapping[str, Any]) -> str:
    """Of a reasoning item: what was thought, or else its summary."""
    summary = [str(part.get("text") or "") for part in item.get("summary") or ()]
    return _text(list(item.get("content") or ())) or "\n\n".join(summary)
