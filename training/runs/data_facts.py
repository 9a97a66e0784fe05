"""What is recorded of the data of a run: snapshots, filters, outcomes, licences."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.base.cli import read_yaml
from ingest.shards import STORED, Snapshot, load_snapshot, read_commit, read_manifest
from ingest.store.storage import storage_of

MAX_SHARDS = 1000  # of which licences and outcomes are counted: a card is written in seconds
PLAIN = (None, [], "", 0, False)  # a filter that is off
SAFETY = ("nsfw", "max_punsafe")


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """One data set of a run. problem: why its folder tells nothing any more.

    images: the manifest of its images, or of those that were embedded; described: another data set
    of the run is these very images; counted: shards whose outcomes and licences were counted.
    """

    kind: str
    root: str
    digest: str
    problem: str = ""
    num_samples: int = 0
    num_shards: int = 0
    manifest: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    licences: dict[str, dict[str, int]] = field(default_factory=dict)
    counted: int = 0
    described: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What the images' manifest says beside its filters."""
        hidden = ("filters", "kind", "version", "config_hash")
        told = {key: value for key, value in self.images.items() if key not in hidden}
        return {
            key: ", ".join(v) or "none" if isinstance(v, list) else v for key, v in told.items()
        }

    @property
    def filters(self) -> dict[str, Any]:
        """The filters that were on."""
        told = self.images.get("filters") or {}
        return {key: value for key, value in told.items() if value not in PLAIN}

    @property
    def limits(self) -> list[str]:
        """What the records show that this data cannot teach, or does not vouch for."""
        found = []
        if self.problem:
            return [f"Its data is not described: {self.problem}."]
        if str(self.images.get("source", "")).startswith("shapes"):
            found.append("It was trained on drawn shapes alone and knows nothing else.")
        elif not self.licences:
            found.append("No licence column was kept: the licences of its images are not known.")
        if "filters" in self.images:
            if not any(name in self.filters for name in SAFETY):
                found.append("No filter on unsafe images is recorded for its data.")
            if "opt_out" not in self.filters:
                found.append("No list of opted-out sites is recorded for its data.")
        return found


def data_facts(run: Path) -> list[DataFacts]:
    """Describe each data set whose snapshot a run pinned, images before embeddings."""
    path = run / "config.yaml"
    config = read_yaml(path) if path.is_file() else {}
    found = []
    for kind in ("images", "embeds"):
        for number, root in enumerate(config.get(kind) or []):
            ordinal = f"_{number + 1}" if number else ""
            pinned = run / f"snapshot_{kind}{ordinal}.txt"
            if pinned.is_file():
                found.append(_facts(kind, str(root), pinned.read_text().strip()))
    roots = {one.root for one in found if one.kind == "images"}
    return [replace(one, described=one.manifest.get("images") in roots) for one in found]


def _facts(kind: str, root: str, digest: str) -> DataFacts:
    try:
        manifest, snapshot = read_manifest(root), load_snapshot(root, digest)
        images = manifest if kind == "images" else _manifest_of(manifest.get("images", ""))
    except (ValueError, OSError) as error:
        return DataFacts(kind=kind, root=root, digest=digest, problem=str(error))
    source = root if kind == "images" else str(manifest.get("images", ""))
    names = [shard.name for shard in snapshot.shards[:MAX_SHARDS]]
    return DataFacts(
        kind=kind,
        root=root,
        digest=digest,
        num_samples=snapshot.num_samples,
        num_shards=len(snapshot.shards),
        manifest=manifest,
        images=images,
        outcomes=_outcomes(source, names) if images else {},
        licences=_licences(source, snapshot, images),
        counted=len(names),
    )


def _manifest_of(images: str) -> dict[str, Any]:
    """Read the manifest of the images that were embedded; nothing where they are gone."""
    try:
        return read_manifest(images) if images else {}
    except (ValueError, OSError):
        return {}


def _outcomes(root: str, names: list[str]) -> dict[str, int]:
    """Add up what became of the rows of these shards, the most frequent first."""
    total: Counter[str] = Counter()
    for name in names:
        commit = read_commit(root, name)
        total.update(commit.counts if commit else {"not committed any more": 1})
    return dict(total.most_common())


def _licences(root: str, snapshot: Snapshot, images: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Count the values of kept columns that bear a licence, of stored rows, by column."""
    import pyarrow.parquet as pq

    columns = [name for name in images.get("keep_columns") or [] if "licen" in name.lower()]
    found: dict[str, Counter[str]] = {name: Counter() for name in columns}
    for shard in snapshot.shards[:MAX_SHARDS] if columns else ():
        try:
            with storage_of(root).open(f"{shard.name}.parquet") as file:
                table = pq.read_table(file, columns=[*columns, "status"])
        except (OSError, ValueError):
            for counts in found.values():
                counts["in a shard that cannot be read"] += shard.num_samples
            continue
        stored = [status == STORED for status in table["status"].to_pylist()]
        for name in columns:
            values = zip(table[name].to_pylist(), stored, strict=True)
            found[name].update(str(value) for value, kept in values if kept)
    return {name: dict(counts.most_common(20)) for name, counts in found.items()}
