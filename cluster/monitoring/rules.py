"""The recording rules: of each metric the series that panels and alerts read."""

from collections.abc import Mapping

from cluster.base.files import Json
from cluster.base.metrics import METRICS, Metric

EVENTS = (  # counted by the hour; of other counters, the rate matters
    "ingest_shards", "embed_shards", "embed_failed_shards", "train_nonfinite_steps",
    "train_incidents", "checkpoints",
)  # fmt: skip


def recorded(metric: Metric) -> dict[str, str]:
    """Return the rule of a metric: {"record": the new series, "expr": its PromQL}.

    A gauge keeps its instance, so that runs of one model on two machines stay apart; a count is
    summed over all. Names take both a script's own and Ray's, which differ by a prefix; Ray's
    WorkerId, a new one after each restart, is left behind.
    """
    short = metric.name.removeprefix("minidalle2_")
    labels = ", ".join(metric.labels)
    by = f" by ({labels})" if labels else ""
    source = f'{{__name__=~"(ray_)?{metric.name}"}}'
    if metric.kind == "gauge":
        expression = f"max by ({', '.join(['instance', *metric.labels])}) ({source})"
        return {"record": f"minidalle2:{short}", "expr": expression}
    if metric.kind == "histogram":
        buckets = f'{{__name__=~"(ray_)?{metric.name}_bucket"}}'
        rates = f"sum by ({', '.join(['le', *metric.labels])}) (rate({buckets}[1h]))"
        return {"record": f"minidalle2:{short}:p90_1h", "expr": f"histogram_quantile(0.9, {rates})"}
    short = short.removesuffix("_total")
    if short in EVENTS:
        how, name, window = "increase", "increase1h", "1h"
    else:
        how, name, window = "rate", "rate5m", "5m"
    expression = f"sum{by} ({how}({source}[{window}]))"
    return {"record": f"minidalle2:{short}:{name}", "expr": expression}


def recording_rules(metrics: Mapping[str, Metric] = METRICS) -> Json:
    """Return the content of recording.yaml: one group, a rule for each metric."""
    rules = [recorded(metric) for metric in metrics.values()]
    return {"groups": [{"name": "minidalle2", "rules": rules}]}
