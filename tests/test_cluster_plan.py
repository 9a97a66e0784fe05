"""The plan: the very models that are trained, what fits, what it costs, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cluster.base.cli import parse, with_options
from cluster.plan import main
from cluster.planning import counts, layouts, report
from cluster.planning.counts import read_preset
from cluster.planning.devices import GPUS, find_gpu
from cluster.planning.efficiency import (
    SECONDS_A_TENSOR,
    Efficiency,
    Workload,
    efficiency,
    read_measured,
)
from cluster.planning.layouts import Layout, step_time
from cluster.planning.report import Planner
from cluster.planning.request import CHAINS, PRESETS, PlanRequest
from cluster.planning.stages import build_stages
from ingest.shards import write_embed_shard
from models.clip import FrozenClip, build_clip
from models.costs import offloaded_bytes, state_bytes
from training.runs.profiling import PEAK_TFLOPS

ROOT = Path(__file__).parent.parent
SLOW = pytest.mark.slow
DEMO = PlanRequest(chain="demo", gpu="cpu", num_gpus=1, images=8000.0, train_clip=True,
                   eval_images=16)  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    return Planner(DEMO)


@pytest.fixture(scope="module")
def plan(demo):
    return demo.plan()


def sizes_of(encoder) -> dict[str, int]:
    return {key: encoder[key] for key in ("embed_dim", "text_width", "context_length")}


# -- the models are those that are trained ---------------------------------------------------------


def dry_run_parameters(kind: str, preset: str, sizes: dict, folder: Path, capsys) -> int:
    """What --dry-run prints for a preset beside embeddings of an encoder of these sizes."""
    from training.runs.dry_run import dry_run
    from training.tasks.clip import clip_model
    from training.tasks.networks import decoder_model, prior_model

    folder.mkdir(exist_ok=True)
    (folder / "_manifest.json").write_text(json.dumps(sizes))
    more = () if kind == "clip" else ("--embeds", str(folder))
    build = {"clip": clip_model, "prior": prior_model, "decoder": decoder_model}[kind]
    capsys.readouterr()
    assert dry_run(read_preset(kind, preset, *more), build) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("parameters: ")]
    return int(line.removeprefix("parameters: ").replace(",", ""))


@pytest.mark.parametrize(
    "chain", ["debug", "demo", *(pytest.param(c, marks=SLOW) for c in ("mini", "modern", "paper"))]
)
def test_parameters_are_those_of_the_dry_run(chain: str, tmp_path: Path, capsys):
    trains = CHAINS[chain].encoder.startswith("clip_")
    encoder, stages = build_stages(PlanRequest(chain=chain, train_clip=trains))  # type: ignore[arg-type]
    assert [stage.name for stage in stages][: 1 + trains][-1] == "prior"
    for stage in stages:
        found = dry_run_parameters(
            stage.kind, stage.preset, sizes_of(encoder), tmp_path / "embeds", capsys
        )
        assert stage.parameters == found, stage.name


def _accept_stored(monkeypatch) -> None:
    """Take the stored counts as those of the present code."""
    header = json.loads(counts.COUNTS.read_text().splitlines()[0])
    monkeypatch.setattr(counts, "source_digest", lambda: header["sources"])
    counts._stored.cache_clear()


def test_counts_of_other_code_are_counted_again(monkeypatch, capsys):
    """What models multiply may have changed: a stored figure would be wrong."""
    _accept_stored(monkeypatch)
    right = counts.encoder_counts("clip_debug")
    monkeypatch.setattr(counts, "source_digest", lambda: "other")
    monkeypatch.setattr(counts, "_count_encoder", lambda name: {"counted": name})
    counts._stored.cache_clear()
    assert counts.encoder_counts("clip_debug") == {"counted": "clip_debug"} != right
    assert "found no counts of this version" in capsys.readouterr().err
    counts._stored.cache_clear()


@pytest.mark.parametrize(
    "chain", ["debug", *(pytest.param(c, marks=SLOW) for c in ("mini", "paper"))]
)
def test_stored_counts_are_what_the_models_count(chain: str, monkeypatch):
    """`cluster.planning.counts.write_counts` writes them again."""
    trains = CHAINS[chain].encoder.startswith("clip_")
    request = PlanRequest(chain=chain, train_clip=trains)  # type: ignore[arg-type]
    _accept_stored(monkeypatch)
    stored = build_stages(request)
    empty: dict = {}
    monkeypatch.setattr(counts, "_stored", lambda: empty)
    for one, two in zip(stored[1], build_stages(request)[1], strict=True):
        assert one.counts == two.counts and one.frozen == two.frozen, one.name


def test_all_shipped_presets_have_stored_counts(monkeypatch):
    """A plan of a shipped preset counts nothing; `counts.write_counts` adds what is missing."""
    _accept_stored(monkeypatch)
    monkeypatch.setattr(counts, "_count_stage", None)
    monkeypatch.setattr(counts, "_count_encoder", None)
    assert len([look_up() for look_up in counts.shipped()]) >= 30


def test_every_chain_names_presets_that_are_shipped():
    shipped = {
        f"{path.parent.name}_{path.stem}"
        for path in (ROOT / "training" / "presets").glob("*/*.yaml")
    }
    for chain in CHAINS.values():
        names = {f"prior_{name}" for name in (chain.prior, chain.ar) if name}
        assert names | {f"decoder_{name}" for name in chain.decoders} <= shipped
    for path in PRESETS.glob("*.yaml"):
        name = path.stem
        assert parse(PlanRequest, presets=PRESETS, argv=["--preset", name]).chain == name


# -- devices and efficiencies ----------------------------------------------------------------------


def test_peaks_are_those_of_training_reports():
    names = {"a100-40": "A100", "a100-80": "A100", "h100": "H100", "h200": "H200", "b200": "B200",
             "l40s": "L40S"}  # fmt: skip
    for name, known in names.items():
        assert GPUS[name].peak_tflops == PEAK_TFLOPS[known]
    assert set(GPUS) == {*names, "cpu"}


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(ValueError, match="gpu: found 'h2000', expected one of .*mean h200"):
        find_gpu("h2000")
    with pytest.raises(ValueError, match="found 'A100-80', .*did you mean a100-80"):
        find_gpu("A100-80")


def test_measured_speeds_go_before_published_ones(tmp_path: Path):
    path = tmp_path / "measured.jsonl"
    lines = [
        {"device": "NVIDIA H200", "preset": "mini", "mfu": 0.2},
        {"device": "NVIDIA H200", "preset": "paper", "mfu": 0.3},
        {"device": "NVIDIA A100-SXM4-80GB", "preset": "mini", "mfu": 0.4},
        {"device": "cpu", "preset": "mini", "mfu": None},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    measured = read_measured(str(path))
    request = PlanRequest()

    def found(gpu: str, network: str, preset: str, **more):
        run = Workload(network=network, preset=preset, **more)
        return efficiency(run, GPUS[gpu], request, measured)

    assert found("h200", "unet", "paper").mfu == 0.3  # its own
    assert found("h200", "unet", "karlo").mfu == 0.3  # the newest of its kind
    assert "measured.jsonl, line 2" in found("h200", "unet", "karlo").source
    assert found("a100-80", "unet", "mini").mfu == 0.4
    assert "Mosaic" in found("a100-40", "unet", "mini").source.replace("mosaicml", "Mosaic")
    assert "NeMo" in found("h200", "transformer", "paper").source
    asked = dataclasses.replace(request, mfu=0.45)
    assert efficiency(UNET, GPUS["h200"], asked, measured).mfu == 0.45
    for one in read_measured(""):  # the project's own
        run = Workload(network=one.network, preset=one.preset, compiled=one.compiled)
        kind = next(k for k in ("h100", "h200") if k.upper() in one.device)
        assert efficiency(run, GPUS[kind], request, [one]).mfu == one.mfu


def test_a_compiled_run_is_planned_by_compiled_lines(tmp_path: Path):
    """Eager lines say nothing of it: the published figure goes before them."""
    path = tmp_path / "measured.jsonl"
    each = {"device": "NVIDIA H200", "preset": "mini", "network": "unet_channels_last"}
    lines = [{**each, "mfu": 0.3, "compiled": True}, {**each, "mfu": 0.2, "compiled": False}]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    measured = read_measured(str(path))
    eager = Workload(network="unet_channels_last", preset="mini")
    compiled = dataclasses.replace(eager, compiled=True)

    def found(run: Workload, lines: list):
        return efficiency(run, GPUS["h200"], PlanRequest(), lines)

    assert found(compiled, measured).mfu == 0.3 and "compiled" in found(compiled, measured).source
    assert found(eager, measured).mfu == 0.2 and "eager" in found(eager, measured).source
    assert "MLPerf" in found(compiled, measured[1:]).source


def test_small_micro_batches_take_longer_a_sample(tmp_path: Path):
    """A measured speed is met at its own batch; a smaller micro-batch is slower a sample, as from
    64 to 16 to 2 in MLPerf's runs."""
    path = tmp_path / "measured.jsonl"
    flops, mfu, tensors = 2e11, 0.25, 400
    a_sample = flops / (0.25 * 989e12)
    path.write_text(json.dumps({
        "device": "NVIDIA H200", "preset": "mini", "network": "unet", "mfu": mfu,
        "ms": 1000 * 256 * a_sample,
    }))  # fmt: skip
    run = Workload(network="unet", preset="mini", tensors=tensors)
    speed = efficiency(run, GPUS["h200"], PlanRequest(), read_measured(str(path)))

    def compute(samples: int) -> float:
        layout = Layout(zero_stage=0, micro_batch=samples, checkpointing=False)
        return step_time(run, flops, samples, GPUS["h200"], 1, layout, speed).compute / samples

    assert compute(256) == pytest.approx(a_sample)
    assert compute(1) == pytest.approx(a_sample + 255 / 256 * tensors * SECONDS_A_TENSOR)
    assert pytest.approx(40e-6, rel=0.02) == SECONDS_A_TENSOR


