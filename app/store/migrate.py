"""Applying the migrations that the code needs, and telling whether they have been."""

from collections.abc import Callable
from pathlib import Path

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from alembic import command
from app.store.database import Database, unavailable_when_away

ROOT = Path(__file__).resolve().parents[2]


class MigrationError(Exception):
    """A migration that can not be done; its text is a sentence. Nothing was changed."""


async def upgrade(database: Database, revision: str = "head") -> None:
    """Bring the schema up to `revision`. Safe when several processes do so at once. Raises UnavailableError, MigrationError."""
    await _run(database, command.upgrade, revision)


async def downgrade(database: Database, revision: str) -> None:
    """Bring the schema down to `revision`. Raises UnavailableError, and MigrationError where jobs would be lost."""
    await _run(database, command.downgrade, revision)


async def is_migrated(database: Database) -> bool:
    """Whether the schema is at the newest revision that this code knows, or at one that it does not know yet."""

    def look(connection: Connection) -> bool:
        options = {"version_table_schema": database.schema}
        present = MigrationContext.configure(connection, opts=options).get_current_revision()
        script = ScriptDirectory.from_config(_config())
        known = {revision.revision for revision in script.walk_revisions()}
        return present is not None and (present == script.get_current_head() or present not in known)

    with unavailable_when_away():
        async with database.reading.connect() as connection:
            return await connection.run_sync(look)


async def _run(database: Database, direction: Callable[[Config, str], None], revision: str) -> None:
    def run(connection: Connection) -> None:
        direction(_config(connection=connection, schema=database.schema), revision)

    try:
        with unavailable_when_away():
            async with database.patient() as connection:
                await connection.run_sync(run)
                await connection.commit()
    except CommandError as error:
        raise MigrationError(str(error)) from error


def _config(**attributes: object) -> Config:
    config = Config(ROOT / "alembic.ini")
    config.attributes.update(attributes)
    return config
