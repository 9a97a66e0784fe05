"""A plan: every stage of a chain on a cluster, as plain data, and as tables for people."""

import math
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from cluster.base.files import Json
from cluster.planning import failures, layouts
from cluster.planning.devices import find_gpu
from cluster.planning.efficiency import (
    CHANNELS_LAST,
    Efficiency,
    Workload,
    efficiency,
    read_measured,
)
from cluster.planning.failures import CheckpointTimes, Nodes
from cluster.planning.layouts import Layout, Placement
from cluster.planning.request import PlanRequest
from cluster.planning.stages import Stage, build_stages, image_flops

DAY = 86_400.0
# img2dataset, 100 machines of 96 vCPUs: 200,000 images a second (its PR 272)
DOWNLOAD_A_VCPU = 200_000 / (100 * 96)
DECODE_SECONDS = 2.4e-3  # CLIP's preprocessing of a 256 px JPEG, a core (benchmarked)
EMBED_SECONDS = 1e-6  # a million embeddings a second and core (benchmarks/results.md)
NETWORK_USE = 0.8  # of a card's rate that downloads reach, many small transfers: an assumption
# 10,000 images of 256 px make a shard of 270 MB (laion-prepro, LAION-400M)
IMAGE_BYTES_256 = 270e6 / 10_000
# of 413 M images of LAION-400M, 9.6 M are at least 1024 px on both sides (LAION-400M's statistics)
SHARE_1024 = 9.6 / 413
# 1024 px on the short side, aspect 4:3, 1.5 bits a pixel in a JPEG of quality 95: an assumption
IMAGE_BYTES_1024 = 1024**2 * (4 / 3) * 1.5 / 8
KEYS_BYTES = 100  # of a row of keys.parquet, key and caption, compressed: an assumption
CHECKPOINT_BYTES = 4 * (1 + 2 + 1) + 4 + 4  # fragments: master, moments, EMA; model, ema files
INCEPTION_MACS = 5.7e9  # of a 299 px image (Szegedy et al. 2016)
SHARD_SECONDS = 600.0  # of one node for one shard of a download or an embedding: an assumption
COPY = 25e9  # bytes a second from a GPU to the memory of its CPU, for which steps wait

GIB = 2**30
ENCODER = Workload(network="encoder")

Plan = Json  # JSON: numbers in the units that their names give, and their sources


def download_plan(request: PlanRequest) -> Plan:
    """Return how many nodes the download needs to end in the days allowed."""
    wanted = request.images / (request.download_days * DAY)
    by_cpu = request.vcpus_per_node * DOWNLOAD_A_VCPU
    by_network = NETWORK_USE * request.node_gbits * 1e9 / 8 / request.fetched_bytes
    nodes = math.ceil(wanted / min(by_cpu, by_network))
    rate = nodes * min(by_cpu, by_network)
    days = request.images / rate / DAY
    return {
        "rows": request.images / request.success,
        "images_per_second": rate,
        "nodes": nodes,
        "bound": "vCPUs" if by_cpu <= by_network else "network",
        "days": days,
        "gbits_per_second": rate * request.fetched_bytes * 8 / 1e9,
        "cost": nodes * request.vcpus_per_node * 24 * days * request.cpu_hour_price,
    }


def checkpoint_bytes(stage: Stage) -> float:
    """Return the size of a checkpoint: fragments, and the weights assembled for inference."""
    return stage.parameters * (CHECKPOINT_BYTES + stage.average_bytes)


def storage_bytes(
    request: PlanRequest, encoder: Mapping[str, int], stages: list[Stage]
) -> dict[str, float]:
    """Return the bytes on storage, by what they are."""
    sizes = {"images of 256 px": request.images * IMAGE_BYTES_256}
    if any(stage.name == "up1024" for stage in stages):
        each = request.images * SHARE_1024 * IMAGE_BYTES_1024
        sizes["images of 1024 px, where the web has them"] = each
    row = embedding_bytes(encoder, request.image_tokens)
    sizes["embeddings, tokens and keys"] = request.images * row
    for stage in stages:
        # while the newest is written, the one it will replace is still there
        kept = stage.train.checkpoint.keep_checkpoints + 1
        sizes[f"checkpoints of {stage.name}, {kept} at most"] = kept * checkpoint_bytes(stage)
    return sizes


