"""How the service talks to PostgreSQL: two pools, the statements, and what a fault becomes.

- `hot`: asyncpg, for the verbs. Its session settings allow the planner one plan a statement: with stale statistics
  PostgreSQL would otherwise swap an index look-up for a scan of everything.
- `looking` and `reading`: SQLAlchemy, for look-ups by id and readiness, and for lists and counts: a slow page never
  takes a connection from a verb, from a look-up, or from the probes.
- `connect`: a connection of its own, for LISTEN and NOTIFY.
- `patient`: one for migrations and for dropping days.

Through a transaction pooler (`pooled`) the first two keep to what such a pooler carries: see `_through_pooler`. The
last two have a session to themselves, which needs `direct_url`: without it there is no `connect`.
"""

import asyncio
import re
import shlex
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import asyncpg
from sqlalchemy import RowMapping
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from app.queue.errors import UnavailableError
from app.store.schema import BODY_COLUMNS, NOTE_COLUMNS

STATEMENT_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 5
LOCK_TIMEOUT_SECONDS = 5
STRANGERS_LOCK_SECONDS = 2.0
"""How long a transaction waits for a row that strangers may hold for as long as they like: one with a unique key, or that
an operator moves."""
STRANGERS_WAIT_SECONDS = 5.0
ACQUIRE_TIMEOUT_SECONDS = 5
CONNECT_TIMEOUT_SECONDS = 10
# Above the server's own limits: it only ends calls whose server has silently gone.
COMMAND_TIMEOUT_SECONDS = 15
DEADLOCK_TRIES = 3
READING_CONNECTIONS = 4

READ_SETTINGS = {"jit": "off", "statement_timeout": f"{READ_TIMEOUT_SECONDS}s"}
HOT_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "synchronous_commit": "on",
    "statement_timeout": f"{STATEMENT_TIMEOUT_SECONDS}s",
    "lock_timeout": f"{LOCK_TIMEOUT_SECONDS}s",
    "idle_in_transaction_session_timeout": f"{COMMAND_TIMEOUT_SECONDS}s",
}

# libpq's parameters that asyncpg knows, and those whose work our own settings do.
_PARAMETERS = frozenset(
    [
        "host",
        "port",
        "user",
        "password",
        "passfile",
        "dbname",
        "sslmode",
        "sslcert",
        "sslkey",
        "sslrootcert",
        "sslcrl",
        "sslpassword",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
        "target_session_attrs",
        "krbsrvname",
        "gsslib",
        "options",
    ]
)
_OURS = frozenset(
    [
        "application_name",
        "fallback_application_name",
        "connect_timeout",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "tcp_user_timeout",
    ]
)
_SSL_MODES = frozenset({"disable", "allow", "prefer", "require", "verify-ca", "verify-full"})
_HOST = re.compile(r"(?:\[[^\]]*\]|[^:\[\]]*)(?::\d{0,5})?")

SQL_DIRECTORY = Path(__file__).with_name("sql")

# SQLSTATE classes and codes that say «not now», not «not so»: connection, resources, operator intervention,
# lock_not_available, deadlock, serialization failure, read-only after a failover; and what a server says to whom it
# lets in no more: authorization, no such database, a database that takes no connections.
_AWAY = ("08", "53", "57", "55P03", "40P01", "40001", "25006", "28", "3D", "55000")


# The arrays that statements take and return. asyncpg asks the server once a connection what each of them is.
_ARRAYS = """
SELECT '{}'::text[], '{}'::bool[], '{}'::int2[], '{}'::int4[], '{}'::int8[], '{}'::float4[], '{}'::float8[],
       '{}'::bytea[], '{}'::uuid[], '{}'::jsonb[], '{}'::timestamptz[], '{}'::name[]
"""

T = TypeVar("T")

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection


class DatabaseUrlError(ValueError):
    """A database's URL can not be understood; the text says why, without the URL's password."""


def connect_arguments(url: str, variable: str = "DATABASE_URL", *, pooled: bool = False) -> dict[str, Any]:
    """Translate libpq's two forms, a URI or `key=value` words, into arguments for asyncpg.connect.

    Raises DatabaseUrlError. Its text names the variable and repeats nothing of the URL: a slip may have put the
    password anywhere.
    """
    try:
        return _connect_arguments(url, pooled=pooled)
    except DatabaseUrlError as error:
        message = f"{variable} {error}"
        raise DatabaseUrlError(message) from None


