"""Which processes of a running server have which patches, whether it speculates and how well, from ``/metrics``."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from packaging.version import Version

from vllm_gemma4_spec.ops import live, server
from vllm_gemma4_spec.ops.doctor.findings import Finding, State
from vllm_gemma4_spec.patching.version import SUPPORTED
from vllm_gemma4_spec.registry import PATCHER
from vllm_gemma4_spec.settings import patch_switch

SECTION = "server"
PATIENCE = 30.0
Patches = Mapping[tuple[str, str], Mapping[str, bool]]  # (process, pid) -> patch -> on


def running(
    url: str,
    api_key: str | None = None,
    workers: int | None = None,
    speculates: bool = True,
    patience: float = PATIENCE,
) -> Iterator[Finding]:
    """What is wrong with the server at ``url`` (see :mod:`vllm_gemma4_spec.metrics.reports`).

    Args:
        speculates: the server is meant to speculate.
        patience: seconds in which the engine must give one token.

    Raises:
        ServerError: nothing answers there, or not vLLM.
    """
    version = server.version(url, api_key)
    fine = Version(version).public == SUPPORTED
    yield Finding(SECTION, "vllm", State.OK if fine else State.PROBLEM, version, SUPPORTED)
    samples = server.samples(url, api_key)
    on: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    info: Mapping[str, str] = {}
    for sample in samples:
        key = (sample.labels.get("process", ""), sample.labels.get("pid", ""))
        if sample.name == "gemma4_spec_process":
            on[key] = on[key] or {}
        elif sample.name == "gemma4_spec_patch_on":
            on[key][sample.labels["patch"]] = sample.value == 1
        elif sample.name == "gemma4_spec_server":
            info = sample.labels
    if not on:
        advice = "install vllm-gemma4-spec into the server's environment and look for 'patches on' in its log"
        yield Finding(SECTION, "plugin", State.PROBLEM, "no process reports it", "every process", advice)
    before = live.sample_server(samples, 0.0)
    yield from _configuration(info, before.server.get("served", ""))
    yield from _answer(url, api_key, patience, before)
    yield from _speculation(before, info, speculates)
    if on:
        yield from _processes(on, info)
        yield from _engine([name for name, _ in on], workers)


def _answer(url: str, api_key: str | None, patience: float, before: live.ServerSample) -> Iterator[Finding]:
    """One token of the engine: where its process hangs or was stopped, every page of the API server is as it was."""
    name = "engine"
    body = {"prompt": "1", "max_tokens": 1, "temperature": 0}  # without a model's name: the one that is served
    started = time.monotonic()
    try:
        server.post(f"{server.base_url(url)}/v1/completions", body, api_key, patience)
    except server.SilentError:
        now = live.between(before, live.sample_server(server.samples(url, api_key), time.monotonic() - started))
        found = f"no token within {patience:g} s; {now.running} running, {now.waiting} waiting"
        if now.output_tok_s:
            yield Finding(SECTION, name, State.NOTE, found, advice="busy: other requests got tokens meanwhile")
            return
        advice = "nobody got a token: the engine hangs or was stopped; read the end of its log, then restart the server"
        yield Finding(SECTION, name, State.PROBLEM, found, "a token", advice)
    except server.ServerError as error:
        advice = "whether the engine answers was not seen"
        yield Finding(SECTION, name, State.NOTE, f"not asked: {error}", advice=advice)
    else:
        yield Finding(SECTION, name, State.OK, f"answers: one token in {time.monotonic() - started:.2f} s")


def _speculation(sample: live.ServerSample, info: Mapping[str, str], wanted: bool) -> Iterator[Finding]:
    name = "speculation"
    if not sample.accepted:  # vLLM has these counters from the start, one for each position
        advice = "start it with --speculative-config, or give --no-speculation if it is meant to decode plainly"
        state, text = (State.PROBLEM, advice) if wanted else (State.OK, "")
        yield Finding(SECTION, name, state, "off", "on" if wanted else "off", text)
        return
    drafts = sample.values.get("vllm:spec_decode_num_drafts_total", 0.0)
    method = f"{info['method']} with {info['drafter']}, " if info.get("method") else ""
    found = f"{method}k = {len(sample.accepted)}, {drafts:.0f} drafts verified"
    if not drafts:
        yield Finding(SECTION, name, State.NOTE, found, advice="ask it something, then look again")
        return
    shares = [sample.accepted[p] / drafts for p in sorted(sample.accepted)]
    by_position = " ".join(f"{share:.0%}" for share in shares)
    found += f", acceptance length {1 + sum(shares):.2f}, acceptance by position from 0: {by_position}"
    poor = drafts >= 100 and shares[0] < 0.05
    advice = "nearly every draft is rejected: the drafter does not fit the target; see the page on troubleshooting"
    yield Finding(SECTION, name, State.PROBLEM if poor else State.OK, found, advice=advice if poor else "")


def _configuration(info: Mapping[str, str], served: str) -> Iterator[Finding]:
    """The model, the model runner and, for Gemma 4, the parsers."""
    if not info:
        yield Finding(SECTION, "model", State.NOTE, served or "the server does not say")
        return
    gemma4 = info["model_type"].startswith("gemma4")
    parts = [served, *(info[name] for name in ("model", "model_type", "quantization"))]
    found = ", ".join(dict.fromkeys(filter(None, parts)))
    advice = "" if gemma4 else "no Gemma 4: nothing here makes it faster, and its parsers are not looked at"
    yield Finding(SECTION, "model", State.OK if gemma4 else State.NOTE, found, advice=advice)
    if info["runner"] != "V1":
        advice = "unset VLLM_USE_V2_MODEL_RUNNER: the patches are for the V1 model runner, the other runs without them"
        yield Finding(SECTION, "model runner", State.PROBLEM, info["runner"], "V1", advice)
    if not gemma4:
        return
    for name, extra in (("reasoning_parser", ""), ("tool_call_parser", " --enable-auto-tool-choice")):
        option = f"--{name.replace('_', '-')} gemma4{extra}"
        fine = info[name] == "gemma4"
        advice = "" if fine else f"start it with {option}: thoughts and tool calls are plain text without it"
        state = State.OK if fine else State.PROBLEM
        yield Finding(SECTION, name.replace("_", " "), state, info[name] or "none", "gemma4", advice)


def _unneeded(info: Mapping[str, str]) -> set[str]:
    """Patches that change nothing for what this server runs."""
    from vllm_gemma4_spec.chat import patches as chat
    from vllm_gemma4_spec.quantization import patches as quantization
    from vllm_gemma4_spec.spec_decode import patches as spec_decode

    if not info:
        return set()
    out: set[str] = set()
    if not info["method"]:
        out |= {p.name for p in spec_decode.PATCHES}
    if not info["quantization"]:
        out |= {p.name for p in quantization.PATCHES}
    if not info["model_type"].startswith("gemma4"):
        out |= {p.name for p in chat.PATCHES}
    return out


def _processes(on: Patches, info: Mapping[str, str]) -> Iterator[Finding]:
    """Each process against what is needed, and against the first of them."""
    correctness = {p.name for p in PATCHER.known if p.group.value == "correctness"}
    unneeded = _unneeded(info)
    reference = next(iter(on.values()))
    for (name, pid), states in on.items():
        off = sorted(patch for patch, state in states.items() if not state)
        missing = [patch for patch in off if patch in correctness and patch not in unneeded]
        missing += sorted(correctness - set(states)) if not states else []
        found = f"{sum(states.values())} patches on" + (f"; off: {', '.join(off)}" if off else "")
        state, advice = State.OK, ""
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            what = f"{', '.join(missing[:3])}{more}; unset {', '.join(patch_switch(m).name for m in missing[:3])}{more}"
            if not any(states.values()):
                found, what = "no patch on", "them; unset VLLM_GEMMA4_SPEC"
            state, advice = State.PROBLEM, f"answers may be wrong without {what}"
        elif states != reference:
            state, advice = State.PROBLEM, "not the patches of the other processes: give all of them one environment"
        elif off:
            state = State.NOTE
        yield Finding(SECTION, f"{name} ({pid})", state, found, advice=advice)


def _engine(kinds: Sequence[str], workers: int | None) -> Iterator[Finding]:
    if not any(k.startswith("EngineCore") for k in kinds):
        advice = "the engine core runs unpatched, or inside the API server's process"
        yield Finding(SECTION, "EngineCore", State.PROBLEM, "does not report", "reports", advice)
    found_workers = sum(k.startswith("VllmWorker") for k in kinds)
    text = f"{found_workers} report" if found_workers else "none of their own: one runs inside the engine core"
    if workers is None:
        yield Finding(SECTION, "workers", State.NOTE, text, advice="give --workers N (GPUs used) to have it checked")
    elif max(found_workers, 1) == workers:
        yield Finding(SECTION, "workers", State.OK, text, str(workers))
    else:
        advice = "a worker runs without the plugin (read its log), or --workers is not the number of GPUs used"
        yield Finding(SECTION, "workers", State.PROBLEM, text, str(workers), advice)
