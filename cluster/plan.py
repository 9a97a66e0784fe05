"""Plan a training: what a preset needs on a cluster, how long it takes, what it costs.

    python cluster/plan.py --preset paper --gpu h200 --num-gpus 64 --images 250e6
    python cluster/plan.py --preset demo               # two CPU cores
    python cluster/plan.py --validate                  # beside runs that others have published
"""

from cluster.base.cli import DONE, INCOMPLETE, parse, run_script
from cluster.planning.request import PRESETS, PlanRequest


def main(request: PlanRequest) -> int:
    """Print the plan that `request` asks for; 1 where it does not fit, or not into the budget."""
    import json
    import sys

    from rich.console import Console

    from cluster.planning.published import print_runs, validated
    from cluster.planning.report import Planner, print_plan

    if request.validate:
        runs = validated()
        print_runs(runs, Console(width=None if Console().is_terminal else 200))
        return INCOMPLETE if any(run.is_off for run in runs) else DONE
    plan = Planner(request).plan()
    if request.json:
        print(json.dumps(plan, indent=2))
    else:
        print_plan(plan, Console(width=None if Console().is_terminal else 200))
    if not plan["fits"]:
        names = ", ".join(stage["name"] for stage in plan["stages"] if not stage["fits"])
        print(f"does not fit: {names}", file=sys.stderr)
        return INCOMPLETE
    if request.budget and plan["cost"] > request.budget:
        print(f"over the budget: ${plan['cost']:,.0f} of ${request.budget:,.0f}", file=sys.stderr)
        return INCOMPLETE
    return DONE


if __name__ == "__main__":
    run_script(lambda: main(parse(PlanRequest, presets=PRESETS)))
