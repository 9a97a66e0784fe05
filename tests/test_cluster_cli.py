"""The command line: names that do not exist, differences in YAML, and what a script exits with."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from cluster.base import machine
from cluster.base.cli import merged, options_of, parse, read_yaml, run_script, to_yaml
from cluster.base.options import flag_of
from training.config import PRESETS, ClipRunConfig, DecoderRunConfig, PriorRunConfig

CONFIGS = {"clip": ClipRunConfig, "prior": PriorRunConfig, "decoder": DecoderRunConfig}
SHIPPED = sorted(f"{path.parent.name}_{path.stem}" for path in PRESETS.glob("*/*.yaml"))


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Sizes."""

    width: int = 8
    """channels"""
    mult: tuple[int, ...] = (1, 2)
    """multipliers"""
    kind: Literal["a", "b"] = "a"
    """kind"""


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A script's configuration."""

    inner: Inner = field(default_factory=Inner)
    """sizes"""
    rate: float = 0.1
    """learning rate"""
    whiten: bool = True
    """whiten"""
    port: int | None = None
    """port"""
    num_steps: int = 10
    """steps"""


def read(*argv: str) -> Outer:
    return parse(Outer, argv=argv)


# -- flags -----------------------------------------------------------------------------------------


def test_flags_override_defaults():
    found = read("--inner.width", "16", "--rate=0.5", "--no-whiten", "--port", "0", "--num-steps=3")
    expected = Outer(inner=Inner(width=16), rate=0.5, whiten=False, port=0, num_steps=3)
    assert found == expected
    assert read("--inner.mult", "1", "2", "4").inner.mult == (1, 2, 4)
    assert read("--num_steps", "3").num_steps == 3 and read() == Outer()


def test_a_value_is_utf8_and_a_tilde_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    """Also after "=", where no shell replaces it."""

    @dataclass(frozen=True, kw_only=True)
    class Names:
        out: str = ""
        """folder"""

    monkeypatch.setenv("HOME", "/home/me")
    for argv in (["--out=~/x"], ["--out", "~/x"]):
        assert parse(Names, argv=argv).out == "/home/me/x"
    assert parse(Names, argv=["--out=a~/x"]).out == "a~/x"
    with pytest.raises(ValueError, match=r"--out: found 'bad \\udcff', bytes that are not UTF-8"):
        parse(Names, argv=["--out", "bad \udcff"])


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--num-step", "--num-steps"), ("--inner.widht", "--inner.width"), ("--raet", "--rate"),
        ("--inner.kin=a", "--inner.kind"), ("--no-whitn", "--whiten"), ("--confg", "--config"),
        ("--presets", "--preset"),
    ],
)  # fmt: skip
def test_an_unknown_flag_names_the_nearest(flag: str, nearest: str):
    with pytest.raises(ValueError, match=f"unknown flag {flag.split('=')[0]}") as caught:
        read(flag, "3")
    assert str(caught.value).endswith(f"did you mean {nearest}?")


@dataclass(frozen=True, kw_only=True)
class HandingOn:
    """A script that calls another."""

    options: str = ""
    """of the other"""


@pytest.mark.parametrize("options", ["--prior-steps 2 --seed 1", "--seed 1"])
def test_options_to_hand_on_are_a_value(options: str):
    assert parse(HandingOn, argv=["--options", options]).options == options
    assert parse(HandingOn, argv=[f"--options={options}"]).options == options


def test_a_flag_like_nothing_lists_them_all():
    with pytest.raises(ValueError, match="unknown flag --zzz; known: --inner.width, .*--num-steps"):
        read("--zzz")


@dataclass(frozen=True, kw_only=True)
class Refusing:
    """A configuration with a law of its own."""

    inner: Inner = field(default_factory=Inner)
    """sizes"""
    num_steps: int = 10
    """steps"""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps: found {self.num_steps}, " + "expected at least 1 " * 20)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-steps", "0"], "num_steps: found 0, expected at least 1"),
        (["--num-steps", "x"], "--num-steps: found 'x', expected an integer"),
        (["--num-steps"], "--num-steps: found nothing after it, expected an integer"),
        (["--inner.kind", "c"], "--inner.kind: found 'c', expected one of a, b"),
        (["stray"], "found 'stray', expected a flag before it"),
    ],
)
def test_a_refused_value_is_reported_in_one_line_without_a_box(argv, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: parse(Refusing, argv=argv) and 0)
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"error: {message}")
    assert not set(lines[0]) & set("│╭╮─") and "help" not in lines[0]


def test_a_nested_refusal_names_its_field_once(capsys):
    argv = ["--train.global-batch-size", "7", "--train.num-workers", "2"]
    with pytest.raises(ValueError) as caught:
        parse(PriorRunConfig, presets=PRESETS / "prior", argv=argv)
    message = "train.global_batch_size: found 7, expected a multiple of 2 workers"
    assert str(caught.value) == message and capsys.readouterr() == ("", "")


