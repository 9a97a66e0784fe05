"""What is left out of a list, and why: each filter at its limits, in every schema of the family."""

import random
import unicodedata
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _lists import download_of, write_list

from ingest.download import main
from ingest.fetching.decode import ImageLimits, header_problem
from ingest.lists import duplicates
from ingest.lists.filters import (
    MAX_CAPTION_CHARS,
    FilterConfig,
    RowFilter,
    normalise_caption,
    normalised,
)

LAION_5B = ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "LANGUAGE", "punsafe", "pwatermark")
LAION_400M = ("URL", "TEXT", "similarity", "LICENSE", "NSFW")
LAION_AESTHETIC = ("URL", "TEXT", "hash", "aesthetic", "punsafe", "pwatermark")
COYO = (
    "url", "text", "clip_similarity_vitb32", "nsfw_score_opennsfw2", "watermark_score",
    "aesthetic_score_laion_v2",
)  # fmt: skip
DATACOMP = ("uid", "url", "text", "sha256", "face_bboxes", "clip_b32_similarity_score")


def problem(config: FilterConfig, **row) -> str | None:
    """Return why a row is left out, of the list that has it alone."""
    row = {"url": "u", "caption": "a cat", **row}
    rows = pa.table({name: [value] for name, value in row.items()})
    return RowFilter.open(config, rows.schema).problems(rows).get(0)


def schema_of(names: tuple[str, ...]) -> pa.Schema:
    tags = {"NSFW", "nsfw", "LANGUAGE", "language", "sha256", "url", "URL", "text", "TEXT"}
    return pa.schema([(name, pa.string() if name in tags else pa.float64()) for name in names])


@pytest.mark.parametrize(
    ("limit", "value", "column", "kept", "left_out", "reason"),
    [
        ("min_similarity", 0.3, "similarity", 0.3, 0.299, "low_similarity"),
        ("min_aesthetic", 5.0, "aesthetic", 7, 4.9, "low_aesthetic"),
        ("max_punsafe", 0.1, "punsafe", 0.1, 0.11, "unsafe"),
        ("max_pwatermark", 0.0, "pwatermark", 0.0, 1e-6, "watermarked"),
        ("nsfw", ("UNLIKELY", "UNSURE"), "NSFW", "unlikely", "NSFW", "nsfw"),
        ("language", ("en",), "LANGUAGE", "en", "eng", "language"),
    ],
)
def test_a_limit_includes_itself_and_null_has_its_own_reason(
    limit: str, value, column: str, kept, left_out, reason: str
):
    config = FilterConfig(**{limit: value})
    assert problem(config, **{column: kept}) is None
    assert problem(config, **{column: left_out}) == reason
    lenient = replace(config, null_scores=True)
    for null in (None, float("nan")):
        assert problem(config, **{column: null}) == "null_score"
        assert problem(lenient, **{column: null}) is None


@pytest.mark.parametrize(
    ("limits", "caption", "expected"),
    [
        ({"min_caption_chars": 5}, "a cat", None),
        ({"min_caption_chars": 6}, "a cat", "short_caption"),
        ({"min_caption_chars": 1}, None, "short_caption"),
        ({"max_caption_chars": 5}, "a cat", None),
        ({"max_caption_chars": 4}, "a cat", "long_caption"),
        ({"min_caption_tokens": 2}, "a cat", None),
        ({"min_caption_tokens": 3}, "a cat", "few_tokens"),
        ({"max_caption_tokens": 1}, "a cat", "many_tokens"),
        ({}, None, None),
    ],
)
def test_captions_are_measured_in_characters_and_tokens(limits: dict, caption, expected):
    assert problem(FilterConfig(**limits), caption=caption) == expected


