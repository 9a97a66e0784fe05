"""Laws of the report: one file that loads nothing, holds every number and escapes its quotes."""

import base64
import copy
import html
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from _report_run import HOSTILE, SCORES, picture, write_plain_run, write_rich_run
from PIL import Image

from eval.html_report.charts import (
    MAX_POINTS,
    line_chart,
    linear_ticks,
    log_ticks,
    point_chart,
    short,
    smoothed,
    thinned,
)
from eval.html_report.formats import duration, flatten, number, size
from eval.html_report.headlines import headlines, judged_by
from eval.html_report.page import write_report
from eval.html_report.pictures import inline
from eval.html_report.score_table import described, entries, score_table

ROOT = Path(__file__).parent.parent


class Tags(HTMLParser):
    """Collects a page's tags with their attributes, and whether they nest."""

    VOID = ("meta", "img", "line", "path", "link", "br", "circle")

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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_loads_nothing(page: str):
    tags = Tags(page)
    assert tags.open == []
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "link", "iframe", "object", "base"})
    sources = [a[k] or "" for _, a in tags.found for k in ("src", "srcset") if k in a]
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    places = {attributes["id"] for _, attributes in tags.found if "id" in attributes}
    links = [a["href"] or "" for _, a in tags.found if "href" in a]
    assert links and {link.removeprefix("#") for link in links} == places
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
    for absent in ("<tr><td", "<svg", "<img", "Ablation", "Training curves", "Stages", "Prior cos"):
        assert absent not in page
    assert Tags(page).open == []