def test_any_script_can_be_run_dry(capsys, tmp_path: Path):
    with pytest.raises(SystemExit) as caught:
        read("--rate", "0.5", "--dry-run", "--inner.width=16")
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert caught.value.code == 0
    assert read("--config", str(path)) == Outer(inner=Inner(width=16), rate=0.5)

    def refuse(config: Outer) -> None:
        raise ValueError(f"rate: found {config.rate}")

    with pytest.raises(ValueError, match="rate: found 0.5"):
        parse(Outer, argv=["--rate", "0.5", "--dry-run"], check=refuse)
    assert capsys.readouterr().out == "" and parse(Outer, argv=[], check=refuse) == Outer()


def test_help_lists_hidden_flags_on_request_alone(capsys):
    shown = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            parse(PriorRunConfig, presets=PRESETS / "prior", argv=[flag])
        assert caught.value.code == 0
        shown.append(capsys.readouterr().out)
    names = [name for name, field in options_of(PriorRunConfig).items() if field.option.hidden]
    assert names and not any(f"{flag_of(name)} " in shown[0] for name in names)
    assert all(flag_of(name) in shown[1] for name in names)
    footer = f"--help-all lists {len(names)} more flags"
    assert shown[0].splitlines()[-1].startswith(footer) and footer not in shown[1]


def test_help_shows_the_values_of_a_preset(capsys):
    paper = parse(PriorRunConfig, presets=PRESETS / "prior", argv=["--preset", "paper"])
    with pytest.raises(SystemExit):
        parse(PriorRunConfig, presets=PRESETS / "prior", argv=["--preset", "paper", "--help"])
    assert f"(default: {paper.train.batch.global_batch_size})" in capsys.readouterr().out


# -- YAML ------------------------------------------------------------------------------------------


