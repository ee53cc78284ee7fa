"""The Pods of deploy/ in real containers: `make test-compose`, by `podman kube play`.

The Job trains into the claim; then the Deployment's Pod serves from it, and KServe's, merged here
as KServe does. podman creates no Services, and asks no probes by itself: the tests ask them.
"""

import json
import time
from copy import deepcopy

import httpx
import pytest
import yaml

from tests import manifests
from tests.compose import INSIDE, run, works
from tests.helpers import eventually, free_port, zero
from tests.manifests import KUBERNETES

pytestmark = pytest.mark.timeout(600)
IMAGE = "localhost/dropserve:play"
CLAIM = "dropserve-play"
"""The claim's name here; every Pod has it as a prefix."""


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """Play manifests; what they made is removed in the end."""
    if not works("podman", "info"):
        pytest.skip("podman does not run here, and Docker plays no manifests")
    if not works("podman", "image", "exists", "localhost/dropserve"):
        pytest.skip("there is no image `dropserve`: `make test-compose` builds it")
    run("podman", "tag", "localhost/dropserve", IMAGE)
    folder, names = tmp_path_factory.mktemp("manifests"), []

    def play(*documents):
        path = folder / f"{len(names)}.yaml"
        path.write_text(yaml.safe_dump_all(documents))
        names.append(path)
        run("podman", "kube", "play", path)

    clean()
    yield play
    clean()
    run("podman", "untag", IMAGE, IMAGE)


def clean():
    pods = run("podman", "pod", "ps", "--quiet", f"--filter=name={CLAIM}").split()
    if pods:
        run("podman", "pod", "rm", "--force", *pods)
    run("podman", "volume", "rm", "--force", CLAIM)


def named(name, spec, port=None):
    """Make a Pod that has this image and claim, and perhaps a port of this machine."""
    spec = deepcopy(spec)
    (container,) = spec["containers"]
    container |= {"image": IMAGE, "name": "main"}
    if port is not None:
        container["ports"] = [{**container["ports"][0], "hostPort": port}]
    for volume in spec["volumes"]:
        if "persistentVolumeClaim" in volume:
            volume["persistentVolumeClaim"]["claimName"] = CLAIM
    name = f"{CLAIM}-{name}"
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def state(name):
    return json.loads(run("podman", "inspect", f"{CLAIM}-{name}-main"))[0]["State"]


@pytest.fixture(scope="module")
def claim(play):
    """The claim with a model that the Job has trained, though in a Pod: podman knows no Jobs."""
    volume = deepcopy(manifests.render()["PersistentVolumeClaim"])
    volume["metadata"]["name"] = CLAIM
    spec = manifests.pod(manifests.read(KUBERNETES / "train.yaml"))
    play(volume, named("train", {**spec, "restartPolicy": "Never"}))
    eventually(lambda: state("train")["Status"] == "exited", 180, 0.5)
    assert state("train")["ExitCode"] == 0, run("podman", "logs", f"{CLAIM}-train-main")


def kserve():
    """KServe's Pod, with the claim where the storage initializer mounts `pvc://`."""
    spec = manifests.kserve_pod()
    spec["volumes"].append(
        {"name": "kserve-pvc-source", "persistentVolumeClaim": {"claimName": CLAIM}}
    )
    spec["containers"][0]["volumeMounts"].append(
        {"name": "kserve-pvc-source", "mountPath": "/mnt/models", "readOnly": True}
    )
    return spec


@pytest.mark.usefixtures("claim")
@pytest.mark.parametrize(
    ("name", "spec", "models"),
    [
        ("plain", manifests.pod(manifests.render()["Deployment"]), "/checkpoints"),
        ("kserve", kserve(), "/mnt/models"),
    ],
)
def test_a_pod_starts_answers_and_stops_within_its_grace_period(name, spec, models, play):
    port = free_port()
    play(named(name, spec, port))
    container, url = f"{CLAIM}-{name}-main", f"http://127.0.0.1:{port}"
    probes = [spec["containers"][0][kind] for kind in ("startupProbe", "livenessProbe")]
    probes.append(spec["containers"][0]["readinessProbe"])
    seconds = probes[0]["periodSeconds"] * probes[0]["failureThreshold"]
    eventually(lambda: all(passes(url + probe["httpGet"]["path"]) for probe in probes), seconds)

    answer = httpx.post(f"{url}/predict", timeout=30, **zero()).raise_for_status().json()
    assert (answer["model"], answer["predictions"][0]["label"]) == ("digits-mlp", "0")
    assert httpx.get(f"{url}/v2/models/digits-mlp/ready").status_code == 200

    program = INSIDE.replace('"/checkpoints"', repr(models))
    status, folders = json.loads(run("podman", "exec", container, "python", "-c", program))
    assert status["Uid"] == status["Gid"] == ["10001"] * 4
    assert {status[kind][0] for kind in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert status["NoNewPrivs"] == ["1"]
    assert folders == {"/": "EROFS", "/opt/dropserve": "EROFS", models: "EROFS", "/tmp": None}  # noqa: S108

    grace, started = spec["terminationGracePeriodSeconds"], time.monotonic()
    run("podman", "stop", "--time", str(grace), container)
    assert time.monotonic() - started < grace
    assert state(name)["ExitCode"] == 0


def passes(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False
