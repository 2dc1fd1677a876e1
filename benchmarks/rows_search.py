"""Forms and launches of a drafter's small-batch NVFP4 GEMMs, chosen where they run: in the chain of ``rows_chain.py``.

    python benchmarks/rows_search.py --out rows-search.json

Needs a Hopper card. Begins with what the package takes where nothing was measured. GEMM by GEMM every launch, then
every form is tried with all others as they are; the fastest stays if the chain gains by it, twice over. A GEMM's time
alone does not say this: what counts in a chain is whether its blocks find room beside those of the kernels around it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rows_chain import HIDDEN, SHAPES, Chain, compile_all, timed

from vllm_gemma4_spec.kernels import packing, small_batch_gemm
from vllm_gemma4_spec.kernels.small_batch_gemm import _WIDE, Form, Launch, all_forms, candidates, source

REGISTERS = (0, 64, 72, 80, 88, 96, 104)
# By the largest batch: batches whose times are added up, forms.
TRIED: dict[int, tuple[tuple[int, ...], tuple[Form, ...]]] = {
    8: (
        (1, 4),
        (*(Form(1, whole=True, registers=n) for n in REGISTERS), Form(1), _WIDE),
    ),
    16: ((16,), (*(Form(2, registers=n) for n in REGISTERS), Form(2, 2), Form(1, whole=True), Form(1), _WIDE)),
}
GAIN = 0.996
Plan = dict[str, tuple[Form, Launch]]


def launches(n: int, k: int, form: Form, gelu: bool) -> list[Launch]:
    blocks, outputs, group = k // packing.COLUMNS, n // packing.ROWS // form.pair, 2 if gelu and form.pair == 1 else 1
    found = []
    for split, slots, parts in itertools.product((1, 2, 3, 4, 5, 7, 8, 10), (1, 2, 4, 8), (1, 2, 4, 5)):
        warps, each = split * slots, -(-blocks // (split * parts))
        sensible = split * parts <= blocks and each <= 5 and each * split * parts - blocks < split * parts // 2 + 1
        if sensible and warps <= form.most_warps and slots % group == 0 and outputs % slots == 0:
            found.append(Launch(warps, split, parts))
    return found


class Search:
    def __init__(self, chain: Chain, rows: tuple[int, ...]) -> None:
        self.chain, self.tried = chain, 0
        torch.manual_seed(rows[0])
        self.starts = [torch.randn(r, HIDDEN, device="cuda").bfloat16() for r in rows]

    def us(self, plan: Plan) -> float:
        self.tried += 1
        forms, how = ({name: both[i] for name, both in plan.items()} for i in range(2))
        for start, (name, (form, launch)) in itertools.product(self.starts, plan.items()):
            self.chain.make_room_for(len(start), name, form, launch)
        return sum(timed(self.chain, start, forms, how)[0] for start in self.starts)

    def better(self, plan: Plan, name: str, others: list[tuple[Form, Launch]]) -> tuple[Plan, dict[str, float]]:
        now = min(self.us(plan), self.us(plan))
        each = {other: self.us({**plan, name: other}) for other in others if other != plan[name]}
        said = {"now": round(now, 2)} | {described(*other): round(us, 2) for other, us in each.items()}
        for other, us in sorted(each.items(), key=lambda item: item[1])[:2]:
            changed = {**plan, name: other}
            if us < GAIN * now and self.us(changed) < GAIN * now:
                return changed, said
        return plan, said


def described(form: Form, how: Launch) -> str:
    return f"{form} {how.warps}/{how.split}/{how.parts}"


def searched(chain: Chain, most: int, with_launches: bool) -> dict[str, Any]:
    rows, forms = TRIED[most]
    search, shapes = Search(chain, rows), chain.shapes
    plan: Plan = {}
    for name, (n, k) in shapes.items():
        form = candidates(n, k, name == "gate_up", False, most)[0]
        plan[name] = (form, small_batch_gemm._launch(n, k, form, form.chunks(most), name == "gate_up", 0))
    first, steps = dict(plan), []
    for _ in range(2):
        before = dict(plan)
        for name, (n, k) in shapes.items() if with_launches else ():
            ways = [(plan[name][0], how) for how in launches(n, k, plan[name][0], name == "gate_up")]
            plan, said = search.better(plan, name, ways)
            steps.append({name: said})
        for name, (n, k) in shapes.items():
            gelu = name == "gate_up"
            usual = {f: small_batch_gemm._launch(n, k, f, f.chunks(most), gelu, 0) for f in forms}
            ways = [(f, how) for f in forms for how in {usual[f]} | {plan[name][1]} & set(launches(n, k, f, gelu))]
            plan, said = search.better(plan, name, ways)
            steps.append({name: said})
        if plan == before:
            break
    times = [(search.us(first), search.us(plan)) for _ in range(3)]
    return {
        "rows": rows,
        "us_before": round(min(t[0] for t in times), 2),
        "us": round(min(t[1] for t in times), 2),
        "before": {name: described(*both) for name, both in first.items()},
        "found": {name: described(*both) for name, both in plan.items()},
        "launches": {name: asdict(how) for name, (_, how) in plan.items()},
        "tried": search.tried,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--models", default=";".join(SHAPES))
    parser.add_argument("--rows", default="8,16")
    parser.add_argument("--forms", action="store_true", help="forms alone, with the launches that the package plans")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    wanted = {form for _, forms in TRIED.values() for form in forms} | {form for form, _ in all_forms()}
    compile_all({source(form, gelu, False) for form in wanted for gelu in (0, 1, 2)})
    torch.manual_seed(0)
    found: dict[str, Any] = {"card": torch.cuda.get_device_name()}
    for model, most in itertools.product(asked.models.split(";"), map(int, asked.rows.split(","))):
        found[f"{model}, to {most} rows"] = here = searched(Chain(model, asked.layers), most, not asked.forms)
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
        print(model, most, {k: v for k, v in here.items() if k not in ("steps", "launches")}, flush=True)


if __name__ == "__main__":
    main()
