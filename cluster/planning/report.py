"""A plan: every stage of a preset on a cluster, put together as plain data."""

from typing import Any

from cluster.planning import fitting, flows
from cluster.planning.devices import find_gpu
from cluster.planning.efficiency import Layout, efficiency, read_measured
from cluster.planning.fitting import Placement
from cluster.planning.flows import DAY
from cluster.planning.request import PlanRequest
from cluster.planning.sampling import flops_an_image
from cluster.planning.simulation import (
    Nodes,
    PipelineStage,
    Tasks,
    Training,
    best_interval,
    best_simulated_interval,
    mean_goodput,
    simulate,
    simulate_pipeline,
    young_interval,
)
from cluster.planning.stages import Stage, build_stages

SHARD_SECONDS = 600.0  # of one node for one shard of a download or an embedding: an assumption
COPY = 25e9  # bytes a second from a GPU to the memory of its CPU, for which steps wait


class Planner:
    """Makes the plan of a request."""

    def __init__(self, request: PlanRequest) -> None:
        self.request, self.gpu = request, find_gpu(request.gpu)
        self.price = request.gpu_hour_price or self.gpu.hour_price
        self.measured = read_measured(request.measured)
        self.encoder, self.stages = build_stages(request)
        self._best: dict[str, Placement] = {}

    def plan(self) -> dict[str, Any]:
        """Return the whole plan: numbers in the units that their names say, and their sources."""
        request = self.request
        download = flows.plan_download(request)
        encodes = efficiency("encoder", self.gpu, request, self.measured)
        embed = flows.plan_embed(request, self.encoder, self.gpu, encodes)
        trained = [self._trained(stage) for stage in self.stages]
        evaluation = self._evaluation()
        pipeline = self._pipeline(download, embed, trained)
        storage = flows.storage_bytes(request, self.encoder, self.stages)
        costs = [download.cost, embed.gpu_hours * self.price, evaluation["cost"]]
        costs += [stage["cost"] for stage in trained if stage["fits"]]
        return {
            "chain": request.chain,
            "gpu": {
                "name": self.gpu.name, "num_gpus": request.num_gpus,
                "peak_tflops": self.gpu.peak_tflops, "memory_gib": self.gpu.memory_gib,
                "hour_price": self.price, "source": self.gpu.source,
                "price_is_assumed": not request.gpu_hour_price,
            },
            "images": request.images,
            "encoder": {"name": self.encoder.name, **self.encoder.sizes},
            "download": vars(download),
            "embed": {**vars(embed), "cost": embed.gpu_hours * self.price, "mfu": encodes.mfu},
            "stages": trained,
            "evaluation": evaluation,
            "storage_bytes": {**storage, "all": sum(storage.values())},
            "pipeline": pipeline,
            "cost": sum(costs),
            "fits": all(stage["fits"] for stage in trained),
        }  # fmt: skip

    # -- one stage that is trained -----------------------------------------------------------------

    def _trained(self, stage: Stage) -> dict[str, Any]:
        request, gpu = self.request, self.gpu
        found = efficiency(stage.network, gpu, request, self.measured, stage.preset)
        workers = fitting.usable_workers(stage, request.num_gpus)
        placements = fitting.place(stage, gpu, workers, found.mfu, request.headroom)
        best = next((one for one in placements if one.fits), None)
        train = stage.config.train
        told = {
            "name": stage.name, "kind": stage.kind, "preset": stage.preset,
            "network": stage.network, "parameters": stage.parameters,
            "caption_tokens": stage.words, "forward_macs": stage.macs,
            "flops_a_sample": stage.flops(train.batch.global_batch_size // workers),
            "num_steps": train.schedule.num_steps,
            "global_batch_size": train.batch.global_batch_size,
            "samples": stage.samples, "epochs": stage.samples / request.images,
            "train_flops": stage.flops(train.batch.global_batch_size // workers) * stage.samples,
            "workers": workers, "mfu": found.mfu, "efficiency_source": found.source,
            "activation_bytes": {
                ("checkpointed" if kept else "kept"): vars(line)
                for kept, line in stage.activations.items()
            },
            "memory": self._memory_table(stage, workers), "fits": best is not None,
            "preset_layout": self._preset_layout(stage, workers),
        }  # fmt: skip
        if best is None:
            least = min(placements, key=lambda one: one.memory.total)
            told["least_bytes"] = least.memory.total
            told["least_layout"] = fitting.told(stage, least.layout)
            told["nearest"] = fitting.nearest(stage, gpu, workers, found.mfu, request.headroom)
            return told
        self._best[stage.name] = best
        return {**told, **self._speed(stage, best)}

    def _preset_layout(self, stage: Stage, workers: int) -> dict[str, Any]:
        layout = fitting.preset_layout(stage, workers)
        total = fitting.memory_of(stage, workers, layout).total
        room = self.gpu.memory_bytes * (1 - self.request.headroom)
        return {
            "layout": fitting.told(stage, layout), "bytes": total, "fits": total <= room,
        }  # fmt: skip

    def _memory_table(self, stage: Stage, workers: int) -> list[dict[str, Any]]:
        """Return, by ZeRO stage: the state, and the largest micro-batch with activations kept and
        computed again."""
        rows = []
        pairs = [(zero, False) for zero in range(4)] + [(2, True), (3, True)]
        for zero, offload in pairs:
            row: dict[str, Any] = {"zero_stage": zero, "offload": offload}
            for again in stage.checkpointing:
                layout = Layout(
                    zero_stage=zero, micro_batch=1, checkpointing=again, offload=offload
                )
                memory = fitting.memory_of(stage, workers, layout)
                row["state_bytes"] = memory.state
                row["host_bytes"] = fitting.host_bytes(stage, workers) if offload else 0.0
                row["bytes_at_1_again" if again else "bytes_at_1"] = memory.total
                most = fitting.largest_micro_batch(
                    stage, self.gpu, workers, layout, self.request.headroom
                )
                row["micro_batch_again" if again else "micro_batch"] = most
            rows.append(row)
        return rows

    def _speed(self, stage: Stage, best: Placement) -> dict[str, Any]:
        """Return a fitting stage's throughput, time, failures and cost."""
        train, step = stage.config.train, best.step
        training, nodes = self._simulated(stage, best)
        histories = simulate(
            training, nodes, seed=self.request.seed, count=self.request.simulations
        )
        goodput = mean_goodput(histories)
        days = train.schedule.num_steps * step.seconds / goodput / DAY
        rate = train.batch.global_batch_size / step.seconds
        hours = 24 * days * best.workers
        own_every = train.checkpoint.checkpoint_every * step.seconds
        interval, at_best = best_simulated_interval(training, nodes, seed=self.request.seed)
        return {
            "layout": vars(best.layout), "layout_told": fitting.told(stage, best.layout),
            "flags": fitting.flags(stage, best), "memory_bytes": vars(best.memory),
            "total_bytes": best.memory.total,
            "step_seconds": {**vars(step), "all": step.seconds},
            "samples_per_second": rate, "tflops_a_gpu": rate * stage.flops() / best.workers / 1e12,
            "failures": {
                "mtbf_hours": nodes.system_mtbf / 3600, "goodput": goodput,
                "expected_failures": sum(h.failures for h in histories) / len(histories),
                "checkpoint_bytes": flows.checkpoint_bytes(stage),
                "block_seconds": training.block, "write_seconds": training.write,
                "preset_interval_seconds": own_every,
                "simulated_interval_seconds": training.interval,
                "young_seconds": young_interval(training.block, nodes.system_mtbf),
                "daly_seconds": best_interval(training.block, nodes.restart, nodes.system_mtbf),
                "best_interval_seconds": interval, "best_goodput": at_best,
                "best_checkpoint_every": max(1, round(interval / step.seconds)),
            },
            "days": days, "gpu_hours": hours, "cost": hours * self.price,
            "read_gbits": rate * flows.sample_bytes(stage, self.encoder) * 8 / 1e9,
            "decode_cores": rate * flows.decode_seconds(stage),
        }  # fmt: skip

    def _nodes(self, gpus: int) -> Nodes:
        request = self.request
        return Nodes(
            count=-(-gpus // self.gpu.per_node),
            mtbf=3600 * request.node_mtbf_hours,
            restart=request.restart_seconds,
            repair=3600 * request.repair_hours,
            spares=request.spare_nodes,
            elastic=request.elastic,
        )

    def _simulated(self, stage: Stage, best: Placement) -> tuple[Training, Nodes]:
        """Describe a training for the simulation, at the preset's own interval of checkpoints."""
        train, size = stage.config.train, flows.checkpoint_bytes(stage)
        block = 16.0 * stage.parameters / best.workers / COPY
        write = size / (1e9 * self.request.storage_gbytes)
        training = Training(
            work=train.schedule.num_steps * best.step.seconds,
            interval=max(train.checkpoint.checkpoint_every * best.step.seconds, write),
            block=block if train.checkpoint.async_checkpoints else block + write,
            write=write if train.checkpoint.async_checkpoints else 0.0,
        )
        return training, self._nodes(best.workers)

    # -- the rest ----------------------------------------------------------------------------------

    def _evaluation(self) -> dict[str, Any]:
        """Return what drawing and scoring the evaluation's images costs."""
        request, gpu = self.request, self.gpu
        each = flops_an_image(request.chain, self.stages)
        seconds = 2 * 2 * flows.INCEPTION_MACS / (gpu.peak_tflops * 1e12 * self._share("encoder"))
        for stage in self.stages:
            if stage.name in each:
                share = self._share(stage.network, stage.preset)
                seconds += each[stage.name] / (gpu.peak_tflops * 1e12 * share)
        hours = seconds * request.eval_images / 3600
        return {
            "images": request.eval_images, "flops_an_image": each, "gpu_seconds_an_image": seconds,
            "gpu_hours": hours, "days": hours / 24 / request.num_gpus, "cost": hours * self.price,
        }  # fmt: skip

    def _share(self, network: str, preset: str = "") -> float:
        return efficiency(network, self.gpu, self.request, self.measured, preset).mfu

    def _pipeline(self, download: Any, embed: Any, trained: list[dict]) -> dict[str, Any]:
        """Simulate the whole, stage after stage, where all of it fits."""
        if not all(stage["fits"] for stage in trained):
            return {}
        plain = Nodes(
            count=download.nodes, mtbf=3600 * self.request.node_mtbf_hours,
            restart=self.request.restart_seconds, repair=3600 * self.request.repair_hours,
        )  # fmt: skip
        tasks = Tasks(work=download.days * DAY, piece=SHARD_SECONDS)
        every = [PipelineStage(name="download", job=tasks, nodes=plain, pool="cpu")]
        every.append(
            PipelineStage(
                name="embed", job=Tasks(work=embed.days * DAY, piece=SHARD_SECONDS),
                nodes=self._nodes(self.request.num_gpus), pool="gpu", after=("download",),
            )
        )  # fmt: skip
        for stage in self.stages:
            job, nodes = self._simulated(stage, self._best[stage.name])
            before = ("embed",) if stage.kind == "prior" or stage.name == "base" else ("download",)
            every.append(
                PipelineStage(name=stage.name, job=job, nodes=nodes, pool="gpu", after=before)
            )
        runs = [
            simulate_pipeline(every, seed=self.request.seed + number)
            for number in range(self.request.simulations)
        ]
        last = runs[0]
        return {
            "days": sum(run.elapsed for run in runs) / len(runs) / DAY,
            "days_without_failures": self._ideal(every) / DAY,
            "stages": {
                name: {"begins_day": last.begins[name] / DAY, "ends_day": last.ends[name] / DAY,
                       "failures": last.histories[name].failures,
                       "goodput": last.histories[name].goodput}
                for name in last.begins
            },
        }  # fmt: skip

    @staticmethod
    def _ideal(stages: list[PipelineStage]) -> float:
        return sum(stage.job.work for stage in stages)
