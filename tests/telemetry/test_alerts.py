"""The alerts: Prometheus takes them, each has a case in which it fires and one in which it does not, and a runbook."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.telemetry.expressions import unknown_metrics

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "helm" / "tandem" / "alerts" / "tandem.yaml"
PAGE = ROOT / "docs" / "observability.md"
CASES = Path(__file__).with_name("alerts_test.yaml")
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: apt-get install prometheus")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


ALERTS = [rule["alert"] for rule in rules() if "alert" in rule]


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=60)


@needs_promtool
def test_prometheus_takes_the_rules_and_the_cases_hold() -> None:
    checked = promtool("check", "rules", str(RULES))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", str(CASES))
    assert tested.returncode == 0, tested.stdout + tested.stderr


@needs_promtool
@pytest.mark.parametrize("alert", ALERTS)
@pytest.mark.parametrize("expression", ["vector(1) > 2", "tandem_always or vector(1)"])
def test_the_cases_notice_an_alert_that_never_or_always_fires(tmp_path: Path, alert: str, expression: str) -> None:
    broken = yaml.safe_load(RULES.read_text())
    for group in broken["groups"]:
        for rule in group["rules"]:
            if rule.get("alert") == alert:
                rule["expr"] = expression
                rule.pop("for", None)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(broken))
    cases = yaml.safe_load(CASES.read_text())
    cases["rule_files"] = ["rules.yaml"]
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases))
    tested = promtool("test", "rules", str(tmp_path / "cases.yaml"))
    assert tested.returncode != 0
    assert f'alertname="{alert}"' in tested.stdout + tested.stderr


def test_every_alert_says_what_it_means_and_where_to_read_on() -> None:
    for rule in rules():
        if "alert" not in rule:
            continue
        assert rule["labels"]["severity"] in ("critical", "warning"), rule
        annotations = rule["annotations"]
        assert annotations["summary"] and annotations["description"]
        assert annotations["runbook"] == f"docs/observability.md#{rule['alert'].lower()}"
        assert f"\n### {rule['alert']}\n\n*{rule['labels']['severity'].title()}.*" in PAGE.read_text()


def test_alerts_use_metrics_of_the_table_and_rules_above_them() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert not [unknown for rule in rules() for unknown in unknown_metrics(rule["expr"], recorded)]
