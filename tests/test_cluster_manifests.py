"""Manifests of Kubernetes: valid, whole, and their commands can be run."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import psutil
import pytest
import yaml
from _heads import free_port, redis_server

from cluster.base.ray_session import GROUPS
from cluster.head.redis_relay import Redis
from cluster.manifests import SOURCES, ManifestsConfig, main
from cluster.start import StartConfig

ROOT = Path(__file__).parent.parent
CRDS = ROOT.parent / "shared" / "data" / "crds"
KUBERAY = sorted((ROOT / "cluster" / "kuberay").rglob("*.yaml"))
RAY_UP = sorted((ROOT / "cluster" / "ray-up").glob("*.yaml"))
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
KUBERNETES = "1.33"
OWN_KINDS = {"RayCluster", "RayJob", "PodMonitor", "PrometheusRule"}
DOWNLOADS = "download download_test download_1024"
ENTRY_POINTS = f"{DOWNLOADS} embed clip prior decoder up256 up1024 sample fid"
REDIS_IMAGE = "redis:7.2"
TRAINED_ON_GPUS = {"clip", "prior", "decoder", "up256", "up1024"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "cluster").as_posix()


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def manifest(name: str) -> dict[str, Any]:
    return load(ROOT / "cluster" / "kuberay" / name)


def walk(value: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every key's path and value, in lists too."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        yield (*path, str(key)), child
        if isinstance(child, (dict, list)):
            yield from walk(child, *path, str(key))


def values(value: Any, key: str) -> list[Any]:
    return [found for path, found in walk(value) if path[-1] == key]


# -- against schemas -------------------------------------------------------------------------------


def closed(schema: Any) -> Any:
    """Make a schema of Kubernetes one of plain JSON, in which a misspelt field is an error.

    The API server drops fields that a schema does not know, in silence.
    """
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if made.pop("nullable", False) and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    keeps = made.pop("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(made.get("properties"), dict) and "type" in schema and not keeps:
        made.setdefault("additionalProperties", False)
    return made


@functools.cache
def validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    group, _, version = api_version.partition("/")
    path = CRDS / f"{group}_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"{path} is not here: a custom resource definition to validate against")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte takes the other ten seconds
    versions = {v["name"]: v for v in yaml.load(path.read_text(), loader)["spec"]["versions"]}
    schema = closed(versions[version]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def check(document: dict[str, Any]) -> None:
    """Raise ValidationError unless the custom resource's definition admits the document."""
    validator(document["apiVersion"], document["kind"]).validate(document)


@pytest.mark.parametrize("path", KUBERAY, ids=name_of)
def test_every_manifest_is_what_its_definition_admits(path: Path):
    document = load(path)
    if document["kind"] in OWN_KINDS:
        check(document)
    elif document["kind"] != "Kustomization":  # which kubectl reads, no server
        for each in document["items"] if document["kind"] == "List" else [document]:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_every_pod_is_what_kubernetes_admits():
    """By its own schemas, without the definitions' leave of unknown fields."""
    for group in node_groups():
        document = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}}
        document["template"] = group["template"]
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        wrong = copy.deepcopy(document)
        wrong["template"]["spec"]["containers"][0]["ressources"] = {}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "workerGroupSpecs", 1, "template", "spec", "toleration"), []),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "none"),
        (("spec", "authOptions", "mode"), "open"),
        (("spec", "authOptions", "secret"), "x"),
        (("spec", "gcsFaultToleranceOptions", "redisPassword"), "sesame"),
        (("spec", "gcsFaultToleranceOptions", "redisCa"), "x"),
    ],
)
def test_a_wrong_manifest_is_refused(path: tuple, value: Any):
    document = copy.deepcopy(manifest("cluster.yaml"))
    check(document)
    at: Any = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(document)


# -- what they name --------------------------------------------------------------------------------


def pods() -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in node_groups()]


