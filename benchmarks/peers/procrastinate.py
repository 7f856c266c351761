"""procrastinate over a pool of psycopg."""

import asyncio
import logging

from procrastinate import App, PsycopgConnector

from benchmarks.peers.protocol import WANTED, Window, answer, repeat, watch

POOL_SIZE = 10
CHUNK = 1000


async def main() -> dict[str, float]:
    """Do the verb that is wanted."""
    logging.disable()
    window = Window()
    app = App(connector=PsycopgConnector(conninfo=WANTED["url"], max_size=POOL_SIZE))

    async def done(**_payload: object) -> None:
        window.add(1)

    bench = app.task(done, name="bench")

    async with app.open_async():
        found = await app.connector.execute_query_one_async(
            "SELECT to_regclass('procrastinate_jobs') IS NOT NULL AS there"
        )
        if not found["there"]:
            await app.schema_manager.apply_schema_async()
        if WANTED["verb"] == "send":
            return await repeat(lambda: bench.defer_async(to="a@example.com", n=1))
        for _ in range(0, WANTED["count"], CHUNK):
            await bench.batch_defer_async(*({"to": "a@example.com", "n": 1} for _ in range(CHUNK)))
        working = asyncio.create_task(app.run_worker_async(concurrency=WANTED["concurrency"]))
        result = await watch(window)
        working.cancel()
        return result


answer(main)
