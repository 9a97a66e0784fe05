"""Laws of the report: one file that loads nothing, holds every number and escapes its quotes."""

import base64
import html
import json
import math
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.charts import MAX_POINTS, line_chart, linear_ticks, log_ticks, short, smoothed, thinned
from eval.report import duration, flatten, judged_by, number, size, write_report

CELL = {"all": 0.512, "attribute": 0.913, "relation": 0.987}
SCORES = {
    "seconds": {"download": 7.25, "prior": 81.5},
    "clip": {"retrieval_at_1": 0.876, "n": 500},
    "prior": {"cos": 0.765, "cos_shuffled": 0.123, "retrieval_at_1": 0.432},
    "images": {
        "n": 1024,
        "fd_clip": 0.0987,
        "fd_clip_real_halves": 0.0123,
        "clip_score": 0.654,
        "clip_score_shuffled": 0.321,
        "judge": "the CLIP the model was trained on",
    },
    "shapes": {
        "single": {
            "all": 0.75,
            "attribute": 0.9,
            "attribute_error": 0.0171,
            "real": 0.97,
            "n": 100,
        },
        "seen": {**CELL, "real": 0.96, "n": 100},
        "held_out": {**CELL, "real": {"all": 0.951, "attribute": 0.99, "relation": 1.0}, "n": 100},
    },
    "ablation": {
        "true_image_embed": {"single": {"all": 0.811}, "seen": CELL, "held_out": CELL},
        "prior": {"single": {"all": 0.75}, "seen": CELL, "held_out": CELL},
        "text_embed": {"single": {"all": 0.399}, "seen": CELL, "held_out": CELL},
    },
}
HOSTILE = '<script>alert("1")</script> & a "red" cube'