def node_groups() -> list[dict[str, Any]]:
    spec = manifest("cluster.yaml")["spec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def built_images() -> set[str]:
    """Return the images that the Dockerfile's own commands build, each of a stage that it has."""
    text = DOCKERFILE.read_text()
    found = re.findall(r"docker build .*--build-arg DEVICE=(\w+) -t (\S+) \.", text)
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", text, re.MULTILINE))
    assert found and {device for device, _ in found} <= stages
    return {image for _, image in found}


def test_every_image_named_is_one_that_the_dockerfile_builds():
    named = [found for path in KUBERAY for found in values(load(path), "image")]
    for path in RAY_UP:
        named += [v for p, v in walk(load(path)) if p[-1] == "image" or p[-1].endswith("_image")]
    named.remove(REDIS_IMAGE)
    assert set(named) == built_images() and not [n for n in named if n.endswith(":latest")]
    [listed] = manifest("kustomization.yaml")["images"]
    assert {image.rpartition(":")[0] for image in named} == {listed["name"]}
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and {n.rpartition(":")[2].partition("-")[0] for n in named} == {version[1]}


def test_every_mount_volume_and_secret_named_exists():
    claims = {manifest("storage.yaml")["metadata"]["name"]}
    secrets = {s["name"] for s in manifest("kustomization.yaml")["secretGenerator"]}
    for pod in pods():
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = [m["name"] for c in pod["containers"] for m in c["volumeMounts"]]
        assert set(mounted) == volumes and len(set(mounted)) == len(mounted)
        assert set(values(pod["volumes"], "claimName")) <= claims
    for path in KUBERAY:
        document = load(path)
        named = {*values(document, "secretName")}
        named |= {ref["name"] for ref in values(document, "secretKeyRef")}
        assert named <= secrets
    assert manifest("cluster.yaml")["spec"]["authOptions"]["secretName"] in secrets


def test_the_kustomization_lists_every_manifest_but_the_jobs():
    here = {p.name for p in KUBERAY if p.parent.name == "kuberay"} - {"kustomization.yaml"}
    assert set(manifest("kustomization.yaml")["resources"]) == here


def test_no_pod_is_root_and_each_asks_for_what_it_needs():
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"]
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    gpus = [p for p in pods() if values(p, "nvidia.com/gpu")]
    [pod] = gpus
    assert values(pod, "tolerations")[0][0]["key"] == "nvidia.com/gpu"
    assert set(values(pod, "image")) == {i for i in built_images() if i.endswith("gpu")}


def test_only_the_heads_autoscaler_has_rights_in_kubernetes():
    """KubeRay makes an account for a head that names none, and binds the autoscaler's role to it;
    bound to an account that is named, every pod of the namespace might have it."""
    head, *workers = pods()
    assert "serviceAccountName" not in head and "automountServiceAccountToken" not in head
    for pod in workers:
        assert pod["automountServiceAccountToken"] is False and "serviceAccountName" not in pod


def test_ray_finds_room_for_its_objects():
    """By Ray's own reckoning, which goes to /tmp where /dev/shm is smaller than it takes."""
    from ray._private import ray_constants, utils

    gib = 2**30
    for pod in pods():
        [limit] = [v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "shm"]
        [container] = pod["containers"]
        memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * gib
        room = int(limit.removesuffix("Gi")) * gib
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils, "get_shared_memory_bytes", lambda room=room: room)
            taken = utils.resolve_object_store_memory(memory)
        assert taken <= room
        assert room >= memory * ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION


