"""The document and the service say the same: routes, schemas, examples, statuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from jsonschema import Draft202012Validator, FormatChecker
from starlette.routing import Route

from app.api.openapi import ANY_BODY
from app.api.problems import CODES, MEDIA_TYPE
from app.cli import OPENAPI_FILE
from app.main import build
from app.settings import Settings
from tests.api.refusals import JSON, LEASE_ID
from tests.conftest import Replica, World

DOCUMENTATION = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
METHODS = {"get", "put", "post", "delete", "patch", "head", "options", "trace"}


@pytest.fixture(scope="module")
def app() -> Any:
    return build(Settings(_env_file=None, database_url="postgresql://")).api.app


@pytest.fixture(scope="module")
def document(app: Any) -> dict[str, Any]:
    """The document as clients get it: nothing in it but JSON."""
    document: dict[str, Any] = json.loads(json.dumps(app.openapi()))
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert method in METHODS
            yield path, method, operation


def every(value: object, key: str) -> Iterator[Any]:
    """Yield what stands under `key`, wherever that is."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for inner in value.values():
            yield from every(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from every(inner, key)


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator(
        {**schema, "components": document["components"]}, format_checker=FormatChecker()
    )


def test_the_file_is_what_the_routes_say(document: dict[str, Any]):
    assert yaml.safe_load(OPENAPI_FILE.read_text()) == document, "run `make openapi`"


def routes_of(routes: list[Any]) -> Iterator[Route]:
    """Yield every route, those of included routers too."""
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from routes_of(included.routes)
        else:
            yield route


def test_every_route_is_in_the_document_and_nothing_else(app: Any, document: dict[str, Any]):
    served = {
        (getattr(route, "path_format", route.path), method.lower())
        for route in routes_of(app.routes)
        if route.path not in DOCUMENTATION
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert {(path, method) for path, method, _ in operations(document)} == served


def test_the_document_is_openapi_3_1_with_a_name_a_version_and_a_license(document: dict[str, Any]):
    assert document["openapi"].startswith("3.1.")
    assert {"title", "version", "description", "license"} <= set(document["info"])
    assert set(document) <= {"openapi", "info", "paths", "components", "tags", "servers", "security"}


def test_every_reference_leads_somewhere_and_every_schema_is_used(document: dict[str, Any]):
    used = set(every(document, "$ref"))
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert used == known


def test_every_schema_is_a_json_schema(document: dict[str, Any]):
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    for schema in every(document["paths"], "schema"):
        Draft202012Validator.check_schema(schema)


def test_nothing_of_the_framework_is_left_in_the_document(document: dict[str, Any]):
    text = json.dumps(document)
    for word in ("ValidationError", "HTTPException", "x-reply", "x-problems", "x-description", "x-also"):
        assert word not in text


def test_every_operation_is_named_once_and_described(document: dict[str, Any]):
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    tags = {tag["name"] for tag in document["tags"]}
    for path, method, operation in operations(document):
        assert operation["summary"], (path, method)
        assert set(operation["tags"]) <= tags
        for response in operation["responses"].values():
            assert response["description"]


def test_every_path_parameter_is_declared_as_required(document: dict[str, Any]):
    for path, _, operation in operations(document):
        declared = {each["name"]: each for each in operation.get("parameters", []) if each["in"] == "path"}
        assert set(declared) == {part[1:-1] for part in path.split("/") if part.startswith("{")}
        assert all(each["required"] for each in declared.values())


def test_every_body_is_described_with_an_example_that_it_allows(document: dict[str, Any]):
    bodies = [
        operation["requestBody"] for _, _, operation in operations(document) if "requestBody" in operation
    ]
    assert len(bodies) >= 8
    for body in bodies:
        content = body["content"]["application/json"]
        check = validator(document, content["schema"])
        check.validate(content["example"])
        # No body at all stands for an empty object.
        assert body["required"] or check.is_valid({})


def test_every_example_of_a_problem_is_one(document: dict[str, Any]):
    for path, _, operation in operations(document):
        for status, response in operation["responses"].items():
            if MEDIA_TYPE in response.get("content", {}):
                content = response["content"][MEDIA_TYPE]
                validator(document, content["schema"]).validate(content["example"])
                assert content["example"]["status"] == int(status), path


def test_every_code_of_a_problem_is_documented(document: dict[str, Any]):
    text = json.dumps(document)
    assert [code for code in CODES if f"`{code}`" not in text and f'"{code}"' not in text] == []


def test_every_operation_tells_of_the_problems_that_any_may_answer(document: dict[str, Any]):
    for path, method, operation in operations(document):
        assert {"500", "503"} <= set(operation["responses"]), (path, method)
        if "requestBody" in operation:
            assert {str(CODES[code][0]) for code in ANY_BODY} <= set(operation["responses"]), path
        if "{job_id}" in path:
            assert "404" in operation["responses"], (path, method)
        if "503" in operation["responses"] and path != "/health":
            assert "Retry-After" in operation["responses"]["503"]["headers"], (path, method)


def test_unknown_fields_are_refused_by_the_schemas_too(document: dict[str, Any]):
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Body"):
            assert schema["additionalProperties"] is False, name


class Checked:
    """Sends requests, and holds every answer against the document."""

    def __init__(self, queue: Replica, document: dict[str, Any]) -> None:
        self._http = queue.http
        self._document = document
        self.seen: set[tuple[str, str, str]] = set()

    async def __call__(self, method: str, path: str, query: str = "", **values: Any) -> Any:
        """Call a documented operation; `job_id` or `name` fills the path, `json` or `content` is the body."""
        job_id, name = values.pop("job_id", ""), values.pop("name", "")
        if "json" in values:
            values = {"content": json.dumps(values["json"]), "headers": JSON | values.get("headers", {})}
        answer = await self._http.request(
            method, path.replace("{job_id}", job_id).replace("{name}", name) + query, **values
        )
        self._check(answer, method.lower(), path)
        is_json = "json" in answer.headers.get("content-type", "")
        return answer.json() if is_json else answer.text

    def _check(self, answer: httpx.Response, method: str, path: str) -> None:
        status = str(answer.status_code)
        self.seen.add((path, method, status))
        documented = self._document["paths"][path][method]["responses"]
        assert status in documented, (method, path, status, answer.text)
        assert set(documented[status].get("headers", {})) <= {name.title() for name in answer.headers}
        content = documented[status].get("content")
        if content is None:
            assert answer.content == b""
            return
        media_type = answer.headers["content-type"].partition(";")[0]
        assert media_type in content
        if "json" in media_type:
            validator(self._document, content[media_type]["schema"]).validate(answer.json())


BOOM = {"message": "boom", "type": "Boom", "stack": "at line 1"}
FULL = {
    "queue": "later",
    "payload": {"n": [1, None]},
    "delay_seconds": 60,
    "timeout_seconds": 60,
    "backoff": {"strategy": "fixed"},
    "tags": ["a"],
    "metadata": {"b": 1},
}


async def live(call: Checked) -> list[str]:
    """Lead jobs to every end, and call every verb also where it is refused; return the jobs' ids."""

    async def leased() -> dict[str, Any]:
        await call("POST", "/jobs", json={"queue": "q", "priority": 10})
        [job] = (await call("POST", "/lease", json={"queues": ["q"], "worker": "w", "wait_seconds": 0}))[
            "jobs"
        ]
        return {"job_id": job["id"], "lease_id": job["lease_id"]}

    async def end(verb: str, lease: dict[str, Any], **fields: Any) -> Any:
        body = {"lease_id": lease["lease_id"], **fields}
        return await call("POST", f"/jobs/{{job_id}}/{verb}", job_id=lease["job_id"], json=body)

    waiting = await call("POST", "/jobs", json=FULL)
    done, retried, failed, released = [await leased() for _ in range(4)]
    await end("heartbeat", done)
    await end("ack", done, result={"ok": True})
    await end("fail", retried, error=BOOM)
    await end("fail", failed, error=BOOM, retry=False)
    await end("release", released, delay_seconds=5)
    for verb in ("ack", "heartbeat", "release"):
        await end(verb, failed)
        await end(verb, {**failed, "job_id": LEASE_ID})
    await end("fail", done, error=BOOM)
    await end("fail", {**done, "job_id": LEASE_ID}, error=BOOM)
    active = await leased()
    for job_id in (waiting["id"], active["job_id"], done["job_id"], LEASE_ID):
        for verb in ("cancel", "retry"):
            await call("POST", f"/jobs/{{job_id}}/{verb}", job_id=job_id)
    await end("heartbeat", active)
    await call(
        "POST", "/settle", json={"items": [{**active, "outcome": "release"}, {**done, "outcome": "fail"}]}
    )
    return [waiting["id"], LEASE_ID, *(each["job_id"] for each in (done, retried, failed, released, active))]


async def run_queues(call: Checked) -> None:
    """Do all that can be done with a whole queue."""
    for body in ({"types": {"t": {"priority": "fast"}}}, {"backoff": {"factor": 3}}):
        await call("PUT", "/queues/{name}", name="emails", json=body)
    for verb in ("pause", "resume"):
        for name in ("emails", "-"):
            await call("POST", f"/queues/{{name}}/{verb}", name=name)
    for name in ("emails", "nowhere"):
        await call("GET", "/queues/{name}", name=name)
        await call("POST", "/queues/{name}/purge", name=name)
    for query in ("", "?limit=1", "?limit=0"):
        await call("GET", "/queues", query)
    for name in ("emails", "emails", "q"):
        await call("DELETE", "/queues/{name}", name=name)


async def direct_workers(call: Checked) -> None:
    """Do all that can be done with a worker; `live` has made one known."""
    for verb in ("quiet", "terminate", "resume"):
        for name in ("w", "nobody"):
            await call("POST", f"/workers/{{name}}/{verb}", name=name)
    for query in ("", "?limit=0"):
        await call("GET", "/workers", query)


async def once(call: Checked) -> None:
    """Enqueue what may be there only once, and ask for it again."""
    unique = {
        "queue": "once",
        "unique": {"key": "k", "scope": "window", "window_seconds": 60, "on_conflict": "replace"},
    }
    keyed: dict[str, Any] = {"json": unique, "headers": {"Idempotency-Key": "k"}}
    job = await call("POST", "/jobs", **keyed)
    await call("POST", "/jobs", json=unique)
    await call("POST", "/jobs", json={"queue": "once", "unique": {"key": "k", "on_conflict": "reject"}})
    await call("POST", "/jobs", **keyed | {"json": {"queue": "once"}})
    await call("POST", "/jobs/{job_id}/cancel", job_id=job["id"])
    await call("DELETE", "/jobs/{job_id}", job_id=job["id"])
    await call("POST", "/jobs", **keyed)
    batch: dict[str, Any] = {
        "json": {"jobs": [{"queue": "once"}, unique, {}]},
        "headers": {"Idempotency-Key": "k"},
    }
    for body in (batch["json"], {"jobs": [unique]}):
        await call("POST", "/jobs/batch", **batch | {"json": body})


async def run_schedules(call: Checked, world: World) -> None:
    """Do all that can be done with a schedule."""
    job = {"queue": "emails", "expires_in_seconds": 30, "metadata": {"a": 1}, "backoff": {"factor": 2}}
    for payload in (1, 2, "x" * 200):
        body = {"every_seconds": 60, "job": {**job, "payload": payload}}
        await call("PUT", "/schedules/{name}", name="s", json=body)
    for name in ("s", "none"):
        for verb in ("trigger", "pause", "resume"):
            await call("POST", f"/schedules/{{name}}/{verb}", name=name)
        await call("GET", "/schedules/{name}", name=name)
        for query in ("", "?limit=0"):
            await call("GET", "/schedules/{name}/runs", query, name=name)
    await call("PUT", "/queues/{name}", name="emails", json={"delay_seconds": 60})
    await call("POST", "/schedules/{name}/trigger", name="s")
    for on_conflict in ("return", "reject"):
        unique = {"queue": "q", "unique": {"key": "k", "on_conflict": on_conflict}}
        await call("PUT", "/schedules/{name}", name="u", json={"every_seconds": 60, "job": unique})
        for _ in range(2):
            await call("POST", "/schedules/{name}/trigger", name="u")
    for query in ("", "?limit=0"):
        await call("GET", "/schedules", query)
    # As other rules than ours might have stored it.
    connection = await world.connect()
    await connection.execute(
        """UPDATE schedules SET definition = definition || '{"missed": "all"}' WHERE name = 's'"""
    )
    for verb in ("pause", "resume"):
        await call("POST", f"/schedules/{{name}}/{verb}", name="s")
    for _ in range(2):
        await call("DELETE", "/schedules/{name}", name="s")


async def look(call: Checked, job_ids: list[str]) -> None:
    """Read all that can be read, then delete what can be deleted."""
    for job_id in job_ids:
        await call("GET", "/jobs/{job_id}", job_id=job_id)
        await call("GET", "/jobs/{job_id}", "?wait_seconds=31", job_id=job_id)
        await call("GET", "/jobs/{job_id}/attempts", job_id=job_id)
        await call("GET", "/jobs/{job_id}/explain", job_id=job_id)
    for query in ("", "?limit=2", "?state=failed&tag=a&error=Boom", "?limit=0"):
        await call("GET", "/jobs", query)
    for job_id in job_ids:
        await call("PATCH", "/jobs/{job_id}", job_id=job_id, json={"priority": 1})
    for verb in ("retry", "cancel", "delete", "update"):
        changes = {"set": {"priority": 1}} if verb == "update" else {}
        await call("POST", f"/jobs/{verb}", json={"filter": {"queue": ["q"]}, "dry_run": True, **changes})
    await call("PATCH", "/jobs/{job_id}", job_id=job_ids[0], json={"payload": "x" * 200})
    await call("POST", "/jobs/update", json={"all": True, "set": {"payload": "x" * 200}})
    for name in ("q", "-"):
        await call("GET", "/queues/{name}/failures", name=name)
        await call("POST", "/queues/{name}/redrive", name=name, json={"limit": 1})
    for path in ("/stats", "/health/live", "/health/ready", "/health", "/metrics"):
        await call("GET", path)
    for job_id in job_ids:
        await call("DELETE", "/jobs/{job_id}", job_id=job_id)


async def misuse(call: Checked, document: dict[str, Any], job_id: str) -> None:
    """Send what no operation takes."""
    for path, method, operation in operations(document):
        if "requestBody" in operation:
            text = {"Content-Type": "text/plain"}
            for body, headers in [(b"{", JSON), (b"{}", text), (b"[]", JSON), (b" " * 3000, JSON)]:
                await call(method.upper(), path, job_id=job_id, name=job_id, content=body, headers=headers)


async def test_what_is_really_answered_is_what_is_documented(world: World, document: dict[str, Any]):
    queue = await world.replica(max_body_bytes=2048, max_payload_bytes=100)
    call = Checked(queue, document)
    job_ids = await live(call)
    await run_queues(call)
    await direct_workers(call)
    await once(call)
    await run_schedules(call, world)
    await look(call, job_ids)
    await misuse(call, document, job_ids[-1])
    queue.machine.service.drain()
    await call("POST", "/lease", json={"queues": ["q"]})
    await call("GET", "/health/ready")
    await call("GET", "/health")
    for query in ("", "?queue="):
        await call("GET", "/events", query)
    documented = {
        (path, method, status)
        for path, method, operation in operations(document)
        for status in operation["responses"]
        if status not in {"500", "503"}
    }
    assert documented - call.seen == set(), "documented, but never seen"


async def test_the_documentation_is_served(queue: Replica, document: dict[str, Any]):
    assert (await queue.http.get("/openapi.json")).json() == document
    page = await queue.http.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in page.text


def test_the_file_is_where_people_look_for_it():
    assert Path(__file__).resolve().parents[2] / "openapi.yaml" == OPENAPI_FILE
