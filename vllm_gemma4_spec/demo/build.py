"""Making the demo pair and keeping it: a cache folder per recipe, checked by checksums before it is used.

The folder holds ``target/`` and ``drafter/`` as transformers saves them, ``assistant/`` as MTP assistants are
published, and ``manifest.json``. It appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gemma4_spec.demo import assistant, data, measure, models, template, tokenizer, train
from vllm_gemma4_spec.errors import Gemma4SpecError
from vllm_gemma4_spec.settings import DEMO_DIR

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from transformers import PreTrainedTokenizerFast

MANIFEST = "manifest.json"
FORMAT = 1
REMEDY = "run `vllm-gemma4-spec demo-models --force` to make it again"
CORPUS_SEED = 0
CORPUS = 2000  # dialogues the tokenizer learns from
RECIPES = {
    "target": (models.TARGET, train.Recipe(steps=750, batch_tokens=1024, learning_rate=4e-3, seed=0)),
    "drafter": (models.DRAFTER, train.Recipe(steps=650, batch_tokens=1024, learning_rate=5e-3, seed=0)),
}
ASKED = 64  # held-out questions the finished pair is measured on
DRAFTS = 3
LEAST_RIGHT, LEAST_ACCEPTANCE, LEAST_OF_ASSISTANT = 0.9, 2.5, 2.2

Progress = Callable[[str, int, int, float], None]
"""Called with (what is trained, steps done, steps in all, loss)."""


class DemoModelsError(Gemma4SpecError):
    """The demo pair cannot be made, or what the cache holds is not what was made."""


@dataclass(frozen=True)
class Pair:
    """A finished pair: folders that vLLM and transformers load, and what was measured when it was made.

    ``assistant``: an MTP assistant of ``target``.
    """

    folder: Path
    target: Path
    drafter: Path
    assistant: Path
    measured: dict[str, Any]


def recipe_hash() -> str:
    """Names the cache folder: 12 hex digits over everything that decides what the models become."""
    digest = hashlib.sha256()
    for module in (assistant, data, models, tokenizer, train):
        digest.update(Path(str(module.__file__)).read_bytes())
    recipe = {
        "format": FORMAT,
        "corpus": [CORPUS, CORPUS_SEED],
        "template": template.chat_template(),
        "recipes": {name: asdict(recipe) for name, (_, recipe) in RECIPES.items()},
    }
    digest.update(json.dumps(recipe, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def default_folder() -> Path:
    """``VLLM_GEMMA4_SPEC_DEMO_DIR``, or the recipe's folder below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := DEMO_DIR.read():
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "vllm-gemma4-spec" / "demo" / recipe_hash()