@pytest.mark.parametrize("line", ["{", "[]", '{"device": "x"}',
                                  '{"device": "x", "preset": "mini", "mfu": 7}',
                                  '{"device": "x", "preset": "nothing", "mfu": 0.1}'])  # fmt: skip
def test_a_wrong_line_of_measured_speeds_is_named(line: str, tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match="measured: m.jsonl, line 1: found .*, expected device"):
        read_measured(str(path))
    with pytest.raises(ValueError, match="measured: found no file"):
        read_measured(str(tmp_path / "none"))


# -- a step ----------------------------------------------------------------------------------------

UNET = Workload(network="unet", parameters=10**9)
LOAD = (UNET, 1e12, 32)  # parameters, FLOPs a sample, samples of a worker
FIFTH = Efficiency(mfu=0.2, source="")


def seconds(zero: int = 0, workers: int = 64, micro: int = 32, **more) -> float:
    layout = Layout(zero_stage=zero, micro_batch=micro, checkpointing=False, **more)
    return step_time(*LOAD, GPUS["h100"], workers, layout, FIFTH).seconds


def test_a_step_alone_is_its_flops():
    layout = Layout(zero_stage=0, micro_batch=8, checkpointing=False)
    found = step_time(*LOAD, GPUS["h100"], 1, layout, FIFTH)
    assert found.compute == pytest.approx(32 * 1e12 / (0.2 * 989e12)) and found.wait == 0.0
    layout = dataclasses.replace(layout, checkpointing=True)
    again = step_time(*LOAD, GPUS["h100"], 1, layout, FIFTH)
    assert again.compute == pytest.approx(4 / 3 * found.compute)