def test_the_groups_are_those_that_work_asks_for():
    starts = [group["rayStartParams"] for group in node_groups()]
    offered = [json.loads(json.loads(start["resources"])) for start in starts]
    assert offered == [{GROUPS: 1}, {"cpu_group": 1}, {"gpu_group": 1}]
    assert starts[0]["num-cpus"] == starts[0]["num-gpus"] == "0"
    types = load(ROOT / "cluster" / "ray-up" / "aws.yaml")["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, GROUPS: 1}
    assert "cpu_group" in types["cpu"]["resources"]
    assert {"gpu_group", "GPU"} <= types["gpu"]["resources"].keys()


def test_prometheus_reaches_the_metrics_port_and_no_other():
    ports = {p["name"]: p["containerPort"] for pod in pods() for p in values(pod, "ports")[0]}
    [endpoint] = manifest("monitor.yaml")["spec"]["podMetricsEndpoints"]
    selector = manifest("monitor.yaml")["spec"]["selector"]["matchLabels"]
    policy = manifest("network.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"] == selector
    assert selector == {"ray.io/cluster": manifest("cluster.yaml")["metadata"]["name"]}
    own, operator, prometheus = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": selector}}]}
    assert operator["ports"] == [{"port": ports["dashboard"]}]
    assert prometheus["ports"] == [{"port": ports[endpoint["port"]]}]
    for group in values(manifest("cluster.yaml"), "rayStartParams"):
        assert group["metrics-export-port"] == str(ports["metrics"])


def redis_parts() -> dict[str, dict[str, Any]]:
    return {item["kind"]: item for item in manifest("redis.yaml")["items"]}


def test_only_the_head_reaches_redis():
    parts = redis_parts()
    cluster = manifest("cluster.yaml")
    policy, pod = parts["NetworkPolicy"]["spec"], parts["StatefulSet"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"] == labels == parts["Service"]["spec"]["selector"]
    assert policy["policyTypes"] == ["Ingress", "Egress"] and "egress" not in policy
    [rule] = policy["ingress"]
    [sender] = values(rule["from"], "podSelector")
    assert sender["matchLabels"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    [nodes] = sender["matchExpressions"]
    assert nodes["key"] == "ray.io/node-type" and "worker" not in nodes["values"]
    [container] = pod["spec"]["containers"]
    [port] = container["ports"]
    assert rule["ports"] == [{"port": port["containerPort"]}]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] and not values(pod, "env")
    options = cluster["spec"]["gcsFaultToleranceOptions"]
    name = parts["Service"]["metadata"]["name"]
    assert options["redisAddress"] == f"rediss://{name}:{port['containerPort']}"
    head, *workers = pods()
    assert "redis" in [v["name"] for v in head["volumes"]]
    assert not [v for worker in workers for v in worker["volumes"] if v["name"] == "redis"]


@pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="Debian's package redis-server is absent"
)
def test_the_redis_of_the_manifest_asks_for_the_password(tmp_path: Path):
    """Its command, run here with folders and a port of the test's own."""
    with redis_server(tmp_path / "other") as other:
        (tmp_path / "redis.crt").write_bytes(other.ca.read_bytes())
        (tmp_path / "redis.key").write_bytes((other.ca.parent / "redis.key").read_bytes())
    (tmp_path / "redis_password").write_text("abc123\n")
    [container] = redis_parts()["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    port = free_port()
    [text] = container["args"]
    text = text.replace("/etc/redis", str(tmp_path)).replace("6380", str(port))
    text = text.replace("--dir /data", f"--dir {tmp_path} --bind 127.0.0.1")
    server = subprocess.Popen([*container["command"], text], stdout=subprocess.DEVNULL)
    try:
        ca = str(tmp_path / "redis.crt")
        found = Redis(host="localhost", port=port, password="abc123", ca=ca)
        for _ in range(100):
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        found.require()
        with pytest.raises(ValueError, match="found -WRONGPASS"):
            dataclasses.replace(found, password="abc").require()
        assert "abc123" not in " ".join(psutil.Process(server.pid).cmdline())
    finally:
        server.kill()
        server.wait()


def test_the_operators_rules_are_prometheus_own(tmp_path: Path, capsys):
    rules = ROOT / "cluster" / "prometheus"
    if not rules.is_dir():
        pytest.skip(f"{rules} is not here: the rules that the manifest repeats")
    assert main(ManifestsConfig(check=True)) == 0, "run `python cluster/manifests.py`"
    found = manifest("rules.yaml")["spec"]["groups"]
    assert found == [g for name in SOURCES for g in load(rules / name)["groups"]] and found
    copied = tmp_path / "rules.yaml"
    assert main(ManifestsConfig(out=str(copied), check=True)) == 1 and not copied.exists()
    assert main(ManifestsConfig(out=str(copied))) == 0
    assert copied.read_text() == (ROOT / "cluster" / "kuberay" / "rules.yaml").read_text()


# -- what they run ---------------------------------------------------------------------------------

JOBS = {path.stem: load(path) for path in KUBERAY if path.parent.name == "jobs"}


def run_dry(command: str, capsys: pytest.CaptureFixture) -> str:
    """Run `python SCRIPT ...` with --dry-run in this process; return what it printed."""
    python, script, *arguments = shlex.split(command)
    assert python == "python" and (ROOT / script).is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(ROOT / script), *arguments, "--dry-run"])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(sys.argv[0], run_name="__main__")
    shown = capsys.readouterr()
    assert caught.value.code == 0, shown.err
    return shown.out


