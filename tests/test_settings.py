"""The environment: what is read, what is refused in one sentence, and that no password is ever said aloud."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
import pytest

from app.queue.model import BackoffStrategy
from app.settings import PREFIX, Settings, SettingsError, load_settings, variable_of
from app.store.database import DatabaseUrlError, connect_arguments
from tests.conftest import World
from tests.served import ROOT, environment

PASSWORD = "s3cr3t-word"  # noqa: S105  # a marker to look for
EVERYWHERE = "0.0.0.0"  # noqa: S104  # refusing it is the point
VARIABLES = {variable_of(name): name for name in Settings.model_fields}


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Nothing set, and no `.env` in the present directory."""
    for variable in [*VARIABLES, "QUEUE_URL"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def refusal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """Return the sentence with which such an environment is refused."""
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as refused:
        load_settings()
    return str(refused.value)


def table_of_the_readme() -> dict[str, tuple[str, str]]:
    """Return default and meaning by variable."""
    rows = re.findall(
        r"^\| `([A-Z_]+)` \| (.*?) \| (.*?) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    return {variable: (default, meaning) for variable, default, meaning in rows}


def example_file() -> str:
    return (ROOT / ".env.example").read_text()


def as_text(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case float() if value == int(value):
            return str(int(value))
        case BackoffStrategy():
            return value.value
        case _:
            return str(value)


def test_the_readme_has_every_variable_with_its_default_and_its_meaning():
    table = {name: row for name, row in table_of_the_readme().items() if not name.startswith("LEASEQ_")}
    assert set(table) == set(VARIABLES)
    for variable, name in VARIABLES.items():
        field = Settings.model_fields[name]
        default, meaning = table[variable]
        assert default.partition(" (")[0].strip("`") == as_text(field.default), variable
        assert meaning == field.description, variable


def test_the_example_file_has_every_variable_with_its_default():
    offered = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", example_file(), re.MULTILINE))
    assert set(offered) == set(VARIABLES)
    for variable, name in VARIABLES.items():
        if variable != "DATABASE_URL":
            assert offered[variable] == as_text(Settings.model_fields[name].default), variable


def test_the_example_file_is_a_good_env_file_also_with_everything_in_it_switched_on(tmp_path: Path):
    (tmp_path / ".env").write_text(re.sub(r"^#([A-Z_]+=)", r"\1", example_file(), flags=re.MULTILINE))
    defaults = Settings(_env_file=None)
    assert load_settings().model_dump(exclude={"database_url"}) == defaults.model_dump(
        exclude={"database_url"}
    )


def test_without_any_variable_the_defaults_of_the_contract_hold():
    settings = load_settings()
    assert (settings.host, settings.port, settings.database_url) == ("127.0.0.1", 8080, None)
    assert (settings.max_retries, settings.lease_seconds, settings.backoff_seconds) == (3, 30, 1)
    assert settings.backoff_strategy is BackoffStrategy.EXPONENTIAL
    assert (settings.max_payload_bytes, settings.max_body_bytes) == (256 * 1024, 16 * 1024 * 1024)
    assert (settings.retention_seconds, settings.dead_retention_seconds) == (7 * 86_400, 30 * 86_400)


GOOD = {
    "DATABASE_URL": ("postgresql://u@h/d", "postgresql://u@h/d"),
    "QUEUE_POOLER": ("transaction", "transaction"),
    "DATABASE_LISTEN_URL": ("postgresql://u@direct/d", "postgresql://u@direct/d"),
    "QUEUE_SCHEMA": ("Jobs of mine", "Jobs of mine"),
    "QUEUE_DATA_DIR": ("/var/lib/leaseq", Path("/var/lib/leaseq")),
    "QUEUE_MIGRATE": ("false", False),
    "QUEUE_CREATE_QUEUES": ("false", False),
    "QUEUE_HOST": ("::1", "::1"),
    "QUEUE_PORT": ("0", 0),
    "QUEUE_PROCESSES": ("64", 64),
    "QUEUE_AUTH": ("off", "off"),
    "QUEUE_MAX_RETRIES": ("0", 0),
    "QUEUE_BACKOFF_STRATEGY": ("linear", BackoffStrategy.LINEAR),
    "QUEUE_BACKOFF_SECONDS": ("0.25", 0.25),
    "QUEUE_LEASE_SECONDS": ("0.5", 0.5),
    "QUEUE_MAINTENANCE_SECONDS": ("0.1", 0.1),
    "QUEUE_POLL_SECONDS": ("60", 60),
    "QUEUE_RETENTION_SECONDS": ("3600", 3600),
    "QUEUE_DEAD_RETENTION_SECONDS": ("3600", 3600),
    "QUEUE_MAX_PAYLOAD_BYTES": ("1024", 1024),
    "QUEUE_MAX_BODY_BYTES": ("2048", 2048),
    "QUEUE_MAX_LEASE_WAITERS": ("5", 5),
    "QUEUE_MAX_JOB_WATCHERS": ("5", 5),
    "QUEUE_MAX_EVENT_STREAMS": ("5", 5),
    "QUEUE_DB_POOL_SIZE": ("2", 2),
    "QUEUE_SHUTDOWN_SECONDS": ("5", 5),
    "QUEUE_LOG_LEVEL": ("debug", "debug"),
    "QUEUE_LOG_FORMAT": ("json", "json"),
}

BAD = {
    "DATABASE_URL": ["mysql://h/d", "localhost", "postgresql://[h/d"],
    "QUEUE_POOLER": ["", "session", "pgbouncer"],
    "DATABASE_LISTEN_URL": ["mysql://h/d", "localhost", "postgresql://[h/d"],
    "QUEUE_SCHEMA": ["", 'a"b', "{schema}", "x" * 49],
    "QUEUE_DATA_DIR": [],
    "QUEUE_MIGRATE": ["perhaps", ""],
    "QUEUE_CREATE_QUEUES": ["perhaps", ""],
    "QUEUE_HOST": [""],
    "QUEUE_PORT": ["-1", "65536", "http", "8080.5", ""],
    "QUEUE_PROCESSES": ["0", "65", "1.5", "auto", ""],
    "QUEUE_AUTH": ["none", "OFF ", ""],
    "QUEUE_MAX_RETRIES": ["-1", "1.5", "many", "10001"],
    "QUEUE_BACKOFF_STRATEGY": ["quadratic", ""],
    "QUEUE_BACKOFF_SECONDS": ["-1", "nan", "inf", "soon"],
    "QUEUE_LEASE_SECONDS": ["0", "0.49", "43201", "nan", "inf"],
    "QUEUE_MAINTENANCE_SECONDS": ["0", "-1", "nan", "inf"],
    "QUEUE_POLL_SECONDS": ["0", "nan"],
    "QUEUE_RETENTION_SECONDS": ["0", "inf", "7 days"],
    "QUEUE_DEAD_RETENTION_SECONDS": ["0", "inf"],
    "QUEUE_MAX_PAYLOAD_BYTES": ["0", "1k", "100000000000"],
    "QUEUE_MAX_BODY_BYTES": ["0", "16MiB"],
    "QUEUE_MAX_LEASE_WAITERS": ["0"],
    "QUEUE_MAX_JOB_WATCHERS": ["0"],
    "QUEUE_MAX_EVENT_STREAMS": ["0"],
    "QUEUE_DB_POOL_SIZE": ["0", "201"],
    "QUEUE_SHUTDOWN_SECONDS": ["0", "nan", "inf"],
    "QUEUE_LOG_LEVEL": ["verbose", "INFO!"],
    "QUEUE_LOG_FORMAT": ["xml"],
}


def test_these_tests_know_every_variable():
    assert set(GOOD) == set(BAD) == set(VARIABLES)


@pytest.mark.parametrize("variable", GOOD)
def test_a_variable_sets_its_field(monkeypatch: pytest.MonkeyPatch, variable: str):
    written, meant = GOOD[variable]
    monkeypatch.setenv(variable, written)
    assert getattr(load_settings(), VARIABLES[variable]) == meant


@pytest.mark.parametrize(
    ("variable", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_value_is_refused_with_one_sentence_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
):
    sentence = refusal(monkeypatch, **{variable: value})
    assert variable in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "pydantic" not in sentence


def test_settings_make_the_variables_that_make_them_again(monkeypatch: pytest.MonkeyPatch):
    for variable, (written, _) in GOOD.items():
        monkeypatch.setenv(variable, written)
    settings = load_settings()
    for variable, value in settings.variables.items():
        monkeypatch.setenv(variable, value)
    assert settings.variables.keys() == VARIABLES.keys()
    assert load_settings() == settings


def test_settings_can_not_be_changed_once_they_are_read():
    with pytest.raises(ValueError, match="frozen"):
        Settings(_env_file=None).port = 1  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("QUEUE_MAX_RETRYS", "QUEUE_MAX_RETRIES"),
        ("QUEUE_PROT", "QUEUE_PORT"),
        ("QUEUE_MAX_PAYLOAD_BYTE", "QUEUE_MAX_PAYLOAD_BYTES"),
        ("QUEUE_LOGLEVEL", "QUEUE_LOG_LEVEL"),
        ("QUEUE_SHUTDOWN_SECS", "QUEUE_SHUTDOWN_SECONDS"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str, meant: str
):
    sentence = refusal(monkeypatch, **{written: "1"})
    assert written in sentence
    assert meant in sentence
    monkeypatch.delenv(written)
    (tmp_path / ".env").write_text(f"{written}=1\n")
    assert refusal(monkeypatch) == sentence


@pytest.mark.parametrize("variable", ["QUEUE_URL", "QUEUE_NAME", "QUEUES", "DATABASE_URLS"])
def test_a_variable_of_another_program_is_left_alone(monkeypatch: pytest.MonkeyPatch, variable: str):
    monkeypatch.setenv(variable, "x")
    load_settings()


@pytest.mark.parametrize("host", [EVERYWHERE, "::", "192.0.2.1", "example.org", "localhost.example.org"])
def test_an_address_that_others_reach_is_refused_unless_auth_is_off_on_purpose(
    monkeypatch: pytest.MonkeyPatch, host: str
):
    sentence = refusal(monkeypatch, QUEUE_HOST=host)
    assert host in sentence
    assert "QUEUE_AUTH=off" in sentence
    monkeypatch.setenv("QUEUE_AUTH", "off")
    assert load_settings().host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_loopback_address_needs_no_more(monkeypatch: pytest.MonkeyPatch, host: str):
    monkeypatch.setenv("QUEUE_HOST", host)
    assert load_settings().host == host


NO_URLS = [
    f"mysql://user:{PASSWORD}@host/db",
    f"user:{PASSWORD}@host/db",
    f"user:{PASSWORD}@host://db",
    f"postgresql:/user:{PASSWORD}@host/db",
    f"postgresql://user:{PASSWORD}@[host/db",
    f"postgresql://user:{PASSWORD}℀@host/db",
    f"postgresql://user:{PASSWORD}@host:port/db",
    f"postgresql://user:/{PASSWORD}@host/db",
    f"postgresql://user:{PASSWORD}@host/db?sslmode=always",
    f"host=h password={PASSWORD} port=http",
    f"host=h password={PASSWORD} colour=red",
    f"host=h password='{PASSWORD}",
    f"host=h password=a {PASSWORD}",
    f"host=h password=a {PASSWORD}=b",
    f"host=h password={PASSWORD} sslmode=always",
]


@pytest.mark.parametrize("url", NO_URLS, ids=lambda url: url.replace(PASSWORD, "…"))
def test_a_database_url_that_makes_no_sense_is_refused_by_name_without_its_password(
    monkeypatch: pytest.MonkeyPatch, url: str
):
    sentence = refusal(monkeypatch, DATABASE_URL=url)
    assert "DATABASE_URL" in sentence
    assert PASSWORD not in sentence
    with pytest.raises(DatabaseUrlError):
        connect_arguments(url)


def test_what_a_pooler_does_not_pass_on_is_refused(monkeypatch: pytest.MonkeyPatch):
    url = f"postgresql://u:{PASSWORD}@h/d?options=-cjit%3Doff"
    monkeypatch.setenv("DATABASE_URL", url)
    assert load_settings().database_url == url
    assert refusal(monkeypatch, QUEUE_POOLER="transaction") == (
        "DATABASE_URL has the parameter options, which a pooler does not pass on."
    )


async def test_every_form_of_database_url_reaches_the_database(world: World):
    parts = urlsplit(world.database_url)
    query = parse_qs(parts.query)
    host = query["host"][0] if query else parts.hostname
    port = query["port"][0] if query else parts.port
    user, password = parts.username, unquote(parts.password or "")
    database = parts.path.removeprefix("/")
    at = f"host={host}&port={port}"
    words = f"host='{host}' port={port} user={user} password='{password}' dbname={database}"
    forms = [
        f"postgresql://{user}:{parts.password}@/{database}?{at}",
        f"postgres://{user}:{parts.password}@/{database}?{at}",
        f"postgresql+asyncpg://{user}:{parts.password}@/{database}?{at}",
        f"postgresql:///{database}?{at}&user={user}&password={parts.password}",
        f"postgresql://{user}:{parts.password}@/{database}?{at}&sslmode=disable",
        f"postgresql://{user}:{parts.password}@/{database}?{at}&sslmode=prefer&application_name=mine",
        f"postgresql://{user}:{parts.password}@/{database}?{at}&connect_timeout=10",
        words,
        f"  {words}   sslmode=disable ",
        f"{words} connect_timeout=10 application_name=mine",
    ]
    for form in forms:
        connection = await asyncpg.connect(**connect_arguments(form))
        world.stack.push_async_callback(connection.close)
        assert await connection.fetchval("SELECT current_database()") == database, form


def test_an_empty_database_url_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATABASE_URL", "")
    assert load_settings().database_url is None


def test_a_command_that_needs_the_database_url_says_so():
    with pytest.raises(SettingsError, match="DATABASE_URL"):
        Settings(_env_file=None).require_database_url()


def run(tmp_path: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"QUEUE_PORT": "http"},
        {"QUEUE_MAX_RETRYS": "1"},
        {"QUEUE_HOST": EVERYWHERE},
        {"DATABASE_URL": f"mysql://u:{PASSWORD}@h/d"},
        {"DATABASE_URL": f"postgresql://u:{PASSWORD}@127.0.0.1:1/d"},
    ],
)
async def test_a_start_that_can_not_be_ends_with_one_sentence_and_nothing_else(tmp_path: Path, variables):
    ended = await asyncio.to_thread(run, tmp_path, "serve", **variables)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert len(ended.stderr.strip().splitlines()) == 1
    assert ended.stderr.strip().endswith((".", "?"))
    assert PASSWORD not in ended.stderr


@pytest.mark.slow
async def test_a_password_that_the_database_refuses_is_told_in_a_sentence_without_it(
    world: World, tmp_path: Path
):
    parts = urlsplit(world.database_url)
    wrong = world.database_url.replace(parts.password or "", PASSWORD)
    ended = await asyncio.to_thread(run, tmp_path, "migrate", DATABASE_URL=wrong)
    assert ended.returncode == 1
    assert PASSWORD not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_prefix_is_the_contracts():
    assert PREFIX == "QUEUE_"
