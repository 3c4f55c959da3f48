"""``ray up`` of ``ray_cluster_local.yaml``: three machines reached by SSH, a job on them, and ``ray down``.

The file's own commands run, but for what costs time or the network: each machine has the environment of the
requirements already, and no MLflow server is started. Machines are processes in file systems of their own
(``tests.ssh_machines``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import storage
from tests.paths import ROOT
from tests.private_nodes import bucket_environment, bucket_server, free_port, wait_for
from tests.ssh_machines import make_key, ssh_machines, why_not

pytest.importorskip("moto", reason="the S3 server of these tests is in the dev extra")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

HEAD, *WORKERS = ADDRESSES = ("127.0.2.1", "127.0.2.2", "127.0.2.3")


@pytest.fixture
def bucket(monkeypatch):
    with bucket_server("desk") as endpoint:
        for name, value in bucket_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        yield bucket_environment(endpoint)


@pytest.fixture
def user(tmp_path, bucket):
    """The home folder of the person who starts the cluster: a key, the bucket's credentials, Ray's token."""
    home = tmp_path / "user"
    (home / ".tinygptv").mkdir(parents=True)
    (home / ".tinygptv/bucket.env").write_text("".join(f"{name}={value}\n" for name, value in bucket.items()))
    make_key(home / "key")
    return home


@pytest.fixture
def machines(tmp_path, user):
    with ssh_machines(tmp_path / "machines", ADDRESSES, user / "key") as homes:
        for home in homes:
            (home / ".tinygptv").mkdir()
            (home / ".tinygptv/venv").symlink_to(sys.prefix)
        yield homes


def cluster_file(user: Path, ports: tuple[int, int]) -> Path:
    """The shipped file with this cluster's machines and free ports."""
    config = yaml.safe_load((ROOT / "ray_cluster_local.yaml").read_text())
    config["cluster_name"] = f"test-{os.getpid()}"
    config["provider"].update(head_ip=HEAD, worker_ips=WORKERS)
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(user / "key")}
    config["file_mounts"] = {
        to: source if source.startswith("~") else str(ROOT / source) for to, source in config["file_mounts"].items()
    }
    config["setup_commands"] = [command for command in config["setup_commands"] if "install" not in command]
    gcs, dashboard = ports
    # All machines are this one: Ray's agents need ports of their own, counted from the last number of the address.
    agents = ("metrics-export", "dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent")
    number = "$(echo $SSH_CONNECTION | cut -d' ' -f3 | cut -d. -f4)"
    own = " ".join(f"--{name}-port=$(({free_port()} + {number}))" for name in agents)
    small = f"--object-store-memory=150000000 {own}"
    config["head_start_ray_commands"] = [
        command.replace("--port=6379", f"--port={gcs} --dashboard-port={dashboard} {small}")
        for command in config["head_start_ray_commands"]
        if "mlflow" not in command
    ]
    config["worker_start_ray_commands"] = [
        command.replace(":6379", f":{gcs} --num-cpus=2 {small}") for command in config["worker_start_ray_commands"]
    ]
    path = user / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_machines_reached_by_ssh_become_a_cluster(machines, user, tmp_path):
    from tinygptv.miniature.writers import write_world

    gcs, dashboard = free_port(), free_port()
    file = cluster_file(user, (gcs, dashboard))
    hidden = ("RAY_", "PYTHON", "AWS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {"HOME": str(user), "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(tmp_path / "ray")}

    def ray(*words, check=True):
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        done = subprocess.run(
            command, env=environment, cwd=user, capture_output=True, text=True, timeout=600, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    ray("get-auth-token", "--generate")
    environment["RAY_AUTH_MODE"] = "token"
    ray("up", str(file), "--yes", "--no-config-cache")
    try:
        address = f"http://127.0.0.1:{dashboard}"
        everywhere = nodes_command(gcs)
        wait_for(
            lambda: alive(ray("exec", str(file), everywhere, check=False)) == set(ADDRESSES),
            300,
            "not all machines joined",
        )

        write_world(tmp_path / "world", 24, 4, sources=("laion",))
        storage.upload_folder(tmp_path / "world", "s3://desk/raw", "sources.json")
        (given,) = json.loads((tmp_path / "world/sources.json").read_text()).values()
        words = ("source=laion", f"input=s3://desk/raw/{given['input']}", "output=s3://desk/data/laion")
        job = ("jobs/prepare_data.py", *words, "tracking_uri=none")
        printed = ray("job", "submit", "--address", address, "--working-dir", str(ROOT), "--", "python", *job)
        assert "s3://desk/data/laion/result.json" in printed
        assert json.loads(storage.read_bytes("s3://desk/data/laion/result.json"))["rows_out"] > 0
    finally:
        told = ray("down", str(file), "--yes", check=False)
    wait_for(lambda: not [home for home in machines if is_running(home)], 60, f"Ray still runs: {told}")


def nodes_command(gcs: int) -> str:
    code = "print([n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']])"
    return f"RAY_AUTH_MODE=token python -c \"import ray; ray.init('{HEAD}:{gcs}', log_to_driver=False); {code}\""


def alive(printed: str) -> set[str]:
    return {address for address in ADDRESSES if f"'{address}'" in printed}


def is_running(home: Path) -> bool:
    """Whether Ray still runs on the machine of this home folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"raylet" in (process / "cmdline").read_bytes() and (process / "root/tmp/home").samefile(home):
                return True
        except OSError:
            continue
    return False
