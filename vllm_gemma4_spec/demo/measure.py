"""What the pair can do, measured with HF transformers: right answers per kind, and drafts accepted."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

from vllm_gemma4_spec.demo.data import Dialogue, dialogues
from vllm_gemma4_spec.demo.template import prompt_text
from vllm_gemma4_spec.demo.tokenizer import CONTROL_TOKENS, END_IDS

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Gemma4ForCausalLM, PreTrainedTokenizerFast

HELD_OUT_SEED = 1
LONGEST_ANSWER = 128


def held_out(count: int, seed: int = HELD_OUT_SEED) -> list[Dialogue]:
    return list(itertools.islice(dialogues(seed, held_out=True), count))


def greedy(
    model: Gemma4ForCausalLM, prompts: list[list[int]], max_new_tokens: int, batch: int = 128
) -> list[list[int]]:
    """Greedy continuations of ``prompts`` (token ids), each up to and with the token that ends it.

    Prompts of like length are decoded together, padded on the left.
    """
    import torch

    out: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        length = max(len(prompts[i]) for i in rows)
        padding = [length - len(prompts[i]) for i in rows]
        ids = torch.tensor([[CONTROL_TOKENS["<pad>"]] * n + prompts[i] for i, n in zip(rows, padding, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (length - n) for n in padding])
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=END_IDS
            )
        for i, answer in zip(rows, made[:, length:].tolist(), strict=True):
            end = next((n + 1 for n, t in enumerate(answer) if t in END_IDS), len(answer))
            out[i] = answer[:end]
    return out


def acceptance(drafter: Gemma4ForCausalLM, prompts: list[list[int]], answers: list[list[int]], k: int) -> list[float]:
    """Share of drafting steps in which the draft at each of the k positions is accepted, under greedy decoding.

    ``answers`` are the target's own. A step drafts k tokens greedily from what stands so far, keeps those that
    agree with the target up to the first that does not, and adds the target's next token: the acceptance length
    is 1 + the sum of the shares. The first token of an answer comes from the prefill, without a draft.
    """
    places = [(row, place) for row, answer in enumerate(answers) for place in range(1, len(answer))]
    contexts = [prompts[row] + answers[row][:place] for row, place in places]
    drafts = dict(zip(places, greedy(drafter, contexts, max_new_tokens=k), strict=True))
    steps = 0
    accepted = [0] * k
    for row, answer in enumerate(answers):
        place = 1
        while place < len(answer):
            steps += 1
            hits = 0
            for draft, wanted in zip(drafts[row, place], answer[place:], strict=False):
                if draft != wanted:
                    break
                accepted[hits] += 1
                hits += 1
            place += hits + 1
    return [n / steps for n in accepted]


def assistant(
    target: Gemma4ForCausalLM,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    questions: int,
    k: int,
    seed: int = HELD_OUT_SEED,
) -> dict[str, Any]:
    """Acceptance of an MTP assistant's k drafts on half of the held-out questions, as :func:`pair` measures it."""
    from vllm_gemma4_spec.demo import assistant as network

    prompts = [tokenizer(prompt_text(d))["input_ids"] for d in held_out(max(1, questions // 2), seed)]
    accepted = network.acceptance(target, *network.load(folder), prompts, greedy(target, prompts, LONGEST_ANSWER), k)
    return {
        "assistant_accepted_by_position": [round(share, 4) for share in accepted],
        "assistant_acceptance_length": round(1 + sum(accepted), 3),
    }


def pair(
    target: Gemma4ForCausalLM,
    drafter: Gemma4ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: int,
    k: int,
    seed: int = HELD_OUT_SEED,
) -> dict[str, Any]:
    """The results in the manifest: shares of right answers, and acceptance of k drafts, on held-out questions.

    An answer is right when it equals the one right answer in every token.
    """
    asked = held_out(questions, seed)
    prompts = [tokenizer(prompt_text(d))["input_ids"] for d in asked]
    answers = greedy(target, prompts, LONGEST_ANSWER)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for dialogue, answer in zip(asked, answers, strict=True):
        total[dialogue.kind] += 1
        right[dialogue.kind] += answer == tokenizer(dialogue.answer)["input_ids"]
    some = slice(0, max(1, questions // 2))  # a draft from every place costs more than an answer
    accepted = acceptance(drafter, prompts[some], answers[some], k)
    return {
        "questions": questions,
        "right": right.total() / total.total(),
        "right_by_kind": {kind: [right[kind], total[kind]] for kind in sorted(total)},
        "drafts": k,
        "accepted_by_position": [round(share, 4) for share in accepted],
        "acceptance_length": round(1 + sum(accepted), 3),
    }