def test_tokens_are_those_of_clip():
    from open_clip.tokenizer import SimpleTokenizer

    captions = ["a cat", "antidisestablishmentarianism", "", "\u732b"]
    lengths = [len(SimpleTokenizer().encode(caption)) for caption in captions]
    rows = pa.table({"url": ["u"] * 4, "caption": captions})
    for limit in range(1, max(lengths) + 1):
        found = RowFilter.open(FilterConfig(min_caption_tokens=limit), rows.schema).problems(rows)
        assert found == {i: "few_tokens" for i, length in enumerate(lengths) if length < limit}


@pytest.mark.parametrize(
    ("schema", "limits"),
    [
        (LAION_5B, {"min_similarity", "max_punsafe", "max_pwatermark", "language"}),
        (LAION_400M, {"min_similarity", "nsfw"}),
        (LAION_AESTHETIC, {"min_aesthetic", "max_punsafe", "max_pwatermark"}),
        (COYO, {"min_similarity", "min_aesthetic", "max_punsafe", "max_pwatermark"}),
        (DATACOMP, {"min_similarity"}),
    ],
)
def test_each_schema_of_the_family_has_its_filters(schema: tuple[str, ...], limits: set[str]):
    all_of_them = {
        "min_similarity": 0.1, "min_aesthetic": 0.1, "max_punsafe": 0.1, "max_pwatermark": 0.1,
        "nsfw": ("x",), "language": ("x",),
    }  # fmt: skip
    for name, value in all_of_them.items():
        config = FilterConfig(**{name: value})
        if name in limits:
            (column,) = RowFilter.open(config, schema_of(schema)).columns.values()
            assert column in schema
            continue
        with pytest.raises(ValueError, match=f"--filters.{name.replace('_', '-')}: no column"):
            RowFilter.open(config, schema_of(schema))


def test_a_column_of_another_type_and_senseless_limits_are_refused():
    words = pa.table({"url": ["a"], "caption": ["b"], "similarity": ["high"]})
    with pytest.raises(ValueError, match="column similarity is string, expected numbers"):
        RowFilter.open(FilterConfig(min_similarity=0.1), words.schema)
    with pytest.raises(ValueError, match="--filters.min-pixels: found -1"):
        RowFilter.open(FilterConfig(min_pixels=-1), words.schema)
    with pytest.raises(ValueError, match="--filters.max-aspect-ratio: found 0.5"):
        RowFilter.open(FilterConfig(max_aspect_ratio=0.5), words.schema)
    with pytest.raises(ValueError, match="--filters.opt-out /none: "):
        RowFilter.open(FilterConfig(opt_out="/none"), words.schema)


# -- captions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (None, ""),
        ("  two\n lines\t", "two lines"),
        ("nul \x00 and \x1b[31m red", "nul and [31m red"),
        ("e\u0301", "\u00e9"),
        ("family \U0001f468\u200d\U0001f469", "family \U0001f468\u200d\U0001f469"),
        ("x" * 5_000_000, "x" * MAX_CAPTION_CHARS),
    ],
)
def test_captions_are_normalised(caption: str | None, expected: str):
    assert normalise_caption(caption) == expected


def test_a_normalised_caption_stays_as_it_is():
    draw = random.Random(0)
    for _ in range(300):
        codes = (draw.randrange(0x20000) for _ in range(draw.randrange(60)))
        text = normalise_caption("".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000))
        assert normalise_caption(text) == text
        assert unicodedata.is_normalized("NFC", text)
        assert not any(unicodedata.category(c) == "Cc" for c in text)


def test_null_captions_become_empty_and_rows_keep_their_order():
    rows = pa.table({"url": ["a", "b"], "caption": [None, " x "], "n": [1, 2]})
    assert normalised(rows).to_pylist() == [
        {"url": "a", "caption": "", "n": 1}, {"url": "b", "caption": "x", "n": 2},
    ]  # fmt: skip


