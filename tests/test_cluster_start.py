"""Ray is never started open: who has no token starts nothing, and a public address wants one."""

import os
import stat
from pathlib import Path

import pytest

from cluster import start
from cluster.base.ray_session import GROUPS
from cluster.start import StartConfig, main


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What would have been executed."""
    found: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, command, env: found.append((command, env)))
    monkeypatch.setattr(os, "chdir", lambda path: None)
    return found


def token(home: Path, mode: int = 0o600, text: str = "abc") -> Path:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("bind", ["127.0.0.1", "10.0.0.5", "192.168.1.9", "fd00::5", "::1"])
def test_a_head_on_an_inner_address_makes_a_token_for_its_owner_alone(bind, home, started):
    previous = os.umask(0)
    try:
        main(StartConfig(bind=bind))
    finally:
        os.umask(previous)
    path = home / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_text()) == 64
    [(command, env)] = started
    assert env["RAY_AUTH_MODE"] == "token" and f"--dashboard-host={bind}" in command
    loopback = bind in ("127.0.0.1", "::1")
    assert (f"--node-ip-address={bind}" in command) is not loopback
    assert not any("0.0.0.0" in argument for argument in command)
    before = path.read_text()
    main(StartConfig(bind=bind))
    assert path.read_text() == before


@pytest.mark.parametrize("bind", ["8.8.8.8", "2001:4860:4860::8888", "100.64.0.1"])
def test_a_public_address_is_refused_without_a_token(bind: str, home: Path, started):
    for text in ("", None):
        if text is not None:
            token(home, text=text)
        with pytest.raises(ValueError, match=f"--bind {bind}: found no token"):
            main(StartConfig(bind=bind))
    assert not started
    token(home)
    main(StartConfig(bind=bind))
    assert len(started) == 1


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "", "head", "224.0.0.1", "10.0.0.5 --head"])
def test_what_is_no_machines_address_is_refused(bind: str, home: Path, started):
    token(home)
    with pytest.raises(ValueError, match="expected an IP address of this machine"):
        main(StartConfig(bind=bind))
    assert not started


def test_who_joins_needs_the_heads_token(home: Path, started):
    with pytest.raises(ValueError, match="found no token, expected a copy of the head's"):
        main(StartConfig(join="10.0.0.5:6379"))
    assert not started and list(home.iterdir()) == []


def test_a_token_that_others_can_read_is_refused(home: Path, started):
    path = token(home, mode=0o644)
    with pytest.raises(ValueError, match=f"run chmod 600 {path}"):
        main(StartConfig())
    path.chmod(0o600)
    main(StartConfig())
    assert len(started) == 1


def test_a_token_of_the_environment_will_do(monkeypatch, home: Path, started):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    main(StartConfig(bind="8.8.8.8", join="8.8.4.4:6379"))
    assert len(started) == 1 and list(home.iterdir()) == []


def test_authentication_cannot_be_switched_off(monkeypatch, started):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match="RAY_AUTH_MODE: found disabled, expected token"):
        main(StartConfig())
    assert not started


def test_a_head_has_no_work_and_a_node_has_its_group(monkeypatch, tmp_path, home: Path, started):
    token(home)
    main(StartConfig())
    main(StartConfig(head_works=True))
    main(StartConfig(join="10.0.0.5:6379", group="gpu_group"))
    for exists in (False, True):
        monkeypatch.setattr(start, "NVIDIA", tmp_path if exists else tmp_path / "none")
        main(StartConfig(join="10.0.0.5:6379"))
    offered = [[c for c in command if c.startswith("--resources")] for command, _ in started]
    groups = ("gpu_group", "cpu_group", "gpu_group")
    joined = [[f'--resources={{"{group}": 1}}'] for group in groups]
    assert offered == [[f'--resources={{"{GROUPS}": 1}}'], [], *joined]
    assert ["--num-cpus=0" in command for command, _ in started] == [True, *[False] * 4]


def test_a_dry_run_leaves_no_token(home: Path, run_here):
    code, output, _ = run_here("cluster/start.py", "--dry-run")
    assert code == 0 and "--dashboard-host=127.0.0.1" in output
    assert list(home.iterdir()) == []
