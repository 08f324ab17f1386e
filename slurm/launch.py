"""torchrun for one node of a Slurm job: `python slurm/launch.py [torchrun's arguments]`.

Slurm's SIGTERM reaches every process of a job. The ranks save then; torchrun would end them after
30 seconds, and calls a rank that has saved a failure, with a traceback. Here it ignores the signal
and ends with 0 where the ranks have finished or stopped as they were asked to, else with 1.
"""

import os
import signal
import socket
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

# What ranks end with that were asked to stop, by the file, SIGTERM or Ctrl-C, and have saved.
STOPPED = {os.EX_TEMPFAIL, 128 + signal.SIGTERM, 128 + signal.SIGINT}


def main() -> int:
    """Run torchrun; the exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # One node holds the store: said, and not guessed from names and addresses.
    host = f"is_host={int(os.environ['SLURM_NODEID'] == '0')}"
    arguments = parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    arguments.rdzv_conf = f"{host},{arguments.rdzv_conf}"
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        run(arguments)
    except RendezvousError as error:
        print(f"launch: {node}: {type(error).__name__}: {error}", flush=True)
        return 1
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        failed = {rank: code for rank, code in codes.items() if code not in STOPPED}
        for rank, code in sorted(failed.items()):
            print(f"launch: {node}: rank {rank} failed with exit code {code}", flush=True)
        return 1 if failed else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
