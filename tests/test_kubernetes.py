"""Kubernetes and KServe manifests, held against their schemas, the image and the service."""

import json
import os
import re
import shutil
import subprocess
from copy import deepcopy
from operator import itemgetter

import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dropserve.service.http.routes import health
from dropserve.service.observability.metrics import Metrics
from dropserve.service.settings import Settings
from dropserve.service.supervisor import _OVERTIME
from tests import manifests
from tests.dockerfile import image_environment, last
from tests.manifests import KSERVE, KUBERNETES, ROOT

KUBECTL = shutil.which("kubectl")
KSERVE_PYTHON = ROOT / ".venv-kserve/bin/python"
RENDERED = {"claim": manifests.render(), "s3": manifests.render("s3")}
JOB = manifests.read(KUBERNETES / "train.yaml")
PODS = {
    **{name: manifests.pod(rendered["Deployment"]) for name, rendered in RENDERED.items()},
    "kserve": manifests.kserve_pod(),
}
"""The Pods that serve."""
LABELS = {"app.kubernetes.io/name": "dropserve"}
KNOWN = {f"DROPSERVE_{field.upper()}" for field in Settings.model_fields}
ROUTES = {route.path for route in health.router.routes}


def container(pod):
    (found,) = pod["containers"]
    return found


def serving(test):
    return pytest.mark.parametrize("pod", PODS.values(), ids=PODS)(test)


# Rendering and schemas


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
@pytest.mark.parametrize("components", [(), ("s3",)])
def test_kubectl_renders_the_same(components, tmp_path):
    base = os.path.relpath(KUBERNETES, tmp_path)
    overlay = {"resources": [base], "components": [f"{base}/{name}" for name in components]}
    found = kustomize(tmp_path, yaml.safe_dump(overlay))
    image = container(manifests.pod(found["Deployment"]))["image"]
    assert image == "registry.example.org/dropserve:0.1.0"
    assert found == manifests.render(*components)


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
def test_the_overlay_of_the_docs_changes_the_bucket_and_the_registry(tmp_path):
    section = (ROOT / "docs/deployment.md").read_text().partition("## Kubernetes")[2]
    overlay = re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1]
    overlay = overlay.replace("dropserve/deploy/kubernetes", os.path.relpath(KUBERNETES, tmp_path))
    expected = deepcopy(RENDERED["s3"])
    changed = container(manifests.pod(expected["Deployment"]))
    changed["image"] = "images.example.org/dropserve:0.1.0"
    (entry,) = [each for each in changed["env"] if each["name"] == "DROPSERVE_CHECKPOINTS"]
    entry["value"] = "s3://my-bucket/models"
    found = kustomize(tmp_path, overlay)
    for each in (found, expected):  # a merge by names changes their order
        container(manifests.pod(each["Deployment"]))["env"].sort(key=itemgetter("name"))
    assert found == expected


def kustomize(folder, overlay):
    """Render an overlay by kubectl; return the manifests by kind."""
    (folder / "kustomization.yaml").write_text(overlay)
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, check=True)
    return {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}


@pytest.mark.parametrize(
    "manifest",
    [
        *(m for each in RENDERED.values() for m in each.values() if m["kind"] != "ServiceMonitor"),
        JOB,
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": PODS["kserve"]},
    ],
    ids=lambda manifest: manifest["kind"],
)
def test_manifests_follow_the_schemas_of_kubernetes(manifest):
    assert kubernetes_validate.validate(manifest, "1.37", strict=True) == "1.37"


@pytest.mark.skipif(not KSERVE_PYTHON.exists(), reason="`make test-kserve` makes its environment")
def test_custom_resources_follow_the_models_of_kserve_and_prometheus_operator():
    found = [manifests.read(path) for path in sorted(KSERVE.glob("*.yaml"))]
    assert [manifest["kind"] for manifest in found] == ["InferenceService", "ServingRuntime"]
    found.append(RENDERED["claim"]["ServiceMonitor"])
    wrong = deepcopy(found)
    wrong[0]["spec"]["predictor"]["model"]["storageURI"] = "s3://bucket/prefix"
    wrong[1]["spec"]["protocolVersions"] = "v2"
    wrong[2]["spec"]["endpoint"] = []
    command = [KSERVE_PYTHON, ROOT / "tests/kserve_manifests.py"]
    text = json.dumps(found + wrong)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert errors[:3] == [[], [], []]
    assert [bool(each) for each in errors[3:]] == [True] * 3


# The Pods


