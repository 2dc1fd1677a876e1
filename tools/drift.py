"""What became of every patch's targets in other releases of vLLM: ``make drift`` writes ``docs/evidence/drift.md``.

Reads the releases' source distributions; nothing of them is built or run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from packaging.version import Version

from vllm_gemma4_spec.patching import fingerprint
from vllm_gemma4_spec.patching.patch import Group
from vllm_gemma4_spec.patching.version import SUPPORTED
from vllm_gemma4_spec.registry import PATCHES

ROOT = Path(__file__).parents[1]
Texts = Mapping[str, str]  # path inside the release -> text
# From the best to the worst: a patch is what the worst of its symbols is.
STATES = ("same", "moved", "changed", "gone")


@dataclass(frozen=True)
class Evidence:
    """How a release's source shows that it no longer needs a patch.

    Attributes:
        says: what is seen, for a reader.
        holds: looks for it in a release.
        whole: the patch is unnecessary; otherwise a part of it is.
    """

    says: str
    holds: Callable[[Texts], bool]
    whole: bool = True


def _contains(path: str, *words: str) -> Callable[[Texts], bool]:
    return lambda texts: all(w in texts.get(path, "") for w in words)


def _any_contains(pattern: str, word: str) -> Callable[[Texts], bool]:
    return lambda texts: any(re.search(pattern, p) and re.search(word, t) for p, t in texts.items())


_PROPOSER = "vllm/v1/spec_decode/llm_base_proposer.py"  # since 0.20.0

EVIDENCE: dict[str, tuple[Evidence, ...]] = {
    "embedder-norm": (
        Evidence(
            "Gemma4MultimodalEmbedder normalises before it projects",
            _contains("vllm/model_executor/models/gemma4_mm.py", "self.embedding_pre_projection_norm(inputs_embeds)"),
        ),
    ),
    "image-attention": (
        Evidence(
            "images attend both ways in sliding layers; one that prefix caching knows in part may still be cut",
            _contains("vllm/model_executor/models/gemma4_mm.py", "_clear_mm_prefix_for_full_attn_layers"),
            whole=False,
        ),
    ),
    "cpu-runner": (
        Evidence(
            "CPUModelRunner loads a drafter and no longer asserts that there is none",
            _contains("vllm/v1/worker/cpu_model_runner.py", "self.drafter.load_model"),
        ),
    ),
    "cpu-kernels": (
        Evidence(
            "cpu_triton_utils has forms of the drafting and rejection kernels",
            _contains(
                "vllm/utils/cpu_triton_utils.py",
                "_eagle_prepare_inputs_padded_kernel_impl",
                "_rejection_greedy_sample_kernel_impl",
            ),
        ),
    ),
    "cpu-moe-gelu": (
        Evidence(
            "the CPU's experts list MoEActivation.GELU",
            _any_contains(r"layers/fused_moe/.*cpu\w*\.py$", r"MoEActivation\.GELU\b"),
        ),
    ),
    "chat-output": (
        Evidence(
            "vllm/parser/gemma4.py: one parser on token ids for reasoning and tool calls",
            lambda texts: "vllm/parser/gemma4.py" in texts,
        ),
    ),
    "own-blocks": (
        Evidence(
            "the first step looks ahead; rows of the block table still keep the tail of the last request",
            _contains("vllm/v1/core/sched/scheduler.py", "limit_lookahead_tokens = load_kv_async"),
            whole=False,
        ),
    ),
    "text-drafter": (
        Evidence(
            "a draft model beside a multimodal target is warned about, no longer refused",
            _contains(_PROPOSER, "def _warn_if_multimodal"),
            whole=False,
        ),
    ),
    "kv-shared-layers": (
        Evidence(
            "KV-shared layers have no k_norm to load",
            _contains("vllm/model_executor/models/gemma4.py", "(and no k_norm/v_norm)"),
            whole=False,
        ),
    ),
}


def _path(module: str, texts: Texts) -> str | None:
    base = module.replace(".", "/")
    return next((p for p in (f"{base}/__init__.py", f"{base}.py") if p in texts), None)


def state(symbol: str, texts: Texts) -> str:
    """``same``, ``moved`` (the same text in another module), ``changed`` or ``gone``."""
    wanted = fingerprint.wanted(symbol)
    module, _, name = symbol.partition(":")
    path = _path(module, texts)
    found = fingerprint.of_source(texts[path], name) if path else None
    if found is not None:
        return "same" if found == wanted else "changed"
    defines = re.compile(rf"^(class|(async )?def) {re.escape(name.split('.')[0])}\b", re.MULTILINE)
    marks = {fingerprint.of_source(t, name) for p, t in texts.items() if p.startswith("vllm/") and defines.search(t)}
    marks.discard(None)
    return "moved" if wanted in marks else "changed" if marks else "gone"


@dataclass(frozen=True)
class Verdict:
    """One patch in one release: the worst state among its targets and among what it relies on."""

    targets: str
    watches: str
    fixed: tuple[Evidence, ...] = ()

    @property
    def unnecessary(self) -> bool:
        return any(e.whole for e in self.fixed)

    def __str__(self) -> str:
        if self.unnecessary:
            return "fixed upstream"
        text = "uses changed code" if self.targets == "same" != self.watches else self.targets
        return f"{text}, fixed in part" if self.fixed else text


def verdicts_of(texts: Texts) -> dict[str, Verdict]:
    """Patch name -> what became of it in a release with these sources."""
    # In the order of their modules, each of which is then parsed once.
    states = {s: state(s, texts) for s in sorted({s for p in PATCHES for s in p.checked_symbols})}
    out = {}
    for patch in PATCHES:
        targets = [
            # Something of that name where 0.19.1 has nothing: upstream's own.
            ("changed" if _exists(e.target, texts) else "same")
            if e.checked_symbol is None
            else states[e.checked_symbol]
            for e in patch.edits
        ]
        watches = [states[s] for s in patch.watches]
        fixed = tuple(e for e in EVIDENCE.get(patch.name, ()) if e.holds(texts))
        out[patch.name] = Verdict(max(targets, key=STATES.index), max(watches, key=STATES.index, default="same"), fixed)
    return out


def _exists(symbol: str, texts: Texts) -> bool:
    module, _, name = symbol.partition(":")
    path = _path(module, texts)
    return path is not None and fingerprint.of_source(texts[path], name) is not None


def _ranges(of_version: Mapping[str, str]) -> str:
    """``same: 0.19.0 to 0.19.1; gone: 0.20.0 to 0.33.0``: consecutive releases with the same word together."""
    runs: list[tuple[str, list[str]]] = []
    for version, word in of_version.items():
        if runs and runs[-1][0] == word:
            runs[-1][1].append(version)
        else:
            runs.append((word, [version]))
    return "; ".join(f"{w}: {v[0]}" + (f" to {v[-1]}" if len(v) > 1 else "") for w, v in runs)


HEAD = """# Other releases of vLLM

