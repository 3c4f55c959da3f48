"""Settings of downloads, and of the released model in one command."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from pipelines.settings.base import Settings
from pipelines.settings.jobs import QuantizationMethod


class FetchSettings(Settings):
    """``jobs/fetch.py``: published weights and data sets by name -> a folder with checked files."""

    section = "fetch"

    what: list[str] = Field(
        default_factory=list,
        description="weights: released, start, stages, or parts of docs/weights.md; data sets: names of "
        "docs/datasets.md, data (all of the paper's recipe) or data1 .. data4 (of a stage); sample: the first rows of "
        "all sets, or of those named beside it, with their images one by one",
    )
    local: list[str] = Field(
        default_factory=list, description="folders where files may lie already; they are linked or copied, and checked"
    )
    offline: bool = Field(False, description="download nothing: take what is in output= and local=, and say what lacks")
    mirror: str = Field("", description="base address instead of https://HOST of every address outside the hub")
    hub: str = Field("", description="address of the Hugging Face hub; empty is HF_ENDPOINT, or the hub itself")
    images: Literal["print", "run"] = Field(
        "print", description="lists of links: print the img2dataset call that downloads the images, or run it"
    )
    rows: int = Field(
        0, ge=0, description="samples and lists of links: how many of the first to take; 0: 1000 of a sample, all links"
    )
    verify: bool = Field(False, description="hash again what was fetched before")
    accept_changed: bool = Field(
        False, description="take files whose size or hash differ from the recorded ones, and record the new ones"
    )
    dry_run: bool = Field(False, description="print the files, their sizes and what is missing; download nothing")

    @field_validator("what", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class ReleasedSettings(Settings):
    """``jobs/released.py``: fetch, convert, quantize and serve the released model."""

    section = "released"

    stage: int = Field(4, ge=1, le=4, description="which of the released stages")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="where it answers; auto: a GPU where it fits")
    method: Literal["", QuantizationMethod] = Field(
        "", description="low-bit weights; empty: what fits the device's memory, the most exact first"
    )
    memory: str = Field("", description="the machine's memory, e.g. 16GB; empty: what is free now")
    language: Literal["phi-2", "phi-2-susnato"] = Field("phi-2", description="whose copy of Phi-2 (docs/weights.md)")
    weights: str = Field("", description="folder of the downloads; empty is <output>/weights")
    drift_samples: int = Field(8, ge=1, description="samples of the check that low-bit weights answer as the full ones")
    serve: bool = Field(True, description="serve at the end; false: only make the artifact")
    fetch: dict[str, Any] = Field(default_factory=dict, description="keys of the fetch section, e.g. fetch.mirror=..")
    server: dict[str, Any] = Field(default_factory=dict, description="keys of the serve section, e.g. server.port=8000")


class RecipeSettings(Settings):
    """``jobs/recipe.py``: a whole recipe, from published files to an artifact."""

    section = "whole_recipe"

    raw: str = Field("", description="folder of the raw data sets, as docs/datasets.md lays them out")
    weights: str = Field("", description="folder of the published weights; empty is <output>/weights")
    data: str = Field("", description="folder of the prepared data; empty is <output>/data")
    features: Literal["auto", "cached", "inline"] = Field(
        "auto", description="auto compares disk and hours of both for each stage, and says what it chose"
    )
    tflops: float = Field(40.0, gt=0, description="what the encoder reaches here, 10^12 operations/s; for the hours")
    benchmarks: str = Field("", description="folder of the benchmarks' files; empty scores nothing")
    benchmark: str = Field("paper", description="benchmark or group to score")
    serve: bool = Field(False, description="serve the artifact at the end")
    fetch: dict[str, Any] = Field(default_factory=dict, description="keys of the fetch section, e.g. fetch.mirror=..")
    dry_run: bool = Field(False, description="print the commands and the plan of features; run nothing")
