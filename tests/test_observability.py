"""docs/operations.md, the alerts and the dashboard name what /metrics has, and nothing else."""

import json
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/operations.md").read_text()
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/dropserve.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
ADDED = {"instance", "job"}  # by Prometheus, to whatever it scrapes


def queries():
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["name"], annotation["expr"]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


@pytest.fixture(scope="module")
def metrics(make_server, tmp_path_factory):
    """Name each family's kind, and each series' labels, of a server that has done something."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("a-key\n")
    server, headers = make_server(api_keys_file=keys).start(), {"X-API-Key": "a-key"}
    pixels = {"instances": np.zeros((1, 8, 8)).tolist()}
    for path in ("/predict", "/uncertainty?samples=10", "/v1/models/nothing/predict"):
        httpx.post(server.url + path, json=pixels, headers=headers)
    text = httpx.get(server.url + "/metrics", headers=headers).text
    families = text_string_to_metric_families(text)
    found = [family for family in families if not family.name.endswith("_created")]
    kinds = {f.name + "_total" * (f.type == "counter"): f.type for f in found}
    labels = {s.name: set(s.labels) for f in found for s in f.samples}
    return kinds, labels


def test_the_page_lists_every_metric_with_its_kind_and_labels(metrics):
    rows = re.findall(r"^\| `(dropserve_\w+)` \| (\w+) \| (.*?)\| ", PAGE, re.MULTILINE)
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    kinds, labels = metrics
    suffix = {"histogram": "_sum"}
    assert listed == {
        name: (kind, labels[name + suffix.get(kind, "")]) for name, kind in kinds.items()
    }


@pytest.mark.parametrize(
    ("where", "query"), list(queries()), ids=lambda x: x if len(x) < 50 else "query"
)
def test_queries_name_only_series_and_labels_that_exist(where, query, metrics):
    _, labels = metrics
    known = labels | {"up": set(), "ALERTS": {"alertname", "alertstate"}}
    bare = re.sub(r'"[^"]*"', '""', query)
    selectors = re.findall(r"\b(dropserve_\w+|up|ALERTS)\b(?:\{([^}]*)\})?", bare)
    assert selectors, where
    for name, matchers in selectors:
        assert name in known, where
        assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= known[name] | ADDED, where
    kept = set(", ".join(re.findall(r"(?:by|on) \(([^)]*)\)", bare)).split(", ")) - {""}
    for name, _ in selectors:
        assert kept <= known[name] | ADDED, where


@pytest.mark.parametrize("query", [query for _, query in queries()])
def test_queries_are_whole(query):
    bare = re.sub(r'"[^"]*"', "", query)
    for opened, closed in ("()", "{}", "[]"):
        assert bare.count(opened) == bare.count(closed)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", query))
    assert used <= variables | {"__rate_interval", "__range"}


def test_the_page_says_what_to_do_about_each_alert():
    rows = re.findall(r"^\| `(Dropserve\w+)` \| .+ \| (.+) \|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket")
        told = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert told <= {"instance", "model", "version"}


def test_panels_have_a_title_and_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, panel["title"]
                taken.add((x, y))
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_prometheus_scrapes_the_service_where_compose_has_it():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert compose["services"][name]["ports"][0].endswith(f":{port}")
    mounted = {v["target"] for v in compose["services"]["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{file}" for file in prometheus["rule_files"]} <= mounted
    assert (
        "--config.file=/etc/prometheus/prometheus.yml"
        in compose["services"]["prometheus"]["command"]
    )


def test_grafana_finds_the_data_and_the_dashboard_where_compose_mounts_them():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    folder = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((folder / "dashboards/dropserve.yml").read_text())["providers"]
    mounts = {v["target"]: v["source"] for v in compose["grafana"]["volumes"]}
    assert (ROOT / mounts[provider["options"]["path"]] / "dropserve.json").is_file()
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == provider["options"]["path"] + "/dropserve.json"
    (chosen,) = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource"]
    assert chosen["current"]["value"] == source["uid"]