def test_there_is_a_job_for_every_stage():
    assert set(JOBS) == set(ENTRY_POINTS.split())


@pytest.mark.parametrize("name", JOBS)
def test_every_jobs_command_can_be_run_dry(name: str, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = JOBS[name]["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": "minidalle2"}
    output = run_dry(spec["entrypoint"], capsys)
    if name in TRAINED_ON_GPUS:
        assert "\nparameters: " in output and "device: cuda" in output
    on_gpu = name in ("sample", "fid")  # these do their work in the entry point itself
    assert ("entrypointNumGpus" in spec) == on_gpu and list(tmp_path.iterdir()) == []
    if on_gpu:
        assert json.loads(spec["entrypointResources"]) == {"gpu_group": 0.001}


def test_a_supervised_job_is_the_job(capsys):
    """RayJobs have no backoffLimit: the operator would delete the cluster that they share."""
    assert [name for name, job in JOBS.items() if "backoffLimit" in job["spec"]] == []
    for path in KUBERAY:
        if path.parent.name != "supervised" or path.name == "kustomization.yaml":
            continue
        pod = load(path)["spec"]["template"]
        [container] = pod["spec"]["containers"]
        at = container["args"].index("--")
        command = shlex.join(container["args"][at + 1 :])
        assert command == JOBS[path.stem]["spec"]["entrypoint"]
        flags = shlex.join([*container["command"], *container["args"][:at]])
        assert "--address http://minidalle2-head-svc:8265" in flags
        assert "away_seconds: 3600.0" in run_dry(flags, capsys)
        operator = manifest("network.yaml")["spec"]["ingress"][1]
        assert {"podSelector": {"matchLabels": pod["metadata"]["labels"]}} in operator["from"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"]


def test_every_folder_that_a_job_reads_is_one_that_another_makes():
    flags = {name: shlex.split(job["spec"]["entrypoint"])[2:] for name, job in JOBS.items()}
    pairs = {name: set(itertools.pairwise(words)) for name, words in flags.items()}
    made = {
        folder: name for name, each in pairs.items() for flag, folder in each
        if flag in ("--out", "--run")
    }  # fmt: skip
    for name, each in pairs.items():
        read = {folder for flag, folder in each if folder.startswith("/data/") and flag != "--urls"}
        assert read <= set(made), name
    assert ("--images", "/data/images_1024") in pairs["up1024"]
    wanted = {("--image-size", "1024"), ("--min-image-side", "1024")}
    assert wanted <= pairs[made["/data/images_1024"]], "an upsampler learns nothing of less"
    lists = [folder for each in pairs.values() for flag, folder in each if flag == "--urls"]
    assert len(lists) == len(set(lists)) == 3, "what scores is not what trains"


def test_a_misspelt_flag_in_a_job_would_be_found(capsys):
    with pytest.raises(AssertionError, match="unknown flag --imgs"):
        run_dry("python ingest/embed.py --imgs /data/images", capsys)


def test_what_the_page_says_of_ports_and_manifests_is_so():
    page = (ROOT / "docs" / "cluster.md").read_text()
    starting = StartConfig()
    for port in (starting.port, starting.dashboard_port, starting.metrics_export_port):
        assert f"| {port} " in page
    named = set(re.findall(r"`(?:cluster/kuberay/)?([a-z]+\.yaml)`", page)) - {"config.yaml"}
    assert named == {p.name for p in KUBERAY if p.parent.name == "kuberay"}
    [listed] = re.findall(r"a RayJob each: (.*) \|", page)
    assert set(listed.split(", ")) == set(JOBS)