def test_communication_hides_behind_the_last_micro_batchs_backward_pass():
    slow = dataclasses.replace(GPUS["h100"], network=1e9)
    layout = Layout(zero_stage=2, micro_batch=32, checkpointing=False, engine="fsdp2")
    fast = step_time(*LOAD, GPUS["h100"], 64, layout, FIFTH)
    assert fast.wait == 0.0  # 2 GB x 63 / 64 over 340 GB/s is less than a third of .16 s
    found = step_time(*LOAD, slow, 64, layout, FIFTH)
    assert found.wait == pytest.approx(4.0 * 63 / 64 - found.compute)
    # in one machine, over its links
    assert step_time(*LOAD, slow, 8, layout, FIFTH).wait == 0.0
    zero = Layout(zero_stage=1, micro_batch=32, checkpointing=False)  # all-reduced; fp32 gathered
    found = step_time(*LOAD, slow, 64, zero, FIFTH)
    assert found.wait == pytest.approx(8.0 * 63 / 64 - found.compute * 2 / 3)
    gathered = 4 * 63 / 64 / 340
    assert step_time(*LOAD, GPUS["h100"], 64, zero, FIFTH).wait == pytest.approx(gathered)


def test_more_partitioning_costs_more_time():
    """Stage 0 apart, which reduces in fp32 after the backward pass."""
    times = [seconds(zero, micro=8) for zero in (1, 2, 3)]
    assert times == sorted(times) and seconds(0, micro=8) > times[0]
    assert seconds(2, micro=8, engine="fsdp2") < times[0]
    assert seconds(2, offload=True) > seconds(2)


