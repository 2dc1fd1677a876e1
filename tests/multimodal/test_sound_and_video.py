"""Sound and video for an E4B-like target with an audio tower: logits of transformers; drafts change no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_models, tiny_multimodal
from tests.support.engine import acceptance, engine
from tests.support.images import TOLERANCE, found
from tests.support.sound_and_video import SOUND, VIDEO, ask, distance
from tests.support.tiny_multimodal import CONTROL

TOKENS = 24
PROMPTS = [SOUND, VIDEO]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = tiny_models.drafter_config()
    return tiny_multimodal.save(text, tmp_path_factory.mktemp("av") / "target", audio_config=tiny_multimodal.AUDIO)


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    options = {"skip_tokenizer_init": False, "max_model_len": 512, "max_num_seqs": 4, "max_logprobs": 512}
    return options | {"limit_mm_per_prompt": {"image": 0, "audio": 1, "video": 1}}


@pytest.fixture(scope="module")
def plain(target: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    with engine(target, **options) as llm:
        return found(ask(llm, PROMPTS, TOKENS))


@pytest.mark.slow
def test_logits_are_those_of_transformers(target: Path, plain: list[dict[str, Any]]) -> None:
    for output, prompt in zip(plain, PROMPTS, strict=True):
        assert output["prompt"].count(CONTROL[prompt[2]][1]) > 20
        assert distance(target, prompt, output) < TOLERANCE


@pytest.mark.slow
def test_answers_to_sound_and_video(target: Path, options: dict[str, Any], plain: list[dict[str, Any]]) -> None:
    with engine(target, target, 3, **options) as llm:
        before = acceptance(llm)
        outputs = found(ask(llm, PROMPTS, TOKENS))
        counts = acceptance(llm) - before
    assert [o["answer"] for o in outputs] == [o["answer"] for o in plain]
    assert 0 < counts.accepted <= counts.proposed
