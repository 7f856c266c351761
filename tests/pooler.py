"""A PgBouncer in transaction mode before the tests' PostgreSQL.

It is set up as it comes, but for where it listens, how few sessions it has, and how soon it tries again to get one.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

NOBODY = 65534

CONNECTIONS = 3
"""Fewer than the service has clients: they do share sessions, and get another one from transaction to transaction."""


@contextmanager
def pooler(cluster_url: str) -> Iterator[str]:
    """Run PgBouncer for the length of the block; yield the URL of the cluster through it."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        message = "pgbouncer is missing: `make system-tools` installs it"
        raise RuntimeError(message)
    parts = urlsplit(cluster_url)
    place = parse_qs(parts.query)
    host, port = place.get("host", [parts.hostname])[0], place.get("port", [parts.port or 5432])[0]
    user, group = _account(Path(str(host)) / f".s.PGSQL.{port}")
    with tempfile.TemporaryDirectory(prefix="leaseq-pooler-") as directory:
        own_port = _free_port()
        configuration = Path(directory) / "pgbouncer.ini"
        configuration.write_text(f"""
[databases]
* = host={host} port={port} user={parts.username} password='{unquote(parts.password or "")}'
[pgbouncer]
pool_mode = transaction
default_pool_size = {CONNECTIONS}
auth_type = any
listen_addr = 127.0.0.1
listen_port = {own_port}
unix_socket_dir =
server_login_retry = 1
""")
        for path in (Path(directory), configuration):
            os.chown(path, user, group)
        as_user = {"user": user, "group": group, "extra_groups": []} if os.getuid() == 0 else {}
        with (Path(directory) / "log").open("w") as log:
            process = subprocess.Popen([program, configuration], stdout=log, stderr=log, **as_user)  # type: ignore[call-overload]
        try:
            _wait_until_it_listens(process, own_port, Path(log.name))
            yield f"postgresql://anybody@127.0.0.1:{own_port}{parts.path}"
        finally:
            process.terminate()
            process.wait()


def _account(own_socket: Path) -> tuple[int, int]:
    """Return whom PgBouncer runs as: it refuses root, and PostgreSQL's socket may be for its owner alone."""
    if os.getuid() != 0:
        return os.getuid(), os.getgid()
    if own_socket.exists():
        owner = own_socket.stat()
        return owner.st_uid, owner.st_gid
    return NOBODY, NOBODY


def _free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port: int = any_port.getsockname()[1]
        return port


def _wait_until_it_listens(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    until = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < until:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    message = f"pgbouncer does not listen: {log.read_text()}"
    raise RuntimeError(message)
