"""The command line: `python -m app serve | migrate | maintain | openapi`."""

import asyncio
import atexit
import gc
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import uvloop
import yaml

from app.main import Machine, NotMigratedError, build, connected, database_of, serve, stop_signals
from app.processes import Parent, StartError, serve_together
from app.queue.errors import UnavailableError
from app.settings import Settings, SettingsError, load_settings
from app.store.embedded import EmbeddedDatabaseError, embedded_database
from app.store.migrate import MigrationError, downgrade, upgrade
from app.telemetry import configure_logging

T = TypeVar("T")

OPENAPI_FILE = Path(__file__).resolve().parents[1] / "openapi.yaml"

# The collection at the interpreter's very end now and then crashes in msgspec's types (0.22): spare it the work.
atexit.register(gc.freeze)

cli = typer.Typer(
    name="leaseq",
    help="A job queue that any language uses over HTTP.",
    no_args_is_help=True,
    add_completion=False,
    # Rich tracebacks show local variables, passwords among them.
    pretty_exceptions_enable=False,
)


@cli.command("serve")
def serve_command() -> None:
    """Serve the HTTP API and do the maintenance, until SIGINT or SIGTERM."""
    with _settings() as settings:
        if settings.processes == 1:
            _run(serve(settings, lambda server: _welcome(settings.host, server.port)))
        else:
            raise typer.Exit(_run(serve_together(settings, lambda port: _welcome(settings.host, port))))


@cli.command("replica", hidden=True)
def replica_command(number: int, parent: int, listeners: list[int]) -> None:
    """Serve as one of the processes of `serve`, which starts it and gives it these descriptors."""
    above = Parent(parent)
    with _settings(above.tell, number) as settings:
        _run(above.serve(settings, number, listeners))


@cli.command("migrate")
def migrate_command(
    to: Annotated[str, typer.Option(help="the revision to go to")] = "head",
    *,
    down: Annotated[bool, typer.Option("--down", help="go down to it; refuses to lose a job")] = False,
) -> None:
    """Bring the database's schema to what this version needs."""
    with _settings() as settings:
        _run(_migrate(settings, to, down=down))
    typer.echo(f"The schema {settings.schema_name} is at {to}.")


@cli.command("maintain")
def maintain_command(
    *, once: Annotated[bool, typer.Option("--once", help="one round, then end")] = False
) -> None:
    """Do the maintenance without serving: expired leases, due jobs, counts, retention."""
    with _settings() as settings:
        changed = _run(_maintain(build(settings), once=once))
    for task, count in changed.items():
        typer.echo(f"{task:8} {count}")


@cli.command("openapi")
def openapi_command(
    *, check: Annotated[bool, typer.Option("--check", help="fail when the file is not up to date")] = False
) -> None:
    """Write openapi.yaml from the routes."""
    settings = Settings(_env_file=None, database_url="postgresql://", host="127.0.0.1")
    text = yaml.safe_dump(build(settings).api.app.openapi(), sort_keys=False, allow_unicode=True, width=110)
    if not check:
        OPENAPI_FILE.write_text(text)
    elif not OPENAPI_FILE.exists() or OPENAPI_FILE.read_text() != text:
        _say("openapi.yaml is not what the routes say: run `make openapi`.")
        raise typer.Exit(1)


async def _migrate(settings: Settings, revision: str, *, down: bool) -> None:
    database = database_of(settings)
    try:
        await (downgrade if down else upgrade)(database, revision)
    finally:
        await database.close()


async def _maintain(machine: Machine, *, once: bool) -> dict[str, int]:
    async with connected(machine):
        if once:
            return await machine.service.maintenance.run_once()
        stopped = asyncio.Event()
        with stop_signals(lambda _number: stopped.set()):
            await machine.service.start()
            try:
                await stopped.wait()
            finally:
                await machine.service.stop()
        return {}


def _say(sentence: str) -> None:
    typer.echo(sentence, err=True)


@contextmanager
def _settings(say: Callable[[str], None] = _say, process: int | None = None) -> Iterator[Settings]:
    """Yield the settings with a database that answers; end with a sentence when there is none."""
    # Until the server takes signals by itself: leave through the blocks that stop what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format, process)
        if settings.database_url is not None:
            yield settings
        else:
            with embedded_database(settings.data_dir) as url:
                yield settings.model_copy(update={"database_url": url})
    except (
        SettingsError,
        EmbeddedDatabaseError,
        UnavailableError,
        NotMigratedError,
        MigrationError,
        StartError,
    ) as error:
        say(str(error))
        raise typer.Exit(error.code if isinstance(error, StartError) else 1) from None


def _run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _welcome(host: str, port: int) -> None:
    at = f"http://{'127.0.0.1' if host in {'0.0.0.0', '::'} else host}:{port}"  # noqa: S104  # it compares
    typer.echo(
        f"""
leaseq is ready at {at}   (docs: {at}/docs, metrics: {at}/metrics)
There are no API keys yet: whoever reaches this address may do everything.

Put a job in, take it, look at it:

  curl -s {at}/jobs -H 'Content-Type: application/json' -d '{{"queue": "emails", "payload": {{"to": "a@example.com"}}}}'
  curl -s {at}/lease -H 'Content-Type: application/json' -d '{{"queues": ["emails"], "worker": "me"}}'
  curl -s '{at}/jobs?queue=emails'

A job that nobody acks within its lease (30 seconds) is given out again. Ctrl-C stops the service.
"""
    )
