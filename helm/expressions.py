"""What panels ask, in PromQL: sums over all processes of one app, `$app`, and rates over Grafana's interval."""

from __future__ import annotations

from typing import Final

from helm.panels import Query

APP: Final = 'app="$app"'
# Every process tells every metric; where lines are named after processes or roles, others would stand there at 0.
WORKERS: Final = ', role!~"ingress|controller"'
INGRESSES: Final = ', role="ingress"'
_RANGE: Final = "$__rate_interval"


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Per second, summed over processes, `by` labels."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{{{APP}{where}}}[{_RANGE}]))"


def increase(metric: str, by: str = "", where: str = "") -> str:
    """For what is rare: how many in the time that a rate is taken over, summed over processes, `by` labels."""
    return rate(metric, by, where).replace("(rate(", "(increase(", 1)


def gauge(metric: str, by: str = "", where: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} ({metric}{{{APP}{where}}})"


def quantile(share: str, histogram: str, by: str = "", where: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(histogram + '_bucket', labels, where)})"


def mean(histogram: str, by: str, where: str) -> str:
    """Where buckets are too wide for a quantile."""
    return f"{rate(histogram + '_sum', by, where)} / {rate(histogram + '_count', by, where)}"


def quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(Query(quantile(share, histogram), f"p{share[2:]}") for share in ("0.50", "0.90", "0.99"))


def under(histogram: str, limit: str) -> str:
    """Share of observations up to `limit`, a bucket's bound."""
    where = f', le="{limit}"'
    return f"{rate(histogram + '_bucket', where=where)} / {rate(histogram + '_count')}"
