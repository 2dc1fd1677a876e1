"""What this server runs, as labels: vLLM's ``/metrics`` says neither the method nor the models nor the parsers."""

from __future__ import annotations

from typing import Any

_apps: list[Any] = []  # the API server's application, once vLLM has built it

LABELS = (
    "model",
    "model_type",
    "quantization",
    "method",
    "k",
    "drafter",
    "runner",
    "reasoning_parser",
    "tool_call_parser",
)


def remember(app: Any) -> None:
    """Called while vLLM builds ``app``; its state is filled in later, so it is read when metrics are asked for."""
    _apps[:] = [app]


def labels() -> dict[str, str] | None:
    """Of :data:`LABELS`, empty where vLLM has None; None in a process that is no API server, or not yet one."""
    state = getattr(_apps[0], "state", None) if _apps else None
    config, args = getattr(state, "vllm_config", None), getattr(state, "args", None)
    if config is None or args is None:
        return None
    import vllm.envs as envs

    spec = config.speculative_config
    tools = args.tool_call_parser if getattr(args, "enable_auto_tool_choice", False) else None
    found = {
        "model": config.model_config.model,
        "model_type": getattr(config.model_config.hf_config, "model_type", None),
        "quantization": config.model_config.quantization,
        "method": spec.method if spec else None,
        "k": spec.num_speculative_tokens if spec else None,
        "drafter": spec.model if spec else None,
        "runner": "V2" if envs.VLLM_USE_V2_MODEL_RUNNER else "V1",
        "reasoning_parser": getattr(args.structured_outputs_config, "reasoning_parser", None),
        "tool_call_parser": tools,
    }
    return {name: str(found[name] or "") for name in LABELS}
