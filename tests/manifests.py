"""Kubernetes manifests, rendered as `kubectl kustomize` does, as far as ours use Kustomize.

A Kustomize field that is not used here is refused. Where kubectl is installed, tests compare.
"""

import copy
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
KUBERNETES = ROOT / "deploy/kubernetes"
KSERVE = ROOT / "deploy/kserve"
_FIELDS = {
    "Kustomization": {"apiVersion", "kind", "resources", "images"},
    "Component": {"apiVersion", "kind", "patches"},
}


def read(path):
    """Read a file's only document."""
    return yaml.safe_load(path.read_text())


def render(*components):
    """Render `deploy/kubernetes`, with components; return the manifests by kind."""
    kustomization = _kustomization(KUBERNETES)
    found = {each["kind"]: each for each in map(_resource, kustomization["resources"])}
    assert len(found) == len(kustomization["resources"])
    for component in components:
        for patch in _kustomization(KUBERNETES / component)["patches"]:
            _apply(patch, KUBERNETES / component, found)
    for image in kustomization["images"]:
        for container in pod(found["Deployment"])["containers"]:
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def pod(manifest):
    """Find the Pod's specification in a Deployment or a Job."""
    return manifest["spec"]["template"]["spec"]


def kserve_pod():
    """Merge what KServe does: the runtime's Pod, the InferenceService's fields, and the name."""
    runtime, service = (
        read(KSERVE / "serving-runtime.yaml"),
        read(KSERVE / "inference-service.yaml"),
    )
    predictor = service["spec"]["predictor"]
    own = {
        "minReplicas",
        "maxReplicas",
        "scaleMetric",
        "scaleTarget",
        "deploymentStrategy",
        "model",
    }
    merged = {key: copy.deepcopy(runtime["spec"][key]) for key in ("containers", "volumes")}
    merged |= {key: value for key, value in predictor.items() if key not in own}
    for entry in merged["containers"][0]["env"]:
        entry["value"] = entry["value"].replace("{{.Name}}", service["metadata"]["name"])
    return merged


def environment(container):
    """Map the names of a container's variables to their values."""
    return {entry["name"]: entry["value"] for entry in container["env"]}


def _kustomization(folder):
    found = read(folder / "kustomization.yaml")
    assert found.keys() == _FIELDS[found["kind"]]
    return found


def _resource(name):
    return read(KUBERNETES / name)


def _apply(patch, folder, found):
    """Apply a JSON patch (RFC 6902), or remove the manifest."""
    target = found[patch["target"]["kind"]]
    assert target["metadata"]["name"] == patch["target"]["name"]
    if "patch" in patch:
        assert yaml.safe_load(patch["patch"])["$patch"] == "delete"
        del found[target["kind"]]
        return
    for step in read(folder / patch["path"]):
        *parents, last = step["path"].strip("/").split("/")
        place = target
        for key in parents:
            place = place[int(key) if isinstance(place, list) else key]
        if step["op"] == "add" and last == "-":
            place.append(step["value"])
        else:
            assert (last in place) == (step["op"] == "replace")
            place[last] = step["value"]