# -- memory and what fits --------------------------------------------------------------------------


def paper_like(demo, name: str):
    return next(stage for stage in demo.stages if stage.name == name)


def test_a_plan_with_fsdp2_keeps_deepspeed_for_muon(demo):
    for stage in demo.stages:
        engine = "deepspeed" if stage.train.optimizer.kind == "muon" else "fsdp2"
        found = {each.engine for each in layouts.layouts(stage, 2, "fsdp2", offload=False)}
        assert found == {engine}


def test_memory_falls_with_partitioning_and_grows_with_the_micro_batch(demo):
    stage = paper_like(demo, "base")
    for micro in (1, 4):
        totals = [
            layouts.memory_of(
                stage, 64, Layout(zero_stage=zero, micro_batch=micro, checkpointing=False)
            ).state
            for zero in range(4)
        ]
        assert totals == sorted(totals, reverse=True)
    one, four = (
        layouts.memory_of(stage, 64, Layout(zero_stage=1, micro_batch=n, checkpointing=False))
        for n in (1, 4)
    )
    each = {name: each["each"] for name, each in stage.counts["activations"].items()}
    assert four.total - one.total == pytest.approx(3 * each["kept"])
    assert each["checkpointed"] < each["kept"]


def test_state_is_what_the_engine_keeps(demo):
    stage = paper_like(demo, "prior")
    model = counts.build_model(stage.config, sizes_of(demo.encoder))
    for zero, offload in [(zero, False) for zero in range(4)] + [(2, True), (3, True)]:
        layout = Layout(zero_stage=zero, micro_batch=1, checkpointing=False, offload=offload)
        found = layouts.memory_of(stage, 4, layout).state
        assert found == pytest.approx(state_bytes(model, zero, 4, offload=offload), abs=4)
    assert layouts.host_bytes(stage, 4) == pytest.approx(offloaded_bytes(model, 4), abs=4)


def test_of_the_encoder_a_gpu_holds_what_training_holds(demo):
    stage = paper_like(demo, "base")
    encoder = FrozenClip(build_clip(read_preset("clip", "demo").model), "demo")
    encoder.drop_vision()  # as training does
    layout = Layout(zero_stage=1, micro_batch=1, checkpointing=False)
    found = layouts.memory_of(stage, 4, layout).frozen
    assert found == sum(p.nbytes for p in encoder.parameters()) > 0


def tiny_gpu(gib: float):
    return dataclasses.replace(GPUS["a100-80"], name="tiny", memory_gib=gib)


def adamw(stage):
    """The stage with an optimizer that ZeRO partitions."""
    train = with_options(stage.config.train, optimizer="adamw")
    return dataclasses.replace(stage, config=dataclasses.replace(stage.config, train=train))


