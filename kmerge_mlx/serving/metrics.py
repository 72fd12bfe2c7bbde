"""Counters, gauges and histograms, and their Prometheus text.

Owns: the names and what is counted. Any thread may count.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

PREFIX = "kmerge_mlx_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass
class _Metric:
    name: str
    help: str
    kind: str
    labels: tuple[str, ...] = ()
    values: dict[tuple[str, ...], float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        known = self.values or ({} if self.labels else {(): 0})
        return [f"{self.name}{_labels(self.labels, k)} {v:.17g}" for k, v in sorted(known.items())]


@dataclass
class _Histogram(_Metric):
    buckets: Sequence[float] = SECONDS
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def lines(self) -> list[str]:
        found, sum_so_far = [], 0
        for bound, count in zip([*self.buckets, math.inf], self.counts, strict=True):
            sum_so_far += count
            name = "+Inf" if bound == math.inf else f"{bound:g}"
            found.append(f'{self.name}_bucket{{le="{name}"}} {sum_so_far}')
        return [*found, f"{self.name}_sum {self.total:.17g}", f"{self.name}_count {sum_so_far}"]


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    pairs = ",".join(f'{n}="{v}"' for n, v in zip(names, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""


_METRICS = (
    ("requests_total", "Requests answered.", "counter", ("endpoint", "status")),
    ("requests_in_flight", "Requests admitted and not yet answered.", "gauge", ()),
    ("requests_waiting", "Of those, requests without a first token.", "gauge", ()),
    ("connections", "Open connections.", "gauge", ()),
    ("prompt_tokens_total", "Original tokens of prompts.", "counter", ()),
    ("compressed_tokens_total", "Positions those tokens took.", "counter", ()),
    ("cached_tokens_total", "Original tokens that a KV cache held already.", "counter", ()),
    ("generated_tokens_total", "Tokens generated.", "counter", ()),
    ("prompt_cache_lookups_total", "Prompts looked up in the KV caches.", "counter", ("result",)),
    ("prompt_cache_sequences", "KV caches kept for prefixes.", "gauge", ()),
    ("prompt_cache_bytes", "Memory of those.", "gauge", ()),
    ("block_slots_in_use", "Slots of the block table that hold a block.", "gauge", ()),
    ("block_slots", "Slots that there are.", "gauge", ()),
    ("ready", "1 while requests are taken.", "gauge", ()),
)
_HISTOGRAMS = (
    ("time_to_first_token_seconds", "From a request's arrival to its first token."),
    ("request_duration_seconds", "From a request's arrival to the end of its answer."),
)


class Metrics:
    """What a server counts; names are without their prefix."""

    def __init__(self) -> None:
        self._lock = Lock()
        named = [_Metric(PREFIX + n, h, kind, labels) for n, h, kind, labels in _METRICS]
        named += [_Histogram(PREFIX + name, help, "histogram") for name, help in _HISTOGRAMS]
        self._metrics = {metric.name.removeprefix(PREFIX): metric for metric in named}

    def add(self, name: str, amount: float = 1, *labels: str) -> None:
        """Counts up, or down for a gauge."""
        with self._lock:
            values = self._metrics[name].values
            values[labels] = values.get(labels, 0) + amount

    def set(self, name: str, value: float) -> None:
        """Sets a gauge."""
        with self._lock:
            self._metrics[name].values[()] = value

    def get(self, name: str, *labels: str) -> float:
        """What a counter or gauge stands at."""
        with self._lock:
            return self._metrics[name].values.get(labels, 0)

    def observe(self, name: str, seconds: float) -> None:
        """Counts a duration in a histogram."""
        with self._lock:
            histogram = self._metrics[name]
            histogram.counts[bisect_left(histogram.buckets, seconds)] += 1
            histogram.total += seconds

    def text(self) -> str:
        """All of it, as Prometheus reads it."""
        with self._lock:
            lines = []
            for metric in self._metrics.values():
                lines += [f"# HELP {metric.name} {metric.help}"]
                lines += [f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
        return "\n".join([*lines, ""])
