#!/usr/bin/env python3
"""Runs llama.cpp (TQ2_0) beside bitnet on the same model shape and prints the ratio of speeds.

    benches/peers/compare.py --shape 2b4t --threads 1,2

Needs Python 3.9, a C++ compiler and network access to PyPI for the first run, which builds
llama-cpp-python from its source package with the instructions of this CPU (some minutes; nothing is
measured meanwhile). Both programs then take turns, so that a machine that slows down slows both; each
turn loads the model anew, warms up and measures every test. What is printed is the median turn.

llama.cpp gets the file with ternary weights in TQ2_0 twice: with its f16 head, and with the head in
Q6_K, the fastest form it has. bitnet gets the file with the f16 head.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="2b4t", choices=["0.7b", "2b4t", "8b"])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("-p", "--prompt", default="128,512")
    parser.add_argument("-n", "--generate", default="64")
    parser.add_argument("-b", "--batch", default="1")
    parser.add_argument("-d", "--depth", default="0")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("-r", "--repetitions", type=int, default=2)
    parser.add_argument("--bitnet", default=str(ROOT / "target/release/bitnet"))
    parser.add_argument("--work", default=str(ROOT / "target/peers"), help="environment and models")
    parser.add_argument("--json", help="also write every turn to this file")
    parser.add_argument("--install-only", action="store_true")
    return parser.parse_args()


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(command, **kwargs):
    return subprocess.run([str(part) for part in command], check=True, **kwargs)


def install(work):
    """The Python of an environment that has llama.cpp."""
    directory = work / "venv"
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(directory, with_pip=True)
    built = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode == 0
    if not built:
        say(f"building {PACKAGE} for this CPU; this takes some minutes")
        flags = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
        environment = dict(os.environ, CMAKE_ARGS=flags)
        package = PACKAGE.split("==")[0]
        command = [python, "-m", "pip", "install", "--quiet", "--no-binary", package, PACKAGE]
        run(command, env=environment, stdout=sys.stderr)
    return python


def models(args, work, python):
    """The synthetic model with an f16 head, and the copy with a Q6_K head."""
    plain = work / f"{args.shape}-tq2_0.gguf"
    q6_head = work / f"{args.shape}-tq2_0-q6_k.gguf"
    if not plain.exists():
        say(f"writing {plain}")
        command = [args.bitnet, "bench", "--synthetic", args.shape, "--write-gguf", plain]
        run(command + ["--packing", "tq2_0"], stdout=sys.stderr)
    if not q6_head.exists() and args.shape != "8b":
        say(f"writing {q6_head}")
        peer = [python, HERE / "llama_cpp_bench.py", plain, "-t", os.cpu_count()]
        run(peer + ["--quantize-head", q6_head], stdout=sys.stderr)
    return plain, q6_head if q6_head.exists() else None


def tests(args):
    return ["-p", args.prompt, "-n", args.generate, "-b", args.batch, "-r", args.repetitions]


def contestants(args, python, plain, q6_head):
    """Name and command for a number of threads, ours first."""
    peer = [python, HERE / "llama_cpp_bench.py"]
    result = [("bitnet", [args.bitnet, "bench", "-m", plain, "--json"])]
    result.append(("llama.cpp TQ2_0, f16 head", peer + [plain]))
    if q6_head:
        result.append(("llama.cpp TQ2_0, Q6_K head", peer + [q6_head]))
    return [(name, command + ["-d", args.depth] + tests(args)) for name, command in result]


def other_load(seconds=1.0):
    """Processors busy with other work, where Linux tells."""
    def times():
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        ticks = list(map(int, fields))
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4]

    try:
        before = times()
        time.sleep(seconds)
        after = times()
    except OSError:
        return 0.0
    elapsed = max(after[0] - before[0], 1)
    return (after[1] - before[1]) / elapsed * os.cpu_count()


def main():
    args = arguments()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    python = install(work)
    if args.install_only:
        return
    if not Path(args.bitnet).exists():
        raise SystemExit(f"{args.bitnet} is missing: cargo build --release")
    plain, q6_head = models(args, work, python)

    rates, turns, ours = {}, [], {}
    for turn in range(args.turns):
        for threads in args.threads.split(","):
            for name, command in contestants(args, python, plain, q6_head):
                busy = other_load()
                if busy > 0.2:
                    say(f"warning: other programs keep {busy:.1f} processors busy")
                say(f"turn {turn + 1} of {args.turns}, {threads} threads: {name}")
                output = run(command + ["-t", threads], stdout=subprocess.PIPE).stdout
                printed = json.loads(output)
                turns.append({"turn": turn, "name": name, "report": printed})
                if name == "bitnet":
                    ours = printed
                for row in printed["results"]:
                    key = (row["test"], row["threads"])
                    rates.setdefault(key, {}).setdefault(name, []).append(row["tok_per_s"])
    if args.json:
        Path(args.json).write_text(json.dumps(turns, indent=1) + "\n")
    report(args, rates, ours)


def report(args, rates, ours):
    date = datetime.date.today().isoformat()
    print(f"{args.shape} shape, {ours.get('cpu', 'unknown CPU')}, {date};", end=" ")
    print(f"bitnet {ours.get('version')} ({ours.get('commit')}), {PACKAGE};", end=" ")
    print(f"tokens a second, median of {args.turns} alternating turns\n")
    names = list(dict.fromkeys(name for row in rates.values() for name in row))
    peers = [name for name in names if name != "bitnet"]
    print("| test | threads | bitnet |", " | ".join(f"{peer} | ratio" for peer in peers), "|")
    print("|---|--:|--:|" + "--:|--:|" * len(peers))
    for (test, threads), row in rates.items():
        medians = {name: statistics.median(values) for name, values in row.items()}
        cells = [test, str(threads), f"{medians['bitnet']:.1f}"]
        for peer in peers:
            ratio = medians["bitnet"] / medians[peer]
            cells += [f"{medians[peer]:.1f}", f"{ratio:.2f}"]
        print("| " + " | ".join(cells) + " |")


main()
