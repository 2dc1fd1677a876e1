"""Images that must be computed whole, under steady decoding: nobody waits for long, and no answer changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import vllm_gemma4_spec
from tests.scheduling.simulation import Job, Simulation, World
from tests.support import tiny_models, tiny_multimodal
from tests.support.images import Chunks, answers, chat, chatting, picture
from tests.support.stock import without
from vllm_gemma4_spec.multimodal import image_attention
from vllm_gemma4_spec.multimodal.patches import IMAGE_TURNS

# Six requests decode for 60 tokens; a step of 12 leaves 6 for an image of 10, and for the text behind it.
DECODING = [Job(0, 2, 60) for _ in range(6)]
IMAGE, TEXT = Job(0, 14, 4, images=((0, 10),)), Job(0, 3, 4)


@pytest.fixture
def uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_gemma4_spec.apply()
    monkeypatch.setattr(image_attention, "trained_both_ways", lambda _: True)


def wait(model: Path, asynchronous: bool) -> tuple[Counter[str], dict[str, int]]:
    """Steps that each job waited to be admitted, and that a decoding request was left out of."""
    world = World(((0, 1), (8, 1)), 400, batched_tokens=12, max_num_seqs=9, asynchronous=asynchronous)
    simulation = Simulation(world, model)
    left_out: Counter[str] = Counter()
    original = simulation.scheduler.schedule

    def schedule() -> Any:
        output = original()
        left_out.update(
            r.request_id
            for r in simulation.scheduler.running
            if r.request_id not in output.num_scheduled_tokens and r.num_output_tokens < r.max_tokens - 1
        )
        return output

    simulation.scheduler.schedule = schedule
    assert simulation.run([*DECODING, IMAGE, TEXT, TEXT], limit=300)
    return simulation.waited, dict(left_out)


@pytest.mark.usefixtures("uncut")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_image_and_what_is_behind_it_wait_a_few_steps(tiny: dict[str, Path], asynchronous: bool) -> None:
    waited, left_out = wait(tiny["target"], asynchronous)
    assert max(waited[name] for name in ("6", "7", "8")) <= 6
    assert not {"0", "1"} & set(left_out)  # the latest sit out, and only as many as are in the way
    assert max(left_out.values()) <= 2


@pytest.mark.usefixtures("uncut")
def test_stock_lets_all_wait_behind_an_image(tiny: dict[str, Path]) -> None:
    with without(IMAGE_TURNS):
        waited, left_out = wait(tiny["target"], False)
    assert min(waited[name] for name in ("6", "7", "8")) > 50  # until the others have ended
    assert not left_out


@pytest.mark.slow
@pytest.mark.parametrize("drafter", [False, True])
def test_a_load_of_images_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafter: bool) -> None:
    """Answers under load are those given alone; images are never cut, and waited for a few steps each.

    The rule for images is that of 31B; the model attends causally, as the CPU does.
    """
    target = tiny_multimodal.save(tiny_models.target_config(), tmp_path / "target")
    small = tiny_multimodal.save(tiny_models.drafter_config(), tmp_path / "drafter", seed=1) if drafter else None
    text = [[" ".join(f"w{50 + 3 * n + i}" for i in range(5 + n))] for n in range(14)]
    images = [[f"w{20 + n}", picture(n, 64, 64 + 8 * (n % 5)), "w30"] for n in range(8)]
    # Most decode for long; images and short requests come in between.
    chats = [*text[:7], *(one for pair in zip(images, text[7:], strict=False) for one in pair)]
    monkeypatch.setattr(image_attention, "trained_both_ways", lambda _: True)
    options = {"max_num_batched_tokens": 96, "max_num_seqs": 9, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    with chatting(target, **options | {"max_num_batched_tokens": 2048}) as llm:
        alone = [answers(chat(llm, [one], 60))[0] for one in chats]
    with chatting(target, small, **options) as llm:
        core = llm.llm_engine.engine_core.engine_core
        chunks = Chunks(core.model_executor.driver_worker.worker.model_runner)
        held: list[int] = []
        original = core.scheduler.schedule

        def schedule() -> Any:
            output = original()
            held.append(len(core.scheduler.running) - len(output.num_scheduled_tokens))
            return output

        core.scheduler.schedule = schedule
        outputs = chat(llm, chats, 60)
    assert answers(outputs) == alone
    assert sum(held) > 0
    assert chunks.steps