def _connect_arguments(url: str, *, pooled: bool) -> dict[str, Any]:
    scheme, is_uri, rest = url.strip().partition("://")
    if is_uri:
        if scheme.partition("+")[0] not in {"postgres", "postgresql"}:
            message = "must begin with postgresql://"
            raise DatabaseUrlError(message)
        place, _, query = rest.partition("?")
        _check_place(place)
        parameters = dict(parse_qsl(query, keep_blank_values=True))
    else:
        place = ""
        try:
            parameters = dict(word.split("=", 1) for word in shlex.split(url))
        except ValueError:
            message = "is neither a postgresql:// URL nor words of the form key=value"
            raise DatabaseUrlError(message) from None
    _check_parameters(parameters)
    if pooled and "options" in parameters:
        message = "has the parameter options, which a pooler does not pass on"
        raise DatabaseUrlError(message)
    known = {name: value for name, value in parameters.items() if name not in _OURS}
    return {"dsn": f"postgresql://{place}?{urlencode(known, quote_via=quote)}"}


def _check_place(place: str) -> None:
    try:
        parts = urlsplit(f"postgresql://{place}")
    except ValueError:
        parts = None
    hosts = [] if parts is None else parts.netloc.rpartition("@")[2].split(",")
    if parts is None or "@" in parts.path or parts.fragment or not all(map(_HOST.fullmatch, hosts)):
        message = "is not a URL: write characters such as / @ : # in a password as %2F %40 %3A %23"
        raise DatabaseUrlError(message)


def _check_parameters(parameters: dict[str, str]) -> None:
    if not parameters.keys() <= _PARAMETERS | _OURS:
        message = f"has an unknown parameter; known are {', '.join(sorted(_PARAMETERS | _OURS))}"
        raise DatabaseUrlError(message)
    if parameters.get("sslmode", "prefer") not in _SSL_MODES:
        message = f"has an unknown sslmode; known are {', '.join(sorted(_SSL_MODES))}"
        raise DatabaseUrlError(message)
    if not re.fullmatch(r"[\d,]*", parameters.get("port", "")):
        message = "has a port that is no number"
        raise DatabaseUrlError(message)


@cache
def statement(name: str, schema: str, **parts: str) -> str:
    """Return the text of `sql/<name>.sql` with the schema, the columns of body and note, and the given parts filled in."""
    text = (SQL_DIRECTORY / f"{name}.sql").read_text()
    quoted = '"' + schema.replace('"', '""') + '"'
    filled = {
        "schema": quoted,
        "body": ", ".join(BODY_COLUMNS),
        "body.": ", ".join(f"body.{column}" for column in BODY_COLUMNS),
        "note": ", ".join(NOTE_COLUMNS),
        "note.": ", ".join(f"note.{column}" for column in NOTE_COLUMNS),
        "or_pass": "",
        **parts,
    }
    for placeholder, value in filled.items():
        text = text.replace("{" + placeholder + "}", value)
    return text


def is_away(error: BaseException) -> bool:
    """Whether a database error is a matter of time: the same request may succeed later."""
    if isinstance(error, PoolTimeoutError):
        return True
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or (error.orig is not None and is_away(error.orig))
    if isinstance(error, SQLAlchemyError):
        return False
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str):
        return state.startswith(_AWAY)
    # asyncpg says InterfaceError of a closed connection, and of a wrong argument (then a ValueError too).
    return isinstance(
        error, asyncpg.InterfaceError | asyncpg.InternalClientError | OSError | TimeoutError
    ) and not (isinstance(error, ValueError))


def is_blocked(error: UnavailableError) -> bool:
    """Whether a lock was waited for longer than it may be."""
    return getattr(error.__cause__, "sqlstate", None) == "55P03"


def _died_under_way(error: BaseException) -> bool:
    """Whether the error leaves open what happened: an answer of the server but for a farewell says «nothing»."""
    state = getattr(error, "sqlstate", None)
    return state is None or state.startswith(("08", "57P"))


@contextmanager
def unavailable_when_away(*, asked: bool = True) -> Iterator[None]:
    """Turn an error that only time can mend into UnavailableError; others pass.

    Where nothing has been `asked` of the database yet, it is known that nothing has happened.
    """
    try:
        yield
    except UnavailableError:
        raise
    except Exception as error:
        if is_away(error) or (error.__cause__ is not None and is_away(error.__cause__)):
            raise UnavailableError(_why(error), outcome_unknown=asked and _died_under_way(error)) from error
        raise


def _why(error: BaseException | None) -> str:
    while error is not None:
        state = getattr(error, "sqlstate", None) or ""
        if state == "55P03":
            return "Another request holds what this one needs at this moment; come back a little later."
        if state.startswith("28"):
            return "The database refuses the role or the password that DATABASE_URL names."
        if state.startswith("3D"):
            return "The database that DATABASE_URL names does not exist."
        if isinstance(error, ConnectionError | socket.gaierror):
            return "The database can not be reached at the address that DATABASE_URL names."
        error = getattr(error, "orig", None) or error.__cause__
    return "The database is away or overloaded. Whether anything has changed is not known; try again."


