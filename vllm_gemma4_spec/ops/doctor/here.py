"""What is installed, chosen and switched in this environment, against what is supported."""

from __future__ import annotations

import glob
import importlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_gemma4_spec import settings
from vllm_gemma4_spec.errors import Gemma4SpecError
from vllm_gemma4_spec.kernels import chosen_rows
from vllm_gemma4_spec.ops.doctor.findings import Finding, State
from vllm_gemma4_spec.patching import fingerprint
from vllm_gemma4_spec.patching.version import SUPPORTED, TRANSFORMERS, vllm_version
from vllm_gemma4_spec.registry import PATCHER

WANTED = {"torch": SpecifierSet("==2.10.*"), "transformers": TRANSFORMERS}
PYTHON = SpecifierSet(">=3.10,<3.14")

# vLLM's own variables that change what the plugin does; value -> why it is wrong (None: any value is a remark).
VLLM_VARIABLES: dict[str, dict[str, str]] = {
    "VLLM_PLUGINS": {},
    "VLLM_NVFP4_GEMM_BACKEND": {"emulation": "0.19.1's emulation computes wrong results; unset it"},
    "VLLM_USE_NVFP4_CT_EMULATIONS": {"1": "0.19.1's emulation computes wrong results; unset it"},
    "VLLM_USE_FBGEMM": {},
    "VLLM_USE_FLASHINFER_MOE_FP4": {},
    "VLLM_DISABLE_COMPILE_CACHE": {},
    "VLLM_CACHE_ROOT": {},
    "VLLM_ENABLE_V1_MULTIPROCESSING": {},
    "VLLM_WORKER_MULTIPROC_METHOD": {},
    "VLLM_CPU_KVCACHE_SPACE": {},
    "VLLM_CPU_OMP_THREADS_BIND": {},
    "PROMETHEUS_MULTIPROC_DIR": {},
}


def versions() -> Iterator[Finding]:
    section = "versions"
    python = platform.python_version()
    fine = Version(python) in PYTHON
    advice = "" if fine else "make a virtual environment with a Python in that range"
    yield Finding(section, "python", State.OK if fine else State.PROBLEM, python, str(PYTHON), advice)
    found = vllm_version()
    fine = found == SUPPORTED
    advice = "" if fine else f"install vllm=={SUPPORTED}, or see docs/how-to/newer-vllm.md where it is a newer one"
    yield Finding(section, "vllm", State.OK if fine else State.PROBLEM, found or "not installed", SUPPORTED, advice)
    if found is None:
        return  # torch and transformers come with it
    for name, wanted in WANTED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fine = version is not None and wanted.contains(Version(version).public, prereleases=True)
        advice = "" if fine else f"pip install '{name}{wanted}'"
        yield Finding(
            section, name, State.OK if fine else State.PROBLEM, version or "not installed", str(wanted), advice
        )
    cuda = _cuda()
    yield Finding(section, "CUDA", State.OK if cuda else State.NOTE, cuda or "a build of torch without CUDA")


def _cuda() -> str | None:
    """The CUDA version of the torch installed, from its ``version.py``: importing torch takes seconds."""
    file = fingerprint.source_file("torch.version")
    found = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", file.read_text(), re.MULTILINE) if file else None
    return found[1] if found else None


def plugin() -> Iterator[Finding]:
    section = "plugin"
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    names = sorted({p.name for p in points if p.value.startswith("vllm_gemma4_spec:")})
    if not names:
        advice = "install this package into the environment that runs vLLM (`pip install .` in its checkout)"
        yield Finding(section, "entry point", State.PROBLEM, "not installed", "gemma4_spec", advice)
        return
    yield Finding(section, "entry point", State.OK, names[0], "gemma4_spec")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "gemma4_spec" not in [p.strip() for p in allowed.split(",")]:
        advice = "add gemma4_spec to VLLM_PLUGINS, or unset it"
        yield Finding(section, "VLLM_PLUGINS", State.PROBLEM, repr(allowed), "gemma4_spec among them", advice)


