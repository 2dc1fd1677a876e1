"""Docker's own parser reads every Compose file, with and without .env; its result says what would be built and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_gemma4_spec import __version__

OVERLAYS = Path(__file__).parents[2] / "overlays"
NAMES = sorted(p.parent.name for p in OVERLAYS.glob("*/compose.yaml"))
COMPOSE = shutil.which("docker-compose", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
needs_compose = pytest.mark.skipif(COMPOSE is None, reason="no docker-compose: `make docker-compose` fetches one")


def compose(name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(COMPOSE), "-f", str(OVERLAYS / name / "compose.yaml"), *arguments]
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | env
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def services(name: str, *arguments: str, **env: str) -> dict[str, Any]:
    done = compose(name, *arguments, "config", "--format", "json", **env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def example(name: str) -> str:
    return (OVERLAYS / name / ".env.example").read_text()


@needs_compose
@pytest.mark.parametrize("name", NAMES)
def test_every_profile_is_read_with_the_example_as_it_is(name: str) -> None:
    given = ("--env-file", str(OVERLAYS / name / ".env.example"), "--profile", "*")
    assert set(services(name, *given)) == {"vllm", "download", "prometheus", "grafana"}


@needs_compose
def test_only_the_server_starts_without_a_profile() -> None:
    assert set(services("hopper", MODELS="/srv/models")) == {"vllm"}


@needs_compose
def test_a_missing_folder_of_models_is_one_line() -> None:
    done = compose("hopper", "config")
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert "set MODELS to the folder of the models, see .env.example" in line


@needs_compose
def test_a_wrong_key_is_refused(tmp_path: Path) -> None:
    for each in ("hopper", "monitoring"):
        shutil.copytree(OVERLAYS / each, tmp_path / each)
    shutil.copy(OVERLAYS / "download.yaml", tmp_path)
    file = tmp_path / "hopper" / "compose.yaml"
    file.write_text(file.read_text().replace("cap_drop", "cap_dorp"))
    done = subprocess.run(
        [str(COMPOSE), "-f", str(file), "config"], capture_output=True, text=True, env={"MODELS": "/m"}, check=False
    )
    assert done.returncode != 0
    assert "cap_dorp" in done.stderr


@needs_compose
@pytest.mark.parametrize("name", NAMES)
def test_folders_of_both_models_come_from_the_variables(name: str) -> None:
    """And land where ``serve.yaml`` looks for them; nothing is made where a folder is missing."""
    found = services(name, MODELS="/m", TARGET="big", DRAFTER="small")["vllm"]
    binds = {v["target"]: v for v in found["volumes"] if v["type"] == "bind"}
    serve = yaml.safe_load((OVERLAYS / name / "serve.yaml").read_text())
    assert binds[serve["model"]]["source"] == "/m/big"
    assert binds[serve["speculative-config"]["model"]]["source"] == "/m/small"
    assert not any(v.get("bind", {}).get("create_host_path") for v in binds.values())
    plain = {v["target"]: v for v in services(name, MODELS="/m")["vllm"]["volumes"]}
    assert all(
        plain[m]["source"] == "/m/" + Path(m).name for m in (serve["model"], serve["speculative-config"]["model"])
    )


@needs_compose
@pytest.mark.parametrize("name", NAMES)
def test_the_image_is_built_from_an_argument_and_named_by_both_versions(name: str) -> None:
    argument = "PYTHON_IMAGE" if name == "cpu" else "VLLM_IMAGE"
    found = services(name, "--profile", "download", MODELS="/m")
    spark = name.endswith("spark")
    assert found["vllm"]["image"].split(":")[1] == f"{__version__}-vllm0.19.1" + "-cu130" * spark
    assert found["download"]["image"] == found["vllm"]["image"]
    base = found["vllm"]["build"]["args"][argument]
    dockerfile = (OVERLAYS / "Dockerfile").read_text()
    assert f"ARG {argument}=" in dockerfile
    assert base == (
        "vllm/vllm-openai:v0.19.1-cu130" if spark else re.findall(rf"^ARG {argument}=(.*)$", dockerfile, re.M)[0]
    )
    given = services(name, **{"MODELS": "/m", argument: "example/other:1"})
    assert given["vllm"]["build"]["args"][argument] == "example/other:1"


def test_the_dockerfile_names_the_tags_that_the_overlays_use() -> None:
    head = (OVERLAYS / "Dockerfile").read_text().split("\n\n")[0]
    assert f" vllm-gemma4-spec:{__version__}-vllm0.19.1 " in head
    assert f" vllm-gemma4-spec-cpu:{__version__}-vllm0.19.1 " in head


def run_download(tmp_path: Path, name: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script of the download service, with an ``hf`` that writes down what it is asked for."""
    shared = yaml.safe_load((OVERLAYS / "download.yaml").read_text())["services"]["download"]
    own = yaml.safe_load((OVERLAYS / name / "compose.yaml").read_text())["services"]["download"]["environment"]
    defaults = {key: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for key, value in own.items()}
    (script,) = shared["command"]
    hf = tmp_path / "hf"
    hf.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    hf.chmod(0o755)
    done = subprocess.run(
        [*shared["entrypoint"], script.replace("$$", "$")],
        env=defaults | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env,
        capture_output=True,
        text=True,
        check=False,
    )
    asked = tmp_path / "asked"
    return done, asked.read_text().splitlines() if asked.exists() else []


def test_the_download_profile_puts_both_models_where_the_server_looks(tmp_path: Path) -> None:
    done, asked = run_download(tmp_path, "deckard-spark")
    assert done.returncode == 0, done.stderr
    assert asked == [
        "download AEON-7/Gemma-4-31B-it-DECKARD-HERETIC-Uncensored-NVFP4 --local-dir /models/deckard-31b",
        "download AEON-7/Gemma-4-E4B-DECKARD-HERETIC-Uncensored-NVFP4 --local-dir /models/e4b-drafter",
    ]


def test_nothing_to_download_is_one_line(tmp_path: Path) -> None:
    done, asked = run_download(tmp_path, "hopper")
    assert (done.returncode, asked) == (2, [])
    assert done.stderr == "set TARGET_REPO and DRAFTER_REPO, see .env.example\n"
    done, asked = run_download(tmp_path, "hopper", DRAFTER_REPO="me/e4b-nvfp4")
    assert asked == ["download me/e4b-nvfp4 --local-dir /models/gemma-4-E4B-it-NVFP4"]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_names_every_variable_and_shows_its_default(name: str) -> None:
    folder = OVERLAYS / name
    text = "".join(
        path.read_text()
        for path in (folder / "compose.yaml", OVERLAYS / "download.yaml", OVERLAYS / "monitoring" / "services.yaml")
    )
    used = dict(re.findall(r"\$\{(\w+)(?::[-?]([^}]*))?\}", text)) | {"VLLM_API_KEY": ""}
    named = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", example(name), re.M))
    assert set(named) == set(used)
    assert {k: v for k, v in named.items() if k != "MODELS"} == {k: v for k, v in used.items() if k != "MODELS"}
