"""Environment variables of the plugin, all named ``VLLM_GEMMA4_SPEC…``.

They are declared to vLLM (``vllm.envs.environment_variables``), so vLLM does not report them as unknown,
hands them to its workers, and makes them part of its torch.compile cache key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vllm_gemma4_spec.errors import SettingError

PREFIX = "VLLM_GEMMA4_SPEC"
PATCH_PREFIX = f"{PREFIX}_PATCH_"


@dataclass(frozen=True)
class Setting:
    """One environment variable: its name, its default as text, and what it does."""

    name: str
    default: str
    help: str
    choices: tuple[str, ...] = ()
    share: bool = False  # a number from 0 to below 1

    def read(self, environ: Mapping[str, str] | None = None) -> str:
        """The value in force.

        Raises:
            SettingError: the value is not one of ``choices``, or no number from 0 to below 1 where it is a share.
        """
        value = (os.environ if environ is None else environ).get(self.name, self.default).strip()
        wanted = ""
        if self.choices and value not in self.choices:
            wanted = f"one of {', '.join(self.choices)}"
        elif self.share and not _is_share(value):
            wanted = "a number from 0 to below 1"
        if wanted:
            raise SettingError(f"{self.name}={value!r}: expected {wanted}; unset it for {self.default!r}")
        return value

    def on(self, environ: Mapping[str, str] | None = None) -> bool:
        return self.read(environ) == "1"

    def number(self, environ: Mapping[str, str] | None = None) -> float:
        return float(self.read(environ))


def _is_share(text: str) -> bool:
    try:
        return 0.0 <= float(text) < 1.0  # false for nan
    except ValueError:
        return False


def switch(name: str, help: str, default: str = "1") -> Setting:
    """A setting that is ``1`` (on) or ``0`` (off)."""
    return Setting(name, default, help, ("0", "1"))


ALL = switch(PREFIX, "0 leaves vLLM as it is: no patch is applied in any process")

DEMO_DIR = Setting(
    f"{PREFIX}_DEMO_DIR",
    "",
    "folder of the demo's models instead of the one below $XDG_CACHE_HOME or ~/.cache",
)
CHECK = switch(
    f"{PREFIX}_CHECK",
    "1 checks every draft pass (slots, lengths, positions) and says when acceptance falls to chance; for fault finding",
    "0",
)

NAN_SCALES = Setting(
    f"{PREFIX}_NAN_SCALES",
    "repair",
    "strict refuses a checkpoint with NaN block scales; repair saturates or zeroes those blocks and says so",
    ("repair", "strict"),
)
NVFP4_WEIGHTS = Setting(
    f"{PREFIX}_NVFP4_WEIGHTS",
    "auto",
    "without an FP4 kernel (CPU): keep NVFP4 weights packed, or dequantized once; auto: dequantized if they fit",
    ("auto", "packed", "dequantized"),
)

ROOMY = 64 * 2**30  # bytes of a card; 31B's weights and their o_proj a second time take a third of it
SCALE_IN_PRODUCT = Setting(
    f"{PREFIX}_SCALE_IN_PRODUCT",
    "auto",
    "1: a target's o_proj multiplies by its pre_quant_scale inside the small-batch GEMM (in batches in which that is "
    "the fastest, where vLLM uses Marlin): decode steps take 5 % less time, a second copy of these weights takes "
    "1.7 GB for 31B. 0: a kernel of its own multiplies. auto: 1 on cards of 64 GiB or more. Always 0 with "
    "VLLM_BATCH_INVARIANT=1",
    ("auto", "1", "0"),
)
STREAM_GEMM = switch(
    f"{PREFIX}_STREAM_GEMM",
    "0 leaves NVFP4 layers to Marlin in all batches; 1 gives those to the kernel that streams its weights in which it "
    "was faster, or as fast where it overlaps with the kernel ahead, measured once per card and shape; gate and up "
    "projections of a Gemma 4 then give gelu(gate) * up themselves, without a branch, LoRA and a scale of down_proj",
)
ADAPTIVE_K = Setting(
    f"{PREFIX}_ADAPTIVE_K",
    "0",
    "runs fewer draft passes while acceptance is low: the time of a further pass as a share of a step with one "
    "(0.16 for 31B + E4B on an H200); 0 always runs k",
    share=True,
)

# Settings other than the switches of single patches; a module that reads one imports it from here.
SETTINGS: tuple[Setting, ...] = (
    ALL,
    ADAPTIVE_K,
    CHECK,
    NAN_SCALES,
    NVFP4_WEIGHTS,
    SCALE_IN_PRODUCT,
    STREAM_GEMM,
    DEMO_DIR,
)


def patch_switch(patch_name: str) -> Setting:
    """The switch of one patch: ``draft-groups`` -> ``VLLM_GEMMA4_SPEC_PATCH_DRAFT_GROUPS``."""
    variable = PATCH_PREFIX + patch_name.upper().replace("-", "_")
    return switch(variable, f"0 leaves out the patch {patch_name}")


def all_settings(patch_names: Iterable[str]) -> tuple[Setting, ...]:
    return (*SETTINGS, *(patch_switch(name) for name in patch_names))


def check_environment(patch_names: Iterable[str], environ: Mapping[str, str] | None = None) -> None:
    """Refuse variables with our prefix that nothing reads, and values that cannot be read.

    Raises:
        SettingError: names the variable and what would be accepted.
    """
    environ = os.environ if environ is None else environ
    known = {s.name: s for s in all_settings(patch_names)}
    for name in sorted(environ):
        if name != PREFIX and not name.startswith(PREFIX + "_"):
            continue
        if name not in known:
            kind, pool = ("patch switch", [n for n in known if n.startswith(PATCH_PREFIX)])
            if not name.startswith(PATCH_PREFIX):
                kind, pool = ("setting", [n for n in known if not n.startswith(PATCH_PREFIX)])
            raise SettingError(f"{name}: no such {kind}; unset it or use one of {', '.join(sorted(pool))}")
        known[name].read(environ)


def declared(patch_names: Iterable[str]) -> dict[str, Callable[[], str]]:
    """What is added to ``vllm.envs.environment_variables``: name -> function that reads the value."""
    return {s.name: s.read for s in all_settings(patch_names)}