def load(folder: Path) -> Pair:
    """The pair in ``folder``, after every file's size and checksum has been compared with the manifest.

    Raises:
        DemoModelsError: the folder holds no pair, one of another recipe, or a file that is missing or changed.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        recipe, files, measured = manifest["recipe"], manifest["files"], manifest["measured"]
        wanted = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise DemoModelsError(f"{folder}: no {MANIFEST}, so this is no demo pair; {REMEDY}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DemoModelsError(f"{path}: cannot be read ({type(error).__name__}: {error}); {REMEDY}") from None
    if recipe != recipe_hash():
        raise DemoModelsError(f"{folder}: made by recipe {recipe}, this version's is {recipe_hash()}; {REMEDY}")
    for name, (size, checksum) in wanted.items():
        file = folder / name
        if not file.is_file():
            raise DemoModelsError(f"{file}: missing from the demo pair; {REMEDY}")
        if file.stat().st_size != size or _sha256(file) != checksum:
            raise DemoModelsError(f"{file}: differs from what was made (checksum); {REMEDY}")
    return Pair(folder, folder / "target", folder / "drafter", folder / "assistant", measured)


def ensure(folder: Path, force: bool = False, progress: Progress = lambda *_: None) -> tuple[Pair, bool]:
    """The pair in ``folder`` and whether it was made now: it is, if the folder is missing or empty, or ``force``.

    Raises:
        DemoModelsError: the folder holds something else or a damaged pair, or training did not succeed.
    """
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not (empty or force):
        return load(folder), False
    if force and not empty and not (folder / MANIFEST).is_file():
        raise DemoModelsError(
            f"{folder}: holds files but no {MANIFEST}; name an empty folder, this one is kept as it is"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise DemoModelsError(f"{folder}: cannot be made ({error.strerror}); name another with --out") from None
    try:
        _make(made, progress)
        made.chmod(0o755)
        _put(made, folder, force)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return load(folder), True


def _put(made: Path, folder: Path, force: bool) -> None:
    """Give ``made`` its name. Another process may have been faster: its pair has the same recipe and stays."""
    if force and folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, old)
        shutil.rmtree(old)
    try:
        os.replace(made, folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise


def _make(folder: Path, progress: Progress) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars would stand between ours
    started = time.monotonic()
    learned = _tokenizer()
    for name in RECIPES:
        learned.save_pretrained(folder / name)
    cpu = _train_side_by_side(folder, progress)
    target, drafter = (AutoModelForCausalLM.from_pretrained(folder / n, dtype="float32") for n in ("target", "drafter"))
    measured = measure.pair(target, drafter, learned, ASKED, DRAFTS)
    measured |= measure.assistant(target, folder / "assistant", learned, ASKED, DRAFTS)
    if measured["right"] < LEAST_RIGHT or measured["acceptance_length"] < LEAST_ACCEPTANCE:
        raise DemoModelsError(
            f"the trained pair is not good enough: {measured['right']:.0%} of held-out answers right "
            f"(at least {LEAST_RIGHT:.0%} wanted), acceptance length {measured['acceptance_length']:.2f} "
            f"(at least {LEAST_ACCEPTANCE} wanted); report this with your CPU and torch version"
        )
    length = measured["assistant_acceptance_length"]
    if length < LEAST_OF_ASSISTANT:
        raise DemoModelsError(
            f"the trained assistant is not good enough: acceptance length {length:.2f} "
            f"(at least {LEAST_OF_ASSISTANT} wanted); report this with your CPU and torch version"
        )
    measured["seconds"] = round(time.monotonic() - started, 1)
    measured["cpu_seconds"] = round(cpu + time.process_time(), 1)
    write_manifest(folder, measured)


def _train_side_by_side(folder: Path, progress: Progress) -> float:
    """Train each model in a process of its own and save it below ``folder``; returns the CPU seconds they took.

    The assistant, which learns from the finished target, begins when that is saved. One thread each: two processes use
    two cores better than two threads share matrices this small, and the rounding does not depend on how many cores
    there are.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, tuple[str, SpawnProcess]] = {}
    seconds = 0.0

    def start(name: str) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_train_one, args=(folder, name, theirs), daemon=True)
        process.start()
        theirs.close()
        running[ours] = (name, process)

    try:
        for name in RECIPES:
            start(name)
        while running:
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                name, process = running[ready]
                try:
                    step, loss, cpu = ready.recv()
                except EOFError:
                    process.join()
                    if process.exitcode:
                        raise DemoModelsError(
                            f"training the {name} failed (exit code {process.exitcode}; its traceback is above)"
                        ) from None
                    del running[ready]
                    if name == "target":
                        start("assistant")
                    continue
                if step < 0:
                    seconds += cpu
                else:
                    progress(name, step, RECIPES[name][1].steps if name in RECIPES else assistant.RECIPE.steps, loss)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return seconds


def _train_one(folder: Path, name: str, to_parent: Connection) -> None:
    """In a process of its own: train one model and send (step, loss, 0), at the end (-1, 0, CPU seconds)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    def trained(step: int, loss: float) -> None:
        to_parent.send((step, loss, 0.0))

    if name == "assistant":
        target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype="float32")
        learned = AutoTokenizer.from_pretrained(folder / "target")
        assistant.save(*assistant.train(target, learned, assistant.RECIPE, trained), folder / name)
    else:
        shape, recipe = RECIPES[name]
        model = models.create(shape, recipe.seed)
        train.train(model, AutoTokenizer.from_pretrained(folder / name), recipe, trained)
        model.save_pretrained(folder / name)
    to_parent.send((-1, 0.0, time.process_time()))


def write_manifest(folder: Path, measured: dict[str, Any]) -> None:
    """``manifest.json`` for the files in ``folder``: recipe, versions, ``measured``, and size and sha256 of each."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {
        "recipe": recipe_hash(),
        "made_with": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        "measured": measured,
        "files": {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _tokenizer() -> PreTrainedTokenizerFast:
    corpus = itertools.islice(data.dialogues(CORPUS_SEED, held_out=False), CORPUS)
    return tokenizer.build([template.prompt_text(d) + d.answer for d in corpus])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
