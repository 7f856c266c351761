"""Runs the migrations: in the schema that the settings name, in one transaction, one process at a time."""

import asyncio

from sqlalchemy import Connection, text

from alembic import context
from app.main import database_of
from app.settings import load_settings
from app.store.schema import metadata

LOCK_TIMEOUT = "5s"
"""How long one statement may wait for a table that the service is using, before the migration gives up whole."""


def migrate(connection: Connection, schema: str) -> None:
    """Apply what `context` was asked for. Raises when a lock can not be had in time; nothing is changed then."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table_schema=schema,
        transactional_ddl=True,
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        # Replicas that start together wait here for each other; the second finds nothing left to do.
        connection.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended('leaseq migrate ' || :schema, 0))"),
            {"schema": schema},
        )
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
        quoted = connection.dialect.identifier_preparer.quote(schema)
        # Its owner need not be allowed to create others.
        if connection.execute(text("SELECT to_regnamespace(:quoted) IS NULL"), {"quoted": quoted}).scalar():
            connection.execute(text(f"CREATE SCHEMA {quoted}"))
        # The migrations name no schema: they work in whichever is first here.
        connection.execute(text(f"SET LOCAL search_path TO {quoted}"))
        context.run_migrations()


async def from_command_line() -> None:
    """Serve the plain `alembic` command: connect to the database that the environment names."""
    settings = load_settings()
    database = database_of(settings)
    try:
        async with database.patient() as connection:
            await connection.run_sync(migrate, settings.schema_name)
            await connection.commit()
    finally:
        await database.close()


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given, context.config.attributes["schema"])
else:
    asyncio.run(from_command_line())
