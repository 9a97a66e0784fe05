"""Laws of README.md, docs/ and the first screen of each script: every command parses, every path
exists, every count is true."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(
    path
    for folder in ("ingest", "training", "eval", "cluster")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
MAX_README_LINES = 150
NO_COMMANDS = ("language-model", "CONTRIBUTING")
FOLDERS = "ingest|models|training|eval|cluster|tests|benchmarks|docs"
MADE = ("data/", "runs/", "benchmarks/measured.jsonl")  # what a user's commands make


def commands(page: Path) -> Iterator[str]:
    """Yield every command of a page, or of a script's docstring: lines that start one, with those
    that continue it, and commands quoted in the text or inside another."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    text = re.sub(r"\\\n\s+", "", text)
    for line in text.splitlines():
        yield from (found.strip() for found in re.findall(rf"python (?:{FOLDERS})/[^`;]*", line))
        yield from re.findall(r'"(python [^"]+)"', line)


def run_dry(script: str, argv: list[str]) -> None:
    """Run a script's own command line with --dry-run; ValueError unless it ends well."""
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", home)
        token = Path(home) / ".ray" / "auth_token"  # a copy of the head's
        token.parent.mkdir()
        token.touch(mode=0o600)
        token.write_text("f" * 64)
        patch.setattr(sys, "argv", [str(ROOT / script), *argv, "--dry-run"])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(sys.argv[0], run_name="__main__")
    if caught.value.code:
        raise ValueError(f"exit code {caught.value.code}")