# -- repeated rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_rows", [1, 7, 1000])
def test_a_url_that_came_before_is_found_across_buckets_and_batches(
    bucket_rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(duplicates, "BUCKET_ROWS", bucket_rows)
    monkeypatch.setattr(duplicates, "CHUNK_ROWS", 5)
    draw = random.Random(1)
    urls = [draw.choice([None, "", " "] + [f"http://a/{i}" for i in range(40)]) for _ in range(90)]
    urls[50] = f"  {urls[49]}\n" if urls[49] else "http://a/1 "
    seen, expected = set(), []
    for url in urls:
        expected.append((url or "").strip() in seen)
        seen |= {url.strip()} if (url or "").strip() else set()
    batches = [pa.chunked_array([urls[i : i + 13]], pa.string()) for i in range(0, 90, 13)]
    assert duplicates.repeated_urls(batches, 90).tolist() == expected
    assert 0 < sum(expected) < 90


def test_the_first_of_equal_urls_is_fetched(site, tmp_path: Path, capsys):
    url = site.put("/a.png", site.picture())
    listed, once = write_list(tmp_path / "l.parquet", [url] * 4), FilterConfig(unique=("urls",))
    config = download_of(site, listed, tmp_path / "images", samples_per_shard=3, filters=once)
    assert main(config) == 0
    assert "4 rows = 1 stored + 3 filtered (duplicate_url 3)" in capsys.readouterr().out
    assert site.hits == ["/a.png"]


# -- the whole download ----------------------------------------------------------------------------


def test_rows_left_out_never_reach_the_web_and_are_counted(site, tmp_path: Path, capsys):
    urls = [site.put(f"/{i}.png", site.picture(60 + i, 40)) for i in range(5)]
    urls += [site.put("/wide.png", site.picture(90, 30)), site.put("/dot.png", site.picture(9, 9))]
    listed = write_list(
        tmp_path / "l.parquet", [*urls, "http://optout.example/x.png"],
        text=["fine", "fine", "x", "fine", "fine", "wide one", "small one", "gone"],
        similarity=[0.5, 0.1, 0.5, None, 0.5, 0.5, 0.5, 0.5],
    )  # fmt: skip
    (tmp_path / "out.txt").write_text(f"optout.example\n{urls[4]}\n")
    filters = FilterConfig(
        min_similarity=0.3, min_caption_chars=2, opt_out=str(tmp_path / "out.txt"),
        min_pixels=1000, max_aspect_ratio=2.0,
    )  # fmt: skip
    config = download_of(site, listed, tmp_path / "images", num_threads=2, filters=filters)
    assert main(config) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(
        "8 rows = 1 stored + 7 filtered (aspect_ratio 1, low_similarity 1, null_score 1, "
        "opt_out_list 2, short_caption 1, too_few_pixels 1) + 0 failed; snapshot "
    )
    assert sorted(site.hits) == ["/0.png", "/dot.png", "/wide.png"]
    stored = pq.read_table(next((tmp_path / "images").glob("*.parquet")))
    assert "similarity" not in stored.column_names, "looked at, not asked to be kept"
    assert stored["error"].to_pylist()[1:4] == ["low_similarity", "short_caption", "null_score"]
    with pytest.raises(ValueError, match="was made with filters = .*--fresh"):
        main(replace(config, filters=FilterConfig(min_similarity=0.2)))
    (tmp_path / "out.txt").write_text("another.example\n")
    with pytest.raises(ValueError, match="was made with filters = "):
        main(config)


def test_area_and_shape_are_judged_by_the_header(site):
    picture = site.picture(60, 20)
    for reason, limits in (
        (None, ImageLimits(max_pixels=1200, min_pixels=1200, max_aspect_ratio=3)),
        ("too_many_pixels", ImageLimits(max_pixels=1199)),
        ("too_few_pixels", ImageLimits(min_pixels=1201)),
        ("aspect_ratio", ImageLimits(max_aspect_ratio=2.9)),
    ):
        assert header_problem(picture, limits) == reason
