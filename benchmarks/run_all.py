"""Run every benchmark and write benchmarks/RESULTS.md: each table with its command and the machine it ran on.

make bench
"""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent

BENCHMARKS = [
    ("Training blocked by a snapshot, and the step's lengthening", ["blocked.py", "--rounds", "2"],
     "target: blocked, median <= 0.1% of a step, worst rank <= 1%; <= 1/100 of async_save's default and of torch.save, "
     "<= 1/10 of DCP's best; the step <= 2% longer"),
    ("The step's lengthening by the copy, more rounds", ["blocked.py", "--rounds", "6", "--ways", "2"], "target: <= 2% longer"),
    ("Copy rate into the image", ["copy_rate.py"], "target: >= 70% of memcpy"),
    ("Reed-Solomon on one core", ["erasure.py"], "target: 4+2 >= 60% of memcpy, 2+2 >= 45%"),
    ("Copy alone, every step", ["every_step.py"], "target: <= 4% longer"),
    ("A whole snapshot every 10 steps", ["whole.py", "overhead", "--rounds", "3", "--steps", "31"], "target: <= 5% longer, committed generations = steps / 10"),
    ("Core-seconds of a whole snapshot", ["core_seconds.py"], "target: <= 2 per GB"),
    ("Recoveries", ["whole.py", "recoveries", "--rounds", "2"], "targets in the table"),
    ("Stores", ["store_rates.py"], "targets: upload >= 85%, download >= 80% of raw parallel boto3"),
    ("Checkpoints beside boto3 and DCP's async_save", ["uploads.py"], "target: keepers' uploads >= 85% of raw boto3's rate"),
    ("Checkpoints in a folder beside DCP's async_save", ["uploads.py", "--to", "folder"], "no target"),
    ("Training beside uploads, one core spare", ["slowdown.py", "--cores", "one"], "target: <= 3% longer"),
    ("Training beside uploads, no core spare", ["slowdown.py", "--cores", "both", "--rounds", "8"], "no target: what is seen"),
    ("Restores from the store and onto other worlds", ["restores.py"], "targets: keepers' fetches >= 80% of raw boto3's rate, other worlds <= 1.5 times the same one's time"),
    ("From a lost node to the first step of a smaller job", ["whole.py", "shrink", "--rounds", "5"], "target: <= 6 s without shrinkAfter"),
    ("Memory of an upload", ["upload_memory.py"], "target: <= 64 MiB a node"),
    ("The automatic interval", ["intervals.py"], "target: within 5% of the best fixed interval"),
    ("On Kubernetes", ["cluster_faults.py"], "measured by `make e2e TIMINGS=benchmarks/kubernetes.json`"),
    ("The same faults under torchrun", ["peer_torchrun.py"], "no target: what a Job that restarts from its last checkpoint does; root"),
    ("The machine", ["machine.py"], "target: >= 20,000 events a second with 10,000 nodes"),
]  # fmt: skip


def machine() -> str:
    import torch

    model = next(
        (
            line.split(":")[1].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB, no GPU, Linux {platform.release()}, "
            f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip


def main() -> None:
    notes = HERE / "NOTES.md"
    parts = [
        "# Results\n",
        "Made by `make bench`; ratios against what ran beside each in the same process or run. Absolute times on a shared "
        "machine mean little.\n",
        f"{datetime.date.today().isoformat()}, {machine()}\n",
    ]
    failed = 0
    for title, command, target in BENCHMARKS:
        print(f"== {title}", flush=True)
        done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True, check=False)  # fmt: skip
        print(done.stdout, flush=True)
        failed += done.returncode != 0
        output = done.stdout.strip() or f"failed with status {done.returncode}"
        parts.append(f"## {title}\n\n`python benchmarks/{' '.join(command)}` ({target})\n\n{output}\n")
    if notes.exists():
        parts.append(notes.read_text())
    (HERE / "RESULTS.md").write_text("\n".join(parts))
    sys.exit(f"{failed} benchmarks failed" if failed else 0)


if __name__ == "__main__":
    main()
