"""Holds manifests against the models of KServe and prometheus-operator: `make test-kserve`.

Reads manifests as a JSON list, and prints what is wrong: fields that a model does not have, and
values of another type. The models have an environment of their own.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import kserve.models
import kubernetes.client.models
from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

PLAIN = {"str": str, "int": int, "bool": bool, "float": float, "object": object}
OTHER_NAMES = {
    "ResourceQuantity": "str",
    "K8sIoApiAppsV1DeploymentStrategy": "V1DeploymentStrategy",
    "IntOrString": "object",
}
"""Types that the models name, and that are no model."""
MODELS = {"ServingRuntime": "V1alpha1ServingRuntime", "InferenceService": "V1beta1InferenceService"}


def errors(kind: str, value: Any, where: str = "") -> Iterator[str]:
    """Compare a value with a type of the models, recursively."""
    kind = OTHER_NAMES.get(kind, kind)
    if inner := re.fullmatch(r"[Ll]ist\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
            return
        for number, item in enumerate(value):
            yield from errors(inner[1], item, f"{where}[{number}]")
    elif inner := re.fullmatch(r"[Dd]ict[\[(]str, (.+)[\])]", kind):
        if not isinstance(value, dict):
            yield f"{where}: {value!r} is no object"
            return
        for key, item in value.items():
            yield from errors(inner[1], item, f"{where}.{key}")
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]):
            yield f"{where}: {value!r} is no {kind}"
    else:
        package = kserve.models if hasattr(kserve.models, kind) else kubernetes.client.models
        model = getattr(package, kind)
        if not isinstance(value, dict):
            yield f"{where}: {value!r} is no {kind}"
            return
        fields = {name: model.openapi_types[key] for key, name in model.attribute_map.items()}
        for key, item in value.items():
            if key in fields:
                yield from errors(fields[key], item, f"{where}.{key}")
            else:
                yield f"{where}.{key}: {kind} has no such field"


def check(manifest: dict[str, Any]) -> list[str]:
    """List what is wrong with a manifest."""
    if manifest["kind"] == "ServiceMonitor":
        kept = ServiceMonitor.model_validate(manifest).model_dump(by_alias=True, exclude_unset=True)
        return [] if kept == manifest else [f"fields are unknown: only {kept} is"]
    return list(errors(MODELS[manifest["kind"]], manifest))


if __name__ == "__main__":
    print(json.dumps([check(manifest) for manifest in json.load(sys.stdin)]))
