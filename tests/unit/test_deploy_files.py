"""The deployment files fit the code that they deploy."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pipelines import storage
from pipelines.serving.backend import ReplicaStats
from pipelines.serving.clients import KEYS_VARIABLE, key_digests
from pipelines.serving.metrics import ENGINE_COUNTERS, ENGINE_GAUGES, Metrics, render
from pipelines.serving.run import ENVIRONMENT
from pipelines.settings import SECTIONS, ServeSettings, SettingsError
from tests.paths import ROOT

CONFIG = ROOT / "deploy/serve_config.yaml"
RAYSERVICE = ROOT / "deploy/kuberay/service/rayservice.yaml"


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
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    assert all(container["image"] == "tinygptv" for container in containers), (
        "tag and registry: image/kustomization.yaml"
    )
    assert all(container["envFrom"] == [{"secretRef": {"name": "tinygptv-bucket"}}] for container in containers)


def test_what_listens_on_every_address_has_keys():
    """Each shipped configuration with host 0.0.0.0 names a source of API keys that must be there."""
    open_to_all = [
        path
        for path in sorted((ROOT / "configs").glob("*.yaml"))
        if ServeSettings.load(path).host not in ("127.0.0.1", "localhost")
    ]
    assert open_to_all == [ROOT / "configs/cluster.yaml"]
    for path in open_to_all:
        with pytest.raises(SettingsError, match="api_keys_file"):
            key_digests(ServeSettings.load(path))
    manifest = yaml.safe_load(RAYSERVICE.read_text())
    assert "0.0.0.0" in manifest["spec"]["serveConfigV2"]
    cluster = manifest["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables[KEYS_VARIABLE]["valueFrom"]["secretKeyRef"], "the value itself never stands in the manifest"
        name = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
        assert variables[name]["value"] == ENVIRONMENT[name]


def test_every_query_of_the_dashboard_finds_something():
    """Metrics and labels that it names are exported; counters are read as rates."""
    dashboard = json.loads((ROOT / "deploy/grafana_dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    metrics = Metrics()
    for status in (200, 429):
        metrics.requests.labels(status).inc()
    for kind in ("prompt", "answer", "cached"):
        metrics.tokens.labels(kind).inc()
    values = dict.fromkeys((*ENGINE_COUNTERS, *ENGINE_GAUGES), 1.0)
    page = render([metrics.snapshot("a"), metrics.snapshot("b")], [ReplicaStats("1", "node", values)]).decode()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    exported: dict[str, dict[str, set[str]]] = {}
    for sample in samples:
        for label, value in sample.labels.items():
            exported.setdefault(sample.name, {}).setdefault(label, set()).add(value)
        exported.setdefault(sample.name, {})
    num_names = 0
    for expression in expressions:
        for name, selector in re.findall(r"(tinygptv_\w+)(?:\{([^}]*)\})?", expression):
            num_names += 1
            assert name in exported, expression
            for label, value in re.findall(r'(\w+)="([^"]*)"', selector):
                assert value in exported[name][label], expression
            for label in re.findall(r"by \((\w+)\)", expression):
                assert label in exported[name], expression
            is_counter = name.endswith(("_total", "_bucket"))
            assert is_counter == ("rate(" in expression), f"a counter is read as a rate: {expression}"
    assert num_names > 10


def test_what_the_image_copies_is_there():
    text = (ROOT / "deploy/Dockerfile").read_text()
    assert "jobs/serve_http.py" in text and (ROOT / "jobs/serve_http.py").is_file()
    assert "USER 1000" in text


RAYJOBS = list(yaml.safe_load_all((ROOT / "deploy/kuberay/jobs/jobs.yaml").read_text()))
RAYCLUSTER = yaml.safe_load((ROOT / "deploy/kuberay/raycluster.yaml").read_text())
CLUSTER_FILES = ("ray_cluster.yaml", "ray_cluster_gcp.yaml")


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_ray_accepts_the_cluster_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (ROOT / name).read_text()
    config = yaml.safe_load(text)
    validate_config(prepare_config(yaml.safe_load(text)))
    with pytest.raises(Exception, match="nonsense"):
        validate_config(prepare_config({**yaml.safe_load(text), "nonsense": 1}))
    kinds = config["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}, "the head runs no tasks"
    assert kinds["gpu_24gb"]["resources"]["GPU"] == 1 and "GPU" not in kinds["data"]["resources"]
    nodes = [kind["node_config"] for kind in kinds.values()]
    if config["provider"]["type"] == "aws":
        assert all(node["IamInstanceProfile"] and "nvidia-driver" in node["ImageId"] for node in nodes)
        assert all(kinds[name]["node_config"]["InstanceMarketOptions"] for name in ("gpu_24gb", "data"))
    else:
        assert all(node["serviceAccounts"] for node in nodes)
        assert all("nvidia-580" in node["disks"][0]["initializeParams"]["sourceImage"] for node in nodes)
        assert all(
            kinds[name]["node_config"]["scheduling"]["provisioningModel"] == "SPOT" for name in ("gpu_24gb", "data")
        )
    assert sum(kind["max_workers"] for kind in kinds.values()) <= config["max_workers"]


def test_ray_accepts_the_file_of_machines_that_are_there():
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (ROOT / "ray_cluster_local.yaml").read_text()
    validate_config(prepare_config(yaml.safe_load(text)))
    config = yaml.safe_load(text)
    aws = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    uv = next(word for command in aws["setup_commands"] for word in command.split() if word.startswith("uv=="))
    assert any(uv in command for command in config["setup_commands"]), "one version of uv"
    starts = [c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--num-cpus=0" in starts[0], "the head runs no tasks"
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token", "every node needs the same token"


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_the_cluster_file_names_the_installed_ray(name):
    import ray

    config = yaml.safe_load((ROOT / name).read_text())
    sources = [source for source in config["file_mounts"].values() if not source.startswith("~")]
    assert all((ROOT / source).is_file() for source in sources)
    assert f":{ray.__version__}-" in config["docker"]["image"]
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token", "every node needs the same token"


@pytest.mark.parametrize("manifest", RAYJOBS, ids=[job["metadata"]["name"] for job in RAYJOBS])
def test_a_rayjob_runs_a_script_with_settings_that_it_takes(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    python, script, flag, config, *overrides = shlex.split(spec["entrypoint"])
    assert (python, flag) == ("python", "--config") and (ROOT / script).is_file()
    section = "train" if "stage" in script else Path(script).stem
    settings = SECTIONS[section].load(ROOT / config, overrides)
    assert storage.Location.parse(settings.output).is_object_store
    assert spec["clusterSelector"] == {"ray.io/cluster": RAYCLUSTER["metadata"]["name"]}
    groups = {group["groupName"]: group for group in RAYCLUSTER["spec"]["workerGroupSpecs"]}
    if section == "train":
        assert groups["gpu-24gb"]["maxReplicas"] >= settings.num_workers


def test_the_raycluster_names_the_installed_ray_and_gives_every_node_the_bucket():
    import ray

    spec = RAYCLUSTER["spec"]
    assert spec["rayVersion"] == ray.__version__ and spec["authOptions"]["mode"] == "token"
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    assert all(container["envFrom"] == [{"secretRef": {"name": "tinygptv-bucket"}}] for container in containers)
    assert containers[1]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_every_job_starts_where_the_one_before_ends():
    names = [job["metadata"]["labels"]["job"] for job in RAYJOBS]
    assert names == ["prepare", "cache-features", *(f"stage{n}" for n in (1, 2, 3, 4)), "score", "quantize"]
    entrypoints = {name: job["spec"]["entrypoint"] for name, job in zip(names, RAYJOBS, strict=True)}
    for n in (1, 2, 3):
        assert f"output=s3://tinygptv-bucket/stage{n}" in entrypoints[f"stage{n}"]
        assert f"init_from=s3://tinygptv-bucket/stage{n}/checkpoint" in entrypoints[f"stage{n + 1}"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", ["deploy/kuberay", "deploy/kuberay/jobs", "deploy/kuberay/service"])
def test_kustomize_builds_the_folder(folder):
    done = subprocess.run(["kubectl", "kustomize", folder], cwd=ROOT, capture_output=True, text=True, check=False)
    if "unknown command" in done.stderr:
        pytest.skip("this kubectl has no kustomize")
    assert done.returncode == 0, done.stderr
    manifests = list(yaml.safe_load_all(done.stdout))
    images = {c["image"] for m in manifests for c in containers_of(m)}
    assert len(images) <= 1, "the image stands in one place"
    assert all(
        c.get("imagePullPolicy") == "IfNotPresent" for m in manifests for c in containers_of(m) if "ray" in c["name"]
    )


def containers_of(value):
    """All containers in a manifest, however deep."""
    if isinstance(value, dict):
        yield from value.get("containers", [])
        for item in value.values():
            yield from containers_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from containers_of(item)


def test_jobs_ship_neither_data_nor_environments():
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    rules = get_excludes_from_ignore_files(ROOT, include_gitignore=True)

    def ignored(path):
        return any(rule(ROOT / path) for rule in rules)

    assert all(ignored(path) for path in (".venv/bin/python", ".git/HEAD", "outputs/a.json", "data/laion/a.tar"))
    packages = [path for name in ("tinygptv", "pipelines") for path in (ROOT / name).rglob("*") if path.is_file()]
    assert not [path for path in packages if "__pycache__" not in path.parts and ignored(path)]


def test_a_submitted_job_receives_the_files_of_git(tmp_path):
    """Ray's own packaging: all of git's files travel with a job; outputs, data and environments do not."""
    from ray._private.runtime_env.packaging import create_package

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this tree is no git repository")
    create_package(str(ROOT), tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as archive:
        carried = set(archive.namelist())
    present = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert not set(present) - carried
    assert not [name for name in carried if name.split("/")[0] in ("outputs", "data", ".venv", ".git", "mlruns")]


def test_the_compose_file_starts_what_is_there_on_loopback():
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    server, mlflow = services["server"], services["mlflow"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    script, *overrides = server["command"][1:]
    assert (ROOT / script).is_file()
    settings = ServeSettings.load(None, [re.sub(r"\$\{\w+:-\}", "", override) for override in overrides])
    assert settings.host == "0.0.0.0" and settings.artifact == "" and settings.tracking_uri == "http://mlflow:5000"
    assert server["environment"] == [KEYS_VARIABLE]
    assert mlflow["command"][:2] == ["mlflow", "server"] and "/mlflow" in (ROOT / "deploy/Dockerfile").read_text()
