"""The optimizer as one torch Optimizer, so that DeepSpeed can own it: AdamW, or Muon for matrices
with AdamW.

State exists before the first step (`prepare`), so that a checkpoint can be restored into it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from models.clip import is_clip, is_clip_outer
from training.config import ScheduleConfig, TrainConfig
from training.engine.precision import settled

# coefficients of the quintic that maps singular values into about [0.7, 1.2]
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(update: Tensor, steps: int = 5, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return roughly U V^T of `update` [..., n, m] = U S V^T by a quintic Newton-Schulz iteration.

    (Jordan et al. 2024, "Muon", https://kellerjordan.github.io/posts/muon.) dtype: of the
    iteration, for which bfloat16 is exact enough.
    """
    a, b, c = _NEWTON_SCHULZ
    x = update.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(update.dtype)


class Optimizer(torch.optim.Optimizer):
    """Takes Muon's step for groups with `muon` True, AdamW's for the others; `lr` is by group.

    matrix_dtype: in which Muon orthogonalises.
    """

    def __init__(
        self,
        groups: list[dict],
        *,
        beta2: float,
        eps: float = 1e-8,
        matrix_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.matrix_dtype = matrix_dtype
        defaults = {
            "lr": 0.0, "peak_lr": 0.0, "weight_decay": 0.0, "muon": False, "beta1": 0.9,
            "beta2": beta2, "momentum": 0.95, "eps": eps,
        }  # fmt: skip
        super().__init__(groups, defaults)
        self.found_inf: Tensor | None = None

    def prepare(self) -> None:
        """Create the state of every parameter that has none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.init_state(parameter, group)

    def init_state(self, parameter: Tensor, group: dict) -> dict[str, Tensor]:
        """Return the state of a parameter of `group`, created where it has none."""
        state = self.state[parameter]
        if not state:
            if not group["muon"]:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["exp_avg"] = torch.zeros_like(parameter)
        return state

    @property
    def num_steps(self) -> int:
        """Return how many steps AdamW's moments have seen, 0 where all parameters are Muon's."""
        counts = [state["step"] for state in self.state.values() if "step" in state]
        return int(torch.stack(counts).max()) if counts else 0

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(value)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient.

        Where `found_inf`, a float32 scalar on the device, is 1, neither parameters nor state move,
        and the host need not know it. None: all move. An attribute, as in torch's own fused
        optimizers, since DeepSpeed calls `step` without arguments.
        """
        found_inf = self.found_inf
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(parameters, group, found_inf)
            elif parameters:
                self._adamw(parameters, group, found_inf)

    def _adamw(self, parameters: list[Tensor], group: dict, found_inf: Tensor | None) -> None:
        states = [self.init_state(p, group) for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["beta1"],
            beta2=group["beta2"],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, parameters: list[Tensor], group: dict, found_inf: Tensor | None) -> None:
        """Step along the orthogonalised Nesterov momentum; matrices of one shape go through
        together."""
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for p in parameters:
            by_shape.setdefault((p.shape[0], p[0].numel()), []).append(p)
        for shape, members in by_shape.items():
            updates = []
            for p in members:
                assert p.grad is not None
                state = self.init_state(p, group)["exp_avg"]
                momentum = state.lerp(p.grad, 1 - group["momentum"])
                _move(state, momentum, found_inf)
                updates.append(p.grad.lerp(momentum, group["momentum"]).view(shape))
            stacked = orthogonalise(torch.stack(updates), dtype=self.matrix_dtype)
            # a tall matrix gets a larger step, so that the change of its output is alike for all
            # shapes
            scale = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
            for p, update in zip(members, stacked, strict=True):
                shrunk = p * (1 - group["lr"] * group["weight_decay"])
                _move(p, shrunk.add_(update.view_as(p), alpha=-scale), found_inf)


def _move(tensor: Tensor, to: Tensor, found_inf: Tensor | None) -> None:
    """Set `tensor` to `to`, unless `found_inf` is 1."""
    tensor.copy_(to if found_inf is None else torch.where(found_inf > 0, tensor, to))


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Group the parameters: hidden matrices (Muon, or AdamW with weight decay), all else AdamW.

    First and last layers, embeddings, norms and biases are not hidden matrices: their rows are not
    interchangeable, and orthogonal updates hurt them. A module names its own as `outer_layers`.
    """
    outer = tuple(
        f"{path}.{layer}.".lstrip(".")
        for path, module in model.named_modules()
        for layer in getattr(module, "outer_layers", ())
    )
    of_clip = is_clip(model)
    hidden, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_outer = is_clip_outer(name) if of_clip else f"{name}.".startswith(outer)
            is_hidden = parameter.ndim >= 2 and not is_outer
            (hidden if is_hidden else others).append(parameter)
    settings = config.optimizer
    muon = settings.kind == "muon"
    peak = settings.matrix_learning_rate if muon else settings.learning_rate
    groups = [
        {"params": hidden, "muon": muon, "peak_lr": peak, "weight_decay": settings.weight_decay},
        {"params": others, "muon": False, "peak_lr": settings.learning_rate},
    ]
    device = next(model.parameters()).device.type
    precision = settled(config.workers.precision, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Optimizer(
        [group for group in groups if group["params"]],
        beta2=settings.beta2, eps=settings.adam_eps, matrix_dtype=dtype,
    )  # fmt: skip


def set_learning_rate(groups: list[dict], ratio: float) -> None:
    """Set every group's learning rate to `ratio` of its peak."""
    for group in groups:
        group["lr"] = group["peak_lr"] * ratio


def learning_rate_ratio(config: TrainConfig, step: int) -> float:
    """Return the learning rate at `step` as a share of its peak.

    The steps before the first end that was extended have the schedule of that end; those after one
    the last rate before it, or a schedule of their own.
    """
    schedule = config.schedule
    start, end, how = 0, schedule.num_steps, "rewarm"
    for former_end, next_how in (each.split(":") for each in schedule.extended):
        if step < int(former_end):
            end = int(former_end)
            break
        start, how = int(former_end), next_how
    if how == "constant":
        return learning_rate_ratio(config, start - 1)
    return _ratio(schedule, step - start, end - start)


def _ratio(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """Return the share at `step` of `num_steps`: linear warm-up, then cosine to 0, constant, or
    falling as 1 / sqrt(step)."""
    warmup = max(1, round(schedule.warmup * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    if schedule.decay == "constant":
        return 1.0
    if schedule.decay == "inverse_sqrt":
        return math.sqrt(warmup / step)
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
