"""Laws of the report: one file that loads nothing, holds every number and escapes its quotes."""

import base64
import copy
import html
import json
import math
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from _report_run import HOSTILE, SCORES, picture, write_plain_run, write_rich_run
from PIL import Image

from eval.html_report.charts import MAX_POINTS, line_chart, point_chart
from eval.html_report.formats import flatten, number
from eval.html_report.page import write_report
from eval.html_report.pictures import inline_image
from eval.html_report.score_table import compared, described, entries, headlines, scored_by


class Tags(HTMLParser):
    """Collects a page's tags with their attributes, and whether they nest."""

    VOID = ("meta", "img", "link", "br")

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


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rich_run(tmp_path_factory.mktemp("rich"))


def test_the_page_loads_nothing(page: str):
    tags = Tags(page)
    assert tags.open == []
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "link", "iframe", "object", "base"})
    sources = [a[k] or "" for _, a in tags.found for k in ("src", "srcset") if k in a]
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    places = {a["id"] for tag, a in tags.found if tag == "section"}
    links = [a["href"] or "" for _, a in tags.found if "href" in a]
    assert links and {link.removeprefix("#") for link in links} == places
    assert not re.search(r"https?://|@import|url\(", page)


def test_the_pictures_are_inline_bit_for_bit(page: str):
    inline = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert [base64.b64decode(source) for source in inline] == [picture(0), picture(1)]


def test_every_number_of_eval_json_is_there(page: str):
    rows = re.findall(r"<td>(.*?)</td>\s*<td>(.*?)</td>", page)
    cells = {(html.unescape(name), html.unescape(value)) for name, value in rows}
    for path, value in flatten(SCORES).items():
        assert (path, number(value)) in cells


def test_headlines_have_method_count_and_scorer(page: str):
    tiles = dict(re.findall(r"<li>\s*<span>([^<]+)</span>\s*<b>(.*?)</li>", page, re.DOTALL))
    assert set(tiles) >= {"CLIP score", "CLIP Fréchet distance", "Prior cosine"}
    score = tiles["CLIP score"]
    assert score.startswith("0.654<")
    assert "shuffled captions 0.321" in score
    assert "n = 1,024" in score
    assert "scored by the CLIP the model was trained on" in score
    assert "scored by" not in tiles["Prior cosine"]
    assert "true drawings 0.951" in tiles["Two held-out shapes, all right"]


def test_tables_and_curves(page: str):
    rows = re.findall(r"<td>(?:one|two) shapes?.*?</tr>", page, re.DOTALL)
    assert [re.findall(r"± ([\d.]+)", row) for row in rows] == [
        ["0.043", "0.017"],  # sqrt(.75 * .25 / 100); an attribute's is what the scorer states
        ["0.050", "0.011"],  # sqrt(.512 * .488 / 100), sqrt(.987 * .013 / 100); it states none
        ["0.050", "0.011"],
    ]
    assert re.search(r"text embedding in place of .*?0\.399", page, re.DOTALL)
    assert "13 min 26 s" in page  # 81.5 s and 725 s together
    assert "3.0 GiB" in page and "1,234.5" in page
    runs = re.findall(r"<h3>(\w+) <span", page)
    assert runs == ["clip", "prior", "extra"]
    assert page.count("<svg") == 6
    assert "39 steps, 2,496 samples" in page  # the line that a kill cut short is left out


def test_what_is_quoted_is_escaped(page: str):
    assert "<script" not in page
    assert html.unescape(page).count(HOSTILE) == 2
    assert "runs/&lt;demo&gt;" in page


def test_it_reads_in_the_dark_on_a_phone_and_on_paper(page: str):
    for query in ("prefers-color-scheme: dark", "max-width: 40rem", "@media print"):
        assert query in page
    assert 'name="viewport"' in page
    assert "overflow-x: auto" in page


def test_writing_again_gives_the_same_bytes(run: Path, page: str):
    assert write_report(run).read_text(encoding="utf-8") == page


