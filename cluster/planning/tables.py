"""A plan as tables for people."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from cluster.base.files import Json
from cluster.planning.efficiency import CHANNELS_LAST

GIB = 2**30
Plan = Json


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
    found = stage["failures"]
    best = f"{found['best_interval_seconds'] / 60:.3g} min"
    return [
        stage["name"], f"{found['mtbf_hours']:,.3g} h", f"{found['expected_failures']:.3g}",
        f"{found['checkpoint_bytes'] / 1e9:.3g} GB", f"{found['block_seconds']:.2g} s",
        f"{found['write_seconds']:.3g} s", f"{found['preset_interval_seconds'] / 60:.3g} min",
        f"{found['goodput']:.2%}", f"{best} = {found['best_checkpoint_every']:,} steps",
        f"{found['best_goodput']:.2%}", f"{found['young_seconds'] / 60:.3g} min",
        f"{found['daly_seconds'] / 60:.3g} min",
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
