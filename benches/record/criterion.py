#!/usr/bin/env python3
"""Collects what `cargo bench` measured into one JSON object, to be recorded.

    cargo bench -p bitnet-core -p bitnet-quant
    benches/record/criterion.py > benches/record/CPU/DATE-criterion.json

Reads the newest estimates that criterion left under target/criterion. Times are nanoseconds of one
iteration: the median and the bounds of its 95 % confidence interval. `giga_per_s` counts what the
benchmark says it handles: bytes, or elements (see the heads of the benchmarks).
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def record(benchmark):
    about = json.loads(benchmark.read_text())
    median = json.loads((benchmark.parent / "estimates.json").read_text())["median"]
    interval = median["confidence_interval"]
    numbers = [median["point_estimate"], interval["lower_bound"], interval["upper_bound"]]
    result = {"id": about["full_id"], **dict(zip(["ns", "low_ns", "high_ns"], [round(x, 1) for x in numbers]))}
    for unit, amount in (about.get("throughput") or {}).items():
        result |= {"unit": unit.lower(), "giga_per_s": round(amount / numbers[0], 3)}
    return result


def main():
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    found = sorted(target.glob("criterion/**/new/benchmark.json"))
    if not found:
        sys.exit(f"no results under {target / 'criterion'}: run `cargo bench` first")
    commit = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    newest = max(file.stat().st_mtime for file in found)
    head = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.fromtimestamp(newest).isoformat(timespec="seconds"),
        "commit": commit,
    }
    lines = ",\n  ".join(json.dumps(record(file)) for file in found)
    print(json.dumps(head)[:-1] + ',\n"benchmarks": [\n  ' + lines + "\n]}")


if __name__ == "__main__":
    main()