def test_what_fits_is_the_quickest_and_what_does_not_names_the_nearest(demo):
    stage = adamw(paper_like(demo, "base"))
    roomy = layouts.place(stage, tiny_gpu(80), 4, FIFTH, DEMO)
    assert roomy[0].fits
    assert roomy[0].layout.micro_batch == 16 and not roomy[0].layout.checkpointing
    limit = 40 / 1024
    tight = layouts.place(stage, tiny_gpu(limit), 4, FIFTH, DEMO)
    best = next(each for each in tight if each.fits)
    assert best.memory.total <= limit * 0.9 * 2**30
    assert best.layout != roomy[0].layout
    assert all(one.step.seconds >= best.step.seconds for one in tight if one.fits)
    nothing = layouts.place(stage, tiny_gpu(0.001), 4, FIFTH, DEMO)
    assert not any(one.fits for one in nothing)
    (other,) = layouts.nearest(stage, tiny_gpu(0.001), 4, FIFTH, DEMO)
    assert other.startswith("4 x a100-40 with ZeRO ")


def test_flags_make_the_training_script_take_the_placement(demo):
    stage = adamw(paper_like(demo, "base"))
    for zero, micro, again in ((0, 16, False), (2, 4, True)):
        layout = Layout(zero_stage=zero, micro_batch=micro, checkpointing=again)
        placement = dataclasses.replace(
            layouts.place(stage, tiny_gpu(80), 4, FIFTH, DEMO)[0], layout=layout
        )
        words = layouts.flags(stage, placement).split()
        config = read_preset("decoder", "demo", "--train.optimizer", "adamw", *words)
        assert layouts.preset_layout(dataclasses.replace(stage, config=config), 4) == Layout(
            zero_stage=zero, micro_batch=micro, checkpointing=again
        )
        assert config.train.workers.num_workers == 4
        assert config.base.unet.checkpointing == again


def test_workers_share_the_global_batch_out_evenly(demo):
    stage = paper_like(demo, "base")  # batches of 64
    found = [layouts.usable_workers(stage, n) for n in (1, 3, 48, 64, 1000)]
    assert found == [1, 2, 32, 64, 64]


def test_muon_stays_whole_and_clip_takes_its_share_at_once(demo):
    clip = paper_like(demo, "clip")
    (only,) = layouts.layouts(clip, 2, offload=False)
    assert only == Layout(zero_stage=0, micro_batch=64, checkpointing=False)
    assert list(layouts.layouts(clip, 2, offload=True)) == []


# -- the plan as a whole ---------------------------------------------------------------------------


def test_parts_add_up(plan):
    stages = plan["stages"]
    assert [stage["name"] for stage in stages] == ["clip", "prior", "base", "up64"]
    assert plan["fits"] and all(stage["fits"] for stage in stages)
    whole = plan["download"]["cost"] + plan["embed"]["cost"] + plan["evaluation"]["cost"]
    assert plan["cost"] == pytest.approx(whole + sum(stage["cost"] for stage in stages))
    storage = dict(plan["storage_bytes"])
    assert storage.pop("all") == pytest.approx(sum(storage.values()))
    for stage in stages:
        assert stage["samples"] == stage["num_steps"] * stage["global_batch_size"]
        assert stage["epochs"] == pytest.approx(stage["samples"] / 8000)
        least = stage["num_steps"] * stage["step_seconds"]["all"] / 86_400
        assert stage["days"] == pytest.approx(least / stage["failures"]["goodput"])
        assert stage["gpu_hours"] == pytest.approx(24 * stage["days"] * stage["workers"])
    pipeline = plan["pipeline"]
    assert pipeline["days"] >= pipeline["days_without_failures"] * (1 - 1e-9)
    assert list(pipeline["stages"]) == ["download", "embed", "clip", "prior", "base", "up64"]


def test_a_checkpoints_size_is_what_training_writes(demo):
    """Master weights, two moments and the average in fragments; model and ema.safetensors."""
    stage = paper_like(demo, "prior")
    assert report.checkpoint_bytes(stage) == stage.parameters * 24


