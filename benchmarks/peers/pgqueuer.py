"""pgqueuer over a pool of asyncpg."""

import asyncio

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.models import Job

from benchmarks.peers.protocol import PAYLOAD, WANTED, Window, answer, repeat, watch

POOL_SIZE = 10
CHUNK = 1000


async def main() -> dict[str, float]:
    """Do the verb that is wanted."""
    pool = await asyncpg.create_pool(WANTED["url"], max_size=POOL_SIZE)
    queue = PgQueuer.from_asyncpg_pool(pool)
    queries = queue.qm.queries
    if not await queries.schema_is_installed():
        await queries.install()
    if WANTED["verb"] == "send":
        return await repeat(lambda: queries.enqueue("bench", PAYLOAD))
    for _ in range(0, WANTED["count"], CHUNK):
        await queries.enqueue(["bench"] * CHUNK, [PAYLOAD] * CHUNK, [0] * CHUNK)
    window = Window()

    async def done(_job: Job) -> None:
        window.add(1)

    queue.entrypoint("bench")(done)

    working = asyncio.create_task(queue.run(batch_size=WANTED["batch"]))
    result = await watch(window)
    working.cancel()
    return result


answer(main)
