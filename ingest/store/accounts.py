"""Where every row of a list went, out of the commits alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.base.outcomes import RETRIED

if TYPE_CHECKING:
    from ingest.store.commits import Commit


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """Rows by outcome: stored, filtered and failed by reason."""

    stored: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, commits: "Iterable[Commit]") -> "Accounts":
        """Add the commits up; a row that a later shard tried again counts where it went then."""
        counts: Counter[str] = Counter()
        for commit in commits:
            counts.update(commit.counts)
        of_kind = {
            kind: {n.partition(":")[2]: c for n, c in counts.items() if n.startswith(f"{kind}:")}
            for kind in ("filtered", "failed", RETRIED)
        }
        failed = Counter(of_kind["failed"])
        failed.subtract(of_kind[RETRIED])
        return cls(
            stored=counts["stored"],
            filtered=dict(sorted(of_kind["filtered"].items())),
            failed={reason: n for reason, n in sorted(failed.items()) if n},
        )

    def __add__(self, other: "Accounts") -> "Accounts":
        """Return both together."""
        return Accounts(
            stored=self.stored + other.stored,
            filtered=_sum(self.filtered, other.filtered),
            failed=_sum(self.failed, other.failed),
        )

    @property
    def total(self) -> int:
        """Number of rows that have an outcome."""
        return self.stored + sum(self.filtered.values()) + sum(self.failed.values())

    def __str__(self) -> str:
        parts = [f"{self.stored} stored"]
        for kind, of_kind in (("filtered", self.filtered), ("failed", self.failed)):
            reasons = ", ".join(f"{name} {n}" for name, n in of_kind.items())
            parts.append(f"{sum(of_kind.values())} {kind}" + (f" ({reasons})" if reasons else ""))
        return " + ".join(parts)

    def rate(self, seconds: float) -> str:
        """Tell the images stored a second, and the commonest reasons of the rows that failed."""
        share = sum(self.failed.values()) / max(1, self.total - sum(self.filtered.values()))
        commonest = sorted(self.failed.items(), key=lambda item: -item[1])[:3]
        reasons = ", ".join(f"{name} {n}" for name, n in commonest)
        failed = f", {share:.0%} failed ({reasons})" if reasons else ""
        return f"{self.stored / max(seconds, 1e-3):.0f} images/s{failed}"


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    both = {name: one.get(name, 0) + other.get(name, 0) for name in {*one, *other}}
    return {name: n for name, n in sorted(both.items()) if n}


def count_rows(commit: "Commit") -> None:
    """Export what became of the rows of a shard just made; those tried again count once."""
    from cluster.base.metrics import counter

    for name, number in commit.counts.items():
        outcome, _, reason = name.partition(":")
        if outcome != RETRIED:
            counter("minidalle2_ingest_rows_total").inc(number, outcome=outcome)
        if outcome == "failed":
            counter("minidalle2_ingest_failures_total").inc(number, reason=reason)
    size = commit.files[f"{commit.shard}.tar"]["size"]
    counter("minidalle2_ingest_bytes_total").inc(size)
    counter("minidalle2_ingest_shards_total").inc()
