"""Where every row of a list went, from the commits alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.base.outcomes import RETRIED

if TYPE_CHECKING:
    from ingest.store.commits import Commit


@dataclass(kw_only=True)
class Accounts:
    """Rows by outcome. counts: as in commits, all of them together."""

    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, commits: "Iterable[Commit]") -> "Accounts":
        """Add commits up."""
        accounts = cls()
        for commit in commits:
            accounts.add(commit)
        return accounts

    def add(self, commit: "Commit") -> None:
        """Add a commit; a row that was tried again counts with its last outcome."""
        for name, number in commit.counts.items():
            kind, _, reason = name.partition(":")
            if kind == RETRIED:
                self.counts[f"failed:{reason}"] -= number
            else:
                self.counts[name] += number

    def reasons(self, kind: str) -> dict[str, int]:
        """Return the rows that were "filtered", or that "failed", by reason."""
        items = sorted(self.counts.items())
        return {k.partition(":")[2]: n for k, n in items if n and k.startswith(f"{kind}:")}

    def __str__(self) -> str:
        text = f"{self.counts['stored']} stored"
        for kind in ("filtered", "failed"):
            counts = self.reasons(kind)
            reasons = ", ".join(f"{name} {number}" for name, number in counts.items())
            text += f" + {sum(counts.values())} {kind}" + (f" ({reasons})" if reasons else "")
        return text

    def rate(self, seconds: float) -> str:
        """Return the images stored a second, and the most frequent reasons of failed rows."""
        stored, failures = self.counts["stored"], self.reasons("failed")
        failed = sum(failures.values())
        frequent = sorted(failures.items(), key=lambda item: -item[1])[:3]
        reasons = ", ".join(f"{name} {number}" for name, number in frequent)
        note = f", {failed / max(1, stored + failed):.0%} failed ({reasons})" if reasons else ""
        return f"{stored / max(seconds, 1e-3):.0f} images/s{note}"


def count_rows(commit: "Commit") -> None:
    """Add the rows of a new shard to the metrics; rows that are tried again count once."""
    from cluster.base.metrics import counter

    for name, number in commit.counts.items():
        outcome, _, reason = name.partition(":")
        if outcome != RETRIED:
            counter("minidalle2_ingest_rows_total").inc(number, outcome=outcome)
        if outcome == "failed":
            counter("minidalle2_ingest_failures_total").inc(number, reason=reason)
    counter("minidalle2_ingest_bytes_total").inc(commit.files[f"{commit.shard}.tar"]["size"])
    counter("minidalle2_ingest_shards_total").inc()
