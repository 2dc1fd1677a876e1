"""What a benchmark asks: a file's prompts, a few built in, or text of a given length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vllm_gemma4_spec.ops import server
from vllm_gemma4_spec.ops.bench.report import BenchError

# One of each kind of work that drafters take differently; for numbers to publish, use MT-bench or Spec-Bench.
BUILT_IN = (
    "Explain to a colleague why a hash table's lookup is constant time on average, and when it is not.",
    "Write a Python function that merges two sorted lists without using sort, with a docstring and two tests.",
    "Summarise in one sentence: The lamp had burnt for forty years; now it goes out when the last ferry leaves.",
    "A train leaves at 9:40, covers 168 km at 112 km/h and waits 25 minutes. When can it leave again? Show each step.",
    "Translate into French: The museum is closed on Mondays, but the garden stays open until sunset.",
    "Return a JSON object with the fields name, capital and population for Portugal, Chile and Kenya. JSON only.",
    "Write the first paragraph of a detective story set in a botanical garden in winter.",
    "List the differences between TCP and UDP in a Markdown table with at least five rows.",
)


def read(file: Path, count: int) -> list[str]:
    """``count`` prompts of an MT-bench or Spec-Bench file (``turns``: the first) or of ``{"prompt": …}`` lines.

    Raises:
        BenchError: the file cannot be read, or a line is neither.
    """
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise BenchError(f"--prompts {file}: {reason}; give a JSONL file of MT-bench, Spec-Bench or your own") from None
    out = []
    for number, line in enumerate(lines[:count], 1):
        try:
            row = json.loads(line)
            text = row["prompt"] if "prompt" in row else row["turns"][0]
        except (ValueError, KeyError, TypeError, IndexError):
            raise BenchError(f'--prompts {file}, line {number}: neither {{"prompt": …}} nor {{"turns": […]}}') from None
        out.append(str(text))
    if not out:
        raise BenchError(f"--prompts {file}: no prompts in it")
    return repeated(out, count)


def repeated(texts: Sequence[str], count: int) -> list[str]:
    """A short list is gone through again."""
    return [texts[i % len(texts)] for i in range(count)]


def of_length(texts: Sequence[str], tokens: int, url: str, model: str, api_key: str | None = None) -> list[str]:
    """Each text repeated and cut to ``tokens`` tokens, by the server's own tokenizer; each differs from the first on.

    Raises:
        ServerError: the server has no ``/tokenize`` and ``/detokenize`` (vLLM's).
    """
    out = []
    for number, text in enumerate(texts):
        long = f"{number}. {text} "
        ids = _tokenize(url, model, long * (1 + tokens // max(1, len(text.split()))), api_key)[:tokens]
        out.append(str(server.post(f"{url}/detokenize", {"model": model, "tokens": ids}, api_key)["prompt"]))
    return out


def _tokenize(url: str, model: str, text: str, api_key: str | None) -> list[int]:
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    return list(server.post(f"{url}/tokenize", body, api_key)["tokens"])
