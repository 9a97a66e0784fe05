"""The image, built and run by podman: the whole pipeline as a user without rights on a read-only
root file system, and a cluster of three containers, one of which is killed."""

import json
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from _podman import Podman, build, podman_with_base
from _runs import HERE, ROOT, prior_run

from cluster.base.jsonl import read_lines
from cluster.base.ray_session import GROUPS
from cluster.base.run_dir import INCIDENTS_NAME, METRICS_NAME
from models.weights import FINAL_NAME
from training.config import TrainConfig
from training.runs.worker import launch

pytestmark = pytest.mark.slow
KUBERAY = ROOT / "cluster" / "kuberay"
MAX_BYTES = 2_500_000_000
HARDENED = (
    "--read-only", "--tmpfs", "/tmp:exec", "--shm-size", "1g", "--env", "OMP_NUM_THREADS=1",
    "--cap-drop", "all", "--security-opt", "no-new-privileges",
)  # fmt: skip
STEPS, EVERY = 600, 50
SETTINGS = TrainConfig.of(
    **HERE, num_steps=STEPS, checkpoint_every=EVERY, global_batch_size=8, precision="fp32",
    device="cpu", learning_rate=1e-4,
)  # fmt: skip


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    with podman_with_base(tmp_path_factory.mktemp("podman")) as engine:
        yield engine


@pytest.fixture(scope="module")
def image(podman: Podman) -> str:
    begin = time.monotonic()
    name = build(podman)
    print(f"the image was built in {time.monotonic() - begin:.0f} s")
    return name


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that everybody may write to; containers have it by the same path."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def test_the_image_is_small_holds_no_secret_and_its_last_layers_are_the_project(
    podman: Podman, image: str
):
    [found] = json.loads(podman("image", "inspect", image))
    print(f"the image has {found['Size']:,} bytes")
    assert found["Size"] < MAX_BYTES and found["Config"]["User"] == "minidalle2"
    layers = json.loads(podman("history", "--format", "json", image))
    largest = max(range(len(layers)), key=lambda i: layers[i]["size"])
    assert sum(layer["size"] for layer in layers[:largest]) < 20_000_000, "newest first"
    look = "env; find / -xdev -name auth_token; find /opt/minidalle2 -name '*.pem'"
    output = podman("run", "--rm", image, "sh", "-c", f"{look}; true").lower()
    assert "ray_auth_mode=token" in output
    assert not any(word in output for word in ("auth_token", "pem", "password", "secret"))
    login = podman("run", "--rm", image, "bash", "--login", "-c", "ray --version")  # as `ray up`
    assert login.startswith("ray, version")


def test_the_pipeline_runs_without_rights_on_a_read_only_root(
    podman: Podman, image: str, shared: Path
):
    run = shared / "demo"
    output = podman(
        "run", "--rm", *HARDENED, "--volume", f"{shared}:{shared}", image,
        "python", "cluster/demo.py", "--size", "debug", "--num-train", 256, "--num-test", 32,
        "--run", run, timeout=1200,
    )  # fmt: skip
    assert f"report: {run}/report.html" in output and "Traceback" not in output
    scores = json.loads((run / "eval.json").read_text())
    assert scores and {path.stat().st_uid for path in run.rglob("*")} == {1000}
    assert "Permission denied" not in output and "Read-only" not in output


def test_the_heads_pod_of_the_manifests_plays(podman: Podman, image: str, tmp_path: Path):
    """As KubeRay's operator would start it: user, rights, claim, Ray's parameters; without Redis
    and the volume in memory, which podman 4 makes a folder of root's."""
    group = yaml.safe_load(KUBERAY.joinpath("cluster.yaml").read_text())["spec"]["headGroupSpec"]
    flags = " ".join(f"--{key}={value}" for key, value in group["rayStartParams"].items())
    name = f"minidalle2-test-{secrets.token_hex(4)}"
    pod = group["template"]["spec"]
    [container] = pod["containers"]
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] == "data"]
    container["volumeMounts"] = [m for m in container["volumeMounts"] if m["name"] == "data"]
    container |= {"image": image, "imagePullPolicy": "Never"}
    container["command"] = ["bash", "-c", f"ray start --head --block {flags}"]
    container["env"] = [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "value": secrets.token_hex(32)},
    ]
    claim = yaml.safe_load(KUBERAY.joinpath("storage.yaml").read_text())
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}
    path = tmp_path / "pod.yaml"
    path.write_text(yaml.safe_dump_all([claim, document]))
    inside = ("exec", f"{name}-{container['name']}")
    try:
        podman("kube", "play", path)
        deadline = time.monotonic() + 120
        while "Active" not in podman.attempt(*inside, "ray", "status").stdout:
            assert time.monotonic() < deadline, podman("logs", inside[1])
            time.sleep(1)
        assert podman(*inside, "id", "-u").strip() == "1000"
        output = podman(*inside, "ray", "status")
        assert GROUPS in output, output
        assert podman.attempt(*inside, "touch", "/opt/minidalle2/x").returncode != 0
    finally:
        podman.attempt("kube", "down", path)
        podman.attempt("volume", "rm", claim["metadata"]["name"])


# -- a cluster of three containers -----------------------------------------------------------------


@pytest.fixture
def cluster(podman: Podman, image: str, shared: Path) -> Iterator["Cluster"]:
    found = Cluster(podman, image, shared)
    try:
        found.start()
        yield found
    finally:
        found.end()


