"""Session-wide fixtures: the tiny checkpoints every engine test shares."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from tests.support import engine as _engine  # sets the engine's environment before anything imports vLLM

assert _engine

# A shell starts what it puts into the background with Ctrl-C ignored, and the commands that tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run; `--hypothesis-profile search` looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.register_profile("unshrunk", derandomize=True, phases=[Phase.explicit, Phase.generate])
settings.load_profile("fixed")


# Files that take minutes come first, so that of two processes none waits for the other at the end.
LONG = (
    "spec_decode/test_draft_groups.py",
    "demo/test_pair.py",
    "multimodal/test_images.py",
    "multimodal/test_image_attention.py",
    "quantization/test_nvfp4_tensor_parallel.py",
    "engine/test_request_features.py",
    "engine/test_sampling.py",
    "engine/test_processes.py",
    "patching/test_engine.py",
    "release/test_distributions.py",
)


def pytest_collection_finish() -> None:
    _engine.keep_out_of_gc()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="tests of each file, and files, in random order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--shuffle")
    if seed is None:
        items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))
        return
    chance = random.Random(seed)
    chance.shuffle(items)
    places = {file: chance.random() for file in sorted({item.path for item in items})}
    items.sort(key=lambda item: places[item.path])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of float32 checkpoints: ``target`` (31B-like), ``drafter`` (E4B-like), ``close`` (a near-target)."""
    from tests.support import tiny_models

    folder = tmp_path_factory.mktemp("tiny")
    target = tiny_models.save(tiny_models.target_config(), folder / "target")
    return {
        "target": target,
        "drafter": tiny_models.save(tiny_models.drafter_config(), folder / "drafter", seed=1),
        "close": tiny_models.perturbed(target, folder / "close"),
    }


@pytest.fixture(scope="session")
def served_model(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``target`` with a tokenizer, as a server needs it."""
    from tests.support import tiny_tokenizer

    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(tiny["target"], folder)
    tiny_tokenizer.save(folder)
    return folder
