"""``docs/reference/patches.md``, generated from the declarations by ``make ledger``."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_gemma4_spec import settings
from vllm_gemma4_spec.patching.patch import Patch

_HEAD = """# Patches

Everything this package changes in vLLM 0.19.1, in the order it is applied. Generated from
`vllm_gemma4_spec/*/patches.py` by `make ledger`; a test fails when this page is stale.

A patch is applied once per process, when the module it changes has been imported. Before anything is
changed, the source of every symbol below is compared with its fingerprint in 0.19.1 (the first 16 hex
digits of the SHA-256 of its text); a difference stops the start and names the symbol. `vllm-gemma4-spec
patches` prints the same comparison for the vLLM installed. `VLLM_GEMMA4_SPEC=0` leaves all patches out.

A wrapper outside its patch's scope calls the original with the arguments that it was given
(`tests/engine/test_out_of_scope.py`). Numbers of related changes are vllm-project/vllm's.

| patch | group | scope | related upstream change | switch (`0` leaves it out) |
|---|---|---|---|---|
"""

_BY_SYMBOL = """
## By symbol of vLLM

What each patch replaces, by class or module; several wrappers of one symbol are called in the order from right to left,
the last applied first. "relies on": the patch reads the symbol and leaves it as it is.

| symbol | replaced by | relied on by |
|---|---|---|
"""


def _section(patch: Patch) -> str:
    marks = patch.fingerprints
    lines = [
        f"\n## {patch.name}\n",
        f"**Group:** {patch.group.value}\n",
        f"**Without it:** {patch.why}\n",
        f"**How:** {patch.how}\n",
        f"**Scope:** {patch.scope}\n",
        f"**Unnecessary with:** {patch.retire}\n",
        f"**Related upstream change:** {patch.related}\n",
        "| replaced | with | fingerprint |",
        "|---|---|---|",
    ]
    for edit in patch.edits:
        mark = f"`{marks[edit.checked_symbol]}`" if edit.checked_symbol else "not in 0.19.1"
        lines.append(f"| `{edit.target}` | `{edit.replacement}` | {mark} |")
    if patch.needs:
        lines += ["", f"Needs {', '.join(f'[{name}](#{name})' for name in patch.needs)}."]
    if patch.watches:
        lines += ["", "| relied on | fingerprint |", "|---|---|"]
        lines += [f"| `{symbol}` | `{marks[symbol]}` |" for symbol in patch.watches]
    return "\n".join(lines) + "\n"


def _links(patches: Sequence[Patch]) -> str:
    return ", ".join(f"[{p.name}](#{p.name})" for p in dict.fromkeys(patches))


def _by_symbol(patches: Sequence[Patch]) -> str:
    """A row per symbol, sorted: the patches that replace it, in the order they are applied, and those that read it."""
    replaced: dict[str, list[Patch]] = {}
    read: dict[str, list[Patch]] = {}
    for patch in patches:
        for edit in patch.edits:
            replaced.setdefault(edit.target, []).append(patch)
        for symbol in patch.watches:
            read.setdefault(symbol, []).append(patch)
    rows = (f"| `{s}` | {_links(replaced.get(s, []))} | {_links(read.get(s, []))} |\n" for s in {*replaced, *read})
    return _BY_SYMBOL + "".join(sorted(rows))


def render(patches: Sequence[Patch]) -> str:
    """The whole page."""
    rows = "".join(
        f"| [{p.name}](#{p.name}) | {p.group.value} | {p.scope} | {p.related} "
        f"| `{settings.patch_switch(p.name).name}` |\n"
        for p in patches
    )
    names = [p.name for p in patches]
    other = [s for s in settings.all_settings(names) if not s.name.startswith(settings.PATCH_PREFIX)]
    table = "\n## Other environment variables\n\n| variable | default | what it does |\n|---|---|---|\n"
    table += "".join(f"| `{s.name}` | `{s.default}` | {s.help} |\n" for s in other)
    return _HEAD + rows + _by_symbol(patches) + "".join(_section(p) for p in patches) + table
