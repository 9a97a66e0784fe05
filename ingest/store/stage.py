"""What a run that makes image shards does around its units: a download and an adoption alike."""

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from cluster.base.cli import DONE, INCOMPLETE
from cluster.base.progress import progress, show_place
from ingest.shards import Commit, committed_names, publish_snapshot, read_commits, recover
from ingest.store.accounts import Accounts, count_rows
from ingest.store.maintenance import Removed, drop_repeated_images, forget, is_forgetting
from ingest.store.removal import Forgotten, read_forgotten
from ingest.store.shard_runner import DealShare, HopelessError, Unit, WorkerPool, run_units


class MakeShard(Protocol):
    """Makes the shard that a unit names, in the folder `root`; picklable."""

    @property
    def root(self) -> str:
        """The folder of the shards."""
        ...

    def __call__(self, unit: Unit) -> Commit:
        """Return the commit of whoever made the shard first."""
        ...


def make_shards(
    stage: str,
    job: MakeShard,
    units: Iterable[Unit],
    pool: WorkerPool,
    *,
    missing: int,
    passing: tuple[type[BaseException], ...] = (),
    deal_share: DealShare | None = None,
) -> dict[str, str]:
    """Make shards and show the progress; return the problem of each that failed, by name.

    stage: "download" or "adopt"; missing: the number of units. Raises HopelessError.
    """
    results = run_units(job, units, pool, passing=passing, deal_share=deal_share)
    failures: dict[str, str] = {}
    accounts, started = Accounts(), time.monotonic()
    show_place(stage, job.root, missing)
    with progress(stage, missing, unit="shards") as advance:
        for result in results:
            if isinstance(result.error, HopelessError):
                raise result.error
            if result.error is not None:
                failures[result.name] = result.problem(job.root)
            else:
                missing -= 1
                accounts.add(result.get())
                count_rows(result.get())
                show_place(stage, job.root, missing)
            advance(note=accounts.rate(time.monotonic() - started))
    return failures


def publish_and_report(
    root: str, *, num_shards: int, num_rows: int | None, unique: Sequence[str], before: Forgotten
) -> int:
    """Settle what workers that died left and what was requested meanwhile; publish a snapshot.

    num_rows: of the list, None where it is known only from the shards; unique: see FilterConfig;
    before: the requests to forget when the run began. Prints where every row went, from the commits
    alone. Returns the exit code.
    """
    recover(root)
    if "images" in unique:
        print(f"{drop_repeated_images(root)} repeated images dropped", flush=True)
    if read_forgotten(root) != before or is_forgetting(root):
        report_removed(forget(root, Forgotten()))
    missing = num_shards - len(committed_names(root))
    if missing and missing == num_shards:
        print("incomplete: nothing is stored; rerun the same command to continue", flush=True)
        return INCOMPLETE
    snapshot = publish_snapshot(root)

    accounts = Accounts.of(read_commits(root))
    total = accounts.counts.total()
    waiting = 0 if num_rows is None else num_rows - total
    more = f" + {waiting} in {missing} missing shards" if waiting else ""
    print(
        f"{num_rows or total} rows = {accounts}{more}; snapshot {snapshot.digest[:12]}", flush=True
    )
    if waiting and not missing:
        raise ValueError(f"{root}: {waiting} rows unaccounted for; rerun with --fresh")
    if missing:
        print("incomplete: rerun the same command to continue", flush=True)
    return INCOMPLETE if missing else DONE


def report_removed(removed: Removed) -> None:
    """Print what a request to forget has removed, and what its user has to delete."""
    print(
        f"forgotten: {removed.num_samples} samples, {removed.num_rows} rows, in "
        f"{removed.num_shards} rewritten shards; no later run stores them",
        flush=True,
    )
    if removed.num_unmatched:
        print(f"no row here: {removed.num_unmatched} of the requested hosts, URLs and images")
    for embeds in removed.unreached:
        print(f"warning: embeddings in {embeds} are not there now: delete that copy", flush=True)
    if removed.sources:
        more = f" and {len(removed.sources) - 3} more" if len(removed.sources) > 3 else ""
        print(
            f"the bytes are still in your own files, and are to be deleted there: "
            f"{', '.join(removed.sources[:3])}{more}",
            flush=True,
        )
