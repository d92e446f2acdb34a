"""What a server's /metrics say, and how fast its counters run."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from .errors import WRONG, CommandError

TIMEOUT_S = 5.0
"""Seconds to wait for an answer."""
OURS = "vllm:fox_kv_pages_live"
"""A metric that only servers of vllm-fox's models have."""


@dataclass(frozen=True)
class Sample:
    """A server at one moment.

    Attributes:
        at: seconds of a clock that only runs forward.
        values: every metric without buckets, summed over engines and other labels, by its name; those with the
            label ``phase`` or ``layer`` by (name, label's value).
        engines: number of data-parallel engines.
        blocks: KV blocks of all engines; None if the server does not say.
        model: the name that the server gives its model.
    """

    at: float
    values: Mapping[str | tuple[str, str], float]
    engines: int
    blocks: int | None
    model: str


def metrics_url(url: str) -> str:
    """Return the address of /metrics, given that of a server, with or without scheme or path.

    Raises:
        CommandError: it is no address of a server.
    """
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urllib.parse.urlsplit(whole)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port or an IPv6 address that is none
        sound = False
    if not sound:
        raise CommandError(f"URL is {url}: give a server's address, such as http://localhost:8000.")
    path = parts.path.rstrip("/").removesuffix("/metrics").removesuffix("/v1")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, f"{path}/metrics", "", ""))


def fetch(url: str) -> Sample:
    """Ask a server for its metrics.

    Args:
        url: see :func:`metrics_url`.

    Raises:
        CommandError: no server answers, it is none of vLLM's, or it serves none of vllm-fox's models.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise CommandError(
            f"{url} answers {error.code} {error.reason}, so it is no vLLM server: give the address of one.", WRONG
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise CommandError(
            f"No server answers at {url} ({reason}): start one by `vllm serve MODEL`, or give its address.", WRONG
        ) from None
    sample = sample_of(text, url, time.monotonic())
    if OURS not in sample.values:
        raise CommandError(
            f"{url} is a vLLM server of {sample.model}, which is no model of vllm-fox's: there are no {OURS} to "
            "show. `vllm-fox doctor` says whether the plugin is installed where it runs.",
            WRONG,
        )
    return sample


def sample_of(text: str, url: str, at: float) -> Sample:
    """Read metrics in Prometheus' text format.

    Raises:
        CommandError: they are not vLLM's.
    """
    values: dict[str | tuple[str, str], float] = {}
    engines: set[str] = set()
    blocks, model = None, ""
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.endswith("_bucket") or not sample.name.startswith("vllm:"):
                    continue
                label = sample.labels.get("phase") or sample.labels.get("layer")
                key = (sample.name, label) if label else sample.name
                values[key] = values.get(key, 0.0) + sample.value
                if sample.name == "vllm:cache_config_info":
                    found = sample.labels.get("num_gpu_blocks", "")
                    blocks = (blocks or 0) + int(found) if found.isdecimal() else blocks
                if sample.name == "vllm:num_requests_running":
                    engines.add(sample.labels.get("engine", ""))
                    model = sample.labels.get("model_name", model)
    except ValueError:
        values = {}
    if "vllm:num_requests_running" not in values:
        raise CommandError(
            f"{url} has no metrics of vLLM, so no vLLM server is there: give the address of one.", WRONG
        )
    return Sample(at, values, len(engines), blocks, model)


def view(now: Sample, before: Sample) -> dict[str, Any]:
    """Return what is shown of a server, under the keys that docs/command_line.md lists.

    Args:
        now, before: two samples. Rates are between them; they are None if the server has started anew since.
    """
    seconds = now.at - before.at

    def value(name: str, label: str = "", sample: Sample = now) -> float:
        key = f"vllm:{name}"
        return sample.values.get((key, label) if label else key, 0.0)

    def change(name: str, label: str = "") -> float | None:
        difference = value(name, label) - value(name, label, before)
        return difference if difference >= 0 and seconds > 0 else None

    def rate(name: str) -> float | None:
        difference = change(name)
        return None if difference is None else difference / seconds

    def share(part: float | None, whole: float | None) -> float | None:
        return part / whole if part is not None and whole else None

    def pruned(phase: str) -> float | None:
        part, whole = (change(f"fox_attention_pages{kind}_total", phase) for kind in ("_pruned", ""))
        return share(part, whole)

    layers = sorted((key[1] for key in now.values if key[0] == "vllm:fox_kv_layer_pages_dense"), key=int)
    live, dense = ([value(f"fox_kv_layer_pages_{kind}", layer) for layer in layers] for kind in ("live", "dense"))
    usage = value("kv_cache_usage_perc") / max(now.engines, 1)
    # vLLM's block 0 is nobody's.
    usable = None if now.blocks is None else now.blocks - now.engines
    return {
        "model": now.model,
        "engines": now.engines,
        "interval_s": seconds,
        "requests_running": int(value("num_requests_running")),
        "requests_waiting": int(value("num_requests_waiting")),
        "preemptions_total": int(value("num_preemptions_total")),
        "kv_blocks": usable,
        "kv_blocks_used": None if usable is None else round(usage * usable),
        "kv_usage": usage,
        "pages_live": int(value("fox_kv_pages_live")),
        "pages_cached": int(value("fox_kv_pages_cached")),
        "pages_free": int(value("fox_kv_pages_free")) if "vllm:fox_kv_pages_free" in now.values else None,
        "bytes_saved": int(value("fox_kv_bytes_saved")),
        "live_share": share(sum(live), sum(dense)),
        "live_share_by_layer": [share(*pages) for pages in zip(live, dense)],
        "prefill_pruned": pruned("prefill"),
        "decode_pruned": pruned("decode"),
        "report_lag_steps": share(change("fox_kv_report_lag_steps_sum"), change("fox_kv_report_lag_steps_count")),
        "pages_allocated_total": int(value("fox_kv_pages_allocated_total")),
        "pages_released_total": int(value("fox_kv_pages_released_total")),
        "pages_allocated_per_s": rate("fox_kv_pages_allocated_total"),
        "pages_released_per_s": rate("fox_kv_pages_released_total"),
        "prefix_hit_rate": share(change("prefix_cache_hits_total"), change("prefix_cache_queries_total")),
        "prefix_hit_rate_total": share(value("prefix_cache_hits_total"), value("prefix_cache_queries_total")),
        "prompt_tokens_per_s": rate("prompt_tokens_total"),
        "generated_tokens_per_s": rate("generation_tokens_total"),
    }
