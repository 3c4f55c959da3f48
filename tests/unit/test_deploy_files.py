"""The deployment files fit the code that they deploy."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from pipelines.serving.metrics import Metrics
from pipelines.settings import ServeSettings
from tests.paths import ROOT

CONFIG = ROOT / "deploy/serve_config.yaml"
RAYSERVICE = ROOT / "deploy/kuberay/rayservice.yaml"


def serve_configs():
    return [
        yaml.safe_load(CONFIG.read_text()),
        yaml.safe_load(yaml.safe_load(RAYSERVICE.read_text())["spec"]["serveConfigV2"]),
    ]


@pytest.mark.parametrize("config", serve_configs(), ids=["serve_config", "rayservice"])
def test_serve_accepts_the_configuration(config):
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    from pipelines.serving import app

    parsed = ServeDeploySchema.model_validate(config)
    (application,) = parsed.applications
    module, _, name = application.import_path.partition(":")
    assert module == app.__name__
    settings = ServeSettings.parse(application.args, "test")
    built = call_user_app_builder_with_args_if_necessary(getattr(app, name), application.args)
    assert built._bound_deployment.name == "ingress"
    assert built._bound_deployment.init_args[0] == settings


def test_the_rayservice_names_the_installed_ray():
    import ray

    manifest = yaml.safe_load(RAYSERVICE.read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"]["mode"] == "token"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(group["template"]["spec"]["containers"][0]["image"] == "tinygptv:latest" for group in groups)


def test_every_metric_of_the_dashboard_exists():
    dashboard = json.loads((ROOT / "deploy/grafana_dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for expression in expressions for name in re.findall(r"tinygptv_\w+", expression)}
    page = Metrics().render([]).decode()
    known = set(re.findall(r"^# TYPE (tinygptv_\w+)", page, re.MULTILINE))
    known |= {f"{name}_bucket" for name in known}
    assert len(used) > 10 and used <= known, used - known


def test_what_the_image_copies_is_there():
    text = (ROOT / "deploy/Dockerfile").read_text()
    assert "jobs/serve_http.py" in text and (ROOT / "jobs/serve_http.py").is_file()
    assert "USER ray" in text
