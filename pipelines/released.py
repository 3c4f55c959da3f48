"""The released TinyGPT-V in one command: plan, fetch, convert, quantize, serve. Each step is skipped where it is done.

    OUTPUT/weights/      published files, as docs/weights.md names them
    OUTPUT/checkpoint/   the same as one checkpoint folder of this project
    OUTPUT/artifact/     low-bit weights for this machine: what is served

Once the artifact is there, the other two can be removed.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import psutil

from pipelines.fetch.run import MARGIN_BYTES, fetch, named_files
from pipelines.fingerprint import Fingerprint
from pipelines.json_files import read_json_object, write_json
from pipelines.settings import FetchSettings, QuantizeSettings, ReleasedSettings, ServeSettings, SettingsError
from pipelines.settings.memory_size import parse_bytes
from pipelines.storage import DiskFullError
from tinygptv.checkpoint.folders import is_whole
from tinygptv.config import TinyGPTVConfig
from tinygptv.convert.sources import all_parts
from tinygptv.quantization.artifact import METHODS
from tinygptv.training.memory_plan import GIB, inference_memory
from tinygptv.training.stages import get_stage

if TYPE_CHECKING:
    from pipelines.export import ExportResult

logger = logging.getLogger(__name__)

SERVER_BYTES = 2 * GIB
"""Ray, its store and the service's own processes."""
CONTEXT_TOKENS = 2048
_DEVICE_METHODS = {"cuda": ("nf4",), "cpu": ("cpu", "cpu4")}
"""Device -> methods that suit it, the most exact first."""
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Plan:
    """Where the released model will answer, and what that takes, in bytes.

    Attributes:
        device: ``cuda`` or ``cpu``.
        method: of quantization.
        needed: memory of the device while answering.
        free: of the device.
        quantizing: memory of the machine while weights are rounded.
        host: of the machine.
        download: published files, where none is here yet.
        disk: published files, checkpoint and artifact.
    """

    device: str
    method: str
    needed: int
    free: int
    quantizing: int
    host: int
    download: int
    disk: int

    def __str__(self) -> str:
        where = "the GPU" if self.device == "cuda" else "the CPU"
        needed, free, quantizing, host = (
            f"{size / GIB:.1f}" for size in (self.needed, self.free, self.quantizing, self.host)
        )
        return (
            f"Plan: answer on {where} with {self.method} weights: {needed} GiB of {free} GiB of memory. Before that: "
            f"{self.download / 1e9:.1f} GB to download, {self.disk / 1e9:.0f} GB of disk in all, {quantizing} of "
            f"{host} GiB of the machine's memory to round the weights."
        )


class ReleasedInputs(TypedDict):
    """Inputs of the artifact, apart from the files' content, which the lock file pins."""

    parts: list[str]
    method: str
    drift_samples: int


class ReleasedResult(TypedDict):
    """``result.json`` of ``released``.

    Attributes:
        artifact: its folder.
        bytes: of its weights.
        drift: rise of the held-out loss, in nats per token.
        inputs: of the artifact.
        plan: fields of ``Plan``.
        files: SHA-256 of the published files, by name.
        result: path of the file.
    """

    artifact: str
    bytes: int
    drift: float
    inputs: ReleasedInputs
    plan: dict[str, str | int]
    files: dict[str, str]
    result: str


def run_released(settings: ReleasedSettings) -> ReleasedResult:
    """Make the artifact.

    Args:
        settings: which stage, where it answers.

    Returns:
        What stands in ``result.json``: the artifact, the plan, the files' hashes.

    Raises:
        SettingsError: the machine has too little memory, or a setting cannot be used.
        DownloadError: a file cannot be had.
        DiskFullError: the disk is too small.
    """
    output = settings.output_dir("outputs/released")
    _check_settings(settings, output)
    plan = plan_released(settings)
    inputs = _inputs(settings, plan)
    done = _finished(output, inputs)
    if done:
        print(f"The artifact is ready: {output / 'artifact'}", flush=True)
        return done
    print(plan, flush=True)
    _check(_with_stated_sizes(settings, plan, output), output)
    files = _fetch(settings, output)
    checkpoint = _convert(settings, output, files)
    exported = _quantize(settings, plan, checkpoint, output)
    result: ReleasedResult = {
        "artifact": exported["artifact"],
        "bytes": exported["bytes"],
        "drift": exported["drift"],
        "inputs": inputs,
        "plan": asdict(plan),
        "files": files,
        "result": str(output / "result.json"),
    }
    write_json(output / "result.json", result)
    return result