def config_of(words: list[str]) -> Any:
    """Parse a command as its script does, without running it."""
    import judge
    import pictures

    from cluster.base.cli import parse
    from eval import clip as eval_clip
    from eval import fid, report, sample, sweep, watch
    from eval.sampling.edits import COMMANDS
    from ingest import adopt, download, embed
    from training import convert, reconstruct_ema
    from training.config import PRESETS, ClipRunConfig, DecoderRunConfig, PriorRunConfig

    script, argv = words[1], words[2:]
    if script.startswith("cluster/"):
        return run_dry(script, argv)
    if script == "eval/sample.py" and argv and argv[0] in COMMANDS:
        return parse(COMMANDS[argv[0]], argv=argv[1:])
    classes: dict[str, tuple[type, Path | None]] = {
        "benchmarks/judge.py": (judge.Config, None),
        "benchmarks/pictures.py": (pictures.Config, None),
        "ingest/adopt.py": (adopt.AdoptConfig, None),
        "ingest/download.py": (download.DownloadConfig, None),
        "ingest/embed.py": (embed.EmbedConfig, None),
        "training/clip.py": (ClipRunConfig, PRESETS / "clip"),
        "training/prior.py": (PriorRunConfig, PRESETS / "prior"),
        "training/decoder.py": (DecoderRunConfig, PRESETS / "decoder"),
        "training/convert.py": (convert.ConvertConfig, None),
        "training/reconstruct_ema.py": (reconstruct_ema.EmaConfig, None),
        "eval/sample.py": (sample.SampleConfig, None),
        "eval/fid.py": (fid.FidConfig, None),
        "eval/clip.py": (eval_clip.ClipScoreConfig, None),
        "eval/report.py": (report.ReportConfig, None),
        "eval/watch.py": (watch.RunWatchConfig, None),
        "eval/sweep.py": (sweep.SweepConfig, None),
    }
    kind, presets = classes[script]
    return parse(kind, presets=presets, argv=argv)


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda page: page.stem)
def test_every_command_parses(page: Path):
    found = [command for command in commands(page) if "..." not in command]
    assert found or page.stem in NO_COMMANDS
    for command in found:
        words = shlex.split(command.partition(" -- ")[0], comments=True)
        try:
            config_of(words)
        except (ValueError, SystemExit, KeyError) as error:
            pytest.fail(f"{page.name}: {command}: {error!r}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_path_exists(page: Path):
    text = page.read_text(encoding="utf-8")
    quoted = re.findall(r"`([^`\n]+)`", text)
    paths = [word for part in quoted for word in part.split() if "/" in word]
    inside = [path.partition(":")[0] for path in paths if re.match(rf"(?:{FOLDERS})/", path)]
    missing = [p for p in inside if not p.startswith(MADE) and not any(ROOT.glob(p.rstrip("/")))]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    assert missing + [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_fits_a_screen_or_two():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= MAX_README_LINES


def test_the_readmes_python_runs(write_chain: Callable[..., dict[str, Path]], tmp_path: Path):
    """The Python of README.md runs as it is, on the folders of an untrained chain."""
    from models.convert.runs import load_clip

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(code) == 1
    runs = write_chain(tmp_path / "runs" / "demo", load_clip("tiny:random"))
    runs["decoder"].rename(tmp_path / "runs" / "demo" / "base")
    runs["upsampler"].rename(tmp_path / "runs" / "demo" / "up")
    done = subprocess.run(
        [sys.executable, "-c", code[0]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_that_a_text_names_is_one_of_the_script_it_names(page: Path):
    """`--flag` in the running text belongs to some script; its own is the one named after `of`."""
    text = " ".join(page.read_text(encoding="utf-8").split())
    for flags, script in re.findall(
        r"((?:`--[^`]+`(?: and |, )?)+) of `([a-z]+/[a-z]+\.py)`", text
    ):
        for flag in re.findall(r"`(--[^`]+)`", flags):
            words = shlex.split(f"python {script} {flag}")
            try:
                config_of([*words, *(["1"] if len(words) == 3 else [])])
            except (ValueError, SystemExit) as error:
                assert "unknown flag" not in str(error), f"{page.name}: {flag} of {script}"


def test_tokens_are_those_that_the_page_on_text_shows():
    from models.tokenizers import VOCAB_SIZE, tokenizer

    text = (ROOT / "docs" / "text.md").read_text(encoding="utf-8")
    short, long = tokenizer(77), tokenizer(256)
    shown = [int(word) for word in re.findall(r"\n    (49406 [\d ]+)\n", text)[0].split()]
    for caption in ("a red cube", "A Red  Cube"):
        row = short([caption])[0]
        assert row[row != 0].tolist() == shown
    assert f"{VOCAB_SIZE:,}" in text
    assert len([token for token in short(["minidalle2"])[0] if token]) == 4 + 2
    many = " ".join(["cube"] * 100)
    assert short([many])[0][-1] == shown[-1] and (long([many])[0] != 0).sum() == 102


def test_sizes_are_those_that_the_page_on_smaller_models_shows():
    import torch

    from cluster.base.cli import parse
    from models.costs import num_parameters
    from training.config import PRESETS, DecoderRunConfig, PriorRunConfig
    from training.tasks.networks import decoder_model, prior_model

    text = (ROOT / "docs" / "smaller-model.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \|", text)
    assert [name for name, *_ in rows] == ["debug", "demo", "mini", "modern", "paper"]
    for name, *shown in rows[:3]:  # the large ones take a minute to be laid out
        prior = parse(PriorRunConfig, presets=PRESETS / "prior", argv=["--preset", name])
        decoder = parse(DecoderRunConfig, presets=PRESETS / "decoder", argv=["--preset", name])
        with torch.device("meta"):
            found = [num_parameters(prior_model(prior)), num_parameters(decoder_model(decoder))]
        assert [f"{count:,}" for count in found] == shown, name


SCORED = re.compile(r"\b(FD|FID|KID|CMMD|CLIP score|everything right|all right)\b", re.I)


def test_every_table_that_scores_pictures_names_its_judge():
    """In the paragraph before or after it: one that the model was not trained on, or that it has
    none."""
    tables = 0
    for page in [*PAGES, ROOT / "benchmarks" / "gpu.md"]:
        blocks = ["", *page.read_text(encoding="utf-8").split("\n\n"), ""]
        for before, table, after in zip(blocks, blocks[1:], blocks[2:], strict=False):
            header = table.partition("\n|--")[0]
            if table.startswith("|") and SCORED.search(header):
                tables += 1
                assert re.search(r"\bjudge", f"{before} {header} {after}"), f"{page.name}: {header}"
    assert tables >= 3