def test_yaml_holds_differences_and_flags_override_it(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("inner:\n  width: 16\n  mult: [1, 4]\nrate: 1e-3\nport: 9000\n")
    found = read("--config", str(path), "--inner.width", "32")
    assert found == Outer(inner=Inner(width=32, mult=(1, 4)), rate=1e-3, port=9000)
    (tmp_path / "d.yaml").write_text("rate: 2\n")
    assert read(f"--config={path}", "--config", str(tmp_path / "d.yaml")).rate == 2.0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("num_step: 3", "unknown key 'num_step'; did you mean num_steps?"),
        ("inner:\n  widht: 3", "unknown key 'inner.widht'; did you mean inner.width?"),
        ("inner: 3", "inner: found 3, expected a mapping of fields"),
        ("num_steps: many", "num_steps: found 'many', expected an integer"),
        ("inner:\n  kind: c", "inner.kind: found 'c', expected one of a, b"),
        ("num_steps: true", "num_steps: found True, expected an integer"),
        ("whiten: 1", "whiten: found 1, expected true or false"),
        ("- 1\n- 2", "found a list, expected a mapping of fields"),
        ("a: [", "expected YAML"),
    ],
)
def test_a_wrong_file_names_its_place_and_the_nearest_key(text: str, problem: str, tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read("--config", str(path))
    assert str(path) in str(caught.value) and problem in str(caught.value)


def test_missing_files_and_values_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="none.yaml: found no such file"):
        read("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match="--config: found nothing after it"):
        read("--config")
    with pytest.raises(ValueError, match="preset: found 'mini', expected one of none"):
        read("--preset", "mini")
    with pytest.raises(ValueError, match="preset: found 'dbug', expected one of debug, demo"):
        parse(PriorRunConfig, presets=PRESETS / "prior", argv=["--preset", "dbug"])


@pytest.mark.parametrize(
    ("name", "flags", "right"),
    [
        ("prior", "--preset paper --prior autoregressive", "--preset paper_ar"),
        ("prior", "--preset modern --prior regression", "--preset debug or demo or mini"),
        ("decoder", "--preset paper --stage up256", "--preset paper_up256"),
        ("decoder", "--preset paper --stage up1024", "--preset paper_up1024"),
        ("decoder", "--preset karlo --stage up256", "--preset karlo_up256"),
        ("decoder", "--preset mini --stage up256", "--preset mini_up"),
    ],
)
def test_a_preset_without_sizes_for_the_chosen_kind_is_refused(name: str, flags: str, right: str):
    with pytest.raises(ValueError, match=f"preset: found .*, which has no sizes .*{right}$"):
        parse(CONFIGS[name], presets=PRESETS / name, argv=flags.split())


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "--train.learning-rate"), ("--batch-size", "--train.global-batch-size"),
        ("--steps", "--train.num-steps"), ("--output", "--run"), ("--wd", "--train.weight-decay"),
        ("--gpus", "--train.num-workers"), ("--train.bf16", "--train.precision"),
        ("--learning-rate", "--train.learning-rate"), ("--no-compile", "--train.compile"),
        ("--width", "--diffusion.width or --autoregressive.width or --regression.width"),
    ],
)  # fmt: skip
def test_an_unknown_flag_names_the_one_that_means_it(flag: str, meant: str):
    with pytest.raises(ValueError, match=f"unknown flag {flag}; did you mean {meant}\\?$"):
        parse(PriorRunConfig, argv=[flag, "3"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_configuration_reads_back_as_it_was(name: str, tmp_path: Path):
    path = tmp_path / "config.yaml"
    presets = [stem.partition("_")[2] for stem in SHIPPED if stem.startswith(f"{name}_")]
    assert presets
    for preset in presets:
        config = parse(CONFIGS[name], presets=PRESETS / name, argv=["--preset", preset])
        path.write_text(to_yaml(config))
        assert merged(CONFIGS[name](), read_yaml(path), str(path)) == config
        assert parse(CONFIGS[name], argv=["--config", str(path)]) == config


# -- the machine -----------------------------------------------------------------------------------


def test_threads_are_an_equal_share_of_the_cores_that_the_cgroup_admits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {*range(16)}, raising=False)
    quota = tmp_path / "cpu.max"
    for text, cores in (("max 100000", 16), ("600000 100000", 6), ("50000 100000", 1), ("", 16)):
        quota.write_text(text)
        assert machine.available_cpus(quota) == cores
    assert machine.available_cpus(tmp_path / "absent") == 16


def test_memory_is_what_the_cgroup_admits(tmp_path: Path):
    whole, limit = machine.total_memory(tmp_path / "absent"), tmp_path / "memory.max"
    assert whole > 1 << 28
    for text, expected in (("max", whole), (whole // 2, whole // 2), (2 * whole, whole)):
        limit.write_text(f"{text}\n")
        assert machine.total_memory(limit) == expected
    assert machine.threads_for(3, 8) == 3 and machine.threads_for(None, 100) == 1


# -- exit codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--diffusion.widht", "3"), "flag --diffusion.widht; did you mean --diffusion.width?"),
        (("--train.zero-stage", "7"), "--train.zero-stage"),
        (("--train.num-steps", "0"), "train.num_steps: found 0, expected at least 1"),
        (("--embeds", "nowhere"), "nowhere"),
    ],
)
def test_a_wrong_request_is_reported_on_stderr_and_exits_2(
    arguments: tuple[str, ...], problem: str, tmp_path: Path, monkeypatch, run_here
):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_here("training/prior.py", *arguments)
    assert code == 2 and problem in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stem",
    [
        pytest.param(stem, marks=[pytest.mark.slow] if re.search("paper|karlo", stem) else [])
        for stem in SHIPPED
    ],
)
def test_every_shipped_preset_can_be_run_dry(
    stem: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The count shown is the model's own, and nothing is allocated to count it."""
    from models.costs import num_parameters
    from training.runs.dry_run import dry_run
    from training.tasks.clip import clip_model
    from training.tasks.networks import decoder_model, prior_model

    monkeypatch.chdir(tmp_path)
    kind, _, preset = stem.partition("_")
    config = parse(CONFIGS[kind], presets=PRESETS / kind, argv=["--preset", preset, "--dry-run"])
    build = {"clip": clip_model, "prior": prior_model, "decoder": decoder_model}[kind]
    assert dry_run(config, build) == 0
    message = capsys.readouterr().out
    assert "\nparameters: " in message and list(tmp_path.iterdir()) == []
    if preset in ("debug", "debug_up", "demo"):  # what is allocated has as many
        assert f"\nparameters: {num_parameters(build(config)):,}\n" in message
    described = message.split("parameters: ")[0]
    assert merged(CONFIGS[kind](), yaml.safe_load(described), "message") == config


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 0, 0, ""),
        (lambda: 1, 1, ""),
        (lambda: (_ for _ in ()).throw(ValueError("two\n  lines")), 2, "error: two lines\n"),
        (lambda: (_ for _ in ()).throw(FileNotFoundError(2, "No such file", "x")), 2,
         "error: [Errno 2] No such file: 'x'\n"),
        (lambda: (_ for _ in ()).throw(FloatingPointError("the loss")), 1, "error: the loss\n"),
        (lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")), 1,
         "error: [Errno 28] No space left on device; rerun the same command when that is mended\n"),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt), 1,
         "interrupted; rerun the same command to continue\n"),
    ],
)  # fmt: skip
def test_a_script_ends_with_a_code_and_at_most_one_line(
    outcome, code: int, message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MINIDALLE2_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: next(outcome()) if hasattr(outcome(), "send") else outcome())
    assert caught.value.code == code and capsys.readouterr().err == message


def test_a_bug_is_not_taken_for_a_wrong_request():
    with pytest.raises(RuntimeError, match="a bug"):
        run_script(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
