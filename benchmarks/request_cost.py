"""What the rules of a request cost: the same work with the patches of ``requests/`` and without, timed and counted.

    python benchmarks/request_cost.py [--rounds 24] [--grammar] [--cases CASE ...] [--out request-cost.json]

One engine, a tiny Gemma 4 as its own drafter (CPU, float32, k = 3, 8 requests), answers in turn without these patches,
with them, and without them once more, first without a rule and then with each kind. The third shows what two equal
engines differ by. Times are processor time: other processes do not count, but they share the caches; beside the medians
over the rounds stand those of each one's fastest quarter. The steps are so short that what is done for a request weighs
far more than with a real model.

What no other process can change is counted in a further turn: steps, Python functions called, tensor operations.

`--grammar` takes no engine: what a step of one request does with a grammar and nothing else (drafts validated, bitmasks
filled, tokens accepted; xgrammar, k = 3), as vLLM does it and with the patch, hundreds of times in turn. And what a
step of eight requests does with their budgets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.requests.generator import SCHEMA
from tests.requests.test_random_requests import OPTIONS
from tests.support import scripted
from tests.support.engine import engine
from tests.support.turns import Turns

TOKENS, REQUESTS, K = 40, 8, 3
FREE = "<bos><|turn>user\nWhat?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
CASES: dict[str, dict[str, Any]] = {
    "no rule": {"ignore_eos": True},
    "JSON schema": {"structured_outputs": {"json": {"type": "array", "items": SCHEMA, "minItems": 9}}},
    "regex": {"structured_outputs": {"regex": "([a-z]{1,9} ){40,60}"}},
    "choice": {"structured_outputs": {"choice": ["Anna has two apples. " * 20, "Ben has two books. " * 20]}},
    "min_tokens": {"ignore_eos": True, "min_tokens": 36},
    "allowed_token_ids": {"ignore_eos": True, "allowed_token_ids": list(range(3, 200))},
    "stop strings": {"ignore_eos": True, "stop": ["zzzz"]},
    # In an open channel, and never spent: without the patches a budget is not looked at when speculating.
    "thinking_token_budget": {"ignore_eos": True, "thinking_token_budget": TOKENS},
}
WAYS = {"stock": False, "patched": True, "stock again": False}


def compared(case: str, rounds: int, run: Callable[[bool], float], unit: str, scale: float) -> dict[str, Any]:
    """Seconds of ``run(patched)`` in turn, each way first as often as the others."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    ways = list(WAYS)
    for turn in range(rounds):
        for way in ways[turn % 3 :] + ways[: turn % 3]:
            seconds[way].append(run(WAYS[way]))
    row: dict[str, Any] = {"case": case, "rounds": rounds}
    row |= {f"{way}, us a {unit}": round(1e6 * scale * statistics.median(s), 1) for way, s in seconds.items()}
    fast = {way: statistics.median(sorted(s)[: max(1, rounds // 4)]) for way, s in seconds.items()}
    for way in ("patched", "stock again"):
        ratios = [a / b for a, b in zip(seconds[way], seconds["stock"], strict=True)]
        row[f"{way} / stock, run for run"] = round(statistics.median(ratios), 3)
        row[f"{way} / stock, fastest quarter"] = round(fast[way] / fast["stock"], 3)
    return row


def grammar_rows(rounds: int, cases: list[str]) -> list[dict[str, Any]]:
    if not any("structured_outputs" in CASES[name] for name in cases):
        return []
    import numpy as np

    from tests.requests import test_grammar_positions as positions

    folder = scripted.save(Path(tempfile.mkdtemp(prefix="request-cost-")) / "target")
    managers = positions.manager.__wrapped__(folder)  # type: ignore[attr-defined]
    manager, rows = next(managers)("xgrammar", K), []
    prompt = scripted.tokenizer().encode(FREE)
    for name, fields in CASES.items():
        if name not in cases or "structured_outputs" not in fields:
            continue
        request = positions.new_request(manager, "xgrammar", dict(fields["structured_outputs"]), prompt)
        patched = request.structured_output_request.grammar
        grammars = {False: patched._inner, True: patched}
        chance, path = np.random.default_rng(1), []
        for _ in range(TOKENS):
            mask = manager.grammar_bitmask({"r": request}, ["r"], {})
            allowed = np.unpackbits(mask[0].view(np.uint8), bitorder="little")[: scripted.VOCAB_SIZE]
            allowed[positions.EOS] = 0
            path.append(int(chance.choice(np.flatnonzero(allowed))))
            assert patched.accept_tokens("r", path[-1:])

        def run(
            way: bool, request: Any = request, grammars: Any = grammars, patched: Any = patched, path: Any = path
        ) -> float:
            grammar = request.structured_output_request.grammar = grammars[way]
            patched.reset()
            started = time.process_time()
            for at in range(0, TOKENS, K + 1):
                drafts = grammar.validate_tokens(path[at : at + K])
                manager.grammar_bitmask({"r": request}, ["r"], {"r": drafts})
                grammar.accept_tokens("r", path[at : at + K + 1])
            return time.process_time() - started

        rows.append(compared(f"{name}, the grammar alone", rounds, run, "step", (K + 1) / TOKENS))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def budget_rows() -> list[dict[str, Any]]:
    """What the processor of budgets does in a step of several requests; stock does nothing when it speculates."""
    import torch

    from vllm_gemma4_spec.requests.thinking_budget import ThinkingBudget

    ids = SimpleNamespace(reasoning_start_token_ids=[100], reasoning_end_token_ids=[101])
    rows = []
    for name, left in (("far off", 1000), ("within the drafts", K - 1), ("after the drafts", K), ("spent", 0)):
        processor = ThinkingBudget(SimpleNamespace(reasoning_config=ids), torch.device("cpu"), False)
        params, output = SimpleNamespace(thinking_token_budget=100 + left), [100, *[5] * 100]
        added = [(row, params, [2], output) for row in range(REQUESTS)]
        processor.update_state(SimpleNamespace(added=added, removed=[], moved=[]))
        processor.drafts = [[5] * K] * REQUESTS
        last, drafts = torch.zeros(REQUESTS, 1024), torch.zeros(REQUESTS * K, 1024)
        seconds = []
        for _ in range(3000):
            started = time.perf_counter()
            processor.update_state(None)
            processor.apply(last)
            processor.apply_to_drafts(drafts, processor.drafts, [K] * REQUESTS)
            seconds.append(time.perf_counter() - started)
        micro = [round(1e6 * x, 1) for x in (min(seconds), statistics.median(seconds))]
        rows.append(
            {"case": f"budgets, their end {name}", "requests": REQUESTS, "us a step": micro[1], "least": micro[0]}
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def engine_rows(rounds: int, cases: list[str]) -> list[dict[str, Any]]:
    from vllm_gemma4_spec.requests.patches import PATCHES

    target = scripted.save(Path(tempfile.mkdtemp(prefix="request-cost-")) / "target")
    rows = []
    with engine(target, target, K, **OPTIONS) as llm, Turns(llm, PATCHES) as turns:
        for name, rule in ((name, CASES[name]) for name in cases):
            prompts = [scripted.prompt(0) if "budget" in name else scripted.tokenizer().encode(FREE)] * REQUESTS
            fields = {"max_tokens": TOKENS} | rule
            answers, steps, calls, operations = {}, {}, {}, {}
            for patched in (False, True):
                turns.change(patched)
                turns.answers(prompts, fields)  # what happens once has happened
                counts, answers[patched] = turns.calls(prompts, fields)
                steps[patched], calls[patched] = len(counts), sum(counts)
                operations[patched] = sum(turns.operations(prompts, fields).values())
            tokens = sum(map(len, answers[True]))

            def run(patched: bool, prompts: Any = prompts, fields: Any = fields) -> float:
                turns.change(patched)
                turns.answers(prompts[:2], fields | {"max_tokens": 9, "min_tokens": 0})  # warm again after a change
                started = time.process_time()
                turns.answers(prompts, fields)
                return time.process_time() - started

            row = compared(name, rounds, run, "token", 1 / tokens)
            row |= {"tokens": tokens, "same answers": answers[True] == answers[False]}
            for what, counted in (("steps", steps), ("Python calls", calls), ("tensor operations", operations)):
                row |= {f"{what}, stock": counted[False], f"{what}, patched": counted[True]}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=24)
    ap.add_argument("--grammar", action="store_true", help="grammars and budgets by themselves, without an engine")
    ap.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    ap.add_argument("--out", type=Path, help="file for the results as JSON")
    args = ap.parse_args()
    if args.grammar:
        rows = [*budget_rows(), *grammar_rows(args.rounds * 20, args.cases)]
    else:
        rows = engine_rows(args.rounds, args.cases)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