def _check_settings(settings: ReleasedSettings, output: Path) -> None:
    """Find mistakes in the settings of all steps before the first one."""
    for key, instead in (("what", "stage="), ("output", "weights=")):
        if key in settings.fetch:
            raise SettingsError(f"fetch.{key}= is decided by this command: give {instead} in its place.")
    if "artifact" in settings.server:
        raise SettingsError("server.artifact= is made by this command; serve another one with jobs/serve_http.py.")
    _fetch_settings(settings, output)
    _server_settings(settings, str(output / "artifact"), "cpu")


def serve_settings(settings: ReleasedSettings, result: ReleasedResult) -> ServeSettings:
    """Settings of serving the artifact: on this machine alone, unless ``server`` says otherwise."""
    return _server_settings(settings, result["artifact"], result["plan"]["device"])


def _server_settings(settings: ReleasedSettings, artifact: str, device: str | int) -> ServeSettings:
    values = {"artifact": artifact, "num_gpus": int(device == "cuda")}
    return ServeSettings.parse({**values, **settings.server}, "released, server")


# ---------------------------------------------------------------------- the plan


def plan_released(settings: ReleasedSettings) -> Plan:
    """Choose device and method by what they take, from the published sizes: nothing has to be here yet.

    Raises:
        SettingsError: no method fits.
    """
    stage = get_stage("released", settings.stage)
    config = TinyGPTVConfig.phi2(image_size=stage.image_size, lora_rank=0)
    host = parse_bytes(settings.memory) if settings.memory else free_memory()
    gpu = _free_gpu_bytes() if settings.device != "cpu" else 0
    devices = (["cuda"] if gpu else []) + ["cpu"] if settings.device == "auto" else [settings.device]
    if settings.device == "cuda" and not gpu:
        raise SettingsError("device=cuda, but there is no CUDA GPU that torch can use: take device=cpu.")
    rejected = []
    for device in devices:
        free = gpu if device == "cuda" else host
        for method in [settings.method] if settings.method else _DEVICE_METHODS[device]:
            needed = needed_bytes(config, device, method)
            if needed <= free:
                return _plan(settings, config, device, method, needed, free, host)
            rejected.append(f"{method} on {device} needs {needed / GIB:.1f} GiB, {free / GIB:.1f} are free")
    raise SettingsError(
        f"the released model does not fit this machine: {'; '.join(rejected)}. Close other programs, or take another "
        "machine."
    )


def needed_bytes(config: TinyGPTVConfig, device: str, method: str) -> int:
    """Memory of the device while it answers one request."""
    memory = inference_memory(config, vars(METHODS[method]), num_tokens=CONTEXT_TOKENS)
    return memory.peak if device == "cuda" else memory.allocated + SERVER_BYTES


def _plan(
    settings: ReleasedSettings, config: TinyGPTVConfig, device: str, method: str, needed: int, free: int, host: int
) -> Plan:
    half = inference_memory(config, dict.fromkeys(vars(METHODS[method]), "half"))
    low_bit = inference_memory(config, vars(METHODS[method]))
    download = sum(file.num_bytes for file in named_files(part_names(settings)))
    checkpoint, artifact = sum(half.weights.values()), sum(low_bit.weights.values())
    quantizing = checkpoint + half.workspace + GIB
    return Plan(device, method, needed, free, quantizing, host, download, download + checkpoint + artifact)


def _with_stated_sizes(settings: ReleasedSettings, plan: Plan, output: Path) -> Plan:
    """The plan with the room of the files that their servers have, where these may be others than the published ones.

    Checkpoint and artifact are smaller or larger in the same proportion.
    """
    if not settings.fetch.get("accept_changed"):
        return plan
    found = fetch(_fetch_settings(settings, output, dry_run=True, quiet=True))
    return replace(plan, disk=round(plan.disk * found["num_bytes"] / plan.download))