async def _nothing_to_reset(_connection: object) -> None:
    """Spare the pool's own reset, a round trip at each release: the verbs change nothing of their session."""


def _through_pooler(settings: Mapping[str, str]) -> type[Connection]:
    """Return the kind of connection that a transaction pooler carries, with these settings in each transaction.

    Between two transactions the pooler may change the server's session behind it, and lends that session to others. So
    what is else a setting of the session comes with each BEGIN, in the same round trip, and goes with its COMMIT; and a
    statement by itself gets a transaction of its own, for the sake of these settings. No statement has a name, which
    another session would not know: asyncpg sends those without one anew each time, parsed and run in one go.
    """
    local = "".join(f" SET LOCAL {name} = '{value}';" for name, value in settings.items())

    class ThroughPooler(Connection):
        async def execute(self, query: str, *args: object, **options: Any) -> Any:
            # asyncpg's own transactions begin here, and so do SQLAlchemy's.
            begins = query.startswith("BEGIN") and not args
            return await super().execute(query + local if begins else query, *args, **options)

        async def fetch(self, query: str, *args: object, **options: Any) -> Any:
            if self.is_in_transaction():
                return await super().fetch(query, *args, **options)
            async with self.transaction():
                return await super().fetch(query, *args, **options)

    return ThroughPooler


async def _learn_arrays(connection: Any) -> None:
    """Ask what asyncpg would else ask amid the work. It changes a setting of the session for it: this takes it back."""
    asking = connection.transaction()
    await asking.start()
    try:
        await connection.fetch(_ARRAYS)
    finally:
        await asking.rollback()