class Cluster:
    """A head without work and two workers of one core on a network of their own."""

    def __init__(self, podman: Podman, image: str, shared: Path) -> None:
        self.podman, self.image, self.shared = podman, image, shared
        self.name = f"minidalle2-test-{secrets.token_hex(4)}"
        self.nodes = tuple(f"{self.name}-{node}" for node in ("head", "one", "two"))
        self.token = secrets.token_hex(32)

    def start(self) -> None:
        """Start the network, the head and the workers."""
        path = self.shared.parent / "token"
        path.write_text(self.token)
        self.podman("secret", "create", self.name, path)
        path.unlink()
        self.podman("network", "create", self.name)
        [network] = json.loads(self.podman("network", "inspect", self.name))
        subnet = network["subnets"][0]["subnet"].rpartition(".")[0]
        self.head = f"{subnet}.11"
        self.run_node(self.nodes[0], self.head)
        for i, node in enumerate(self.nodes[1:], 12):
            joins = ("--join", f"{self.head}:6379", "--group", "gpu_group")
            self.run_node(node, f"{subnet}.{i}", *joins)

    def run_node(self, node: str, ip: str, *more: str) -> None:
        """Start Ray in a container that stays."""
        secret = f"{self.name},target=/home/minidalle2/.ray/auth_token,uid=1000,gid=1000,mode=0400"
        self.podman(
            "run", "--detach", "--name", node, "--network", self.name, "--ip", ip, "--cpus", 1,
            *HARDENED, "--secret", secret, "--volume", f"{self.shared}:{self.shared}", self.image,
            "python", "cluster/start.py", "--bind", ip, "--block", *more,
        )  # fmt: skip

    def submit(self, *command: object, token: str) -> tuple[int, str]:
        """Submit a job from a container of its own; return the exit code and the output."""
        done = self.podman.attempt(
            "run", "--rm", "--network", self.name, *HARDENED, "--env", f"RAY_AUTH_TOKEN={token}",
            self.image, "ray", "job", "submit", "--no-wait", "--submission-id", "prior",
            "--address", f"http://{self.head}:8265", "--", *command,
        )  # fmt: skip
        return done.returncode, done.stdout

    def logs(self) -> str:
        """Return what the job has printed, and the nodes."""
        job = ("exec", self.nodes[0], "ray", "job", "logs", "--address", f"http://{self.head}:8265")
        parts = [self.podman.attempt(*job, "prior").stdout[-3000:]]
        return "\n".join(parts + [self.podman.attempt("logs", node).stdout for node in self.nodes])

    def await_that(self, true: Callable[[], object], seconds: float = 240) -> None:
        """Wait until something holds; fail with the logs."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def end(self) -> None:
        """Delete all of it."""
        self.podman.attempt("rm", "--force", "--time", 0, *self.nodes)
        self.podman.attempt("network", "rm", "--force", self.name)
        self.podman.attempt("secret", "rm", self.name)


def test_a_job_on_three_containers_outlives_one(
    cluster: Cluster, shared: Path, tmp_path: Path, write_data: Callable[..., Path]
):
    data = write_data(shared / "data", num_shards=2, samples_per_shard=10)
    run = shared / "prior"
    command = (
        "python", "training/prior.py", "--embeds", data / "embeds", "--run", run,
        "--train.num-workers", 2, "--train.min-workers", 1, "--train.num-threads", 1,
        "--train.num-steps", STEPS, "--train.checkpoint-every", EVERY, "--train.report-every", 1,
        "--train.global-batch-size", 8, "--train.precision", "fp32", "--train.device", "cpu",
        "--train.learning-rate", 1e-4, "--diffusion.width", 16, "--diffusion.depth", 1,
        "--diffusion.num-heads", 2,
    )  # fmt: skip

    def submitted() -> bool:
        code, output = cluster.submit(*command, token=cluster.token)
        assert "401" not in output
        return code == 0

    def job_of(node: str) -> bool:
        return "RayTrainWorker" in cluster.podman("top", node, "args")

    cluster.await_that(submitted)
    for token in ("", secrets.token_hex(32)):
        code, output = cluster.submit("true", token=token)
        assert code != 0 and "AuthenticationError" in output, output
    cluster.await_that(lambda: all(job_of(node) for node in cluster.nodes[1:]))
    cluster.await_that((run / f"step_{EVERY:08d}" / "state.json").exists)
    cluster.podman("kill", cluster.nodes[2])
    cluster.await_that((run / FINAL_NAME).exists)

    assert [line["step"] for line in read_lines(run / METRICS_NAME)] == list(range(1, STEPS + 1))
    assert [line["kind"] for line in read_lines(run / INCIDENTS_NAME)].count("lost") == 1
    expected = prior_run(data, tmp_path / "here", train=SETTINGS)
    assert launch(expected, expected.run, "training.tasks.prior:build_prior", "prior") == 0

    from safetensors.torch import load_file

    name = f"step_{STEPS:08d}/model.safetensors"
    found, wanted = load_file(str(run / name)), load_file(str(tmp_path / "here" / name))
    worst = max(float((found[key] - wanted[key]).abs().max()) for key in wanted)
    print(f"the weights differ by {worst:.1e} at most")
    assert worst < 1e-3 and cluster.token not in cluster.logs()