class Tags(HTMLParser):
    """Collects a page's tags with their attributes, and whether they nest."""

    VOID = ("meta", "img", "line", "path", "link", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_run(root: Path) -> Path:
    run = root / "demo"
    (run / "samples").mkdir(parents=True)
    (run / "eval.json").write_text(json.dumps(SCORES))
    command = "python training/prior.py --run 'runs/<demo>'"
    rows = [
        {
            "stage": "prior",
            "seconds": 81.5,
            "images_per_second": 1234.5,
            "peak_memory_bytes": 3 * 2**30,
            "command": command,
        },
        {"stage": "download", "seconds": 725, "images_per_second": None},
    ]
    (run / "timings.json").write_text(json.dumps(rows))
    provenance = {"commit": "abc123", "snapshots": {"images": "f00d"}, "config_hash": HOSTILE}
    (run / "provenance.json").write_text(json.dumps(provenance))
    (run / "samples" / "grid.png").write_bytes(picture(0))
    (run / "samples" / "grid.json").write_text(json.dumps({"captions": [HOSTILE, "a blue ring"]}))
    (run / "samples" / "ablation.png").write_bytes(picture(1))
    for name in ("prior", "clip", "extra"):
        (run / name).mkdir()
        lines = [
            {"step": i, "samples_seen": 64 * i, "loss": 2 / i, "samples_per_second": 100 + i}
            for i in range(1, 40)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / name / "metrics.jsonl").write_text(text + '{"step": 40, "samp')
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_loads_nothing(page: str):
    tags = Tags(page)
    assert tags.open == []
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "link", "iframe", "object", "base"})
    sources = [a[k] or "" for _, a in tags.found for k in ("src", "href", "srcset") if k in a]
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(", page)


def test_the_pictures_are_inline_bit_for_bit(page: str):
    inline = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert [base64.b64decode(source) for source in inline] == [picture(0), picture(1)]


def test_every_number_of_eval_json_is_there(page: str):
    text = html.unescape(re.sub(r"<[^>]+>", "\n", page))
    lines = {line.strip() for line in text.splitlines()}
    for path, value in flatten(SCORES).items():
        assert path in lines
        assert number(value) in lines, path


def test_headlines_carry_method_count_and_judge(page: str):
    tiles = dict(re.findall(r"<li>\s*<span>([^<]+)</span>\s*<b>(.*?)</li>", page, re.DOTALL))
    assert set(tiles) >= {"CLIP score", "CLIP Fréchet distance", "Prior cosine"}
    score = tiles["CLIP score"]
    assert score.startswith("0.654<")
    assert "shuffled captions: 0.321" in score
    assert "n = 1,024" in score
    assert "scored by the CLIP the model was trained on" in score
    assert "scored by" not in tiles["Prior cosine"]
    assert "true drawings: 0.951" in tiles["Two held-out shapes, all right"]


def test_tables_and_curves(page: str):
    rows = re.findall(r"<tr><th>(?:one|two) .*?</tr>", page, re.DOTALL)
    assert [re.findall(r"± ([\d.]+)", row) for row in rows] == [
        ["0.043", "0.017"],  # sqrt(.75 * .25 / 100); an attribute's is what the scorer says
        ["0.050", "0.011"],  # sqrt(.512 * .488 / 100), sqrt(.987 * .013 / 100); it says none
        ["0.050", "0.011"],
    ]
    assert re.search(r"text embedding in place of .*?0\.399", page)
    assert "13 min 26 s" in page  # 81.5 s and 725 s together
    assert "3.0 GiB" in page and "1,234.5" in page
    runs = re.findall(r"<h3>(\w+) ", page)
    assert runs == ["clip", "prior", "extra"]
    assert page.count("<svg") == 6
    assert "39 steps, 2,496 samples" in page  # the line that a kill cut short is left out


def test_what_is_quoted_is_escaped(page: str):
    assert "<script" not in page
    assert page.count(html.escape(HOSTILE).replace("&quot;", "&#34;")) == 2
    assert "runs/&lt;demo&gt;" in page


def test_it_reads_in_the_dark_on_a_phone_and_on_paper(page: str):
    for query in ("prefers-color-scheme: dark", "max-width: 40rem", "@media print"):
        assert query in page
    assert 'name="viewport"' in page
    assert "overflow-x: auto" in page


def test_writing_again_gives_the_same_bytes(run: Path, page: str):
    assert write_report(run).read_text(encoding="utf-8") == page
    assert not list(run.glob("*.tmp"))


def test_real_pictures_need_no_shapes_and_parts_may_be_absent(tmp_path: Path):
    images = {"n": 10, "clip_score": 0.5, "judge": "a second CLIP"}
    (tmp_path / "eval.json").write_text(json.dumps({"images": images}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "scored by a second CLIP" in page
    for absent in ("<table", "<svg", "<img", "Ablation", "Training curves", "Stages", "Prior cos"):
        assert absent not in page
    assert Tags(page).open == []


def test_the_ablation_of_real_pictures_shows_the_scores_it_has(tmp_path: Path):
    ablation = {"prior": {"clip_score": 0.611}, "text_embed": {"clip_score": 0.522}}
    (tmp_path / "eval.json").write_text(json.dumps({"ablation": ablation}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<tr><th>decoder given</th><th>clip score</th></tr>" in page
    assert re.search(r'class="chosen"><th>full chain[^<]*</th><td>0.611</td></tr>', page)
    assert "<td>0.522</td></tr>" in page


def test_mistakes_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="found no eval.json"):
        write_report(tmp_path)
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval\.json: .*expected JSON"):
        write_report(tmp_path)
    (tmp_path / "eval.json").write_text("[]")
    with pytest.raises(ValueError, match=r"eval\.json: found a JSON list"):
        write_report(tmp_path)
    (tmp_path / "eval.json").write_text("{}")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "grid.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"grid\.png: .*expected a PNG"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 7), (0, 0.00042), (0, 123456), (5, 5)])
def test_linear_ticks_are_few_even_and_enclose(low: float, high: float):
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low and high <= ticks[-1] * (1 + 1e-12)
    assert len(ticks) <= 7
    assert np.allclose(np.diff(ticks), ticks[-1] - ticks[-2]) if len(ticks) > 1 else low == high


def test_log_ticks_enclose():
    assert log_ticks(0.02, 3) == pytest.approx([0.01, 0.1, 1, 10])


def test_charts_stay_inside_their_box_and_keep_their_order():
    chart = line_chart("loss", [(64.0 * i, 100 / i) for i in range(1, 1000)])
    assert chart and chart.log
    points = [tuple(map(float, p.split())) for p in chart.raw.removeprefix("M").split("L")]
    assert len(points) <= MAX_POINTS
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # the loss falls, so y, which points down, grows
    assert chart.left <= min(xs) and max(xs) <= chart.right + 0.1
    assert chart.top - 0.1 <= min(ys) and max(ys) <= chart.bottom + 0.1


def test_charts_skip_what_is_not_finite():
    assert line_chart("loss", [(1, math.nan), (2, 1.0)]) is None
    chart = line_chart("loss", [(1, 3.0), (2, math.inf), (3, 3.0)])
    assert chart and "nan" not in chart.raw and "inf" not in chart.raw


def test_smoothing_keeps_a_constant_and_thinning_keeps_the_mean():
    assert smoothed([2.0] * 9) == pytest.approx([2.0] * 9)
    points = [(float(i), float(i % 7)) for i in range(10 * MAX_POINTS)]
    thin = thinned(points)
    assert len(thin) == MAX_POINTS and thin[-1][0] == points[-1][0]
    assert np.mean([y for _, y in thin]) == pytest.approx(np.mean([y for _, y in points]))


def test_formats():
    assert [number(v) for v in (None, 1234, 0.5, 0.00012, 123.456, "x")] == [
        "–",
        "1,234",
        "0.500",
        "1.2e-04",
        "123.5",
        "x",
    ]
    assert [duration(v) for v in (None, 7.46, 725, 7380)] == [
        "–",
        "7.5 s",
        "12 min 05 s",
        "2 h 03 min",
    ]
    assert [size(v) for v in (None, 2**20, 3 * 2**29)] == ["–", "1 MiB", "1.5 GiB"]
    assert [short(v) for v in (0, 0.0312, 1500, 2e6)] == ["0", "0.0312", "1.5k", "2M"]
    assert judged_by({"images": {"judge": "scored by X"}}) == judged_by({"judge": "X"})
    assert judged_by({}) is None
