"""Records what transformers' own assistant drafts; run where transformers 5.8 or later is, without vLLM.

    python -m tests.mtp.pairs FOLDER                                        # this project's environment
    python -m tests.mtp.record_with_transformers FOLDER tests/mtp/recorded  # transformers 5.12.1 or 5.24.0

The module itself is called, on the target's KV of the accepted text alone: ``generate()`` leaves rejected drafts' keys
in the cache (seen in 5.12.1 and 5.24.0). The module's mask admits one key more than a sliding layer sees, so the keys
are cut to the window. A query stands at the last position of the cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma4AssistantForCausalLM

from tests.mtp.digest import digest

LENGTHS, TOKENS, K = (3, 33, 70, 200), 24, 8


@torch.no_grad()
def record(folder: Path) -> dict[str, Any]:
    """Prompts, the target's greedy answers, and the drafts after each of their tokens."""
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32).eval()
    model = Gemma4AssistantForCausalLM.from_pretrained(folder / "assistant", dtype=torch.float32).eval()
    text, window = target.get_input_embeddings(), target.config.get_text_config().sliding_window
    g = torch.Generator().manual_seed(1)
    rows = []
    for n in LENGTHS:
        prompt = torch.randint(3, 512, (n,), generator=g).tolist()
        ids, cache, fresh = list(prompt), None, prompt
        for _ in range(TOKENS):  # not generate(), which ends at an end of sequence
            step = target(torch.tensor([fresh]), past_key_values=cache, use_cache=True)
            cache, fresh = step.past_key_values, [int(step.logits[0, -1].argmax())]
            ids += fresh
        # Causal: what was computed for the first tokens is what their text alone gives.
        seen = target(torch.tensor([ids]), output_hidden_states=True, return_shared_kv_states=True, use_cache=False)
        assert seen.logits[0, n - 1 : -1].argmax(-1).tolist() == ids[n:]
        drafts = []
        for length in range(n, n + TOKENS):
            kv = {kind: tuple(t[:, :, :length] for t in pair) for kind, pair in seen.shared_kv_states.items()}
            kv["sliding_attention"] = tuple(t[:, :, -window:] for t in kv["sliding_attention"])
            hidden, draft = seen.hidden_states[-1][:, length - 1 : length], [ids[length]]
            for _ in range(K):
                inputs = torch.cat([text(torch.tensor([draft[-1:]])), hidden], dim=-1)
                position = torch.tensor([[length - 1]])
                out = model(inputs_embeds=inputs, position_ids=position, shared_kv_states=kv)
                hidden = out.last_hidden_state
                draft.append(int(out.logits[0, -1].argmax()))
            drafts.append(draft[1:])
        rows.append({"prompt": prompt, "answer": ids[n:], "drafts": drafts})
    weights = [digest(folder / name) for name in ("target", "assistant")]
    return {"transformers": transformers.__version__, "weights": weights, "rows": rows}


if __name__ == "__main__":
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for kind in sorted(p.name for p in source.iterdir()):
        (out / f"{kind}.json").write_text(json.dumps(record(source / kind)) + "\n")
        print(kind)