@pytest.mark.parametrize("pod", [*PODS.values(), manifests.pod(JOB)], ids=[*PODS, "train"])
def test_pod_keeps_the_restricted_standard_and_runs_as_the_images_user(pod):
    user, group = map(int, last("USER").split(":"))
    context = dict(pod["securityContext"])
    for key in ("fsGroup", "fsGroupChangePolicy"):
        context.pop(key, None)
    assert context == {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container(pod)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    limits = container(pod)["resources"]["limits"]
    assert limits == {
        "cpu": manifests.environment(container(pod))["OMP_NUM_THREADS"],
        "memory": "2Gi",
    }


@serving
def test_probes_ask_routes_at_the_port_of_the_image(pod):
    (port,) = container(pod)["ports"]
    assert str(port["containerPort"]) == last("EXPOSE") == image_environment()["DROPSERVE_PORT"]
    paths = {}
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container(pod)[kind]["httpGet"]
        assert asked["port"] in (port["name"], port["containerPort"])
        paths[kind] = asked["path"]
    assert set(paths.values()) <= ROUTES
    assert paths["readinessProbe"] == "/readyz"  # only it says that the service drains
    assert paths["livenessProbe"] == "/livez"
    liveness = container(pod)["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > Settings().watchdog


@serving
def test_grace_period_covers_the_sleep_the_drain_and_what_is_given_up(pod):
    drain = int(manifests.environment(container(pod))["DROPSERVE_DRAIN_SECONDS"])
    sleep = container(pod)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert sleep > 0
    assert pod["terminationGracePeriodSeconds"] > sleep + drain + 2 * _OVERTIME


@pytest.mark.parametrize("pod", [*PODS.values(), manifests.pod(JOB)], ids=[*PODS, "train"])
def test_settings_exist_and_a_service_of_this_name_cannot_add_others(pod, monkeypatch):
    given = image_environment() | manifests.environment(container(pod))
    named = {name for name in given if name.startswith("DROPSERVE_")}
    assert named <= KNOWN
    for name in named:
        monkeypatch.setenv(name, given[name])
    assert Settings().host == "0.0.0.0"  # noqa: S104
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize("pod", [*PODS.values(), manifests.pod(JOB)], ids=[*PODS, "train"])
def test_every_mount_has_a_volume_and_a_purpose(pod):
    given = image_environment() | manifests.environment(container(pod))
    mounts = {mount["mountPath"]: mount for mount in container(pod)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == volumes.keys()
    assert given["HOME"] in mounts
    wanted = {given["HOME"], *(given[key] for key in ("DROPSERVE_CACHE",) if key in given)}
    if "train" in container(pod)["args"]:
        wanted |= {given["DROPSERVE_CHECKPOINTS"], given["DROPSERVE_DATA_DIR"]}
    assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == wanted
    for volume in volumes.values():
        assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"]


def test_models_are_read_only_in_the_claim_that_the_job_writes():
    (claim,) = [v for v in PODS["claim"]["volumes"] if "persistentVolumeClaim" in v]
    name = claim["persistentVolumeClaim"]["claimName"]
    assert name == RENDERED["claim"]["PersistentVolumeClaim"]["metadata"]["name"]
    assert {"name": claim["name"], "persistentVolumeClaim": {"claimName": name}} in manifests.pod(
        JOB
    )["volumes"]
    mounts = {mount["name"]: mount for mount in container(PODS["claim"])["volumeMounts"]}
    assert mounts[claim["name"]] == {
        "name": claim["name"],
        "mountPath": image_environment()["DROPSERVE_CHECKPOINTS"],
        "readOnly": True,
    }


def test_models_from_a_store_need_no_claim_and_may_reach_it():
    assert "PersistentVolumeClaim" not in RENDERED["s3"]
    assert not [volume for volume in PODS["s3"]["volumes"] if "persistentVolumeClaim" in volume]
    given = manifests.environment(container(PODS["s3"]))
    assert given["DROPSERVE_CHECKPOINTS"].startswith("s3://")
    mounts = [mount["mountPath"] for mount in container(PODS["s3"])["volumeMounts"]]
    assert given["DROPSERVE_CACHE"] in mounts
    (cache,) = [volume for volume in PODS["s3"]["volumes"] if volume["name"] == "cache"]
    limit = int(cache["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30
    assert int(given["DROPSERVE_CACHE_BYTES"]) < limit
    allowed = {
        (port["port"], port["protocol"])
        for rule in RENDERED["s3"]["NetworkPolicy"]["spec"]["egress"]
        for port in rule["ports"]
    }
    assert allowed == {(53, "UDP"), (53, "TCP"), (443, "TCP"), (80, "TCP")}
    assert RENDERED["claim"]["NetworkPolicy"]["spec"]["egress"] == []


# What finds the Pods


@pytest.mark.parametrize("name", RENDERED)
def test_all_selectors_find_the_pods(name):
    rendered = RENDERED[name]
    spec = {kind: manifest["spec"] for kind, manifest in rendered.items()}
    template = spec["Deployment"]["template"]
    assert template["metadata"]["labels"] == LABELS
    assert spec["Service"]["selector"] == LABELS
    assert rendered["Service"]["metadata"]["labels"] == LABELS
    selectors = [
        spec["Deployment"]["selector"],
        spec["PodDisruptionBudget"]["selector"],
        spec["NetworkPolicy"]["podSelector"],
        spec["ServiceMonitor"]["selector"],
        *(each["labelSelector"] for each in template["spec"]["topologySpreadConstraints"]),
    ]
    assert selectors == [{"matchLabels": LABELS}] * 6
    assert JOB["spec"]["template"]["metadata"]["labels"] != LABELS  # it must get no requests
    scaled = spec["HorizontalPodAutoscaler"]["scaleTargetRef"]
    found = rendered["Deployment"]
    assert scaled == {
        "apiVersion": found["apiVersion"],
        "kind": found["kind"],
        "name": found["metadata"]["name"],
    }


def test_the_port_is_the_same_in_pod_service_policy_and_monitor():
    spec = {kind: manifest["spec"] for kind, manifest in RENDERED["claim"].items()}
    (port,) = container(PODS["claim"])["ports"]
    (published,) = spec["Service"]["ports"]
    assert published["targetPort"] == port["name"]
    (rule,) = spec["NetworkPolicy"]["ingress"]
    assert rule["ports"] == [{"port": port["name"], "protocol": "TCP"}]
    (endpoint,) = spec["ServiceMonitor"]["endpoints"]
    assert endpoint["port"] == published["name"]
    assert endpoint["path"] in ROUTES


# Replacing and scaling


def test_no_pod_is_stopped_before_its_replacement_is_ready():
    expected = {"maxSurge": 1, "maxUnavailable": 0}
    assert RENDERED["claim"]["Deployment"]["spec"]["strategy"]["rollingUpdate"] == expected
    predictor = manifests.read(KSERVE / "inference-service.yaml")["spec"]["predictor"]
    assert predictor["deploymentStrategy"]["rollingUpdate"] == expected
    assert "replicas" not in RENDERED["claim"]["Deployment"]["spec"]  # the autoscaler's


def test_the_autoscaler_goes_by_what_the_service_exports():
    spec = RENDERED["claim"]["HorizontalPodAutoscaler"]["spec"]
    (processor,) = [each["resource"] for each in spec["metrics"] if each["type"] == "Resource"]
    assert container(PODS["claim"])["resources"]["requests"][processor["name"]]
    (queue,) = [each["pods"] for each in spec["metrics"] if each["type"] == "Pods"]
    name = queue["metric"]["name"]
    text = Metrics().write("")[0].decode()
    gauges = {f.name for f in text_string_to_metric_families(text) if f.type == "gauge"}
    assert name in gauges
    assert 0 < int(queue["target"]["averageValue"]) < Settings().max_batch
    (rule,) = manifests.read(KUBERNETES / "prometheus-adapter.yaml")["rules"]["custom"]
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert rule["name"]["matches"] == f"^{name}$"
    budget = RENDERED["claim"]["PodDisruptionBudget"]["spec"]
    assert spec["minReplicas"] > budget["maxUnavailable"]


# KServe


def test_the_inference_service_runs_on_the_runtime_and_names_the_model():
    runtime = manifests.read(KSERVE / "serving-runtime.yaml")
    service = manifests.read(KSERVE / "inference-service.yaml")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"] in [
        {"name": each["name"], "version": each["version"]}
        for each in runtime["spec"]["supportedModelFormats"]
    ]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert container(runtime["spec"])["name"] == "kserve-container"
    given = manifests.environment(container(runtime["spec"]))
    assert given["DROPSERVE_DEFAULT_MODEL"] == "{{.Name}}"
    assert given["DROPSERVE_CHECKPOINTS"] == "/mnt/models"
    assert service["metadata"]["annotations"] == {"serving.kserve.io/deploymentMode": "Standard"}
    monitored = runtime["spec"]["annotations"]
    assert monitored["prometheus.kserve.io/port"] == last("EXPOSE")
    assert monitored["prometheus.kserve.io/path"] == "/metrics"


def test_kserve_runs_the_container_of_the_deployment():
    ours, theirs = (dict(container(PODS[name])) for name in ("claim", "kserve"))
    for each in (ours, theirs):
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            each[kind] = {**each[kind], "httpGet": each[kind]["httpGet"]["path"]}
    same = {"args", "image", "lifecycle", "resources", "securityContext"}
    same |= {"startupProbe", "livenessProbe", "readinessProbe"}
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