Generated by `make drift` from the releases' sources on the package index: does the code that each patch was written
for still stand there, and does the release still need the patch? Newest release seen: {newest}. What to use instead:
[On a newer vLLM](../how-to/newer-vllm.md).

**What the plugin does there:** it is for 0.19.1. On every other release it ends the start with one line, `vLLM … is
installed and this plugin is for 0.19.1; …`, and changes nothing; `VLLM_GEMMA4_SPEC=0` or uninstalling it lets vLLM
start. Patches whose code happens to be the same are not applied either: all were tested together, on 0.19.1.

*same*: every target's source text is that of 0.19.1. *moved*: the same text in another module. *uses changed code*:
the targets are the same, something the patch builds on is not. *gone*: a target's name is nowhere. *fixed upstream*:
the source shows what the last column says; nothing was run.
"""


def _advice(version: str, verdicts: Mapping[str, Verdict]) -> str:
    if version == SUPPORTED:
        return "Use the plugin."
    needed = sum(p.group is Group.CORRECTNESS and not verdicts[p.name].unnecessary for p in PATCHES)
    if Version(version) < Version(SUPPORTED):
        return f"Go to {SUPPORTED}, which the plugin is for."
    return f"Uninstall the plugin. If you need one of {needed} correctness patches (below), stay on {SUPPORTED}."


def page(found: Mapping[str, Mapping[str, Verdict]]) -> str:
    """``docs/evidence/drift.md`` from release -> patch name -> verdict."""
    lines = [HEAD.format(newest=list(found)[-1])]
    lines += ["| release | same | moved, changed or gone | fixed upstream | what to do |", "|---|---|---|---|---|"]
    rows: dict[str, list[str]] = {}
    for version, verdicts in found.items():
        words = [str(v) for v in verdicts.values()]
        same, fixed = words.count("same"), words.count("fixed upstream")
        cells = f"| {same} | {len(words) - same - fixed} | {fixed} | {_advice(version, verdicts)} |"
        rows.setdefault(cells, []).append(version)
    lines += [f"| {', '.join(versions)} {cells}" for cells, versions in rows.items()]
    lines += ["", "## Patch by patch", "", "| patch | group | its code | fixed upstream |", "|---|---|---|---|"]
    for patch in PATCHES:
        of_version = {v: str(verdicts[patch.name]) for v, verdicts in found.items()}
        seen = []
        for evidence in EVIDENCE.get(patch.name, ()):
            since = [v for v, verdicts in found.items() if evidence in verdicts[patch.name].fixed]
            if since:
                seen.append(f"{'' if evidence.whole else 'in part '}since {since[0]}: {evidence.says}")
        link = f"[{patch.name}](../reference/patches.md#{patch.name})"
        lines.append(f"| {link} | {patch.group.value} | {_ranges(of_version)} | {'; '.join(seen) or 'no'} |")
    return "\n".join(lines) + "\n"


def main(
    cache: Annotated[Path, typer.Option(help="Folder for the downloaded releases.")] = ROOT / "build/vllm-sources",
    since: Annotated[str, typer.Option(help="Oldest release to look at.")] = "0.19.0",
    out: Annotated[Path, typer.Option(help="The page to write.")] = ROOT / "docs/evidence/drift.md",
) -> None:
    """Compare every patch's targets with every release since 0.19.0 and write the page."""
    import vllm_sources

    found: dict[str, dict[str, Verdict]] = {}
    for version, package in vllm_sources.releases(since).items():
        texts = vllm_sources.read_python(vllm_sources.fetch(package, cache))
        found[version] = verdicts_of(texts)
        typer.echo(f"{version}: " + ", ".join(f"{n} {v}" for n, v in found[version].items() if str(v) != "same"))
    out.write_text(page(found))


if __name__ == "__main__":
    typer.run(main)
