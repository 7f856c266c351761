from tests.conftest import Replica


async def test_one_job_from_enqueue_to_ack(queue: Replica):
    job = await queue.enqueue(payload={"n": 1})
    leased = await queue.lease_one(worker="w")
    assert leased["id"] == job["id"]
    answer = await queue.verb("ack", leased, result={"ok": True})
    assert answer.status_code == 200
    assert (await queue.job(job["id"]))["state"] == "completed"
    await queue.maintain()


async def test_fail_retry_dead(queue: Replica):
    job = await queue.enqueue(max_retries=1, backoff={"jitter": "none"})
    print(await queue.fail(await queue.lease_one()))
    queue.clock.move(1.5)
    await queue.maintain()
    leased = await queue.lease_one()
    assert leased["attempt"] == 2
    print(leased)
    assert await queue.fail(leased, retry=True) == {"state": "failed"}
    print(await queue.attempts(job["id"]), await queue.job(job["id"]))
    await queue.maintain()
    print((await queue.http.get("/health")).json(), (await queue.http.get("/metrics")).text[-2500:])
    await queue.http.post(f"/jobs/{job['id']}/retry")
    leased = await queue.lease_one()
    assert leased["attempt"] == 3
    await queue.verb("release", leased)
    await queue.http.post(f"/jobs/{job['id']}/cancel")
    assert (await queue.http.delete(f"/jobs/{job['id']}")).status_code == 204
    await queue.maintain()
