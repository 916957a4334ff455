"""Kill notebook 08 twenty times and compare: ``python tests/kill_notebook.py FOLDER [--kills 20] [--minutes 15]``.

Run by hand, because each restart costs the notebook's start (10 to 20 s). ``python -m mclip course --only 08`` runs
in profile smoke, with so many epochs that there is time for all kills, and once a record has been added to its
log.jsonl all its processes (papermill's, the kernel's) get SIGKILL a random moment later, anywhere up to the
notebook's end. It is started again each time, and left alone after the last kill or when the time is nearly over.
Then its weights, its log and its newest checkpoint must equal, bit for bit, those of a run that nobody disturbed.

Prints one line of JSON: kills, those in each phase (0: before the first step), the last step in the log at each,
seconds, and whether all is identical; exit status 1 if it is not. The phases begin
early, because a restarted run has only a few seconds before the next kill.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from test_kills import last_place, run_differences

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds for one execution of the notebook


def start(out: Path, epochs: int) -> subprocess.Popen:
    """The notebook in execution, its copy and its run in ``out``."""
    command = [sys.executable, "-m", "mclip", "course", "--only", "08", "--profile", "smoke", "--out", str(out)]
    command += ["-p", "max_epochs", str(epochs), "-p", "auto_kd_config", str(out.parent / "terms.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MCLIP_CACHE": str(out.parent / "cache")}
    with (out.parent / f"{out.name}.txt").open("a", encoding="utf-8") as printed:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=printed, stderr=printed, start_new_session=True
        )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for ``process`` and everything that it has started, whatever group it is in."""
    parent = psutil.Process(process.pid)
    parent.suspend()  # nothing is started, or cleared up, between the listing and the kill
    family = [parent, *parent.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=30)


def run_until(process: subprocess.Popen, log: Path, moment: float) -> bool:
    """Wait until the run has added to its log, and ``moment`` seconds more; False if the process ended before."""
    before, began = log.stat().st_mtime_ns if log.exists() else 0, time.monotonic()
    # On resume the log is written anew, up to the checkpoint; only then do records follow.
    changes = 0
    while changes < 2:
        if process.poll() is not None:
            return False
        if time.monotonic() - began > LIMIT:
            raise TimeoutError(f"the notebook has not trained within {LIMIT} s; see {log.parents[1]}.txt")
        now = log.stat().st_mtime_ns if log.exists() else 0
        changes, before = changes + (now != before), now
        time.sleep(0.01)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    return process.poll() is None


def main() -> int:
    """Kill, restart, compare, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty or new folder")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=15.0, help="no more kills after three quarters of them")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--longest", type=float, default=6.0, help="seconds that a run goes on before it is killed")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder, rng, began = given.folder.resolve(), random.Random(given.seed), time.monotonic()
    folder.mkdir(parents=True)
    (folder / "terms.yaml").write_text("phases: [0.15, 0.35, 0.9]\n", encoding="utf-8")
    cut, whole = folder / "cut", folder / "whole"
    found: dict[str, Any] = {"kills": 0, "phases": {}, "steps": []}
    while found["kills"] < given.kills and time.monotonic() - began < 0.75 * 60 * given.minutes:
        process, log = start(cut, given.epochs), cut / "kd" / "log.jsonl"
        if not run_until(process, log, rng.uniform(0, given.longest)):
            break
        kill(process)
        phase, step = last_place(log)
        found["kills"] += 1
        found["phases"][phase] = found["phases"].get(phase, 0) + 1
        found["steps"].append(step)
        print(f"kill {found['kills']}: phase {phase}, step {step}", file=sys.stderr, flush=True)
    status = [start(out, given.epochs).wait(LIMIT) for out in (cut, whole)]
    found |= {"exit_status": status, "last_step": last_place(whole / "kd" / "log.jsonl")[1]}
    found |= {"identical": not any(status) and not run_differences(cut / "kd", whole / "kd")}
    found |= {"left_behind": [path.name for path in (cut / "kd").rglob(".*")]}
    print(json.dumps(found | {"seconds": round(time.monotonic() - began)}))
    return 0 if found["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
