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

PLAIN = {"str": str, "int": int, "bool": bool, "float": float, "object": object, "nothing": ()}
"""Types that are no model; no value is of the last, that of a field which there is not."""
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
    items = re.fullmatch(r"[Ll]ist\[(.+)\]", kind)
    values = re.fullmatch(r"[Dd]ict[\[(]str, (.+)[\])]", kind)
    if items and isinstance(value, list):
        for number, item in enumerate(value):
            yield from errors(items[1], item, f"{where}[{number}]")
    elif values and isinstance(value, dict):
        for key, item in value.items():
            yield from errors(values[1], item, f"{where}.{key}")
    elif not items and not values and kind not in PLAIN and isinstance(value, dict):
        fields = fields_of(kind)
        for key, item in value.items():
            yield from errors(fields.get(key, "nothing"), item, f"{where}.{key}")
    elif kind not in PLAIN or not isinstance(value, PLAIN[kind]):
        yield f"{where}: {value!r} is no {kind}"


def fields_of(kind: str) -> dict[str, str]:
    """Map the fields of a model to their types."""
    package = kserve.models if hasattr(kserve.models, kind) else kubernetes.client.models
    model = getattr(package, kind)
    return {name: model.openapi_types[key] for key, name in model.attribute_map.items()}


def check(manifest: dict[str, Any]) -> list[str]:
    """List what is wrong with a manifest."""
    if manifest["kind"] == "ServiceMonitor":
        kept = ServiceMonitor.model_validate(manifest).model_dump(by_alias=True, exclude_unset=True)
        return [] if kept == manifest else [f"fields are unknown: only {kept} is"]
    return list(errors(MODELS[manifest["kind"]], manifest))


if __name__ == "__main__":
    print(json.dumps([check(manifest) for manifest in json.load(sys.stdin)]))
