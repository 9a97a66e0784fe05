"""The demo's source: pairs of caption and image, and a loopback web server in place of the
internet."""

import http.server
import io
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.base.files import Json, atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

SIDE = 64  # px of the pictures that the demo stores, and of those that it generates
TEST_ONE_IN = 10
SKIN_TONE = re.compile(
    r"[:,]?\s*\b(?:medium-light|medium-dark|light|medium|dark) skin tone\b", re.IGNORECASE
)


Rows = list[Json]  # {"image": encoded bytes, "caption": text}


def read_pairs(path: Path) -> Rows:
    """Read a Parquet file of pairs, in its order."""
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["image", "caption"]).to_pylist()


def _write_table(path: Path, table: "pa.Table") -> Path:
    """Write a Parquet file atomically."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary)
    return path


def write_pairs(path: Path, rows: Rows) -> Path:
    """Write pairs to a Parquet file atomically."""
    import pyarrow as pa

    return _write_table(path, pa.Table.from_pylist(rows))


def drawn_pairs(folder: Path, num_train: int, num_test: int, seed: int) -> dict[str, Path]:
    """Draw the shapes, unless they are there: a training set, and a test set of `num_test` of each
    of the three held-back kinds. Returns their Parquet files."""
    from ingest.shapes import make_pairs

    sizes = {
        "train": (("train", num_train),),
        "test": tuple((s, num_test) for s in ("single", "seen", "held_out")),
    }
    paths = {name: folder / f"{name}.parquet" for name in sizes}
    for name, path in paths.items():
        if not path.is_file():
            pairs = [pair for split, n in sizes[name] for pair in make_pairs(n, seed, split)]
            write_pairs(path, [{"image": p.image_bytes, "caption": p.caption} for p in pairs])
    return paths


def given_pairs(folder: Path, source: Path, limit: int, salt: str = "") -> dict[str, Path]:
    """Split a user's pairs by base name, so that no variant of a test picture is trained on.

    source: what ingest/adopt.py takes; salt: another one makes another split. Returns the Parquet
    files of the sets.

    An existing split stays as it is. Raises ValueError as `_read_given` does, for a picture that
    does not decode, and for too few pairs.
    """
    paths = {name: folder / f"{name}.parquet" for name in ("train", "test")}
    if all(path.is_file() for path in paths.values()):
        return paths
    rows = _read_given(source)
    # a stable shuffle by base name: variants stay together, and a limit takes whole names
    rows.sort(
        key=lambda row: (
            zlib.crc32(f"{salt}{base_name(row['name'])}".encode()),
            base_name(row["name"]),
            row["caption"],
        )
    )
    rows = rows[: limit or None]
    _require_pictures(source, rows)
    split: dict[str, Rows] = {"train": [], "test": []}
    for row in rows:
        pair = {"image": row["image"], "caption": row["caption"]}
        split["test" if is_held_out(row["name"], salt) else "train"].append(pair)
    for name, pairs in split.items():
        if len(pairs) < 2:
            raise ValueError(
                f"{source}: found {len(pairs)} pairs for {name}, expected more; raise --limit"
            )
    return {name: write_pairs(paths[name], pairs) for name, pairs in split.items()}


def _read_given(source: Path) -> list[Json]:
    """Read a user's pairs, by ingest/adopt.py's readers, as rows {key, image, caption, name}.

    key: the row's name in the source; name: the caption where there is no such column.

    Raises ValueError for what is not there, and for a row that is no pair, naming it.
    """
    import pyarrow.parquet as pq

    from ingest.adopting.config import AdoptConfig
    from ingest.adopting.sources import open_source

    if not source.exists():
        raise ValueError(
            f"{source}: found no such file, expected a Parquet file with columns image and caption"
        )
    named = source.suffix == ".parquet" and "name" in pq.read_schema(source).names
    found = open_source(AdoptConfig(source=str(source), keep_columns=("name",) if named else ()))
    rows: list[Json] = []
    for sample in (sample for part in found.parts() for sample in found.read(part)):
        name = sample.fields["name"] if named else "".join(sample.captions[:1])
        if sample.problem is not None or name is None:
            raise ValueError(
                f"{source}: found {sample.problem or 'no name'} in row {sample.key} (counted from "
                "0), expected an image and a caption in every row; leave it out"
            )
        caption = sample.captions[0]
        rows.append({"key": sample.key, "image": sample.image, "caption": caption, "name": name})
    return rows


def _require_pictures(source: Path, rows: list[Json]) -> None:
    """Decode every picture as the download will, so that a bad one is named by its row.

    Raises ValueError for it, and if none has `SIDE` px: nothing is enlarged.
    """
    from ingest.fetching.decode import DecodeError, Resizer

    resize, largest = Resizer(image_size=SIDE, resize_mode="keep_ratio"), 0
    for row in rows:
        try:
            resized = resize(row["image"])
        except DecodeError:
            raise ValueError(
                f"{source}: found {len(row['image'])} bytes in row {row['key']} (counted from 0) "
                "that do not decode, expected an encoded picture (JPEG, PNG, WebP, ...); leave out "
                "the row"
            ) from None
        largest = max(largest, min(resized.width, resized.height))
    if rows and largest < SIDE:
        raise ValueError(
            f"{source}: found pictures of {largest} px at most, expected {SIDE} px or more; "
            "enlarge them first"
        )


def is_held_out(name: str, salt: str = "") -> bool:
    """Return whether the pairs of this name are the test set's; salt: as in `given_pairs`."""
    return zlib.crc32(f"{salt}test {base_name(name)}".encode()) % TEST_ONE_IN == 0


def base_name(name: str) -> str:
    """Return `name` without its skin tone, in lower case."""
    return SKIN_TONE.sub("", name).strip().lower()


def write_url_list(path: Path, pairs: Rows, port: int, name: str) -> None:
    """Write a URL list with LAION's columns that points at the loopback server."""
    import pyarrow as pa
    from PIL import Image

    sizes = [Image.open(io.BytesIO(pair["image"])).size for pair in pairs]
    table = pa.table(
        {
            "URL": [f"http://127.0.0.1:{port}/{name}/{i}" for i in range(len(pairs))],
            "TEXT": [pair["caption"] for pair in pairs],
            "WIDTH": pa.array([size[0] for size in sizes], pa.int32()),
            "HEIGHT": pa.array([size[1] for size in sizes], pa.int32()),
        }
    )
    _write_table(path, table)


def is_fetched(images: Path, num_shards: int) -> bool:
    """Return whether all `num_shards` shards of a download are committed and undamaged."""
    from ingest.shards import committed, damage

    commits = committed(images).values()
    return len(commits) == num_shards and not any(damage(images, commit) for commit in commits)


@contextmanager
def serve_pairs(sets: dict[str, Rows], port: int) -> Iterator[int]:
    """Serve /<set>/<row> on the loopback; port 0 takes any free one. Yields the port.

    Raises ValueError if the port is taken: a URL list that was written for it cannot move.
    """

    heads = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"GIF8": "image/gif"}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _, name, row = (*self.path.split("/"), "", "")[:3]
            known = name in sets and row.isdigit() and int(row) < len(sets[name])
            body = sets[name][int(row)]["image"] if known else b"not found"
            self.send_response(200 if known else 404)
            media_type = heads.get(body[:4], "image/jpeg") if known else "text/plain"
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: a line for each of thousands of images would bury the demo's own."""

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ValueError(
            f"port {port}: found it taken ({error.strerror}), expected the port that the URL list "
            "names; free it or start over with --fresh"
        ) from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
