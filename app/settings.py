"""The environment, read once into one frozen object. Every duration is in seconds, every size in bytes."""

import difflib
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from dotenv import dotenv_values
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.queue.model import Backoff, BackoffStrategy, JobDefaults
from app.store.database import DatabaseUrlError, connect_arguments

PREFIX = "QUEUE_"
SCHEMA_BYTES_MAX = 48

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SettingsError(Exception):
    """A setting is wrong; the text is a sentence that names it."""


class Settings(BaseSettings):
    """What the environment says. The README's table of variables is checked against the fields."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", populate_by_name=True)

    database_url: str | None = Field(
        default=None,
        validation_alias="DATABASE_URL",
        description="PostgreSQL 14 or newer, in either of libpq's forms; unset: an embedded PostgreSQL",
    )
    pooler: Literal["none", "transaction"] = Field(
        default="none", description="`transaction`: DATABASE_URL leads through a pooler of transactions"
    )
    database_listen_url: str | None = Field(
        default=None,
        validation_alias="DATABASE_LISTEN_URL",
        description="the same database past the pooler: for hints between processes, and for migrations",
    )
    schema_name: str = Field(
        default="leaseq",
        validation_alias=f"{PREFIX}SCHEMA",
        min_length=1,
        pattern=r"^[^\x00\"{}\[\]]+$",
        description="the schema that holds the tables",
    )
    data_dir: Path = Field(default=Path(".leaseq"), description="where the embedded PostgreSQL lives")
    migrate: bool = Field(default=True, description="apply missing migrations at the start")
    host: str = Field(default="127.0.0.1", description="address to serve on")
    port: int = Field(default=8080, ge=0, le=65535, description="port to serve on")
    processes: int = Field(default=1, ge=1, le=64, description="processes that serve the port together")
    auth: Literal["required", "off"] = Field(
        default="required", description="`off`: serve without API keys on any address"
    )
    create_queues: bool = Field(
        default=True, description="queues appear on first use; `false`: only those that were made take jobs"
    )
    max_retries: int = Field(default=3, ge=0, le=10_000, description="retries where a job names none")
    backoff_strategy: BackoffStrategy = Field(
        default=BackoffStrategy.EXPONENTIAL, description="`exponential`, `linear` or `fixed`"
    )
    backoff_seconds: float = Field(
        default=1.0, ge=0, le=86_400, allow_inf_nan=False, description="the delay before the first retry"
    )
    lease_seconds: float = Field(default=30.0, ge=0.5, le=43_200, description="how long a lease lasts")
    maintenance_seconds: Seconds = Field(default=1.0, description="pause between two rounds of maintenance")
    poll_seconds: Seconds = Field(
        default=5.0, description="how often waiting leases look for jobs of which no hint came"
    )
    retention_seconds: Seconds = Field(default=7 * 86_400.0, description="how long completed jobs are kept")
    dead_retention_seconds: Seconds = Field(
        default=30 * 86_400.0, description="how long failed, cancelled and expired jobs are kept"
    )
    max_payload_bytes: int = Field(
        default=256 * 1024, ge=1, le=64 * 1024**2, description="largest payload or result"
    )
    max_body_bytes: int = Field(
        default=16 * 1024**2,
        ge=1024,
        le=256 * 1024**2,
        description="largest request body; where one job is meant, its payload and 64 KiB are",
    )
    max_lease_waiters: int = Field(
        default=10_000, ge=1, description="leases that may wait at once, shared out between the processes"
    )
    max_job_watchers: int = Field(
        default=2_000,
        ge=1,
        description="requests that may wait at once for the end of a job, shared out between the processes",
    )
    max_event_streams: int = Field(
        default=100,
        ge=1,
        description="listeners of `GET /events` at once, shared out between the processes",
    )
    db_pool_size: int = Field(
        default=8,
        ge=1,
        le=200,
        description="database connections for the verbs, shared out between the processes, at least 4 each",
    )
    shutdown_seconds: Seconds = Field(default=25.0, description="how long requests may take to end at a stop")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="`debug`, `info`, `warning` or `error`"
    )
    log_format: Literal["auto", "json", "pretty"] = Field(
        default="auto", description="`json`, `pretty`, or `auto`: pretty on a terminal"
    )

    @field_validator("database_url", "database_listen_url")
    @classmethod
    def _understandable_url(cls, value: str | None, info: ValidationInfo) -> str | None:
        if not value:
            return None
        try:
            connect_arguments(value, variable_of(str(info.field_name)))
        except DatabaseUrlError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("schema_name")
    @classmethod
    def _usable_schema(cls, value: str) -> str:
        if value.startswith("pg_"):
            raise ValueError("names that begin with pg_ belong to PostgreSQL")
        if len(value.encode()) > SCHEMA_BYTES_MAX:
            raise ValueError(f"may have at most {SCHEMA_BYTES_MAX} bytes")
        return value

    @model_validator(mode="after")
    def _asks_no_more_than_a_pooler_passes_on(self) -> "Settings":
        if self.pooler != "none" and self.database_url is not None:
            connect_arguments(self.database_url, pooled=True)
        return self

    @model_validator(mode="after")
    def _open_only_on_purpose(self) -> "Settings":
        if self.auth != "off" and not _is_loopback(self.host):
            message = (
                f"QUEUE_HOST is {self.host}, which others can reach, and there are no API keys. "
                "Serve on 127.0.0.1, or set QUEUE_AUTH=off if the network in front keeps strangers out"
            )
            raise ValueError(message)
        return self

    @property
    def defaults(self) -> JobDefaults:
        """What a job gets where its producer named nothing."""
        return JobDefaults(
            lease_seconds=self.lease_seconds,
            max_retries=self.max_retries,
            backoff=Backoff(strategy=self.backoff_strategy, initial_seconds=self.backoff_seconds),
        )

    @property
    def variables(self) -> dict[str, str]:
        """The environment that makes these settings again, whatever a `.env` file says meanwhile."""
        values = self.model_dump(mode="json", exclude_none=True)
        return {variable_of(name): str(value) for name, value in values.items()}

    def require_database_url(self) -> str:
        """Return DATABASE_URL. Raises SettingsError when it is not set."""
        if self.database_url is None:
            message = "DATABASE_URL is not set."
            raise SettingsError(message)
        return self.database_url


def load_settings() -> Settings:
    """Read the settings from the environment, and from a `.env` file beside it.

    Raises SettingsError with a sentence that names the first wrong variable.
    """
    try:
        settings = Settings(_env_file=".env")
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from None
    _refuse_misspelt({*dotenv_values(".env"), *os.environ})
    return settings


def variable_of(name: str) -> str:
    """Return the environment variable that sets the field `name`."""
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else f"{PREFIX}{name.upper()}"


def _refuse_misspelt(variables: Iterable[str]) -> None:
    """Stop at QUEUE_MAX_RETRYS; leave QUEUE_URL, which may be another program's, alone."""
    known = {variable_of(name) for name in Settings.model_fields}
    for variable in sorted(variables):
        if variable.startswith(PREFIX) and variable not in known:
            near = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
            if near:
                message = f"{variable} is not a setting of leaseq. Did you mean {near[0]}?"
                raise SettingsError(message)


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"{message}."
    field = str(first["loc"][0])
    name = variable_of(field) if field in Settings.model_fields else field
    if name in {"DATABASE_URL", "DATABASE_LISTEN_URL"}:
        return f"{message}."
    return f"{name} is {first['input']!r}: {message}."


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
