"""What came out of the queue, held against what went in: nothing missing, nothing wrong, nothing too much."""

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.traffic import Job
from examples.worker import media_type

FILES_PER_CALL = 200  # Bounds the length of sha256sum's command line, also with the longest of paths.


@dataclass(frozen=True)
class Verdict:
    """How many results are right in every field, and a sentence for each thing that is wrong."""

    verified: int
    problems: list[str]


def judge(
    files: Sequence[str], unreadable: Mapping[str, str], completed: Iterable[Job], dead: Iterable[Job]
) -> Verdict:
    """Compare the results with sha256sum and the files; ``unreadable`` tells each path's expected error."""
    problems = []
    verified = 0
    digests = sha256sums(files)
    results = {job["payload"]["path"]: job["result"] for job in completed}
    for path in files:
        if path not in results:
            problems.append(f"no result: {path!r}")
        elif path not in digests:
            problems.append(f"sha256sum cannot read it: {path!r}")
        elif wrong := _differences(results[path], {"sha256": digests[path], **_measures(path)}):
            problems.append(f"wrong {wrong}: {path!r}")
        else:
            verified += 1
    problems += [f"unexpected result: {path!r}" for path in results.keys() - set(files)]

    errors = {job["payload"]["path"]: (job["last_error"] or {}).get("type") for job in dead}
    for path, error in unreadable.items():
        if path not in errors:
            problems.append(f"not in the dead letters: {path!r}")
        elif errors[path] != error:
            problems.append(f"died of {errors[path]}, not of {error}: {path!r}")
    problems += [
        f"unexpected dead letter ({errors[path]}): {path!r}" for path in errors.keys() - unreadable.keys()
    ]
    return Verdict(verified, problems)


def sha256sums(paths: Sequence[str]) -> dict[str, str]:
    """Ask sha256sum for the digest of each file, some hundreds at a time; what it cannot read is left out."""
    digests = {}
    for start in range(0, len(paths), FILES_PER_CALL):
        # With -z names come back as they are and end in NUL, so a newline in a name does no harm.
        answer = subprocess.run(
            ("sha256sum", "-z", "--", *paths[start : start + FILES_PER_CALL]),
            stdout=subprocess.PIPE,
            check=False,
        ).stdout
        for line in answer.split(b"\0")[:-1]:
            digest, name = line[:64], line[66:]  # digest, a space, a mark of the reading mode, name
            digests[os.fsdecode(name)] = digest.decode()
    return digests


def _measures(path: str) -> dict[str, Any]:
    size = lines = 0
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            size += len(chunk)
            lines += chunk.count(b"\n")
    return {"size": size, "lines": lines, "media_type": media_type(path)}


def _differences(result: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> str:
    found = result or {}
    return ", ".join(
        f"{name} ({found.get(name)!r}, not {value!r})"
        for name, value in expected.items()
        if found.get(name) != value
    )
