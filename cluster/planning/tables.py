"""A plan and its comparisons, as tables for people."""

from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.planning.efficiency import CHANNELS_LAST
from cluster.planning.published import Row

GIB = 2**30


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print every table of a plan."""
    gpu = plan["gpu"]
    assumed = " (an assumption, no offer: --gpu-hour-price)" if gpu["price_is_assumed"] else ""
    console.print(
        f"[bold]{plan['chain']}[/bold] on {gpu['num_gpus']} x {gpu['name']}: "
        f"{gpu['peak_tflops']:g} TFLOP/s of bf16, {gpu['memory_gib']:g} GiB each "
        f"({gpu['source']}); ${gpu['hour_price']:.2f} a GPU-hour{assumed}; "
        f"encoder {plan['encoder']['name']}",
        highlight=False,
    )
    console.print(_models(plan))
    for stage in plan["stages"]:
        console.print(_memory(stage))
    console.print(_times(plan))
    console.print(_failures(plan))
    console.print(_data(plan))
    for line in remarks(plan):
        console.print(line, highlight=False, soft_wrap=True)


def _models(plan: dict[str, Any]) -> Table:
    table = Table(title="Models", title_justify="left")
    for name in ("stage", "preset", "parameters", "tokens", "forward a sample",
                 "training a sample", "samples", "epochs", "whole training"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("stage", "preset") else "right")
    for stage in plan["stages"]:
        table.add_row(
            stage["name"], stage["preset"], f"{stage['parameters']:,}",
            str(stage["caption_tokens"]) if stage["kind"] != "decoder" or stage["name"] == "base"
            else "-",
            f"{stage['forward_macs'] / 1e9:,.4g} GMAC", f"{stage['flops_a_sample'] / 1e12:.3g} TF",
            f"{stage['samples'] / 1e6:,.4g} M", f"{stage['epochs']:.3g}",
            f"{stage['train_flops']:.3g} FLOP",
        )  # fmt: skip
    return table


def _memory(stage: dict[str, Any]) -> Table:
    """Memory by ZeRO stage: state, and the largest micro-batch with each way of activations."""
    kept, again = (stage["activation_bytes"].get(key) for key in ("kept", "checkpointed"))
    title = f"Memory of {stage['name']} on {stage['workers']} GPUs; activations a sample: " + (
        f"{kept['each'] / GIB:.3g} GiB kept" if kept else ""
    )
    title += f", {again['each'] / GIB:.3g} GiB checkpointed" if again else ", no checkpointing"
    table = Table(title=title, title_justify="left")
    table.add_column("ZeRO")
    for name in ("state, GiB", "CPU, GiB", "all at 1, kept", "largest micro-batch",
                 "all at 1, checkpointed", "largest micro-batch"):  # fmt: skip
        table.add_column(name, justify="right")
    for row in stage["memory"]:
        cells = [f"{row['zero_stage']}{', offload' if row['offload'] else ''}"]
        cells.append(f"{row['state_bytes'] / GIB:.3g}")
        cells.append(f"{row['host_bytes'] / GIB:.3g}" if row["offload"] else "-")
        for suffix in ("", "_again"):
            bytes_at_1 = row.get(f"bytes_at_1{suffix}")
            most = row.get(f"micro_batch{suffix}", 0)
            cells.append("-" if bytes_at_1 is None else f"{bytes_at_1 / GIB:.3g}")
            cells.append("-" if bytes_at_1 is None else str(most) if most else "none fits")
        table.add_row(*cells)
    return table


def _times(plan: dict[str, Any]) -> Table:
    table = Table(title="Time and cost", title_justify="left")
    table.add_column("stage")
    table.add_column("where, and how")
    for name in ("MFU", "samples/s", "step", "time", "GPU-hours", "cost"):
        table.add_column(name, justify="right")
    download, embed, evaluation = (plan[key] for key in ("download", "embed", "evaluation"))
    table.add_row(
        "download", f"{download['nodes']} CPU nodes, bound by {download['bound']}", "-",
        f"{download['images_per_second']:,.0f}", "-", _time(download['days']), "-",
        _dollars(download["cost"]),
    )  # fmt: skip
    table.add_row(
        "embed", f"{plan['gpu']['num_gpus']} GPUs, {embed['decode_nodes']} nodes that decode",
        f"{embed['mfu']:.1%}", f"{embed['images_per_second']:,.0f}", "-", _time(embed['days']),
        f"{embed['gpu_hours']:,.0f}", _dollars(embed["cost"]),
    )  # fmt: skip
    for stage in plan["stages"]:
        if not stage["fits"]:
            table.add_row(stage["name"], "[red]does not fit[/red]", *["-"] * 6)
            continue
        table.add_row(
            stage["name"], f"{stage['workers']} GPUs, {stage['layout_told']}: "
            f"{stage['total_bytes'] / GIB:.3g} GiB", f"{stage['mfu']:.1%}",
            f"{stage['samples_per_second']:,.0f}", f"{stage['step_seconds']['all']:.3g} s",
            _time(stage['days']), f"{stage['gpu_hours']:,.0f}", _dollars(stage["cost"]),
        )  # fmt: skip
    table.add_row(
        "evaluate", f"{evaluation['images']:,} images", "-",
        f"{plan['gpu']['num_gpus'] / evaluation['gpu_seconds_an_image']:,.3g}", "-",
        _time(evaluation['days']), f"{evaluation['gpu_hours']:,.0f}",
        _dollars(evaluation["cost"]),
    )  # fmt: skip
    whole = plan["pipeline"].get("days")
    table.add_row(
        "[bold]all[/bold]", "one after the other, simulated with failures", "-", "-", "-",
        _time(whole) if whole else "-", "-", _dollars(plan["cost"]),
    )  # fmt: skip
    return table


def _failures(plan: dict[str, Any]) -> Table:
    table = Table(title="Failures and checkpoints", title_justify="left")
    table.add_column("stage")
    for name in ("a failure every", "failures", "checkpoint", "steps wait", "written in",
                 "preset's interval", "goodput", "best interval", "its goodput", "Young",
                 "best in closed form"):  # fmt: skip
        table.add_column(name, justify="right")
    for stage in plan["stages"]:
        found = stage.get("failures")
        if found is None:
            continue
        table.add_row(
            stage["name"], f"{found['mtbf_hours']:,.3g} h", f"{found['expected_failures']:.3g}",
            f"{found['checkpoint_bytes'] / 1e9:.3g} GB", f"{found['block_seconds']:.2g} s",
            f"{found['write_seconds']:.3g} s", f"{found['preset_interval_seconds'] / 60:.3g} min",
            f"{found['goodput']:.2%}",
            f"{found['best_interval_seconds'] / 60:.3g} min = "
            f"{found['best_checkpoint_every']:,} steps",
            f"{found['best_goodput']:.2%}", f"{found['young_seconds'] / 60:.3g} min",
            f"{found['daly_seconds'] / 60:.3g} min",
        )  # fmt: skip
    return table


def _data(plan: dict[str, Any]) -> Table:
    table = Table(title="Storage and networks", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for what, size in plan["storage_bytes"].items():
        table.add_row(what, _size(size))
    download, embed = plan["download"], plan["embed"]
    table.add_row("rows of the URL list", f"{download['rows'] / 1e6:,.4g} M")
    table.add_row("download from the web", f"{download['gbits_per_second']:,.3g} Gb/s")
    table.add_row("embedding reads", f"{embed['read_gbits']:,.3g} Gb/s")
    for stage in plan["stages"]:
        if stage["fits"]:
            table.add_row(
                f"training {stage['name']} reads, with {stage['decode_cores']:,.2g} cores decoding",
                f"{stage['read_gbits']:,.3g} Gb/s",
            )
    return table


def remarks(plan: dict[str, Any]) -> list[str]:
    """Return what the tables do not say: what does not fit, which flags to take, and sources."""
    found = []
    for stage in plan["stages"]:
        asked = plan["gpu"]["num_gpus"]
        if stage["workers"] < asked:
            found.append(
                f"{stage['name']}: uses {stage['workers']} of {asked} GPUs, which its global batch "
                f"of {stage['global_batch_size']} shares out evenly"
            )
        own = stage["preset_layout"]
        if not own["fits"]:
            found.append(
                f"{stage['name']}: the preset as it is ({own['layout']}) takes "
                f"{own['bytes'] / GIB:.3g} GiB and does not fit"
            )
        if stage["network"] == "unet" and plan["gpu"]["name"] != "cpu":
            found.append(
                f"{stage['name']}: channels_last, which the preset leaves off, would train it some "
                f"{CHANNELS_LAST:.2f} times as fast (see efficiency)"
            )
        if stage["fits"]:
            found.append(f"{stage['name']}: --preset {stage['preset']} {stage['flags']}")
        else:
            found.append(
                f"{stage['name']}: does not fit: at least {stage['least_bytes'] / GIB:.3g} GiB "
                f"({stage['least_layout']}); nearest that does: "
                f"{' or '.join(stage['nearest']) or 'none that is known'}"
            )
    sources = {stage["network"]: stage["efficiency_source"] for stage in plan["stages"]}
    sources["encoder"] = plan["embed"]["source"]
    found += [f"efficiency, {network}: {source}" for network, source in sources.items()]
    return found


def print_comparisons(rows: list[Row], console: Console) -> None:
    """Print every comparison with its error."""
    table = Table(title="Against published figures", title_justify="left")
    for name in ("what", "ours", "published", "unit", "error", "role", "source"):
        number = name in ("ours", "published", "error")
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        mark = "" if row.holds else " [red]outside[/red]"
        table.add_row(
            row.what, f"{row.ours:,.4g}", f"{row.published:,.4g}", row.unit,
            f"{row.error:+.1%}{mark}", row.role + (f": {row.why}" if row.why else ""), row.source,
        )  # fmt: skip
    console.print(table)
    for role in ("size", "tests"):
        these = [row for row in rows if row.role == role]
        worst = max(these, key=lambda row: abs(row.error))
        console.print(
            f"{role}: {sum(row.holds for row in these)} of {len(these)} within "
            f"{these[0].limit:.0%}; largest error {worst.error:+.1%} ({worst.what})",
            highlight=False,
        )


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
