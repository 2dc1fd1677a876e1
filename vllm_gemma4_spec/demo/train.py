"""Training of the demo pair on the CPU: batches of dialogues of like length, AdamW, cosine decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_gemma4_spec.demo.data import dialogues
from vllm_gemma4_spec.demo.template import prompt_text

if TYPE_CHECKING:
    import torch
    from transformers import Gemma4ForCausalLM, PreTrainedTokenizerFast

IGNORED = -100  # label of a position that is not learned


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. ``batch_tokens`` counts padding; ``seed`` is that of weights and of data."""

    steps: int
    batch_tokens: int
    learning_rate: float
    seed: int
    warmup: float = 0.05
    weight_decay: float = 0.05


def examples(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[list[int], int]]:
    """Endless training examples: (token ids of prompt and answer, length of the prompt)."""
    for dialogue in dialogues(seed, held_out=False):
        prompt = tokenizer(prompt_text(dialogue))["input_ids"]
        answer = tokenizer(dialogue.answer)["input_ids"]
        yield prompt + answer, len(prompt)


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, batch_tokens: int, pool: int = 512
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches (input_ids, labels), int64 [batch, length], padded on the right.

    ``pool`` examples are sorted by length before they are cut into batches, so that little is padding; a causal
    model needs no mask for padding that stands on the right.
    """
    import random

    import torch

    rng = random.Random(seed)
    stream = examples(tokenizer, seed)
    while True:
        drawn = sorted((next(stream) for _ in range(pool)), key=lambda e: len(e[0]))
        cut: list[list[tuple[list[int], int]]] = [[]]
        for example in drawn:
            if (len(cut[-1]) + 1) * len(example[0]) > batch_tokens:
                cut.append([])
            cut[-1].append(example)
        rng.shuffle(cut)
        for rows in cut:
            length = max(len(ids) for ids, _ in rows)
            inputs = torch.zeros(len(rows), length, dtype=torch.int64)
            labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
            for row, (ids, prompt) in enumerate(rows):
                inputs[row, : len(ids)] = torch.tensor(ids)
                labels[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
            yield inputs, labels


def train(
    model: Gemma4ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train ``model`` in place on the answers of the training dialogues; ``progress(step, loss)`` after each step."""
    import torch
    import torch.nn.functional as F

    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    warmup = max(1, round(recipe.warmup * recipe.steps))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    stream = batches(tokenizer, recipe.seed, recipe.batch_tokens)
    for step in range(recipe.steps):
        inputs, labels = next(stream)
        learned = labels[:, 1:] != IGNORED
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1][learned]
        # Only positions that are learned go through the output matrix: half of them are prompt.
        logits = model.lm_head(hidden)
        cap = model.config.final_logit_softcapping
        logits = torch.tanh(logits / cap) * cap
        loss = F.cross_entropy(logits, labels[:, 1:][learned])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
    model.eval()
