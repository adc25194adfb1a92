"""A run of 2,000 steps under random kills, stops, disk errors and damage, compared with a run without faults.

    python -m tests.soak [--steps 2000] [--seed 0] [--folder DIR]

The run is started again and again, and ended by a random fault at a random moment:

  kill      SIGKILL, often within a save
  stop      SIGTERM: it saves and exits 0
  damage    stopped, then one byte of its newest checkpoint is flipped, or a file truncated, or all of its files deleted
  full      the disk refuses files above 2 kB for a while and accepts them again; then SIGKILL

In the end metrics.jsonl and the checksums of the last checkpoint must equal those of the run without faults.
"""

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.train.commands import arguments, finish, metrics, one_process, read_until

FAULTS = ("kill", "kill", "kill", "stop", "damage", "full")
LONGEST_LIFE = 10.0
"""Longest time in seconds from the first step of a process to its fault."""


def newest(workdir: Path) -> Path:
    """The folder of the newest checkpoint."""
    return max((path for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))


def damage(step: Path, chance: random.Random) -> str:
    """Damage a checkpoint in a random way; returns its name."""
    files = [path for path in step.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    how = chance.choice(("flip", "cut", "empty"))
    if how == "flip":
        raw = bytearray(largest.read_bytes())
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        largest.write_bytes(raw)
    elif how == "cut":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    else:
        for path in files:
            path.unlink()
    return how


def life(command: list[str], workdir: Path, chance: random.Random) -> str | None:
    """Run one process until a fault ends it; returns the fault, or None if the run is complete."""
    process = one_process(*command)
    try:
        lines = read_until(process, "ETA")
    except AssertionError as error:  # it printed no step: it was complete, or could not continue
        if finish(process)[0] == 0:
            return None
        raise RuntimeError(f"the run could not continue: {error}") from error
    print("".join(line for line in lines if "damaged" in line or "continuing" in line), end="", flush=True)
    fault = chance.choice(FAULTS)
    time.sleep(chance.uniform(0.0, LONGEST_LIFE))
    if process.poll() is not None:
        return None
    if fault == "full":
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2_000, hard))
        time.sleep(chance.uniform(0.5, 2.0))
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        time.sleep(chance.uniform(0.0, 2.0))
    process.send_signal(signal.SIGKILL if fault in ("kill", "full") else signal.SIGTERM)
    code, out = finish(process)
    if "done: best" in out:
        return None
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"exit code {code} after {fault}: {out}")
    return f"damage ({damage(newest(workdir), chance)})" if fault == "damage" else fault


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    plain, soaked = folder / "plain", folder / "soaked"
    common = {"train__steps": options.steps, "train__eval_every": 500, "train__ema_decay": 0.99}

    start = time.monotonic()
    code, out = finish(one_process(*arguments(plain, **common, train__checkpoint_every=500)), timeout=3600)
    assert code == 0, out
    clean = time.monotonic() - start
    ended: Counter[str] = Counter()
    while (fault := life(arguments(soaked, **common, train__checkpoint_every=5), soaked, chance)) is not None:
        ended[fault] += 1
        print(f"{time.monotonic() - start:6.0f} s  step {newest(soaked).name:>5}  {fault}", flush=True)
    checksums = [json.loads((newest(w) / "meta" / "metadata").read_text())["arrays"] for w in (plain, soaked)]
    same = metrics(plain) == metrics(soaked) and checksums[0] == checksums[1]
    faults = ", ".join(f"{n} {name}" for name, n in sorted(ended.items()))
    aside = sum(path.name.startswith("damaged-") for path in (soaked / "checkpoints").iterdir())
    print(
        f"{options.steps} steps, {sum(ended.values())} faults ({faults}), "
        f"{aside} damaged checkpoints set aside, {time.monotonic() - start - clean:.0f} s against {clean:.0f} s "
        f"without faults: metrics.jsonl and the last checkpoint are {'the same, bit for bit' if same else 'DIFFERENT'}"
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