def test_the_ablation_of_real_pictures_shows_the_scores_it_has(tmp_path: Path):
    ablation = {"prior": {"clip_score": 0.611}, "text_embed": {"clip_score": 0.522}}
    (tmp_path / "eval.json").write_text(json.dumps({"ablation": ablation}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<tr><th>decoder given</th><th>clip score</th></tr>" in page
    assert re.search(r'class="chosen"><th>full chain[^<]*</th><td>0.611</td></tr>', page)
    assert "<td>0.522</td></tr>" in page


def test_a_rich_run_shows_each_part_once_and_escapes_every_quote(tmp_path: Path):
    page = write_report(write_rich_run(tmp_path)).read_text(encoding="utf-8")
    assert Tags(page).open == []
    assert "<script" not in page
    ids = re.findall(r'<section id="([a-z]+)">', page)
    assert ids == [
        "samples", "scores", "drawings", "guidance", "ablation", "edits", "neighbours", "curves",
        "stages", "provenance",
    ]  # fmt: skip
    assert page.count("<figcaption>&lt;script&gt;") == 1  # the caption under its own sample
    assert page.count('class="name">&lt;script&gt;') == 2  # a row of each strip
    assert page.index("Guidance</h2>") < page.index("What the embedding holds</h2>")
    assert "num_steps: 39 # &lt;script&gt;" in page  # a configuration
    assert "evaluation.versions.torch" in page and "c0ffee" in page
    assert "prior_weights.sha256" in page and "left out" not in page
    assert "best 10.6 at 2" in page  # of the sweep: lower is better


def test_a_training_run_alone_has_its_curves(tmp_path: Path):
    run = write_rich_run(tmp_path) / "base"
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("<svg") == 4  # loss, samples/s, and two scores over the checkpoints
    assert "num_steps: 39" in page


def test_scores_stand_beside_an_earlier_run_s_only_where_made_alike(tmp_path: Path):
    other = copy.deepcopy(SCORES)
    other["images"]["clip_score"] = 0.7
    other["images"]["fd_clip"] = 0.2
    other["features"]["inception"] |= {"n": 2500, "fd": 3.0, "digest": "another"}
    other["prior"]["cos_shuffled"] = 0.4
    other["memorisation"]["nearest"] = []
    del other["clip"]
    mine = copy.deepcopy(SCORES)
    for run, words in ((mine, "one"), (other, "two")):
        run["shapes"]["seen"] = {**SCORES["shapes"]["single"], "captions_sha256": words}
        run["shapes"]["held_out"] = {**SCORES["shapes"]["single"]}
    mine["shapes"]["held_out"]["captions_sha256"] = "one"
    table = score_table(mine, {"before": other})
    cells = {row.path: row.others[0] for group in table.groups for row in group.rows}
    assert cells["images.clip_score"].better is False
    assert cells["images.clip_score"].difference == pytest.approx(-0.046)
    assert cells["images.fd_clip"].better is True
    assert cells["features.inception.fd"].unlike == "n = 2,500"
    assert cells["features.inception.fd"].difference is None
    assert cells["clip.retrieval_at_1"].value is None
    assert cells["shapes.seen.all"].unlike == "other captions"
    assert cells["shapes.held_out.all"].unlike == "captions not told"
    assert cells["shapes.single.all"].difference == 0 and cells["shapes.single.all"].better is None
    assert cells["novel_measure.something_new"].better is None  # nobody knows which way is better


def test_every_number_is_a_row_or_stands_in_one():
    found = entries(SCORES)
    paths = {entry.path for entry in found}
    spread = {entry.path: entry.spread for entry in found}
    assert spread["features.inception.fd"] == "95 %: 12.10 to 12.60"
    assert spread["features.inception.kid"] == "± 2.0e-04"
    assert spread["images.clip_score"] == "shuffled captions 0.321"
    assert spread["shapes.held_out.relation"] == "true drawings 1.000"
    assert spread["shapes.seen.all"] == "true drawings 0.960"
    numbers = {path for path, value in flatten(SCORES).items() if isinstance(value, float)}
    folded = {path for path in numbers - paths if not path.startswith("memorisation.nearest")}
    ends = ("_ci95_low", "_ci95_high", "_std", "_error", "_shuffled", "_real_halves")
    assert all(path.endswith(ends) or ".real" in path for path in folded)


def test_a_distance_is_fid_only_where_it_may_be_quoted():
    assert described("features.inception.fd", {"quotable": True})[0] == "FID"
    assert described("features.inception.fd", {"quotable": False})[0] == "Fréchet distance"
    assert described("features.inception.fd")[0] == "Fréchet distance"
    small = copy.deepcopy(SCORES)
    small["features"]["inception"]["quotable"] = False
    assert "FID" in {headline.name for headline in headlines(SCORES)}
    assert "FID" not in {headline.name for headline in headlines(small)}
    relation = {"judge": "clip X", "judge_relation": "another CLIP than the model was trained on"}
    told = judged_by({"images": relation})
    assert told == "scored by clip X; another CLIP than the model was trained on"


def test_large_pictures_are_reduced_and_others_stay_bit_for_bit(tmp_path: Path):
    for side, kept in ((64, True), (1024, False)):
        path = tmp_path / f"{side}.png"
        Image.new("RGB", (side, side // 2), "red").save(path)
        shown = inline(path)
        content = base64.b64decode(shown.source.partition(",")[2])
        assert (content == path.read_bytes()) is kept
        with Image.open(BytesIO(content)) as image:
            assert image.size == (shown.width, shown.height)
            assert max(image.size) <= 384 and image.width == 2 * image.height


def test_a_list_names_no_file_outside_its_folder(tmp_path: Path):
    run = write_rich_run(tmp_path)
    (tmp_path / "secret.png").write_bytes(picture(5))
    line = {"file": "../../secret.png", "caption": "x", "seed": 0}
    (run / "samples" / "samples.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="expected a file in that folder"):
        write_report(run)


def test_the_script_reports_beside_earlier_runs(tmp_path: Path):
    run = write_rich_run(tmp_path)
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "eval.json").write_text(json.dumps(SCORES))
    script = [sys.executable, str(ROOT / "eval" / "report.py"), "--run", str(run)]
    both = ["--against", str(tmp_path / "before"), "--against", str(run / "eval.json")]
    done = subprocess.run([*script, *both], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {run / 'report.html'}"
    assert "<th>before</th><th>demo</th>" in (run / "report.html").read_text()
    done = subprocess.run([*script, "--against", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere: found no such file, expected the scores")


def test_mistakes_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="found no eval.json and no metrics.jsonl"):
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


def test_points_keep_their_places_and_say_which_is_best():
    chart = point_chart("fd", [(4, 13.0), (1, 14.0), (2, 10.6), (3, math.nan)], better=-1)
    assert chart and chart.told == "best 10.6 at 2" and len(chart.dots) == 3
    xs, ys = zip(*chart.dots, strict=True)
    assert list(xs) == sorted(xs) and xs[0] == chart.left and xs[-1] == pytest.approx(chart.right)
    assert max(ys) == chart.dots[1][1]  # the lowest value stands lowest
    assert point_chart("fd", [(1, 2.0)], better=1) is None


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
    told = {None: "–", 1234: "1,234", 0.5: "0.500", 0.00012: "1.2e-04", 0.00456: "0.00456"}
    told |= {12.3456: "12.35", 123.456: "123.5", "x": "x", 0.0: "0.000", -0.5: "-0.500"}
    assert {value: number(value) for value in told} == told
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
