"""What FastAPI and Pydantic cost by themselves: the same body, read, checked and sent back, and no database."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel


class Job(BaseModel):
    """The body of a job."""

    queue: str
    type: str = "default"
    payload: dict[str, Any] | None = None


app = FastAPI()


@app.post("/jobs", status_code=201)
async def echo(job: Job) -> Job:
    """Send it back."""
    return job
