"""Settings of the HTTP service, and of answering a file of requests."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator

from pipelines.settings.base import Settings
from pipelines.settings.errors import SettingsError


class AnswerSettings(Settings):
    """Which model answers requests, and the bounds of a request."""

    artifact: str = Field(
        "", description="artifact or checkpoint folder, hf://org/name, or models:/name@alias; empty is the shipped one"
    )
    model_name: str = Field("tinygpt-v", min_length=1, description="name that requests call the model by")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica; a fraction lets replicas share one")
    threads: int = Field(0, ge=0, description="torch threads of a replica; 0: one for a small model, else all cores")
    max_batch_size: int = Field(16, ge=1, description="answers generated together in one replica")
    context_length: int = Field(0, ge=0, description="tokens of prompt and answer; 0 is the model's, at most 2048")
    prefill_tokens: int = Field(128, ge=1, description="prompt tokens read per step while answers are being written")
    kv_cache_dtype: Literal["auto", "bfloat16"] = Field(
        "auto", description="keys and values; bfloat16 halves their memory on a CPU, and is slower in long contexts"
    )
    max_tokens: int = Field(256, ge=1, description="answer length where a request names none")
    temperature: float = Field(0.0, ge=0, le=2, description="temperature where a request names none; 0 is greedy")
    default_task: Literal["", "vqa", "caption", "refer", "grounding", "detection"] = Field(
        "",
        description="task of questions about images that name none; vqa: short answers, as evaluation harnesses expect",
    )
    request_timeout_s: float = Field(300, gt=0, description="longest time of an answer, waiting for the model included")
    allowed_image_hosts: list[str] = Field(
        default_factory=list, description="hosts that images may be fetched from; none by default"
    )
    max_messages: int = Field(256, ge=1, description="messages of one request")
    max_images: int = Field(8, ge=0, description="images of one request")
    max_image_mb: float = Field(10, gt=0, description="size of an encoded image")
    max_image_megapixels: float = Field(24, gt=0, description="width x height of an image")
    max_body_mb: float = Field(16, gt=0, description="size of a request; base64 makes an image a third larger")
    image_timeout_s: float = Field(
        10, gt=0, description="time to fetch an image, to wait for a decoder, and to decode it, each"
    )
    image_decoders: int = Field(2, ge=1, description="processes that decode images; each decodes one at a time")
    kept_images: int = Field(256, ge=1, description="images whose embeddings a replica keeps for later turns")

    @field_validator("allowed_image_hosts")
    @classmethod
    def _hosts_are_names(cls, value: list[str]) -> list[str]:
        for host in value:
            if not host or re.search(r"[/*@\s]", host):
                raise ValueError(f"{host!r} is no host: write images.example, or images.example:8080")
        return [host.encode("idna").decode() for host in value]


class ServeSettings(AnswerSettings):
    """``jobs/serve_http.py``: artifact -> HTTP."""

    section = "serve"

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    num_replicas: int = Field(1, ge=1, description="copies of the model")
    num_ingresses: int = Field(1, ge=1, description="processes that check requests; one serves some hundred per second")
    max_replicas: int = Field(0, ge=0, description="autoscale from num_replicas up to this; 0 keeps the number fixed")
    cpus_per_replica: float = Field(1.0, ge=0, description="logical CPUs of a replica")
    max_queue: int = Field(64, ge=0, description="requests that may wait; more are refused with 429")
    max_per_client: int = Field(
        0, ge=0, description="requests in flight of one API key or address; 0: all slots, while nobody else asks"
    )
    trusted_proxies: list[str] = Field(
        default_factory=list,
        description="addresses or networks of proxies whose X-Forwarded-For names the client",
    )
    stream_interval_ms: float = Field(25, ge=0, description="shortest time between two events of a stream")
    api_keys: list[SecretStr] = Field(
        default_factory=list,
        description="accepted bearer tokens, in a YAML file; none accepts everybody. Also: TINYGPTV_API_KEYS",
    )
    api_keys_file: str = Field("", description="file with accepted bearer tokens, one per line")
    open_paths: list[Literal["/metrics", "/docs", "/openapi.json"]] = Field(
        default_factory=list, description="paths that need no key although there are keys, e.g. ['/metrics']"
    )
    cors_origins: list[str] = Field(
        default_factory=list, description="web origins that may call the API; none by default"
    )
    body_timeout_s: float = Field(60, gt=0, description="time to receive a request")
    stuck_after_s: float = Field(
        300,
        gt=0,
        description="longest step or batch of images; beyond it the replica is unhealthy and is replaced",
    )

    @classmethod
    def load(cls, config: str | Path | None, overrides: Sequence[str] = ()) -> Self:
        """As ``Settings.load``; ``api_keys=`` without a key, as from an unset variable of a shell, is refused."""
        if any(override.partition("=")[0] == "api_keys" and not override.partition("=")[2] for override in overrides):
            raise SettingsError("the command line: api_keys= names no key; leave it out to accept everybody.")
        return super().load(config, overrides)

    @field_validator("api_keys", mode="before")
    @classmethod
    def _keys_are_usable(cls, value: object) -> object:
        if not isinstance(value, list):
            raise ValueError("API keys are a list of texts")
        texts = [key.get_secret_value() if isinstance(key, SecretStr) else key for key in value]
        if not all(isinstance(text, str) and text.strip() == text != "" for text in texts):
            raise ValueError("an API key must be a text, not empty, without white space at its ends")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_addresses(cls, value: list[str]) -> list[str]:
        for proxy in value:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError:
                raise ValueError(f"{proxy!r} is no address: write 10.0.0.1, or a network such as 10.0.0.0/8") from None
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_those_of_browsers(cls, value: list[str]) -> list[str]:
        origins = [origin.lower().removesuffix("/") for origin in value]
        for origin in origins:
            if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/*\s]+", origin):
                raise ValueError(f"{origin!r} is no origin: write https://site.example, or * for all sites")
        return origins


class BatchSettings(AnswerSettings):
    """``jobs/batch.py``: a file of requests -> answers."""

    section = "batch"

    input: str = Field("", description="JSON Lines file of requests, as OpenAI's batch API takes it")
    overwrite: bool = Field(False, description="answer again, even if the output has answers of other settings")
