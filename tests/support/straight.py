"""Whether a wrapper hands a call straight on: one call of the original, with the objects that came in, nothing kept."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_gemma4_spec.patching.patch import Edit, Patch

OURS = ("vllm_gemma4_spec.spec_decode", "vllm_gemma4_spec.performance", "vllm_gemma4_spec.quantization")
OURS += ("vllm_gemma4_spec.multimodal", "vllm_gemma4_spec.lora", "vllm_gemma4_spec.kernels", "vllm_gemma4_spec.cpu")


def _attributes(args: Sequence[Any]) -> dict[str, int]:
    """Identity of every attribute of a method's object."""
    return {name: id(value) for name, value in getattr(args[0], "__dict__", {}).items()} if args else {}


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: dict[str, int]
    after: dict[str, int] = field(default_factory=dict)
    result: Any = None
    raised: BaseException | None = None


@dataclass
class Watch:
    """What patched functions did with their calls, by ``patch: target``.

    Attributes:
        straight: calls that the wrapper handed on untouched.
        acted: what it did instead, in the words of the first such call.
    """

    straight: dict[str, int] = field(default_factory=dict)
    acted: dict[str, str] = field(default_factory=dict)

    def patches(self, known: Sequence[Patch]) -> tuple[Patch, ...]:
        """``known`` with every function that replaces one of vLLM's watched."""
        return tuple(replace(p, edits=tuple(self._edit(p, e) for e in p.edits)) for p in known)

    def _edit(self, patch: Patch, edit: Edit) -> Edit:
        name = f"{patch.name}: {edit.target}"

        def wrapper(original: Any) -> Any:
            if isinstance(original, staticmethod):
                return staticmethod(self._watched(name, edit, original.__func__, static=True))
            if inspect.isfunction(original) or (inspect.isclass(original) and edit.target.endswith(":CPUModelRunner")):
                return self._watched(name, edit, original)
            return edit.wrapper(original)  # a class, a table, an attribute that vLLM lacks; see `instances`

        return replace(edit, wrapper=wrapper)

    def _watched(self, name: str, edit: Edit, original: Callable[..., Any], static: bool = False) -> Callable[..., Any]:
        open_calls: list[list[_Call]] = []

        @functools.wraps(original, updated=())
        def inner(*args: Any, **kwargs: Any) -> Any:
            call = _Call(args, kwargs, _attributes(args))
            if open_calls:
                open_calls[-1].append(call)
            try:
                call.result = original(*args, **kwargs)
            except BaseException as error:
                call.raised = error
                raise
            finally:
                call.after = _attributes(args)
            return call.result

        made = edit.wrapper(staticmethod(inner) if static else inner)
        wrapper: Callable[..., Any] = made.__func__ if static else made
        if not inspect.isfunction(wrapper):  # a kernel's form for the CPU, which is launched by its own protocol
            return edit.wrapper(original)
        signature = inspect.signature(original)

        @functools.wraps(original, updated=())
        def outer(*args: Any, **kwargs: Any) -> Any:
            before, calls, result, raised = _attributes(args), [], None, None
            open_calls.append(calls)
            try:
                result = wrapper(*args, **kwargs)
            except BaseException as error:
                raised = error
                raise
            finally:
                open_calls.pop()
                did = _deviation(signature, args, kwargs, before, calls, result, raised)
                if did is None:
                    self.straight[name] = self.straight.get(name, 0) + 1
                else:
                    self.acted.setdefault(name, did)
            return result

        return outer


def _given(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; those of `*args` and `**kwargs` one by one."""
    out: dict[str, Any] = {}
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            out |= {f"{name}[{n}]": v for n, v in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            out |= value
        else:
            out[name] = value
    return out


def _deviation(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: dict[str, int],
    calls: list[_Call],
    result: Any,
    raised: BaseException | None,
) -> str | None:
    """What a wrapper did beside calling its original with what came in; None if nothing."""
    if len(calls) != 1:
        return f"called the original {len(calls)} times"
    (call,) = calls
    came, went = _given(signature, args, kwargs), _given(signature, call.args, call.kwargs)
    if came.keys() != went.keys() or any(came[name] is not went[name] for name in came):
        return "changed the arguments"
    if call.before != before or call.after != _attributes(args):
        return "changed the object's attributes"
    if call.result is not result or call.raised is not raised:
        return "changed the result"
    return None


def instances() -> list[str]:
    """Objects of this package's classes, and attributes that it set on objects of vLLM, in this process now."""
    gc.collect()
    found = []
    for thing in gc.get_objects():
        kind = type(thing)
        module = str(getattr(kind, "__module__", ""))
        if module.startswith(OURS):
            found.append(f"{module}.{kind.__qualname__}")
        elif module.startswith(("vllm.", "torch")):
            names = [n for n in list(getattr(thing, "__dict__", None) or ()) if isinstance(n, str)]
            found += [f"{kind.__qualname__}.{n}" for n in names if "gemma4_spec" in n]
    return sorted(set(found))
