"""Laws of opting out: what headers say is read as servers write it, and in doubt it forbids."""

from datetime import UTC, datetime

import pytest

from ingest.lists.opt_outs import opted_out, reserved

NOW = datetime(2026, 6, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], False),
        (["NoAI"], True),
        (["all", "x, noindex"], True),
        (["none"], True),
        (["noai, noimageai, max-image-preview:large"], True),
        (["max-snippet:-1, noindex"], True),
        (["otherbot: noai"], False),
        (["MiniDALLE2: noai"], True),
        (["max-image-preview:large"], False),
        (["all", "noai"], True),
    ],
)
def test_opt_outs_beside_directives_with_values_and_by_name(tags: list[str], expected: bool):
    assert opted_out(tags, NOW) is expected


@pytest.mark.parametrize(
    ("date", "passed"),
    [
        ("25 Jun 2010 15:00:00 GMT", True),
        ("25 Jun 2030 15:00:00 GMT", False),
        ("Saturday, 25-Jun-10 15:00:00 GMT", True),
        ("Tuesday, 25-Jun-30 15:00:00 GMT", False),
        ("2030-06-25", False),
        ("2010-06-25T15:00:00Z", True),
        ("25 Jun 2030 15:00:00 +0200", False),
        ("some day", True),
        ("", True),
    ],
)
@pytest.mark.parametrize(
    "frame", ["{}", "max-snippet:-1, {}", "{}, max-snippet:-1", "minidalle2: {}"]
)
def test_a_page_is_unavailable_once_its_date_has_passed(frame: str, date: str, passed: bool):
    assert opted_out([frame.format(f"unavailable_after: {date}")], NOW) is passed


def test_another_agents_date_is_not_ours():
    assert not opted_out(["otherbot: unavailable_after: 25 Jun 2010 15:00:00 GMT"], NOW)


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), (" 1 ", True), ("0", False), (None, False)]
)
def test_a_reservation_of_rights(value: str | None, expected: bool):
    assert reserved(value) is expected
