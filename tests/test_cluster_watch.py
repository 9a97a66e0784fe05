"""Laws of what is watched, live: Debian's Prometheus over real stages, every query of every panel
and rule, and the page of watch.py in a browser. Faster ones, of the page alone, are in
test_cluster_watch_page.py."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from _browser import browsing, needs_chromium
from _prometheus import (
    CLUSTER,
    Prometheus,
    configuration,
    free_port,
    needs_prometheus,
    prometheus,
    wait_for,
)
from conftest import Site, serve_site

from cluster.base.metrics import METRICS
from cluster.monitoring.queries import PANELS
from cluster.watch import WatchPageConfig, open_server
from models.convert.runs import load_clip

GPU_ONLY = {"minidalle2_train_device_memory_bytes"}  # no CPU run has them
CHILDREN = ("expr", "lhs", "rhs", "param", "vector_selector")  # of a node of promql_parser's
STAGES = Path(__file__).with_name("_stages.py")
pytestmark = [pytest.mark.slow, needs_prometheus]


@dataclass
class Live:
    """A Prometheus, and the process whose stages it watches."""

    prometheus: Prometheus
    process: subprocess.Popen
    folder: Path

    def wait_until_done(self, stage: str) -> None:
        """Wait for the line that a stage prints when it is done."""

        def said() -> bool:
            text = (self.folder / "stages.log").read_text()
            assert self.process.poll() is None, text[-3000:]
            return f"done: {stage}" in text

        wait_for(said, stage, 300)


def url_list(folder: Path, site: Site) -> Path:
    """Write a list of six pictures and two rows that fail."""
    urls = [site.put(f"/{i}.png", site.picture(red=20 * i)) for i in range(6)]
    path = folder / "urls.txt"
    path.write_text("\n".join([*urls, site.url("/none.png"), "no url"]) + "\n")
    return path


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory, write_data: Callable, write_chain: Callable
) -> Iterator[Live]:
    """Stages under way, watched once a second: the prior is training."""
    folder = tmp_path_factory.mktemp("live")
    write_data(folder / "data", num_shards=2, samples_per_shard=8)
    write_chain(folder / "chain", load_clip("tiny:random"), image_size=32)  # twice that: as drawn
    port = free_port()
    config = configuration(folder, minidalle2=[{"targets": [f"127.0.0.1:{port}"]}])
    with (
        prometheus(config) as watching,
        serve_site() as site,
        (folder / "stages.log").open("w") as log,
    ):
        command = [sys.executable, str(STAGES), str(folder), str(port)]
        command += [str(url_list(folder, site)), site.address]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        found = Live(watching, process, folder)
        try:
            wait_for(lambda: watching.now("minidalle2_ingest_rows_total"), "a scrape", 120)
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            found.wait_until_done("download")
            wait_for(lambda: watching.now("minidalle2:train_step > 1"), "a few steps", 300)
            yield found
        finally:
            process.kill()
            process.communicate()


@pytest.fixture
def page(live: Live) -> Iterator[str]:
    """The address of the page over the live Prometheus; it looks once a second."""
    server = open_server(WatchPageConfig(prometheus=live.prometheus.url, port=0, every=1.0))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://{server.shown}/"
    server.shutdown()
    server.server_close()
    thread.join()


@needs_chromium
def test_charts_move_in_a_browser_at_two_widths(live: Live, page: str, tmp_path: Path):
    wanted = os.environ.get("MINIDALLE2_ARTEFACTS")
    pictures = Path(wanted) if wanted else tmp_path
    pictures.mkdir(parents=True, exist_ok=True)
    for name, width, scheme in (("wide", 1360, "light"), ("phone", 390, "dark")):
        with browsing(width=width, color_scheme=scheme) as view:
            view.tab.goto(page)
            view.tab.select_option("#window", "5m")
            steps = '[data-panel="training-3"]'
            path = view.tab.wait_for_selector(f"{steps} path", state="attached")
            drawn = path.get_attribute("d")
            number = view.tab.inner_text(f"{steps} .legend b")
            view.tab.wait_for_function(
                "([at, drawn, number]) => document.querySelector(at + ' path').getAttribute('d')"
                " !== drawn && document.querySelector(at + ' .legend b').textContent !== number",
                arg=[steps, drawn, number],
            )
            assert view.tab.inner_text("#runs .top i") == "● running"
            view.tab.hover(f"{steps} .plot")
            view.tab.wait_for_selector(f"{steps} .tip")
            for each in ("evaluation", "pipeline", "training"):
                view.tab.click(f'[data-name="{each}"]')
                view.tab.wait_for_selector(".card:not(.none) path", state="attached")
                assert view.tab.evaluate("document.documentElement.scrollWidth") <= width
                picture = pictures / f"watch_{name}_{each}.png"
                view.tab.screenshot(path=picture, full_page=True)
                assert picture.stat().st_size > 10_000
            assert view.said == []
            assert {url.startswith(page) for url in view.asked} == {True}


def selectors(expression: str) -> set[str]:
    """Return the selectors of an expression, without their ranges and offsets."""
    import promql_parser

    found = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(f"{node.name or ''}{node.matchers}")
        children = [getattr(node, name, None) for name in CHILDREN]
        for child in [*children, *(getattr(node, "args", None) or [])]:
            if child is not None and not isinstance(child, str):
                visit(child)

    visit(promql_parser.parse(expression))
    assert found, expression
    return found


def rules() -> list[dict[str, Any]]:
    files = ("recording.yaml", "alerts.yaml")
    parsed = [yaml.safe_load((CLUSTER / "prometheus" / name).read_text()) for name in files]
    return [rule for each in parsed for group in each["groups"] for rule in group["rules"]]


def gpu_only(text: str) -> bool:
    return any(name.removeprefix("minidalle2_") in text for name in GPU_ONLY)


def test_every_query_and_selector_returns_data(live: Live):
    (live.folder / "run" / "stop").touch()
    live.wait_until_done("evaluate")
    watching = live.prometheus
    wait_for(lambda: watching.now('minidalle2:stage_seconds{stage="evaluate"}'), "the last value")
    wait_for(lambda: watching.now("rate(minidalle2_ingest_rows_total[5m])"), "a rate")
    asked = {panel.query for panel in PANELS.values()}
    for rule in rules():
        asked |= selectors(rule["expr"])
        asked |= {rule["record"]} if "record" in rule else set()
    silent = [query for query in sorted(asked) if not watching.ever(query)]
    assert [query for query in silent if not gpu_only(query)] == []
    healths = [rule["health"] for g in watching.get("rules")["groups"] for rule in g["rules"]]
    assert set(healths) == {"ok"}


def test_every_series_is_defined_and_every_metric_is_served(live: Live):
    names = set(live.prometheus.get("label/__name__/values"))
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    served = {name for name in bare if name.startswith("minidalle2_")}
    assert served <= set(METRICS)
    assert set(METRICS) - GPU_ONLY <= served