def _check(plan: Plan, output: Path) -> None:
    if plan.quantizing > plan.host:
        raise SettingsError(
            f"rounding the weights takes {plan.quantizing / GIB:.1f} GiB of memory, and {plan.host / GIB:.1f} are "
            "free: close other programs, or make the artifact on another machine (serve=false) and serve it here with "
            "jobs/serve_http.py artifact=DIR."
        )
    have = sum(path.stat().st_size for path in output.rglob("*") if path.is_file() and not path.is_symlink())
    free = shutil.disk_usage(output).free
    if plan.disk - have + MARGIN_BYTES > free:
        raise DiskFullError(
            f"{output} needs about {(plan.disk - have) / 1e9:.0f} GB more, and {free / 1e9:.1f} GB are free: free some "
            "space, or give another output=."
        )


def free_memory() -> int:
    """Bytes of main memory that this process may still take, swap space included, within its container's limit."""
    free: int = psutil.virtual_memory().available + psutil.swap_memory().free
    for name in _CGROUP_LIMITS:
        path = Path(name)
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            free = min(free, max(0, int(text) - psutil.Process().memory_info().rss))
    return free


def _free_gpu_bytes() -> int:
    import torch

    free: int = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return free


# ---------------------------------------------------------------------- the steps


def part_names(settings: ReleasedSettings) -> list[str]:
    """The published parts that the stage's model is made of."""
    return ["vision", "qformer", settings.language, f"stage{settings.stage}"]


def _inputs(settings: ReleasedSettings, plan: Plan) -> ReleasedInputs:
    return {
        "parts": part_names(settings),
        "method": plan.method,
        "drift_samples": settings.drift_samples,
    }


def _finished(output: Path, inputs: ReleasedInputs) -> ReleasedResult | None:
    """The result of an earlier run with the same inputs whose artifact is whole."""
    result = read_json_object(output / "result.json")
    if result is None or result.get("inputs") != inputs:
        return None
    return cast(ReleasedResult, result) if is_whole(result["artifact"]) else None


def _fetch(settings: ReleasedSettings, output: Path) -> dict[str, str]:
    """Path of each file below the weights' folder -> its SHA-256."""
    fetched = fetch(_fetch_settings(settings, output))
    return {name: entry["sha256"] for name, entry in fetched["files"].items()}


def _fetch_settings(settings: ReleasedSettings, output: Path, **changes: bool) -> FetchSettings:
    values = {
        "what": part_names(settings),
        "output": settings.weights or str(output / "weights"),
        "quiet": settings.quiet,
        **settings.fetch,
        **changes,
    }
    return FetchSettings.parse(values, "released, fetch")


def _convert(settings: ReleasedSettings, output: Path, files: dict[str, str]) -> Path:
    """The published files as a checkpoint folder."""
    checkpoint, record = output / "checkpoint", output / "checkpoint.json"
    stage = get_stage("released", settings.stage)
    inputs = dict(Fingerprint.of("convert", files=files, stage=settings.stage).inputs)
    if read_json_object(record) == inputs and is_whole(checkpoint):
        print(f"The checkpoint is converted already: {checkpoint}", flush=True)
        return checkpoint
    from tinygptv.convert.match import match_release
    from tinygptv.convert.write import convert_release
    from tinygptv.data.processing import load_tokenizer

    folder = Path(settings.weights or output / "weights").expanduser().absolute()
    paths: dict[str, Any] = {all_parts()[name].role: folder / all_parts()[name].path for name in part_names(settings)}
    print(f"Converting to {checkpoint} ...", flush=True)
    release = match_release(**paths, projection=None, image_size=stage.image_size)
    record.unlink(missing_ok=True)
    convert_release(release, checkpoint, load_tokenizer(paths["language"]), template=stage.template)
    write_json(record, inputs)
    return checkpoint


def _quantize(settings: ReleasedSettings, plan: Plan, checkpoint: Path, output: Path) -> ExportResult:
    from pipelines.export import export
    from pipelines.fingerprint import OtherInputsError

    print(f"Quantizing ({plan.method}) and comparing with the full model ...", flush=True)
    values = {
        "checkpoint": str(checkpoint),
        "method": plan.method,
        "output": str(output / "artifact"),
        "drift_samples": settings.drift_samples,
        "tracking_uri": "none",
        "quiet": settings.quiet,
    }
    try:
        return export(QuantizeSettings.parse(values, "released, quantize"))
    except OtherInputsError:  # of another method or stage: made here, and cheap to make again
        return export(QuantizeSettings.parse({**values, "overwrite": True}, "released, quantize"))
