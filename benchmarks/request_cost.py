"""What the rules of a request cost: processor time of the same work with the patches of ``requests/`` and without.

    python benchmarks/request_cost.py [--rounds 24] [--out request-cost.json]

Two engines in two processes, one of them without these patches, take turns: a tiny Gemma 4 as its own drafter (CPU,
float32, k = 3, 8 requests), without a rule and with each kind. Its steps are so short that what is done for a request
weighs far more than with a real model. Beside the medians over the turns stand those of the fastest quarter of each
engine's: whatever else a machine does makes turns slower, never faster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.requests.generator import SCHEMA
from tests.requests.test_random_requests import OPTIONS
from tests.support import scripted
from tests.support.engine import engine

CASES: dict[str, dict[str, Any]] = {
    "no rule": {"ignore_eos": True},
    "JSON schema": {"structured_outputs": {"json": {"type": "array", "items": SCHEMA, "minItems": 9}}},
    "regex": {"structured_outputs": {"regex": "([a-z]{1,9} ){40,60}"}},
    "min_tokens": {"ignore_eos": True, "min_tokens": 36},
    "allowed_token_ids": {"ignore_eos": True, "allowed_token_ids": list(range(3, 200))},
}
TOKENS = 40
WAYS = ("stock", "patched")


def serve(way: str, target: Path, pipe: Any) -> None:
    """In a process of its own: does what it is told, and says how many seconds it took and what came out."""
    import vllm
    from vllm.sampling_params import StructuredOutputsParams

    from tests.support.stock import without
    from vllm_gemma4_spec.requests.patches import PATCHES

    prompt = scripted.tokenizer().encode("<bos><|turn>user\nWhat?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>")
    with contextlib.ExitStack() as stack:
        for patch in PATCHES if way == "stock" else ():
            stack.enter_context(without(patch))
        llm = stack.enter_context(engine(target, target, 3, **OPTIONS))
        for name in iter(pipe.recv, None):
            fields = {"temperature": 0.0, "max_tokens": TOKENS} | CASES[name]
            if "structured_outputs" in fields:
                fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
            params = [vllm.SamplingParams(**fields) for _ in range(8)]
            started = time.process_time()  # other processes on the machine do not count
            outputs = llm.generate([{"prompt_token_ids": prompt}] * 8, params, use_tqdm=False)
            pipe.send((time.process_time() - started, [list(o.outputs[0].token_ids) for o in outputs]))
        pipe.send(None)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=24)
    ap.add_argument("--out", type=Path, help="file for the results as JSON")
    args = ap.parse_args()

    target = scripted.save(Path(tempfile.mkdtemp(prefix="request-cost-")) / "target")
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for way in WAYS:
        pipes[way], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(way, target, theirs), daemon=True))
        processes[-1].start()

    def ask(way: str, name: str) -> tuple[float, list[list[int]]]:
        pipes[way].send(name)
        answer: tuple[float, list[list[int]]] = pipes[way].recv()
        return answer

    rows = []
    for name in CASES:
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        tokens = {way: ask(way, name)[1] for way in WAYS}  # warm
        for turn in range(args.rounds):
            for way in WAYS[:: 1 if turn % 2 else -1]:
                seconds[way].append(ask(way, name)[0])
        row: dict[str, Any] = {"case": name, "rounds": args.rounds, "tokens": sum(map(len, tokens["patched"]))}
        row["same answers"] = tokens["stock"] == tokens["patched"]
        micro = {w: sorted(1e6 * x / sum(map(len, tokens[w])) for x in s) for w, s in seconds.items()}
        row |= {f"{way}, us a token": round(statistics.median(micro[way]), 1) for way in WAYS}
        fast = {way: statistics.median(micro[way][: max(1, args.rounds // 4)]) for way in WAYS}
        row |= {f"{way}, fastest quarter": round(fast[way], 1) for way in WAYS}
        ratios = [p / s for s, p in zip(seconds["stock"], seconds["patched"], strict=True)]
        row["ratio, run for run"] = round(statistics.median(ratios), 3)
        row["ratio, fastest quarter"] = round(fast["patched"] / fast["stock"], 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    for pipe in pipes.values():
        pipe.send(None)
        pipe.recv()
    for process in processes:
        process.join()
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
