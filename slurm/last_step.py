"""Where a training stands: `python slurm/last_step.py METRICS_JSONL STEPS`.

Prints the last step's record, and when the last of STEPS will be done at the speed of late.
"""

import json
import statistics
import sys
import time
from pathlib import Path

# The median of so many steps leaves out those that waited for a save or compiled.
LATE = 50


def main() -> None:
    train = []
    for line in Path(sys.argv[1]).read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            # What a killed run was about to write.
            continue
        if record["kind"] == "train":
            train.append(record)
    if not train:
        return
    last, steps = train[-1], int(sys.argv[2])
    left = (steps - last["step"]) * statistics.median(r["seconds"] for r in train[-LATE:])
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left))
    print(json.dumps(last))
    print(
        f"step {last['step']} of {steps}, {left / 3600:.1f} hours of training left"
        + (f": {end}, if it runs on" if left else "")
    )


if __name__ == "__main__":
    main()
