"""The Kubernetes manifests fit KubeRay's own kinds, field by field.

``tests/data/kuberay_v1.json.gz`` holds the ``spec`` schemas of RayCluster, RayJob and RayService, version ray.io/v1:
the openAPIV3Schema of the custom resource definitions in KubeRay's chart (of August 2026), without descriptions and
defaults.
"""

import copy
import gzip
import json

import jsonschema
import pytest
import yaml

from tests.paths import ROOT

SCHEMAS = json.loads(gzip.decompress((ROOT / "tests/data/kuberay_v1.json.gz").read_bytes()))
FILES = ("raycluster.yaml", "jobs/jobs.yaml", "service/rayservice.yaml")
MANIFESTS = [
    manifest for name in FILES for manifest in yaml.safe_load_all((ROOT / "deploy/kuberay" / name).read_text())
]


def closed(schema):
    """The schema without room for unknown fields: a misspelt one is pruned by Kubernetes without a word."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: closed(part) for name, part in schema.items()}
    if "properties" in result and isinstance(result["properties"], dict):
        result.setdefault("additionalProperties", False)
    if result.pop("x-kubernetes-int-or-string", False):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return result


VALIDATORS = {kind: jsonschema.Draft202012Validator(closed(schema)) for kind, schema in SCHEMAS.items()}


def faults(manifest):
    found = VALIDATORS[manifest["kind"]].iter_errors(manifest["spec"])
    return [f"{'/'.join(map(str, fault.absolute_path))}: {fault.message[:200]}" for fault in found]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=[manifest["metadata"]["name"] for manifest in MANIFESTS])
def test_kuberay_knows_every_field(manifest):
    assert manifest["apiVersion"] == "ray.io/v1"
    assert faults(manifest) == []


@pytest.mark.parametrize("manifest", MANIFESTS[-1:], ids=["service"])
def test_a_misspelt_field_is_found(manifest):
    changed = copy.deepcopy(manifest)
    container = changed["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["imagePullPolicies"] = "Always"
    container["resources"]["limits"]["memory"] = ["16Gi"]
    assert len(faults(changed)) == 2