def embedding_bytes(encoder: Mapping[str, int], image_tokens: int = 1) -> int:
    """Return the bytes of a row: two float16 embeddings and k > 1 float16 tokens of the image,
    int32 tokens, key and caption."""
    vectors = 2 + (image_tokens if image_tokens > 1 else 0)
    return 2 * vectors * encoder["embed_dim"] + 4 * encoder["context_length"] + KEYS_BYTES


class Planner:
    """Makes the plan of a request."""

    def __init__(self, request: PlanRequest) -> None:
        self.request, self.gpu = request, find_gpu(request.gpu)
        self.price = request.gpu_hour_price or self.gpu.hour_price
        self.measured = read_measured(request.measured)
        self.encoder, self.stages = build_stages(request)

    def plan(self) -> Plan:
        """Return the complete plan."""
        request, gpu = self.request, self.gpu
        download, embed = download_plan(request), self._embed()
        trained = [self._trained(stage) for stage in self.stages]
        evaluation = self._evaluation()
        storage = storage_bytes(request, self.encoder, self.stages)
        fits = all(stage["fits"] for stage in trained)
        sizes = {key: self.encoder[key] for key in ("embed_dim", "text_width", "context_length")}
        return {
            "chain": request.chain,
            "gpu": {
                "name": gpu.name, "num_gpus": request.num_gpus, "peak_tflops": gpu.peak_tflops,
                "memory_gib": gpu.memory_gib, "hour_price": self.price, "source": gpu.source,
                "price_is_assumed": not request.gpu_hour_price,
            },
            "images": request.images,
            "encoder": {"name": self.encoder["name"], **sizes},
            "download": download, "embed": embed, "stages": trained, "evaluation": evaluation,
            "storage_bytes": {**storage, "all": sum(storage.values())},
            "pipeline": self._pipeline(download, embed, trained) if fits else {},
            "cost": download["cost"] + embed["cost"] + evaluation["cost"]
            + sum(stage["cost"] for stage in trained if stage["fits"]),
            "fits": fits,
        }  # fmt: skip

    def _embed(self) -> Plan:
        """Return how long both towers take over all images, and the nodes that decode for them."""
        request, share = self.request, self._efficiency(ENCODER)
        flops = 2.0 * (self.encoder["image_macs"] + self.encoder["caption_macs"])
        rate = request.num_gpus * self.gpu.peak_tflops * 1e12 * share.mfu / flops
        days = request.images / rate / DAY
        hours = 24 * days * request.num_gpus
        return {
            "images_per_second": rate, "days": days, "gpu_hours": hours,
            "decode_nodes": math.ceil(rate * DECODE_SECONDS / request.vcpus_per_node),
            "read_gbits": rate * IMAGE_BYTES_256 * 8 / 1e9, "source": share.source,
            "cost": hours * self.price, "mfu": share.mfu,
        }  # fmt: skip

    def _trained(self, stage: Stage) -> Plan:
        """Return a stage's size, memory by layout, and its speed, failures and cost if it fits."""
        request, gpu = self.request, self.gpu
        share = self._efficiency(stage.workload)
        workers = layouts.usable_workers(stage, request.num_gpus)
        flops = stage.flops(stage.global_batch_size // workers)
        own = layouts.preset_layout(stage, workers)
        own_bytes = layouts.memory_of(stage, workers, own).total
        placements = layouts.place(stage, gpu, workers, share, request)
        best = next((each for each in placements if each.fits), None)
        plan = {
            "name": stage.name, "kind": stage.kind, "preset": stage.preset,
            "network": stage.network, "parameters": stage.parameters,
            "caption_tokens": stage.caption_tokens, "forward_macs": stage.macs,
            "flops_a_sample": flops, "num_steps": stage.num_steps,
            "global_batch_size": stage.global_batch_size, "samples": stage.samples,
            "epochs": stage.samples / request.images, "train_flops": flops * stage.samples,
            "workers": workers, "mfu": share.mfu, "efficiency_source": share.source,
            "activation_bytes": stage.counts["activations"],
            "memory": self._memory_table(stage, workers), "fits": best is not None,
            "preset_layout": {
                "layout": str(own), "bytes": own_bytes,
                "fits": own_bytes <= gpu.memory_bytes * (1 - request.headroom),
            },
        }  # fmt: skip
        if best is not None:
            return {**plan, **self._speed(stage, best)}
        least = min(placements, key=lambda each: each.memory.total)
        plan["least_bytes"], plan["least_layout"] = least.memory.total, str(least.layout)
        plan["nearest"] = layouts.nearest(stage, gpu, workers, share, request)
        return plan

    def _memory_table(self, stage: Stage, workers: int) -> list[Plan]:
        """Return, by ZeRO stage: the state, and the largest micro-batch with activations kept and
        computed again."""
        rows = []
        for zero, offload in [(zero, False) for zero in range(4)] + [(2, True), (3, True)]:
            row: Plan = {"zero_stage": zero, "offload": offload}
            for again in stage.checkpointing:
                layout = Layout(
                    zero_stage=zero, micro_batch=1, checkpointing=again, offload=offload
                )
                memory, suffix = layouts.memory_of(stage, workers, layout), "_again" * again
                row["state_bytes"] = memory.state
                row["host_bytes"] = layouts.host_bytes(stage, workers) if offload else 0.0
                row[f"bytes_at_1{suffix}"] = memory.total
                row[f"micro_batch{suffix}"] = layouts.largest_micro_batch(
                    stage, self.gpu, workers, layout, self.request.headroom
                )
            rows.append(row)
        return rows

    def _speed(self, stage: Stage, best: Placement) -> Plan:
        """Return a fitting stage's throughput, time, failures and cost."""
        train, seconds, size = stage.train.checkpoint, best.step.seconds, checkpoint_bytes(stage)
        nodes, own_interval = self._nodes(best.workers), train.checkpoint_every * seconds
        block = 16.0 * stage.parameters / best.workers / COPY
        write = size / (1e9 * self.request.storage_gbytes)
        checkpoints = CheckpointTimes(
            interval=max(own_interval, write),
            block=block if train.async_checkpoints else block + write,
            write=write if train.async_checkpoints else 0.0,
        )
        goodput = failures.training_goodput(checkpoints, nodes)
        optimum, best_goodput = failures.best_checkpoints(checkpoints, nodes)
        block, mtbf = checkpoints.block, nodes.system_mtbf
        days = stage.num_steps * seconds / goodput / DAY
        rate, hours = stage.global_batch_size / seconds, 24 * days * best.workers

        if stage.kind == "prior":
            read, decode = float(embedding_bytes(self.encoder)), EMBED_SECONDS
        elif stage.name == "up1024":
            read, decode = IMAGE_BYTES_1024, DECODE_SECONDS * 16  # by area
        else:
            read, decode = IMAGE_BYTES_256, DECODE_SECONDS
        return {
            "layout": vars(best.layout), "layout_text": str(best.layout),
            "flags": layouts.flags(stage, best), "memory_bytes": vars(best.memory),
            "total_bytes": best.memory.total, "step_seconds": {**vars(best.step), "all": seconds},
            "samples_per_second": rate, "tflops_a_gpu": rate * stage.flops() / best.workers / 1e12,
            "failures": {
                "mtbf_hours": mtbf / 3600, "goodput": goodput,
                "expected_failures": days * DAY / mtbf,
                "checkpoint_bytes": size, "block_seconds": block,
                "write_seconds": checkpoints.write, "preset_interval_seconds": own_interval,
                "interval_seconds": checkpoints.interval,
                "young_seconds": failures.young_interval(block, mtbf),
                "daly_seconds": failures.best_interval(block, nodes.restart, mtbf),
                "best_interval_seconds": optimum.interval, "best_goodput": best_goodput,
                "best_checkpoint_every": max(1, round(optimum.interval / seconds)),
            },
            "days": days, "gpu_hours": hours, "cost": hours * self.price,
            "read_gbits": rate * read * 8 / 1e9, "decode_cores": rate * decode,
        }  # fmt: skip

    def _nodes(self, gpus: int) -> Nodes:
        request = self.request
        return Nodes(
            count=-(-gpus // self.gpu.per_node), mtbf=3600 * request.node_mtbf_hours,
            restart=request.restart_seconds, repair=3600 * request.repair_hours,
            spares=request.spare_nodes, elastic=request.elastic,
        )  # fmt: skip

    def _evaluation(self) -> Plan:
        """Return what it costs to sample and score the evaluation's images."""
        request, peak = self.request, self.gpu.peak_tflops * 1e12
        flops = image_flops(request.chain, self.stages)
        seconds = 2 * 2 * INCEPTION_MACS / (peak * self._efficiency(ENCODER).mfu)
        for stage in self.stages:
            mfu = self._efficiency(stage.workload).mfu
            seconds += flops.get(stage.name, 0.0) / (peak * mfu)
        hours = seconds * request.eval_images / 3600
        return {
            "images": request.eval_images, "flops_an_image": flops, "gpu_seconds_an_image": seconds,
            "gpu_hours": hours, "days": hours / 24 / request.num_gpus, "cost": hours * self.price,
        }  # fmt: skip

    def _efficiency(self, run: Workload) -> Efficiency:
        return efficiency(run, self.gpu, self.request, self.measured)

    def _pipeline(self, download: Plan, embed: Plan, trained: list[Plan]) -> Plan:
        """Return when each stage begins and ends: one after the other, failures included."""
        request = self.request
        pieces = Nodes(
            count=download["nodes"], mtbf=3600 * request.node_mtbf_hours,
            restart=request.restart_seconds, repair=3600 * request.repair_hours,
        )  # fmt: skip
        rows = []  # name, days without failures, goodput, mean time between failures in days
        gpu_nodes = self._nodes(request.num_gpus)
        for name, days, nodes in (
            ("download", download["days"], pieces),
            ("embed", embed["days"], gpu_nodes),
        ):
            goodput = failures.tasks_goodput(SHARD_SECONDS, nodes)
            rows.append((name, days, goodput, nodes.system_mtbf / DAY))
        for stage in trained:
            costs = stage["failures"]
            ideal = stage["days"] * costs["goodput"]
            rows.append((stage["name"], ideal, costs["goodput"], costs["mtbf_hours"] / 24))
        now, stages = 0.0, {}
        for name, ideal, goodput, mtbf in rows:
            begins, now = now, now + ideal / goodput
            stages[name] = {
                "begins_day": begins, "ends_day": now,
                "failures": (now - begins) / mtbf, "goodput": goodput,
            }  # fmt: skip
        ideal = sum(row[1] for row in rows)
        return {"days": now, "days_without_failures": ideal, "stages": stages}


# -- tables ----------------------------------------------------------------------------------------


def print_plan(plan: Plan, console: Console) -> None:
    """Print every table of a plan, and its remarks."""
    gpu = plan["gpu"]
    assumed = " (an assumption, no offer: --gpu-hour-price)" if gpu["price_is_assumed"] else ""
    console.print(
        f"[bold]{plan['chain']}[/bold] on {gpu['num_gpus']} x {gpu['name']}: "
        f"{gpu['peak_tflops']:g} TFLOP/s of bf16, {gpu['memory_gib']:g} GiB each "
        f"({gpu['source']}); ${gpu['hour_price']:.2f} a GPU-hour{assumed}; "
        f"encoder {plan['encoder']['name']}",
        highlight=False,
    )
    stages = plan["stages"]
    columns = ("stage", "preset", "parameters", "tokens", "forward a sample", "training a sample",
               "samples", "epochs", "all of training")  # fmt: skip
    console.print(_table("Models", columns, map(_model, stages), left=2))
    for stage in stages:
        console.print(_memory(stage))
    console.print(_times(plan))
    columns = ("stage", "a failure every", "failures", "checkpoint", "steps wait", "written in",
               "preset's interval", "goodput", "best interval", "its goodput", "Young",
               "Daly")  # fmt: skip
    rows = (_failures(stage) for stage in stages if stage["fits"])
    console.print(_table("Failures and checkpoints", columns, rows))
    console.print(_table("Storage and networks", ("item", "figure"), _data(plan)))
    for line in remarks(plan):
        console.print(line, highlight=False, soft_wrap=True)


def _table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1
) -> Table:
    """Return a table whose first `left` columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _model(stage: Plan) -> list[str]:
    reads_text = stage["kind"] != "decoder" or stage["name"] == "base"
    return [
        stage["name"], stage["preset"], f"{stage['parameters']:,}",
        str(stage["caption_tokens"]) if reads_text else "-",
        f"{stage['forward_macs'] / 1e9:,.4g} GMAC", f"{stage['flops_a_sample'] / 1e12:.3g} TF",
        f"{stage['samples'] / 1e6:,.4g} M", f"{stage['epochs']:.3g}",
        f"{stage['train_flops']:.3g} FLOP",
    ]  # fmt: skip


def _memory(stage: Plan) -> Table:
    """Memory by ZeRO stage: state, and the largest micro-batch with each way of activations."""
    kept, again = (stage["activation_bytes"].get(key) for key in ("kept", "checkpointed"))
    title = f"Memory of {stage['name']} on {stage['workers']} GPUs; activations a sample: "
    title += f"{kept['each'] / GIB:.3g} GiB kept" if kept else ""
    title += f", {again['each'] / GIB:.3g} GiB checkpointed" if again else ", no checkpointing"
    rows = []
    for row in stage["memory"]:
        cells = [f"{row['zero_stage']}{', offload' if row['offload'] else ''}"]
        cells.append(f"{row['state_bytes'] / GIB:.3g}")
        cells.append(f"{row['host_bytes'] / GIB:.3g}" if row["offload"] else "-")
        for suffix in ("", "_again"):
            if f"bytes_at_1{suffix}" in row:
                largest = row[f"micro_batch{suffix}"]
                cells += [f"{row[f'bytes_at_1{suffix}'] / GIB:.3g}", str(largest or "none fits")]
            else:
                cells += ["-", "-"]
        rows.append(cells)
    columns = ("ZeRO", "state, GiB", "CPU, GiB", "total at 1, kept", "largest micro-batch",
               "total at 1, checkpointed", "largest micro-batch")  # fmt: skip
    return _table(title, columns, rows)


def _times(plan: Plan) -> Table:
    download, embed, evaluation = (plan[key] for key in ("download", "embed", "evaluation"))
    num_gpus = plan["gpu"]["num_gpus"]
    rows = [
        ["download", f"{download['nodes']} CPU nodes, bound by {download['bound']}", "-",
         f"{download['images_per_second']:,.0f}", "-", _time(download["days"]), "-",
         _dollars(download["cost"])],
        ["embed", f"{num_gpus} GPUs, {embed['decode_nodes']} nodes that decode",
         f"{embed['mfu']:.1%}", f"{embed['images_per_second']:,.0f}", "-", _time(embed["days"]),
         f"{embed['gpu_hours']:,.0f}", _dollars(embed["cost"])],
    ]  # fmt: skip
    for stage in plan["stages"]:
        if not stage["fits"]:
            rows.append([stage["name"], "[red]does not fit[/red]", *["-"] * 6])
            continue
        where = f"{stage['workers']} GPUs, {stage['layout_text']}"
        rows.append([
            stage["name"], f"{where}: {stage['total_bytes'] / GIB:.3g} GiB", f"{stage['mfu']:.1%}",
            f"{stage['samples_per_second']:,.0f}", f"{stage['step_seconds']['all']:.3g} s",
            _time(stage["days"]), f"{stage['gpu_hours']:,.0f}", _dollars(stage["cost"]),
        ])  # fmt: skip
    rate = num_gpus / evaluation["gpu_seconds_an_image"]
    days = plan["pipeline"].get("days")
    rows += [
        ["evaluate", f"{evaluation['images']:,} images", "-", f"{rate:,.3g}", "-",
         _time(evaluation["days"]), f"{evaluation['gpu_hours']:,.0f}",
         _dollars(evaluation["cost"])],
        ["[bold]all[/bold]", "one after the other, failures included", "-", "-", "-",
         _time(days) if days else "-", "-", _dollars(plan["cost"])],
    ]  # fmt: skip
    columns = ("stage", "where and how", "MFU", "samples/s", "step", "time", "GPU-hours", "cost")
    return _table("Time and cost", columns, rows, left=2)


def _failures(stage: Plan) -> list[str]:
    costs = stage["failures"]
    best = f"{costs['best_interval_seconds'] / 60:.3g} min"
    return [
        stage["name"], f"{costs['mtbf_hours']:,.3g} h", f"{costs['expected_failures']:.3g}",
        f"{costs['checkpoint_bytes'] / 1e9:.3g} GB", f"{costs['block_seconds']:.2g} s",
        f"{costs['write_seconds']:.3g} s", f"{costs['preset_interval_seconds'] / 60:.3g} min",
        f"{costs['goodput']:.2%}", f"{best} = {costs['best_checkpoint_every']:,} steps",
        f"{costs['best_goodput']:.2%}", f"{costs['young_seconds'] / 60:.3g} min",
        f"{costs['daly_seconds'] / 60:.3g} min",
    ]  # fmt: skip


def _data(plan: Plan) -> list[tuple[str, str]]:
    rows = [(item, _size(size)) for item, size in plan["storage_bytes"].items()]
    download, embed = plan["download"], plan["embed"]
    rows.append(("rows of the URL list", f"{download['rows'] / 1e6:,.4g} M"))
    rows.append(("download from the web", f"{download['gbits_per_second']:,.3g} Gb/s"))
    rows.append(("embedding reads", f"{embed['read_gbits']:,.3g} Gb/s"))
    for stage in plan["stages"]:
        if stage["fits"]:
            cores = f"{stage['decode_cores']:,.2g} cores decoding"
            rate = f"{stage['read_gbits']:,.3g} Gb/s"
            rows.append((f"training {stage['name']} reads, with {cores}", rate))
    return rows


def remarks(plan: Plan) -> list[str]:
    """Return what the tables do not show: what does not fit, the flags to pass, and sources."""
    lines = []
    for stage in plan["stages"]:
        name, requested, own = stage["name"], plan["gpu"]["num_gpus"], stage["preset_layout"]
        if stage["workers"] < requested:
            lines.append(
                f"{name}: uses {stage['workers']} of {requested} GPUs, which its global batch "
                f"of {stage['global_batch_size']} shares out evenly"
            )
        if not own["fits"]:
            lines.append(
                f"{name}: the preset as it is ({own['layout']}) takes {own['bytes'] / GIB:.3g} GiB "
                "and does not fit"
            )
        if stage["network"] == "unet" and plan["gpu"]["name"] != "cpu":
            lines.append(
                f"{name}: channels_last, which the preset leaves off, would train it some "
                f"{CHANNELS_LAST:.2f} times as fast (see efficiency)"
            )
        if stage["fits"]:
            lines.append(f"{name}: --preset {stage['preset']} {stage['flags']}")
        else:
            lines.append(
                f"{name}: does not fit: at least {stage['least_bytes'] / GIB:.3g} GiB "
                f"({stage['least_layout']}); nearest that does: "
                f"{' or '.join(stage['nearest']) or 'none that is known'}"
            )
    sources = {stage["network"]: stage["efficiency_source"] for stage in plan["stages"]}
    sources["encoder"] = plan["embed"]["source"]
    return lines + [f"efficiency, {network}: {source}" for network, source in sources.items()]


def _dollars(value: float) -> str:
    return f"${value:,.0f}" if value >= 10 else f"${value:,.2g}"


def _time(days: float) -> str:
    if days >= 1:
        return f"{days:,.3g} days"
    return f"{24 * days:.3g} h" if days >= 1 / 24 else f"{1440 * days:.2g} min"


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:,.4g} {unit}"
    return f"{count / 1e6:,.3g} MB"
