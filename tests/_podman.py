"""A container engine for tests: podman, with a storage of its own that it empties afterwards."""

import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from _runs import ROOT

BASE, IMAGE = "localhost/minidalle2-test-base", "localhost/minidalle2-test"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
NUM_FILES, NUM_PROCESSES = 65536, 30000
# Of torchvision's C++ operators these two have to be declared before it can be imported
DECLARED = """
for _name in ("nms", "qnms"):
    torch.library.define(
        f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
"""


@dataclass(frozen=True)
class Podman:
    """The engine, in a folder for what it keeps.

    conf: its configuration, for hosts with limits below podman's or cgroups that crun refuses.
    """

    folder: Path
    conf: Path

    def __call__(self, *arguments: object, timeout: float = 600) -> str:
        """Run podman; return what it prints, or fail with it."""
        done = self.attempt(*arguments, timeout=timeout)
        assert done.returncode == 0, f"podman {arguments}\n{done.stdout[-6000:]}"
        return done.stdout

    def attempt(self, *arguments: object, timeout: float = 600) -> "subprocess.CompletedProcess":
        """Run podman, whatever comes of it; its errors are among its output."""
        own = ("podman", "--root", self.folder / "storage", "--runroot", self.folder / "state")
        return subprocess.run(
            [str(each) for each in (*own, *arguments)], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=timeout,
            env={**os.environ, "CONTAINERS_CONF": str(self.conf)},
        )  # fmt: skip


@contextmanager
def podman_with_base(folder: Path) -> Iterator[Podman]:
    """Import a base of Debian's packages; delete it and what was made of it in the end."""
    for program in ("podman", "mmdebstrap"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed: make test-image installs it")
    conf, archive = folder / "containers.conf", folder / "base.tar"
    conf.write_text("")
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3,python3-venv",
         "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
         "--dpkgopt=path-exclude=/usr/share/locale/*", "bookworm", archive],
        check=True,
    )  # fmt: skip
    podman = Podman(folder, conf)
    podman("import", archive, f"{BASE}:bare")
    archive.unlink()
    try:
        if podman.attempt("run", "--rm", f"{BASE}:bare", "true").returncode:
            files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], NUM_FILES)
            conf.write_text(
                f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", '
                f'"nproc={NUM_PROCESSES}:{NUM_PROCESSES}"]\n[engine]\nruntime = "runc"\n'
            )
            podman("run", "--rm", f"{BASE}:bare", "true")
        yield podman
    finally:
        podman("rmi", "--all", "--force")


def build(podman: Podman) -> str:
    """Build the CPU image of cluster/Dockerfile from the files of git's index; return its name.

    The host's certificates come into the base: a proxy may stand between it and the packages.
    """
    context, wheels = podman.folder / "context", podman.folder / "wheels"
    wheels.mkdir()
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    for name in filter(None, files.stdout.decode().split("\0")):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, context / name)
    arguments = ["--build-arg", f"BASE={BASE}", "--build-arg", "DEVICE=cpu"]
    if not _reaches_pytorch():
        _make_wheels(wheels)
        arguments += ["--build-arg", "TORCH_BACKEND=", "--volume", f"{wheels}:/wheels:ro"]
        lock = context / "requirements.lock"
        pins = {path.name.split("-")[0]: path.name.split("-")[1] for path in wheels.glob("*.whl")}
        lines = lock.read_text().splitlines()
        names = [line.partition("==")[0] for line in lines]
        lock.write_text(
            "".join(
                f"{name}=={pins[name]}\n" if name in pins else f"{line}\n"
                for name, line in zip(names, lines, strict=True)
            )
        )
    with (podman.folder / "Dockerfile").open("w") as file:
        file.write(f"FROM {BASE}:bare\nENV UV_FIND_LINKS=/wheels\n")
        if CERTIFICATES.is_file():
            shutil.copy(CERTIFICATES, podman.folder / "host.crt")
            file.write(f"COPY host.crt {CERTIFICATES}\n")
            file.write(f"ENV SSL_CERT_FILE={CERTIFICATES} PIP_CERT={CERTIFICATES}\n")
    common = ("build", "--quiet", "--isolation", "chroot", "--file")
    podman(*common, podman.folder / "Dockerfile", "--tag", BASE, podman.folder)
    podman(
        *common, context / "cluster" / "Dockerfile", *arguments, "--tag", IMAGE, context,
        timeout=1800,
    )  # fmt: skip
    return IMAGE


def _reaches_pytorch() -> bool:
    """Say whether uv finds the lock's torch without CUDA, which PyPI has not."""
    command = [
        sys.executable, "-m", "uv", "pip", "install", "--quiet", "--dry-run", "--no-deps",
        "--torch-backend", "cpu", "--target", os.devnull, "torch",
    ]  # fmt: skip
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def _make_wheels(folder: Path) -> None:
    """Put a torch without CUDA there, of pip's own folders of wheels, and the installed torchvision
    without its C++ operators, which nothing here calls."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-index", "--no-deps",
        "--dest", folder, "torch",
    ]  # fmt: skip
    if subprocess.run(command).returncode or not list(folder.glob("torch-*+cpu-*.whl")):
        pytest.skip("found neither PyTorch's index nor a wheel of torch for the CPU")
    import torchvision

    version = torchvision.__version__.partition("+")[0] + "+cpu"
    package, info = Path(torchvision.__file__).parent, f"torchvision-{version}.dist-info"
    files = {
        f"torchvision/{path.relative_to(package)}": path.read_text()
        for path in package.rglob("*.py")
    }
    files["torchvision/extension.py"] += DECLARED
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: torchvision\nVersion: {version}\nRequires-Dist: torch\n"
    )
    files[f"{info}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: minidalle2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"torchvision-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