def _nvfp4_reason(backend: str, capability: tuple[int, int]) -> str:
    """Why vLLM 0.19.1 chose ``backend`` (the order of ``select_nvfp4_linear_backend``)."""
    for variable in ("VLLM_USE_FBGEMM", "VLLM_USE_NVFP4_CT_EMULATIONS", "VLLM_NVFP4_GEMM_BACKEND"):
        if os.environ.get(variable, "0") not in ("", "0"):
            return f"forced by {variable}"
    if backend.startswith("flashinfer"):
        return "compute capability 10.0 or above, and FlashInfer is usable"
    if backend == "marlin":
        return f"no FP4 tensor core kernel for {capability[0]}.{capability[1]}: weights in 4 bits, arithmetic in bf16"
    return "vLLM's CUTLASS kernel supports this device; FlashInfer is missing or has no compiler"


def device() -> Iterator[Finding]:
    section = "device"
    if vllm_version() is None:
        return
    # Without a driver's device files nothing is visible, and torch, which takes seconds to import, need not be asked.
    torch = importlib.import_module("torch") if _cuda() and glob.glob("/dev/nvidia[0-9c]*") else None
    if torch is None or not torch.cuda.is_available():
        yield Finding(section, "GPU", State.NOTE, "none visible", advice="the CPU build serves small models only")
        yield Finding(section, "NVFP4 backend", State.NOTE, "none: all of vLLM's need a GPU")
        return
    p, capability = torch.cuda.get_device_properties(0), torch.cuda.get_device_capability()
    found = f"{torch.cuda.device_count()} x {p.name}, {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    yield Finding(section, "GPU", State.OK, found)
    if vllm_version() != SUPPORTED:
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its INFO lines go to stdout
    try:
        from vllm.model_executor.layers.quantization.utils import nvfp4_utils

        backend = nvfp4_utils.select_nvfp4_linear_backend().value
    except (ValueError, AssertionError, ImportError, AttributeError) as error:
        advice = "unset VLLM_NVFP4_GEMM_BACKEND, or install what it needs"
        yield Finding(section, "NVFP4 backend", State.PROBLEM, f"none: {error}", advice=advice)
        return
    wrong = backend == "emulation"
    yield Finding(
        section,
        "NVFP4 backend",
        State.PROBLEM if wrong else State.OK,
        backend,
        advice="its results are wrong in 0.19.1; unset the variable" if wrong else _nvfp4_reason(backend, capability),
    )
    for shape, chosen in chosen_rows.of_card(chosen_rows.card()).items():
        yield Finding(section, chosen_rows.named(shape), State.OK, chosen)


def patches() -> Iterator[Finding]:
    section = "patches"
    if vllm_version() is None:
        return
    try:
        statuses = PATCHER.status()
    except Gemma4SpecError as error:  # an unreadable switch; environment() names it too
        yield Finding(section, "states", State.PROBLEM, "unknown", advice=str(error))
        return
    installed = fingerprint.installed(s for patch in PATCHER.known for s in patch.checked_symbols)
    for status, patch in zip(statuses, PATCHER.known, strict=True):
        wrong = [
            f"{symbol} is {installed[symbol] or 'gone'}, wanted {mark}"
            for symbol, mark in patch.fingerprints.items()
            if installed[symbol] != mark
        ]
        marks = f"{len(patch.checked_symbols)} fingerprints match"
        if wrong:
            advice = f"install an unchanged vllm=={SUPPORTED}: bind-mounted or edited files must go"
            yield Finding(section, patch.name, State.PROBLEM, "; ".join(wrong), "the source of 0.19.1", advice)
        elif status.state == "off" and status.group == "correctness":
            advice = f"answers may be wrong without it; unset {status.switch} and {settings.PREFIX}"
            yield Finding(section, patch.name, State.PROBLEM, f"off; {marks}", "on", advice)
        else:
            # `not applied` here: this command is no server; a server applies what is switched on
            found = "off" if status.state == "off" else "switched on"
            yield Finding(section, patch.name, State.NOTE if found == "off" else State.OK, f"{found}; {marks}")


def environment() -> Iterator[Finding]:
    section = "environment"
    names = [p.name for p in PATCHER.known]
    try:
        PATCHER.check_environment()
    except Gemma4SpecError as error:
        yield Finding(section, settings.PREFIX, State.PROBLEM, "unknown or unreadable", advice=str(error))
    for setting in settings.all_settings(names):
        if setting.name in os.environ:
            yield Finding(section, setting.name, State.NOTE, os.environ[setting.name], setting.default, setting.help)
    for name, wrong in VLLM_VARIABLES.items():
        value = os.environ.get(name)
        if value is not None:
            reason = wrong.get(value.lower(), "")
            yield Finding(section, name, State.PROBLEM if reason else State.NOTE, value or "(empty)", advice=reason)
