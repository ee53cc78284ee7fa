"""What a deployer sets: environment variables that begin with DROPSERVE_."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dropserve.models.defaults import Device, Precision
from dropserve.service.errors import did_you_mean
from dropserve.service.schemas import MAX_SAMPLES

PREFIX = "DROPSERVE_"
_OBJECT_STORAGE = re.compile(r"(?:s3|gs|az)://[^/?#\s]+(?:/[^?#\s]*)?")
_ORIGIN = re.compile(r"https?://[^/?#@\s]+")


class Settings(BaseSettings):
    """Every field is read from `DROPSERVE_` and its name in capitals; unknown ones are errors."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, allow_inf_nan=False
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    workers: int = Field(1, ge=1, le=64, description="Server processes, each with the models.")
    checkpoints: Path | str = Field(
        Path("checkpoints"),
        description="Models, as <name>/<version>: a folder, or s3://, gs:// or az://bucket/prefix.",
    )
    cache: Path = Field(
        Path("~/.cache/dropserve"), description="Folder of versions read from object storage."
    )
    cache_bytes: int = Field(10 * 2**30, ge=0, description="Bytes that the cache may take.")
    start_from_cache: bool = Field(
        False, description="Start from the cache if object storage does not answer."
    )
    data_dir: Path = Field(Path("data"), description="Folder of datasets, for training.")
    dataset_mb: int = Field(
        4096,
        ge=1,
        description="MiB of a folder's decoded images that are kept in memory, to train.",
    )
    poll_seconds: float = Field(5.0, gt=0, description="Seconds between scans for new versions.")
    keep_versions: int = Field(2, ge=0, description="Older versions that stay callable.")
    max_loaded_models: int = Field(
        0,
        ge=0,
        description="Models in memory; others are loaded when they are asked for, and the least "
        "recently used makes room. 0: all are loaded at the start.",
    )
    admin_token: SecretStr | None = Field(
        None, min_length=16, description="Token that may load and unload models."
    )
    api_keys_file: Path | None = Field(
        None, description="File of keys, one per line; requests except probes must have one."
    )
    api_key: SecretStr | None = Field(None, description="Key that the commands send to a service.")
    key_rate: float = Field(
        0.0,
        ge=0,
        description="Requests per second and worker with one key; more get 429. 0: no limit.",
    )
    key_concurrency: int = Field(
        0,
        ge=0,
        description="Requests in flight per worker with one key; more get 429. 0: no limit.",
    )
    tls_cert: Path | None = Field(None, description="Certificate chain (PEM); serves HTTPS.")
    tls_key: Path | None = Field(None, description="Private key of the certificate (PEM).")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins, comma-separated, whose pages may read answers; * for all.",
    )
    docs: bool = Field(True, description="Serve the playground, /docs and /openapi.json.")
    default_model: str | None = Field(
        None, description="Model for routes that name none; required with several models."
    )
    default_version: int | None = Field(
        None,
        ge=1,
        le=999_999_999,
        description="Version of the default model that answers; wins over a pin.",
    )
    strict_start: bool = Field(False, description="Fail the start if a version or pin is invalid.")
    factories: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Factories, comma-separated, that checkpoints may call: "
        "package.module:factory or path/to/file.py:factory.",
    )
    device: Device = Field(
        "auto", description="What networks run on. auto takes a GPU if PyTorch finds one."
    )
    precision: Precision = Field(
        "auto",
        description="Of Monte Carlo dropout. auto takes bfloat16 if the CPU has AMX (or the GPU "
        "bfloat16) and it is faster at 1, 8 and 64 images; else float32.",
    )
    threads: int = Field(1, ge=1, le=256, description="CPU threads of one worker's computations.")
    max_batch: int = Field(64, ge=1, le=4096, description="Images in one run of the network.")
    max_queue: int = Field(
        1024, ge=1, description="Images that may wait; more are refused with 503."
    )
    max_wait: float = Field(
        2.0, gt=0, description="Seconds that a request may wait; what would wait longer gets 503."
    )
    max_connections: int = Field(
        8192,
        ge=1,
        description="Connections of one worker, at most its open files less 192; more get 503.",
    )
    head_timeout: float = Field(
        10.0, gt=0, description="Seconds for a request's first byte, and for its head, to arrive."
    )
    keep_alive: float = Field(
        75.0,
        gt=0,
        description="Seconds that a connection may be idle, or its client leave an answer unread.",
    )
    max_body_bytes: int = Field(32 * 2**20, ge=1024, description="Bytes of one request's body.")
    max_held_bytes: int = Field(64 * 2**20, ge=1024, description="Bytes of all bodies at once.")
    max_pixels: int = Field(
        64 * 10**6, ge=1, description="Pixels of one image; decoding takes up to 12 bytes each."
    )
    max_side: int = Field(16_384, ge=1, description="Pixels of one image's longer side.")
    max_images: int = Field(64, ge=1, le=1000, description="Images in one request.")
    max_samples: int = Field(
        MAX_SAMPLES, ge=1, le=MAX_SAMPLES, description="Samples of one request."
    )
    fast_path: bool = Field(True, description="Answer small PNG requests without ASGI.")
    body_timeout: float = Field(30.0, gt=0, description="Seconds for one body to arrive.")
    drain_seconds: int = Field(20, ge=1, description="Seconds that open requests get at shutdown.")
    watchdog: float = Field(
        60.0,
        ge=0,
        description="Seconds after which a process that is stuck ends; 0: never.",
    )
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry spans; OTEL_* variables say where. Needs dropserve[otel].",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest severity that is logged; request lines are info."
    )

    @field_validator("factories", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("checkpoints", mode="before")
    @classmethod
    def _check_checkpoints(cls, where: object) -> object:
        if not isinstance(where, str) or "://" not in where:
            return Path(where) if isinstance(where, str) else where
        if not _OBJECT_STORAGE.fullmatch(where):
            raise ValueError("must be a folder, or s3://, gs:// or az://bucket/prefix")
        return where.rstrip("/")

    @field_validator("cache")
    @classmethod
    def _expand(cls, folder: Path) -> Path:
        return folder.expanduser()

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        if not all(origin == "*" or _ORIGIN.fullmatch(origin) for origin in origins):
            raise ValueError("an origin is * or http[s]://host[:port], with nothing behind it")
        return origins

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        """Refuse settings that have no effect without another, or that contradict it."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("DROPSERVE_TLS_CERT and DROPSERVE_TLS_KEY need each other")
        if (self.key_rate or self.key_concurrency) and self.api_keys_file is None:
            raise ValueError("limits per API key need DROPSERVE_API_KEYS_FILE")
        if self.max_held_bytes < self.max_body_bytes:
            raise ValueError(
                "DROPSERVE_MAX_HELD_BYTES must be at least DROPSERVE_MAX_BODY_BYTES, or bodies "
                "that are allowed would be refused even alone"
            )
        return self

    @model_validator(mode="after")
    def _refuse_unknown(self) -> Self:
        """Refuse a misspelt variable, which would otherwise be ignored."""
        known = {environment_name(name) for name in type(self).model_fields}
        unknown = {name for name in os.environ if name.upper().startswith(PREFIX)} - known
        if unknown:
            hint = did_you_mean(min(unknown), known)
            raise ValueError(f"no such setting: {', '.join(sorted(unknown))}{hint}")
        return self

    @property
    def url(self) -> str:
        """Where a client on this machine finds the service."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        scheme = "http" if self.tls_cert is None else "https"
        return (
            f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"
        )


def environment_name(field: str) -> str:
    """Name the environment variable of a field."""
    return PREFIX + field.upper()
