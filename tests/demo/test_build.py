"""The demo pair's cache: complete or absent, checked before use, made again only when asked to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_gemma4_spec import cli
from vllm_gemma4_spec.demo import build
from vllm_gemma4_spec.demo.build import DemoModelsError

MEASURED = {
    "right": 1.0,
    "right_by_kind": {"counting": [3, 3]},
    "drafts": 3,
    "acceptance_length": 3.5,
    "assistant_acceptance_length": 3.2,
    "seconds": 1.0,
    "cpu_seconds": 1.0,
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Training stood in for by writing six small files; the folders it was asked for."""
    asked: list[Path] = []

    def make(folder: Path, progress: build.Progress) -> None:
        asked.append(folder)
        for name in ("target", "drafter", "assistant"):
            progress(name, 1, 1, 0.5)
            (folder / name).mkdir()
            (folder / name / "config.json").write_text("{}")
            (folder / name / "model.safetensors").write_bytes(bytes([len(asked)]) * 100)
        build.write_manifest(folder, dict(MEASURED))

    monkeypatch.setattr(build, "_make", make)
    return asked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "pair"


def test_made_once_and_then_found(made: list[Path], folder: Path) -> None:
    pair, now = build.ensure(folder)
    assert now
    assert pair.target == folder / "target"
    assert pair.measured == MEASURED
    assert build.ensure(folder) == (pair, False)
    assert len(made) == 1
    assert [p.name for p in folder.parent.iterdir()] == ["pair"]


def test_force_makes_it_again(made: list[Path], folder: Path) -> None:
    build.ensure(folder)
    _, now = build.ensure(folder, force=True)
    assert now
    assert (folder / "target/model.safetensors").read_bytes() == b"\2" * 100
    assert [p.name for p in folder.parent.iterdir()] == ["pair"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_broken_off_build_leaves_nothing(
    made: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def half(folder: Path, progress: build.Progress) -> None:
        (folder / "target").mkdir()
        raise error

    monkeypatch.setattr(build, "_make", half)
    with pytest.raises(error):
        build.ensure(folder)
    assert list(folder.parent.iterdir()) == []


def test_a_pair_that_another_process_finished_first_is_taken(made: list[Path], folder: Path) -> None:
    build.ensure(folder)
    late = folder.parent / "late"
    late.mkdir()
    build._make(late, lambda *_: None)
    build._put(late, folder, force=False)
    assert (folder / "target/model.safetensors").read_bytes() == b"\1" * 100


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "target/model.safetensors").write_bytes(b"\1" * 99 + b"\0"), r"model\.safetensors: differs"),
        (lambda f: (f / "drafter/model.safetensors").write_bytes(b"\1"), r"drafter/model\.safetensors: differs"),
        (lambda f: (f / "drafter/config.json").unlink(), r"drafter/config\.json: missing"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json: cannot be read"),
        (lambda f: (f / "manifest.json").unlink(), r"no manifest\.json"),
        (
            lambda f: (f / "manifest.json").write_text(
                json.dumps({**json.loads((f / "manifest.json").read_text()), "recipe": "old"})
            ),
            "made by recipe old",
        ),
    ],
)
def test_damage_is_one_line_that_names_file_and_way_out(made: list[Path], folder: Path, damage, says: str) -> None:
    build.ensure(folder)
    damage(folder)
    with pytest.raises(DemoModelsError, match=says) as raised:
        build.ensure(folder)
    assert "demo-models --force" in str(raised.value) or "empty folder" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(made) == 1


def test_force_does_not_delete_a_folder_that_is_no_pair(made: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("...")
    for force in (False, True):
        with pytest.raises(DemoModelsError):
            build.ensure(folder, force)
    assert (folder / "thesis.tex").exists()
    assert made == []


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLLM_GEMMA4_SPEC_DEMO_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.default_folder() == tmp_path / "vllm-gemma4-spec/demo" / build.recipe_hash()
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_DEMO_DIR", str(tmp_path / "mine"))
    assert build.default_folder() == tmp_path / "mine"


def test_the_recipe_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.recipe_hash()
    assert build.recipe_hash() == before
    monkeypatch.setattr(build, "CORPUS", 3)
    assert build.recipe_hash() != before


def test_the_command(made: list[Path], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    if "demo-models" not in {c.name for c in cli.app.registered_commands}:
        cli._register([])
    result = CliRunner().invoke(cli.app, ["demo-models", "--out", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["target"], found["made_now"]) == (str(folder / "target"), True)
    (folder / "target/model.safetensors").write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["vllm-gemma4-spec", "demo-models", "--out", str(folder)])
    monkeypatch.setattr(cli, "_register", lambda arguments: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