def test_real_pictures_need_no_shapes_and_parts_may_be_absent(tmp_path: Path):
    images = {"n": 10, "clip_score": 0.5, "judge": "a second CLIP"}
    (tmp_path / "eval.json").write_text(json.dumps({"images": images}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "scored by a second CLIP" in page
    for absent in ("<svg", "<img", "Ablation", "Training curves", "Stages", "Prior cos"):
        assert absent not in page
    assert Tags(page).open == []


def test_the_ablation_of_real_pictures_shows_the_scores_it_has(tmp_path: Path):
    ablation = {"prior": {"clip_score": 0.611}, "text_embed": {"clip_score": 0.522}}
    (tmp_path / "eval.json").write_text(json.dumps({"ablation": ablation}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.search(r"<th>decoder given</th>\s*<th>clip score</th>\s*</tr>", page)
    assert re.search(r"<td>full chain[^<]*</td>\s*<td>0.611</td>", page)
    assert "<td>0.522</td>" in page


def test_a_rich_run_shows_each_part_once_and_escapes_every_quote(rich: Path):
    page = write_report(rich).read_text(encoding="utf-8")
    assert Tags(page).open == []
    assert "<script" not in page
    ids = re.findall(r'<section id="([a-z]+)">', page)
    assert ids == [
        "samples", "scores", "drawings", "guidance", "ablation", "edits", "neighbours", "curves",
        "stages", "provenance",
    ]  # fmt: skip
    assert page.count('<figcaption class="">&lt;script&gt;') == 1  # under its own sample
    assert page.count('class="name">&lt;script&gt;') == 2  # a row of each strip
    assert page.index("Guidance</h2>") < page.index("What the embedding holds</h2>")
    assert "num_steps: 39 # &lt;script&gt;" in page  # a configuration
    assert "evaluation.versions.torch" in page and "c0ffee" in page
    assert "prior_weights.sha256" in page and "left out" not in page
    assert "best 10.6 at 2" in page  # of the sweep: lower is better


def test_a_training_run_alone_has_its_curves(rich: Path):
    page = write_report(rich / "base").read_text(encoding="utf-8")
    assert page.count("<svg") == 4  # loss, samples/s, and two scores over the checkpoints
    assert "num_steps: 39" in page


def test_scores_are_compared_with_an_earlier_run_s_only_where_made_alike():
    other = copy.deepcopy(SCORES)
    other["images"]["clip_score"] = 0.7
    other["images"]["fd_clip"] = 0.2
    other["features"]["inception"] |= {"n": 2500, "fd": 3.0, "digest": "another"}
    other["prior"]["cos_shuffled"] = 0.4
    other["memorisation"]["nearest"] = []
    del other["clip"]
    own = copy.deepcopy(SCORES)
    for run, captions in ((own, "one"), (other, "two")):
        run["shapes"]["seen"] = {**SCORES["shapes"]["single"], "captions_sha256": captions}
        run["shapes"]["held_out"] = {**SCORES["shapes"]["single"]}
    own["shapes"]["held_out"]["captions_sha256"] = "one"
    before = {entry.path: entry for entry in entries(other)}
    cells = {entry.path: compared(entry, before.get(entry.path)) for entry in entries(own)}
    assert cells["images.clip_score"] == "0.700 (−0.046, worse)"
    assert cells["images.fd_clip"] == "0.200 (−0.101, better)"
    assert cells["features.inception.fd"] == "3.000 (not compared: n = 2,500)"
    assert cells["clip.retrieval_at_1"] == "–"
    assert cells["shapes.seen.all"] == "0.750 (not compared: other captions)"
    assert cells["shapes.held_out.all"] == "0.750 (not compared: captions not stated)"
    assert cells["shapes.single.all"] == "0.750 (equal)"
    other["novel_measure"]["something_new"] = 0.5  # of which nobody knows which way is better
    (new,) = (entry for entry in entries(own) if entry.path.startswith("novel"))
    (old,) = (entry for entry in entries(other) if entry.path.startswith("novel"))
    assert compared(new, old) == "0.500 (+0.277)"


def test_every_number_has_a_row_or_is_in_the_row_of_its_score():
    found = list(entries(SCORES))
    paths = {entry.path for entry in found}
    spread = {entry.path: entry.spread for entry in found}
    assert spread["features.inception.fd"] == "95 %: 12.10 to 12.60"
    assert spread["features.inception.kid"] == "± 2.0e-04"
    assert spread["images.clip_score"] == "shuffled captions 0.321"
    assert spread["shapes.held_out.relation"] == "± 0.011, true drawings 1.000"
    assert spread["shapes.seen.all"] == "± 0.050, true drawings 0.960"
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
    assert "FID" in {tile["name"] for tile in headlines(SCORES)}
    assert "FID" not in {tile["name"] for tile in headlines(small)}
    relation = {"judge": "clip X", "judge_relation": "another CLIP than the model was trained on"}
    text = scored_by({"images": relation})
    assert text == "scored by clip X; another CLIP than the model was trained on"
    assert scored_by({"images": {"judge": "scored by X"}}) == scored_by({"judge": "X"})
    assert scored_by({}) == ""


def test_large_pictures_are_reduced_and_others_stay_bit_for_bit(tmp_path: Path):
    for side, kept in ((64, True), (1024, False)):
        path = tmp_path / f"{side}.png"
        Image.new("RGB", (side, side // 2), "red").save(path)
        shown = inline_image(path)
        content = base64.b64decode(shown["source"].partition(",")[2])
        assert (content == path.read_bytes()) is kept
        with Image.open(BytesIO(content)) as image:
            assert image.size == (shown["width"], shown["height"])
            assert max(image.size) <= 384 and image.width == 2 * image.height


def test_a_list_names_no_file_outside_its_folder(tmp_path: Path):
    run = tmp_path / "runs" / "demo"
    (run / "samples").mkdir(parents=True)
    (run / "eval.json").write_text("{}")
    (tmp_path / "runs" / "secret.png").write_bytes(picture(5))
    line = {"file": "../../secret.png", "caption": "x", "seed": 0}
    (run / "samples" / "samples.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="expected a file in that folder"):
        write_report(run)


def test_the_script_reports_beside_earlier_runs(tmp_path: Path, run_here):
    run = tmp_path / "demo"
    for folder in (run, tmp_path / "before"):
        folder.mkdir()
        (folder / "eval.json").write_text(json.dumps(SCORES))
    both = ["--against", str(tmp_path / "before"), "--against", str(run / "eval.json")]
    code, output, errors = run_here("eval/report.py", "--run", str(run), *both)
    assert code == 0, errors
    assert output.splitlines()[-1] == f"report: {run / 'report.html'}"
    page = (run / "report.html").read_text()
    assert re.search(r"<th>demo</th>\s*<th>before</th>\s*<th>demo</th>", page)
    with pytest.raises(ValueError, match="nowhere: found no such file, expected the scores"):
        write_report(run, [Path("nowhere")])


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


def lines_of(chart: str) -> list[np.ndarray]:
    """Return the points of a chart's coloured lines, [N, 2] each; y points down."""
    paths = re.findall(r'<path d="([^"]*)" style="fill: none; stroke: #4a80cc', chart)
    return [np.array(re.findall(r"[\d.]+ [\d.]+", path)) for path in paths]


def test_a_curve_is_thinned_and_keeps_its_order():
    chart = line_chart("loss", [(64.0 * i, 100 / i) for i in range(1, 1000)])
    assert chart and "log scale" in chart.caption and "last 0.1" in chart.caption
    raw, mean = ([tuple(map(float, p.split())) for p in line] for line in lines_of(chart.svg))
    assert len(mean) <= MAX_POINTS
    for points in (raw, mean):
        xs, ys = zip(*points, strict=True)
        assert list(xs) == sorted(xs) and list(ys) == sorted(ys)  # the loss falls


def test_the_running_mean_of_a_constant_is_the_constant():
    chart = line_chart("loss", [(float(i), 2.0) for i in range(9)])
    assert chart
    heights = {point.split()[1] for line in lines_of(chart.svg) for point in line}
    assert len(heights) == 1


def test_points_keep_their_places_and_the_best_is_stated():
    chart = point_chart("fd", [(4, 13.0), (1, 14.0), (2, 10.6), (3, math.nan)], better=-1)
    assert chart and "best 10.6 at 2" in chart.caption and chart.svg.count("<use") == 3
    assert point_chart("fd", [(1, 2.0)], better=1) is None


def test_charts_leave_out_what_is_not_finite():
    assert line_chart("loss", [(1, math.nan), (2, 1.0)]) is None
    chart = line_chart("loss", [(1, 3.0), (2, math.inf), (3, 3.0)])
    assert chart and all(len(line) == 2 for line in lines_of(chart.svg))
