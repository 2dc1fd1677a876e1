"""The demo's tokenizer: Gemma 4's layout in small.

A BPE with byte fallback, spaces written as "▁", no BOS of its own (the chat template writes it), and Gemma 4's
control tokens and byte tokens at their genuine ids. The image, audio and video tokens (255999 and up) lie beyond
this vocabulary and are left out: the demo's models read text only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_gemma4_spec.demo.template import chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024

# Token -> id, as in the published tokenizer of Gemma 4.
CONTROL_TOKENS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}
NEWLINE = 107
FIRST_BYTE = 238
# What ends an answer: <eos>, <turn|> and <|tool_response>, as in the published generation_config.json.
END_IDS = [CONTROL_TOKENS[t] for t in ("<eos>", "<turn|>", "<|tool_response>")]

# A word or a number of up to two digits, with the space before it, or a run of signs: merges never cross these.
# Gemma 4 splits every digit; whole numbers let models of this size learn to count in a minute.
_PIECES = r"▁?\p{L}+|▁?\p{N}{1,2}|\n|▁?[^\p{L}\p{N}\n▁]+|▁"


def build(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the ordinary tokens from ``corpus`` and lay out the vocabulary; control tokens cut its texts."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Replace(" ", "▁")
    pieces = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizer, pieces
    fixed = {**CONTROL_TOKENS, "\n": NEWLINE, **{f"<0x{b:02X}>": FIRST_BYTE + b for b in range(256)}}
    printable = [chr(c) for c in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - (NEWLINE + 1) - 256,
        initial_alphabet=[*printable, "▁"],
        limit_alphabet=len(printable) + 2,
        show_progress=False,
    )
    controls = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
    learner.train_from_iterator((part for text in corpus for part in controls.split(text) if part), trainer)
    learned = json.loads(learner.to_str())["model"]
    ordinary = [t for t, _ in sorted(learned["vocab"].items(), key=lambda item: item[1]) if t not in fixed]

    by_id = {i: t for t, i in fixed.items()}
    # The ids below the newline are Gemma 4's control block: what is free there stays unused.
    free = (i for i in range(NEWLINE + 1, VOCAB_SIZE) if i not in by_id)
    by_id.update(zip(free, ordinary, strict=False))
    vocab = {by_id.get(i, f"<unused{i}>"): i for i in range(VOCAB_SIZE)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pieces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="left",
        chat_template=chat_template(),
        clean_up_tokenization_spaces=False,
    )
