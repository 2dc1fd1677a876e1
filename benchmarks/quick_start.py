"""The README's quick start, whole, on a GPU: `vllm serve` with every flag, `doctor --url`, requests, `bench`.

    GEMMA4_ARTIFACTS=… python benchmarks/quick_start.py --out quick-start.json [--layers 12] [--work FOLDER]

31B and E4B in NVFP4_AWQ are written from their published configs with random weights, as ModelOpt would export them
(20 and 8 GB), beside the genuine tokenizer and chat template. The server has an fp8 KV cache, chunked prefill, prefix
caching, a context of 131,072 tokens, four requests at a time, and both parsers. Then: ``doctor --url``, a chat and a
long prompt as a client sends them, ``vllm-gemma4-spec bench``. Exits 1 where a step fails; the server's log lies beside
``--out``. Random weights answer nonsense, so acceptance means nothing here: what is shown is that it starts and serves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CONTEXT, REQUESTS, K = 131_072, 4, 3
TEMPLATE = "google-official-2026-07-large-31B-26B-12B"


def write_models(work: Path, layers: int | None, device: str) -> tuple[Path, Path]:
    """Target and drafter, each with tokenizer and chat template; kept where they are there already."""
    import shapes

    from tests.support import random_nvfp4

    folders = []
    for name in ("31B", "E4B"):
        folder = work / f"{name}-NVFP4_AWQ{f'-{layers}' if layers else ''}"
        folders.append(folder)
        if (folder / "config.json").exists():
            continue
        config = shapes.text_config(name, layers)
        random_nvfp4.save(config, folder, "NVFP4_AWQ", device=device)
        tokenizer = shapes.artifacts() / "gemma4" / "tokenizer"
        for file in tokenizer.iterdir():
            shutil.copy2(file, folder / file.name)
        (template,) = (shapes.artifacts() / "gemma4" / "chat_templates").glob(f"{TEMPLATE}*.jinja")
        shutil.copy2(template, folder / "chat_template.jinja")
        generation = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "do_sample": False}
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folders[0], folders[1]


def serve_arguments(target: Path, drafter: Path, memory: float) -> list[str]:
    """Those of the README and of ``overlays/hopper``."""
    speculative = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": K}
    return [
        str(target),
        "--served-model-name=gemma-4-31B-it",
        f"--speculative-config={json.dumps(speculative)}",
        "--kv-cache-dtype=fp8",
        "--enable-prefix-caching",
        "--enable-chunked-prefill",
        f"--max-model-len={CONTEXT}",
        f"--max-num-seqs={REQUESTS}",
        f"--gpu-memory-utilization={memory}",
        "--reasoning-parser=gemma4",
        "--tool-call-parser=gemma4",
        "--enable-auto-tool-choice",
    ]


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    import urllib.request

    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps({"model": "gemma-4-31B-it", "temperature": 0} | body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        found: dict[str, Any] = json.load(response)
    return found


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=Path("quick-start.json"))
    ap.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gemma4-quick-start")
    ap.add_argument("--layers", type=int, help="keep this many layers of each (a multiple of six): a quick run")
    ap.add_argument("--memory", type=float, default=0.9, help="--gpu-memory-utilization")
    ap.add_argument("--long", type=int, default=100_000, help="tokens of the long prompt")
    ap.add_argument("--write-only", action="store_true", help="write the checkpoints and stop")
    args = ap.parse_args()
    import torch

    from vllm_gemma4_spec.demo.server import Server

    steps: dict[str, Any] = {}

    def step(name: str, run: Callable[[], dict[str, Any]]) -> bool:
        began = time.monotonic()
        try:
            found = {"ok": True} | run()
        except Exception as error:  # the steps after it are of use all the same
            found = {"ok": False, "why": f"{type(error).__name__}: {error}"[:2000]}
        steps[name] = found | {"seconds": round(time.monotonic() - began, 1)}
        args.out.write_text(json.dumps(steps, indent=1))
        print(f"{'ok  ' if found['ok'] else 'FAIL'} {name}: {json.dumps(steps[name])[:400]}", flush=True)
        return bool(found["ok"])

    def command(*arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", "from vllm_gemma4_spec.cli import main; main()", *arguments],
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
        return {"printed": done.stdout[-4000:]}

    folders: list[Path] = []

    def written() -> dict[str, Any]:
        folders.extend(write_models(args.work, args.layers, "cuda" if torch.cuda.is_available() else "cpu"))
        return {p.name: round(sum(f.stat().st_size for f in p.iterdir()) / 1e9, 2) for p in folders}

    if not step("write", written) or args.write_only:
        return 0 if steps["write"]["ok"] else 1
    step("inspect", lambda: command("inspect", str(folders[1])))
    began = time.monotonic()
    log = args.out.with_suffix(".log")
    try:
        with Server(serve_arguments(folders[0], folders[1], args.memory), log) as server:
            step("serve", lambda: {"ready_s": round(time.monotonic() - began, 1)})
            step("doctor", lambda: command("doctor", "--url", server.url))

            def chat() -> dict[str, Any]:
                message = {"role": "user", "content": "Why is the sky blue?"}
                reply = ask(server.url, {"messages": [message], "max_tokens": 64})
                return {"usage": reply["usage"], "finish": reply["choices"][0]["finish_reason"]}

            def long() -> dict[str, Any]:
                text = " ".join(["lake"] * args.long)  # a token each
                reply = ask(server.url, {"messages": [{"role": "user", "content": text}], "max_tokens": 16})
                return {"usage": reply["usage"]}

            step("chat", chat)
            step("long prompt", long)
            prompts = args.work / "prompts.jsonl"
            prompts.write_text("".join(json.dumps({"prompt": f"Count to {n + 10}."}) + "\n" for n in range(8)))
            how = ("--prompts", str(prompts), "--concurrency", "1,4", "--requests", "8", "--tokens", "64")
            step("bench", lambda: command("bench", "--url", server.url, *how))
    except Exception as error:
        steps["server"] = {"ok": False, "why": f"{type(error).__name__}: {error}"[:3000]}
        args.out.write_text(json.dumps(steps, indent=1))
        print(f"FAIL server: {steps['server']['why']}", flush=True)
    return 0 if all(found["ok"] for found in steps.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