@pytest.mark.parametrize("k", [1, 4])
def test_rows_of_embeddings_are_what_shards_hold(demo, tmp_path: Path, k: int):
    sizes, n, vectors = demo.encoder, 1000, {1: (), 4: (5,)}[k]
    write_embed_shard(
        tmp_path, "000000", image_embed=np.zeros((n, *vectors, sizes["embed_dim"])),
        text_embed=np.zeros((n, sizes["embed_dim"])),
        tokens=np.zeros((n, sizes["context_length"])),
        keys=[f"{i:09d}" for i in range(n)], captions=[f"a picture of {i}" for i in range(n)],
    )  # fmt: skip
    npy = sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    row = (4 if k == 1 else 12) * sizes["embed_dim"] + 4 * sizes["context_length"]
    assert npy == pytest.approx(n * row, rel=0.01)
    request = dataclasses.replace(DEMO, image_tokens=k)
    found = report.storage_bytes(request, demo.encoder, [])["embeddings, tokens and keys"]
    assert found == pytest.approx(8000 * (row + report.KEYS_BYTES))


def test_the_download_is_done_in_the_days_allowed():
    request = PlanRequest(images=5e9, download_days=7.0)
    found = report.download_plan(request)
    assert found["days"] <= 7.0 and found["bound"] == "vCPUs"
    fewer = report.download_plan(dataclasses.replace(request, download_days=found["days"] * 1.5))
    assert fewer["nodes"] < found["nodes"]
    narrow = report.download_plan(dataclasses.replace(request, node_gbits=0.5))
    assert narrow["bound"] == "network" and narrow["nodes"] > found["nodes"]
    assert found["images_per_second"] * 86_400 * found["days"] == pytest.approx(5e9)


def test_the_script_prints_tables_and_json_and_exits_by_the_budget(plan, capsys, monkeypatch):
    monkeypatch.setattr(Planner, "plan", lambda self: plan)
    monkeypatch.setattr(Planner, "__init__", lambda self, request: None)
    assert main(DEMO) == 0
    shown = capsys.readouterr().out
    for words in ("Models", "Memory of base", "Time and cost", "Failures and checkpoints",
                  "Storage and networks", "efficiency, unet_channels_last: ", "1,959,537",
                  "--preset demo --train.num-workers 1"):  # fmt: skip
        assert words in shown
    assert main(dataclasses.replace(DEMO, json=True)) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plan))
    assert main(dataclasses.replace(DEMO, budget=1e-9)) == 1
    assert "over the budget: $" in capsys.readouterr().err
    stage = {**plan["stages"][0], "fits": False, "least_bytes": 2**40, "least_layout": "ZeRO 3",
             "nearest": ["8 x h200 with ZeRO 3"]}  # fmt: skip
    bad = {**plan, "fits": False, "stages": [stage, *plan["stages"][1:]], "pipeline": {}}
    monkeypatch.setattr(Planner, "plan", lambda self: bad)
    assert main(DEMO) == 1
    found = capsys.readouterr()
    assert "nearest that does: 8 x h200 with ZeRO 3" in found.out
    assert found.err == "does not fit: clip\n"


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("num_gpus", 0, "num_gpus: found 0, expected 1 to 100000"),
        ("images", -1.0, "images: found -1, expected 1 to 1e"),
        ("images", float("nan"), "images: found nan"),
        ("budget", -5.0, "budget: found -5"),
        ("headroom", 1.5, "headroom: found 1.5"),
        ("node_mtbf_hours", 0.0, "node_mtbf_hours: found 0"),
        ("caption_tokens", 1000, "caption_tokens: found 1000"),
    ],
)
def test_a_wrong_figure_is_one_line(field: str, value, problem: str):
    with pytest.raises(ValueError) as caught:
        PlanRequest(**{field: value})
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="effective_tflops: found 200 with mfu 0.3"):
        PlanRequest(mfu=0.3, effective_tflops=200.0)
    with pytest.raises(ValueError, match="effective_tflops: found 5000, expected at most the 989"):
        efficiency(UNET, GPUS["h200"], PlanRequest(effective_tflops=5000.0), [])
    with pytest.raises(ValueError, match="prior: found autoregressive for the preset modern"):
        build_stages(PlanRequest(chain="modern", prior="autoregressive"))
    with pytest.raises(ValueError, match="train_clip: found true for the preset mini"):
        build_stages(PlanRequest(chain="mini", train_clip=True))
