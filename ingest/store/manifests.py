"""Manifests: what a data folder is, so that nobody resumes it with anything else.

<root>/_manifest.json    kind, format version, and the settings that its content depends on
"""

import json
import os
from typing import Any

from ingest.store.storage import join_root, storage_of

FORMAT_VERSION = 1
KEPT = "_forgotten"  # outlives --fresh: who asked to be forgotten asked for good


def write_manifest(root: str | os.PathLike[str], kind: str, fields: dict[str, Any]) -> None:
    """Create `<root>/_manifest.json`, or check that the one there says the same.

    kind: "images", "embeds" or "features"; fields: JSON-able. Raises ValueError naming the first
    field that differs, or when the folder holds something that is not ours.
    """
    storage = storage_of(root)
    wanted = json.loads(json.dumps({"kind": kind, "version": FORMAT_VERSION, **fields}))
    present = storage.names()
    unknown = [name for name in present if "_manifest.json" not in name and name != KEPT]
    if "_manifest.json" not in present and unknown:
        raise ValueError(f"{root}: not empty and without our manifest; give another folder")
    text = json.dumps(wanted, indent=1, sort_keys=True) + "\n"
    if "_manifest.json" in present or not storage.create("_manifest.json", text.encode()):
        _require_same(root, read_manifest(root), wanted)


def _require_same(
    root: str | os.PathLike[str], found: dict[str, Any], wanted: dict[str, Any]
) -> None:
    # The hash of all settings comes last: a setting's own name says more.
    for name in sorted({*found, *wanted}, key=lambda name: (name == "config_hash", name)):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{root}: was made with {name} = {found.get(name)!r}, this run has "
                f"{wanted.get(name)!r}; use the same, another folder, or --fresh to start over"
            )


def read_manifest(root: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of `root`; ValueError with the remedy when there is none."""
    try:
        return json.loads(storage_of(root).read("_manifest.json"))
    except FileNotFoundError:
        raise ValueError(
            f"{root}: no _manifest.json, so not a data folder; make one with "
            "ingest/download.py (images) or ingest/embed.py (embeds)"
        ) from None
    except json.JSONDecodeError as error:
        where = join_root(root, "_manifest.json")
        raise ValueError(f"{where}: not JSON ({error}); restore it or use --fresh") from None


def remove_data_folder(root: str | os.PathLike[str], kind: str) -> None:
    """Empty `root` for --fresh: only a folder that bears our manifest of that kind."""
    storage = storage_of(root)
    names = storage.names()
    if set(names) <= {KEPT}:
        return
    found = read_manifest(root).get("kind")
    if found != kind:
        raise ValueError(f"{root}: --fresh refused: its manifest says {found!r}, not {kind!r}")
    # The manifest goes last, so that an interrupted deletion can be repeated.
    for name in sorted(set(names) - {KEPT}, key=lambda name: name == "_manifest.json"):
        storage.delete(name)
