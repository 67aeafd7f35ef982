"""From what was measured to figures: plain data, for the table, the JSON file and the diagnosis. None: unknown."""

import math
import statistics
from collections import Counter
from typing import Any

import torch

from genai_fast import cpu
from genai_fast.profiling import machine
from genai_fast.profiling.flops import FlopCount
from genai_fast.profiling.loops import Subject
from genai_fast.profiling.measure import Measured, Measurement


def figures(subject: Subject, measurement: Measurement) -> dict[str, Any]:
    """Everything that was found out. Seconds, bytes, watts and joules; shares from 0 to 1.

    {"model", "what", "device", "environment", "peak": {"precision", "flops_per_second"} or null, "energy", "ended"
    and "no_wait" (remarks), "foreign_load" (cores that other programs kept busy), "tune_cpu" (what it does here, "" if
    it is off), "left_alone" (by fuse: [module, found, reason]), "variants": {name: figures or {"failed": reason}}}
    """
    device = "cuda" if measurement.cuda else "cpu"
    count = _counted(measurement)
    peak = None if count is None else roof(device, count)
    return {
        "model": subject.name,
        "what": subject.what,
        "device": device,
        "environment": machine.environment(device),
        "peak": peak,
        "energy": measurement.energy,
        "ended": measurement.ended,
        "no_wait": subject.no_wait,
        "foreign_load": measurement.others,
        "tune_cpu": str(cpu.active() or ""),
        "left_alone": _left_alone(subject),
        "variants": {v.name: _variant(subject, v, measurement, peak) for v in measurement.variants},
    }


def _left_alone(subject: Subject) -> list[list[str]]:
    """[module, its class, reason]; of several networks the module's path begins with the network's class."""
    several, seen, found = len(subject.left_alone) > 1, Counter[str](), []
    for network, rows in subject.left_alone:
        seen[network] += 1
        label = network if seen[network] == 1 else f"{network} {seen[network]}"
        for row in rows:
            path = ".".join(filter(None, (label, row.path))) if several else row.path or "."
            found.append([path, row.found, row.reason])
    return found


def _counted(measurement: Measurement) -> FlopCount | None:
    counts = (measurement.flops, *(v.flops for v in measurement.variants if not v.failed))
    return next((count for count in counts if count is not None and count.total), None)


def roof(device: str, count: FlopCount) -> dict[str, Any] | None:
    """What this machine's matrix products reach in the precision of most of those counted, measured now.

    {"precision", "flops_per_second"}; None: that precision is not measured.
    """
    precision = str(max(count.by_dtype, key=lambda dtype: count.by_dtype[dtype])).removeprefix("torch.")
    if precision not in ("float32", "bfloat16", "float16"):
        return None
    if device == "cuda" and precision == "float32":
        # Convolutions round to TF32 unless they are told not to, products only where they are told to.
        switches = [torch.backends.cuda.matmul, *([torch.backends.cudnn.conv] if count.convolutions[0] else [])]
        precision = "tf32" if any(switch.fp32_precision == "tf32" for switch in switches) else precision
    return {"precision": precision, "flops_per_second": machine.gemm(device, precision)}


def _variant(
    subject: Subject, variant: Measured, measurement: Measurement, peak: dict[str, Any] | None
) -> dict[str, Any]:
    if variant.failed:
        return {"failed": variant.failed}
    traced, steps = variant.traced, variant.steps
    amount = steps if variant.samples is None else variant.samples * (subject.block or 1)
    unit = "steps" if variant.samples is None else "tokens" if subject.block else "samples"
    count = measurement.flops or variant.flops
    own = variant.flops or measurement.flops  # the layout and the precision that this one has
    flops = count.total if count is not None and count.total else None
    rate = None if flops is None else flops * steps / variant.wall
    joules = variant.joules
    return {
        "unit": unit,
        "per_second": amount / variant.wall,
        "steps": steps,
        "step_seconds": {"p50": statistics.median(variant.seconds), "p95": percentile(variant.seconds, 0.95),
                         "max": max(variant.seconds)},
        "first_step_seconds": variant.first_step_seconds,
        "data_wait": variant.waited / variant.wall if variant.batches else None,
        "host_seconds": statistics.median(variant.host),
        "device_seconds": traced.device_seconds,
        "device_busy": None if traced.device_seconds is None else traced.device_seconds * steps / variant.wall,
        "operator_calls": traced.operator_calls,
        "kernels": traced.kernels,
        "launches": traced.launches,
        "flops": flops,
        "flops_not_counted": ["what torch.compile compiled"] if count is None else sorted(count.unknown),
        "flops_per_second": rate,
        "flops_share_of_peak": None if rate is None or peak is None else rate / peak["flops_per_second"],
        "arithmetic": {} if own is None else {
            str(k).removeprefix("torch."): v / own.total for k, v in own.by_dtype.items()
        },
        "convolutions": own.convolutions[0] if own is not None else None,
        "convolutions_not_channels_last": own.convolutions[1] if own is not None else None,
        **variant.memory,
        "page_faults": None if variant.faults is None else variant.faults / steps,
        "joules": None if joules is None else joules / amount,
        "watts": None if joules is None else joules / variant.wall,
        "operators": [
            {"name": o.name, "calls": o.calls, "own_seconds": o.own_seconds, "seconds": o.seconds,
             "share": o.own_seconds / traced.whole, "share_with_callees": o.seconds / traced.whole}
            for o in traced.operators
        ],
        "timeline": variant.seconds,
    }  # fmt: skip


def percentile(values: list[float], share: float) -> float:
    """The least value that at least that share of them does not pass."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
