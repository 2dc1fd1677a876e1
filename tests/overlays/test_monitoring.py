"""The monitoring profile: real Prometheus loads its configuration; Grafana's files and dashboard fit together."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

OVERLAYS = Path(__file__).parents[2] / "overlays"
MONITORING = OVERLAYS / "monitoring"
NAMES = ["blackwell", "cpu", "deckard-spark", "dgx-spark", "hopper"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_overlay_has_the_profile(name: str) -> None:
    services = read(OVERLAYS / name / "compose.yaml")["services"]
    for monitor in ("prometheus", "grafana"):
        extends = services[monitor]["extends"]
        shared = read(OVERLAYS / name / extends["file"])["services"][extends["service"]]
        assert shared["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in shared["ports"])
        assert all(v["read_only"] and (MONITORING / v["source"]).exists() for v in shared["volumes"])
    (target,) = read(MONITORING / "prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in services


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not here")
def test_prometheus_reads_its_configuration(tmp_path: Path) -> None:
    good = MONITORING / "prometheus.yml"
    bad = tmp_path / "prometheus.yml"
    bad.write_text(good.read_text().replace("static_configs", "static_confgs"))
    checks = [["promtool", "check", "config", str(file)] for file in (good, bad)]
    codes = [subprocess.run(check, capture_output=True, timeout=60, check=False).returncode for check in checks]
    assert codes[0] == 0
    assert codes[1] != 0


def test_grafana_finds_its_source_and_dashboard() -> None:
    services = read(MONITORING / "services.yaml")["services"]
    (source,) = read(MONITORING / "provisioning/datasources/prometheus.yaml")["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert any(p.endswith(f":{port}") for p in services[host]["ports"])
    (provider,) = read(MONITORING / "provisioning/dashboards/dashboards.yaml")["providers"]
    targets = [v["target"] for v in services["grafana"]["volumes"]]
    assert any(t.startswith(provider["options"]["path"] + "/") for t in targets)


def test_the_dashboard_selects_instance_and_model_in_every_query() -> None:
    dashboard = json.loads((OVERLAYS / "grafana.json").read_text())
    assert {"instance", "model_name"} <= {v["name"] for v in dashboard["templating"]["list"]}
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    for query in queries:
        assert query.count('instance=~"$instance"') == query.count("vllm:") + query.count("gemma4_spec_")
        assert query.count('model_name=~"$model_name"') == query.count("vllm:")
    for metric in ("prefix_cache_hits", "num_preemptions", "finished_reason", "inter_token_latency", "per_pos"):
        assert any(metric in query for query in queries), metric
