"""Rules, dashboards and what provisions them: valid, complete, and in step with each other."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.tools import DASHBOARDS, DEPLOY, RULES, dashboard, preview, program, rules, run

ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
TESTS = DEPLOY / "prometheus" / "tests" / "vllm-requant.test.yml"


def test_configuration_and_rules_are_valid() -> None:
    promtool = program("promtool")
    assert "SUCCESS: 1 rule files found" in run(promtool, "check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    assert "SUCCESS" in run(promtool, "check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_rules_do_what_their_tests_say() -> None:
    assert "SUCCESS" in run(program("promtool"), "test", "rules", TESTS)


def test_every_alert_is_seen_to_fire_and_to_keep_silent() -> None:
    yaml = pytest.importorskip("yaml")
    fires, silent = set(), set()
    for test in yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case["exp_alerts"] else silent).add(case["alertname"])
    assert fires == ALERTS.keys()
    assert silent == ALERTS.keys()


@pytest.mark.parametrize("name", ALERTS)
def test_alerts_say_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert "$labels" in alert["annotations"]["summary"] + alert["annotations"]["description"]
    file, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    runbook = (DEPLOY.parent / file).read_text(encoding="utf-8")
    headings = {heading.lower(): heading for heading in re.findall(r"(?m)^### (\w+)$", runbook)}
    assert headings[anchor] == name
    section = runbook.partition(f"### {name}\n")[2].partition("\n### ")[0]
    for part in ("**Means**", "**Look**", "**Do**"):
        assert part in section, part
    # at once, because what it says is over or has waited long enough already
    at_once = {"RequantConversionFailed", "RequantConversionStalled", "RequantRestartLoop"}
    assert ("for" in alert) == (name not in at_once)


def test_the_runbook_knows_no_alert_that_is_gone() -> None:
    runbook = (DEPLOY / "runbook.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^### (Requant\w+)$", runbook)) == ALERTS.keys()


def test_counters_are_asked_for_by_the_name_that_they_have_on_the_wire() -> None:
    pytest.importorskip("promql_parser")
    for expr in [rule["expr"] for rule in rules()] + [expr for _, expr in all_queries()]:
        for match in re.finditer(r"(?:rate|increase)\((\w[\w:]*)", expr):
            assert re.search(r"_(total|sum|count|bucket)$", match[1]), expr


def all_queries() -> list[tuple[Path, str]]:
    return [(file, expr) for file in DASHBOARDS for _, expr in preview().queries(dashboard(file), "1m")]


def test_every_query_is_promql() -> None:
    promql = pytest.importorskip("promql_parser")
    found = 0
    for expr in [rule["expr"] for rule in rules()] + [expr for _, expr in all_queries()]:
        promql.parse(expr)
        found += 1
    assert found > 60
    with pytest.raises(ValueError):
        promql.parse("sum(rate(x[5m])")


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_dashboards_are_whole(file: Path) -> None:
    content = dashboard(file)
    panels = content["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    assert len({panel["title"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in content["templating"]["list"]}
    known = preview().KINDS
    for panel in panels:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["type"] in known
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFG"[: len(panel["targets"])])
        for alert in re.findall(r"\bRequant[A-Z]\w+", panel["description"]):
            assert alert in ALERTS, panel["title"]
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


def test_dashboards_have_names_of_their_own() -> None:
    contents = [dashboard(file) for file in DASHBOARDS]
    assert len(contents) == 3
    assert len({content["uid"] for content in contents}) == len({content["title"] for content in contents}) == 3


def test_grafana_finds_what_is_provisioned() -> None:
    """The folders of the configuration are those that compose.yaml mounts."""
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    mounts = dict(reversed(volume.split(":")[:2]) for volume in services["grafana"]["volumes"])
    provisioning = DEPLOY / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "vllm-requant.yml").read_text())["providers"]
    assert (DEPLOY / "compose" / mounts[provider["options"]["path"]]).resolve() == DASHBOARDS[0].parent
    assert (DEPLOY / "compose" / mounts["/etc/grafana/provisioning"]).resolve() == provisioning
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "${PROMETHEUS_URL}"
    assert services["grafana"]["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
    interval = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval


def test_prometheus_in_compose_has_the_same_configuration_and_other_targets(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for volume in services["prometheus"]["volumes"]:
        source, target, *_ = volume.split(":")
        if source.startswith("."):
            copy = tmp_path / Path(target).relative_to("/etc/prometheus")
            origin = (DEPLOY / "compose" / source).resolve()
            shutil.copytree(origin, copy) if origin.is_dir() else shutil.copy(origin, copy)
    assert "SUCCESS" in run(program("promtool"), "check", "config", tmp_path / "prometheus.yml")
    for kind in ("servers", "converters"):
        (group,) = yaml.safe_load((tmp_path / "targets" / f"{kind}.yml").read_text())
        (target,) = group["targets"]
        host, port = target.split(":")
        assert host in services
        assert port == {"servers": "8000", "converters": "9100"}[kind]


def test_a_picture_shows_every_panel(tmp_path: Path) -> None:
    """Drawn of made-up series: what a Prometheus answers is the business of tests/e2e."""
    pytest.importorskip("matplotlib")
    module = preview()

    asked = []
    labels = {"model_name": "m", "kind": "lut", "instance": "a:8000", "stage": "gradients", "output": "/m/out"}

    class Made(module.Prometheus):  # type: ignore[misc, name-defined]
        def _ask(self, what: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
            asked.append(parameters["query"])
            if what == "query":
                return [{"metric": labels, "value": [0, "1.5"]}, {"metric": {"kind": "x"}, "value": [0, "NaN"]}]
            return [{"metric": labels, "values": [[600, "1"], [604, "2"], [1000, "3"]]}, {"metric": {}, "values": []}]

    for file in DASHBOARDS:
        asked.clear()
        content = json.loads(file.read_text())
        module.draw(content, Made("", 600.0, 1200.0, "1m"), tmp_path / "picture.png")
        assert sorted(asked) == sorted(expr for _, expr in module.queries(content, "1m"))
        assert (tmp_path / "picture.png").stat().st_size > 20_000
    empty = module.Prometheus("", 0.0, 60.0, "1m")
    object.__setattr__(empty, "_ask", lambda *_: [])
    module.draw(content, empty, tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"\$nothing is not a variable"):
        module.with_all(content, "up{x=~'$nothing'}", "1m")


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("s", 0.0125, "12.5 ms"),
        ("s", 3.0, "3 s"),
        ("s", 300.0, "5 min"),
        ("bytes", 3 * 2**20, "3 MiB"),
        ("Bps", 2**31, "2 GiB/s"),
        ("percentunit", 0.0511, "5.11 %"),
        ("short", 53084, "53.1 K"),
        ("suffix: tok/s", 12, "12 tok/s"),
        ("none", 0.0, "0"),
    ],
)
def test_values_of_a_picture_have_the_unit_of_the_panel(unit: str, value: float, text: str) -> None:
    assert preview()._text(value, {"fieldConfig": {"defaults": {"unit": unit}}}) == text