class Database:
    """The connections of one process to one database and schema.

    `pooled`: the URL leads through a transaction pooler. `direct_url` leads past it, to the same database.
    """

    def __init__(
        self,
        url: str,
        *,
        schema: str,
        pool_size: int = 8,
        direct_url: str | None = None,
        pooled: bool = False,
    ) -> None:
        self.schema = schema
        self._arguments = connect_arguments(url, pooled=pooled)
        self._direct = self._arguments
        if direct_url is not None:
            self._direct = connect_arguments(direct_url, "DATABASE_LISTEN_URL")
        self._pooled = pooled
        self.can_listen = not pooled or direct_url is not None
        """Whether there can be a connection with a session of its own, as LISTEN needs it."""
        self._pool_size = pool_size
        self._hot: asyncpg.Pool[asyncpg.Record] | None = None
        self._aside = asyncio.Semaphore(max(pool_size // 2, 1))
        self.reading = self._reading()
        self.looking = self._reading()

    @property
    def hot(self) -> "asyncpg.Pool[asyncpg.Record]":
        """The pool of the verbs; there is one between `start` and `close`."""
        if self._hot is None:
            message = "the database has not been started"
            raise RuntimeError(message)
        return self._hot

    async def start(self) -> None:
        """Open the hot pool. Raises UnavailableError when the database can not be reached."""
        with unavailable_when_away():
            self._hot = await asyncpg.create_pool(
                **self._shared(HOT_SETTINGS),
                min_size=1,
                max_size=self._pool_size,
                init=_learn_arrays if self._pooled else None,
                reset=_nothing_to_reset,
            )

    async def close(self) -> None:
        """Close both pools; what still runs gets a moment to end."""
        if self._hot is not None:
            try:
                await asyncio.wait_for(self._hot.close(), ACQUIRE_TIMEOUT_SECONDS)
            except TimeoutError:
                self._hot.terminate()
            self._hot = None
        await self.reading.dispose()
        await self.looking.dispose()

    async def connect(
        self, *, command_timeout: float | None = COMMAND_TIMEOUT_SECONDS, **settings: str
    ) -> Connection:
        """Open a connection outside the pools, past any pooler; the caller closes it. Raises what asyncpg.connect raises."""
        return await asyncpg.connect(
            **self._direct,
            timeout=CONNECT_TIMEOUT_SECONDS,
            command_timeout=command_timeout,
            server_settings={"application_name": "leaseq", **settings},
        )

    @asynccontextmanager
    async def patient(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection without time limits, for migrations and for dropping days: past the pooler if that can be."""

        async def connect() -> Connection:
            if self.can_listen:
                return await self.connect(command_timeout=None)
            return await self._connect({}, command_timeout=None)

        engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
        try:
            async with engine.connect() as connection:
                yield connection
        finally:
            await engine.dispose()

    def _reading(self) -> AsyncEngine:
        # A pooler lets a statement wait for a session, and the server's own limit does not count that.
        limit = READ_TIMEOUT_SECONDS if self._pooled else COMMAND_TIMEOUT_SECONDS

        async def connect() -> Connection:
            return await self._connect(READ_SETTINGS, command_timeout=limit)

        return create_async_engine(
            "postgresql+asyncpg://",
            async_creator=connect,
            pool_size=READING_CONNECTIONS,
            max_overflow=0,
            pool_timeout=ACQUIRE_TIMEOUT_SECONDS,
            pool_pre_ping=True,
            execution_options={"schema_translate_map": {None: self.schema}},
        )

    async def _connect(self, settings: Mapping[str, str], *, command_timeout: float | None) -> Connection:
        connection: Connection = await asyncpg.connect(**self._shared(settings, command_timeout))
        if self._pooled:
            try:
                await _learn_arrays(connection)
            except BaseException:  # the pooler is there, but the database may not be
                connection.terminate()
                raise
        return connection

    def _shared(
        self, settings: Mapping[str, str], command_timeout: float | None = COMMAND_TIMEOUT_SECONDS
    ) -> dict[str, Any]:
        """Return the arguments for a connection that a pooler may stand in front of, with these settings."""
        arguments = {
            **self._arguments,
            "timeout": CONNECT_TIMEOUT_SECONDS,
            "command_timeout": command_timeout,
            "server_settings": {"application_name": "leaseq"},
        }
        if self._pooled:
            return {**arguments, "connection_class": _through_pooler(settings), "statement_cache_size": 0}
        return {**arguments, "server_settings": {"application_name": "leaseq", **settings}}

    async def fetch(self, name: str, *values: object, **parts: str) -> Sequence[asyncpg.Record]:
        """Run the statement `sql/<name>.sql` by itself: it is committed when this returns.

        Raises UnavailableError.
        """
        text = statement(name, self.schema, **parts)

        async def run(connection: Any) -> Sequence[asyncpg.Record]:
            rows: Sequence[asyncpg.Record] = await connection.fetch(text, *values)
            return rows

        return await self._with_connection(run)

    async def transact(
        self, work: "Callable[[Transaction], Awaitable[T]]", *, lock_seconds: float | None = None
    ) -> T:
        """Run `work` in one transaction, committed when this returns. `work` may be run again: no effects of its own.

        With `lock_seconds` it waits for each lock at most so long, and goes `aside`: for what strangers may hold.
        Raises UnavailableError, and what `work` raises.
        """

        async def run(connection: Any) -> T:
            async with connection.transaction():
                if lock_seconds is not None:
                    await connection.execute(f"SET LOCAL lock_timeout = '{lock_seconds}s'")
                return await work(Transaction(connection, self.schema))

        if lock_seconds is None:
            return await self._with_connection(run)
        async with self.aside():
            return await self._with_connection(run)

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """Keep half of the hot pool at most busy with what may wait for strangers: the group commits have the others.

        Must not be entered twice by one caller. Raises UnavailableError when there is no room for too long.
        """
        try:
            async with asyncio.timeout(STRANGERS_WAIT_SECONDS):
                await self._aside.acquire()
        except TimeoutError:
            message = "Too many requests wait for what others hold at this moment; come back a little later."
            raise UnavailableError(message) from None
        try:
            yield
        finally:
            self._aside.release()

    async def _with_connection(self, run: "Callable[[Any], Awaitable[T]]") -> T:
        # A deadlock or a serialization failure has rolled everything back: the same work may begin again.
        with unavailable_when_away():
            for _ in range(DEADLOCK_TRIES - 1):
                with suppress(asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
                    async with self._acquired() as connection:
                        return await run(connection)
            async with self._acquired() as connection:
                return await run(connection)

    @asynccontextmanager
    async def _acquired(self) -> AsyncIterator[Any]:
        with unavailable_when_away(asked=False):
            connection = await self.hot.acquire(timeout=ACQUIRE_TIMEOUT_SECONDS)
        try:
            yield connection
        finally:
            await self.hot.release(connection)


async def rows_of(
    engine: AsyncEngine, statement: Any, parameters: Mapping[str, Any] | None = None
) -> Sequence[RowMapping]:
    """Run a statement of SQLAlchemy's by itself; return its rows. Raises UnavailableError."""
    with unavailable_when_away():
        async with engine.connect() as connection:
            return (await connection.execute(statement, parameters)).mappings().all()


class Transaction:
    """Statements within one transaction."""

    def __init__(self, connection: Any, schema: str) -> None:
        self._connection = connection
        self._schema = schema

    async def fetch(self, name: str, *values: object, **parts: str) -> Sequence[asyncpg.Record]:
        """Run the statement `sql/<name>.sql`."""
        text = statement(name, self._schema, **parts)
        rows: Sequence[asyncpg.Record] = await self._connection.fetch(text, *values)
        return rows

    async def query(self, text: str, *values: object) -> Sequence[asyncpg.Record]:
        """Run a statement that no file can hold, because it names a day."""
        rows: Sequence[asyncpg.Record] = await self._connection.fetch(text, *values)
        return rows
