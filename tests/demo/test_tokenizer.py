"""The demo's tokenizer: genuine control ids, any text there and back, the same every time."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from vllm_gemma4_spec.demo import data, template, tokenizer


def corpus() -> list[str]:
    return [template.prompt_text(d) + d.answer for d in islice(data.dialogues(0, held_out=False), 300)]


@pytest.fixture(scope="module")
def learned() -> PreTrainedTokenizerFast:
    return tokenizer.build(corpus())


def test_control_tokens_have_their_ids_and_are_one_token(learned: PreTrainedTokenizerFast) -> None:
    assert len(learned) == tokenizer.VOCAB_SIZE
    for token, wanted in tokenizer.CONTROL_TOKENS.items():
        assert learned(token)["input_ids"] == [wanted]
        assert wanted in learned.all_special_ids or token in learned.get_added_vocab()
    assert tokenizer.END_IDS == [1, 106, 50]


def test_ids_are_those_of_the_published_tokenizer(learned: PreTrainedTokenizerFast) -> None:
    root = os.environ.get("GEMMA4_ARTIFACTS")
    if not root:
        pytest.skip("GEMMA4_ARTIFACTS does not name the folder with the published tokenizer")
    published = json.loads((Path(root) / "gemma4/tokenizer/tokenizer.json").read_text())
    wanted = {t["content"]: t["id"] for t in published["added_tokens"] if t["id"] < tokenizer.VOCAB_SIZE}
    assert wanted == tokenizer.CONTROL_TOKENS
    vocab = published["model"]["vocab"]
    for token in ["\n", "<0x00>", "<0xFF>"]:
        assert learned.get_vocab()[token] == vocab[token]


# "▁" stands for a space in Gemma's vocabulary, so it alone does not come back.
@given(st.text(st.characters(exclude_characters="▁", exclude_categories=("Cs",)), max_size=60))
def test_any_text_comes_back(learned: PreTrainedTokenizerFast, text: str) -> None:
    ids = learned(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.CONTROL_TOKENS["<unk>"] not in ids
    assert learned.decode(ids) == text


def test_a_dialogue_comes_back_with_its_control_tokens(learned: PreTrainedTokenizerFast) -> None:
    for text in corpus()[:50]:
        assert learned.decode(learned(text)["input_ids"]) == text


def test_the_same_corpus_gives_the_same_tokenizer(learned: PreTrainedTokenizerFast) -> None:
    again = tokenizer.build(corpus())
    assert again.backend_tokenizer.to_str() == learned.backend_tokenizer.to_str()


def test_the_saved_tokenizer_is_the_same(learned: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    learned.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = corpus()[0]
    assert loaded(text)["input_ids"] == learned(text)["input_ids"]
    assert loaded.chat_template == template.chat_template()
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (2, 1, 0)
