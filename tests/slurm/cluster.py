"""A real Slurm cluster of several slurmd on this machine, with pretended cores, memory and GPUs.

munged, slurmctld and one slurmd a node run as children of this process, on ports that are free
and in a folder of its own. Each slurmd has its own UTS and mount namespace, so that in a job
`hostname` says nodeN and nodeN resolves, without a change to this machine's own name or /etc/hosts.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.pipeline.running import WORLD

# In a Debian system: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "sinfo", "scancel")
# Seconds that a daemon has to answer, and to end.
START, END = 20, 10
GRACE = 30
# Of a client's command; chain.sh does a stage itself.
LONGEST = 600
POLL = 0.1
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY"}


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if missing:
        return f"{missing[0]} is not installed (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "several slurmd on one machine need namespaces, and so root"
    tried = subprocess.run(
        ["unshare", "-m", "-u", "mount", "--bind", "/etc/hosts", "/etc/hosts"],
        capture_output=True,
        text=True,
        timeout=START,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def _path() -> str:
    """Debian's daemons lie in folders that a user's PATH may lack."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_until(condition: Callable[[], object], seconds: float, what: str, poll: float = POLL):
    """The first true value of `condition()`; AssertionError with `what` after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, f"{what}: not within {seconds} s"
        time.sleep(poll)


class Cluster:
    """Nodes node1 to nodeN in the partitions batch (the default), grace, and high.

    A job in high preempts the others, those in grace GRACE seconds after their SIGTERM.

    After start(), `env` is what sbatch and the others need to reach it.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 16, gpus: int = 8) -> None:
        """`folder`: short, for munge's socket must fit in 108 bytes. `cpus`, `gpus`: of a node."""
        self.folder, self.nodes, self.cpus, self.gpus = folder, nodes, cpus, gpus
        self.conf = folder / "slurm.conf"
        kept = {
            key: value
            for key, value in os.environ.items()
            # Of a launcher's world, and of an outer Slurm job, nothing may reach the jobs.
            if key not in WORLD and not key.startswith(("SLURM", "SBATCH", "SRUN"))
        }
        self.env = kept | {"PATH": _path(), "SLURM_CONF": str(self.conf)}
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start the daemons and wait until every node is idle."""
        try:
            self._write_configuration()
            self._start_munged()
            self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
            wait_until(lambda: self._answers("scontrol", "ping"), START, "slurmctld answers")
            for number in range(1, self.nodes + 1):
                self.start_node(f"node{number}")
            wait_until(lambda: self._idle() == self.nodes, START, "all nodes are idle")
        except BaseException:
            self.stop()
            raise

    def start_node(self, name: str) -> None:
        """Start the slurmd of one node."""
        inside = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
        hosts = str(self.folder / "hosts")
        slurmd = ("slurmd", "-D", "-N", name, "-f", str(self.conf))
        self._daemon(name, "unshare", "-m", "-u", "sh", "-c", inside, name, hosts, *slurmd)

    def kill_node(self, name: str) -> None:
        """What the cluster sees when a machine loses its power: slurmd and its jobs are gone."""
        self._daemons.pop(name).kill()
        _kill([p for p in self._own_processes() if self._node_of(p) == name])

    def stop(self) -> None:
        """End every job and every process that was started, by its id."""
        if "slurmctld" in self._daemons:
            with suppress(AssertionError, subprocess.TimeoutExpired):
                self.run("scancel", "--user=root", check=False)
                wait_until(lambda: not self._running(), END, "jobs end")
        for name in sorted(self._daemons, key=lambda n: (n == "munged", n == "slurmctld")):
            process = self._daemons[name]
            process.terminate()
            try:
                process.wait(END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(END)
        self._daemons.clear()
        # A slurmstepd lives on without its slurmd.
        _kill(self._own_processes())

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **env: str):
        """A client's command, finished; its output is shown where it fails and may not."""
        done = subprocess.run(
            command, env=self.env | env, cwd=cwd, capture_output=True, text=True, timeout=LONGEST
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait_for_job(self, number: str, seconds: float, *states: str) -> dict[str, str]:
        """The job once it is in one of `states`; without any, once it is over."""
        wanted = set(states) or OVER

        def reached():
            job = self.job(number)
            if states and job["JobState"] in OVER - wanted:
                raise AssertionError(f"job {number} ended as {job['JobState']}: {self.logs()}")
            return job if job["JobState"] in wanted else None

        try:
            return wait_until(reached, seconds, f"job {number} is {' or '.join(sorted(wanted))}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.job(number)}\n{self.logs()}") from None

    def logs(self) -> str:
        """The end of every daemon's log."""
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("log/*"))
        )

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("a") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _start_munged(self) -> None:
        munge = self.folder / "munge"
        key = munge / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid"}
        files |= {"log-file": self.folder / "log/munged", "seed-file": munge / "seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        answer = ("munge", "-n", "-S", str(files["socket"]))
        wait_until(lambda: self._answers(*answer), START, "munged answers")

    def _answers(self, *command: str) -> bool:
        for name, process in self._daemons.items():
            assert process.poll() is None, f"{name} ended at once: {self.logs()}"
        return self.run(*command, check=False).returncode == 0

    def _idle(self) -> int:
        done = self.run("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N")
        return len(set(done.stdout.split()))

    def _running(self) -> str:
        return self.run("squeue", "-h", "-t", "R,CG,CF,S", "-o", "%A", check=False).stdout

    def _environment(self, process: int) -> list[bytes]:
        try:
            return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        except OSError:
            return []

    def _own_processes(self) -> list[int]:
        """Ids of slurmstepd and of jobs' processes: all have this cluster's SLURM_CONF."""
        mark = f"SLURM_CONF={self.conf}".encode()
        daemons = {process.pid for process in self._daemons.values()}
        found = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
        mine = {os.getpid(), *daemons}
        return [p for p in found if p not in mine and mark in self._environment(p)]

    def _node_of(self, process: int) -> str | None:
        """The host name of the process's namespace: that of its node."""
        done = subprocess.run(
            ["nsenter", f"--target={process}", "--uts", "hostname"],
            capture_output=True,
            text=True,
            timeout=START,
        )
        return done.stdout.strip() or None

    def _write_configuration(self) -> None:
        for name in ("log", "state", "spool", "munge", "dev"):
            (self.folder / name).mkdir(mode=0o755, parents=True)
        control, *ports = _free_ports(1 + self.nodes)
        names = [f"node{number}" for number in range(1, self.nodes + 1)]
        # File= must name a character device; a link to /dev/null is one. Its trailing digit becomes
        # CUDA_VISIBLE_DEVICES. Without File=, Slurm 22.05 calls the nodes invalid.
        for number in range(self.gpus):
            (self.folder / f"dev/nvidia{number}").symlink_to("/dev/null")
        last = f"[0-{self.gpus - 1}]" if self.gpus > 1 else "0"
        gres = [f"NodeName={n} Name=gpu File={self.folder}/dev/nvidia{last}" for n in names]
        _write(self.folder / "gres.conf", gres if self.gpus else [])
        hosts = Path("/etc/hosts").read_text().splitlines()
        _write(self.folder / "hosts", [*hosts, *(f"127.0.0.1 {name}" for name in names)])
        version = subprocess.run(
            ["slurmd", "-V"], env=self.env, capture_output=True, text=True, timeout=START
        ).stdout.split()[-1]
        # slurmd loads a cgroup plugin even where nothing uses it; "disabled" is newer than 22.
        old = int(version.split(".")[0]) < 23
        _write(self.folder / "cgroup.conf", [f"CgroupPlugin={'cgroup/v1' if old else 'disabled'}"])
        shape = f"CPUs={self.cpus} RealMemory=64000 State=UNKNOWN"
        shape += f" Gres=gpu:{self.gpus}" if self.gpus else ""
        lines = CONFIGURATION.format(folder=self.folder, port=control).splitlines()
        for name, port in zip(names, ports, strict=True):
            place = f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            lines.append(f"NodeName={name} {place} {shape}")
        partitions = (
            ("batch", 10, "Default=YES"),
            ("grace", 10, f"GraceTime={GRACE}"),
            ("high", 100, "PreemptMode=OFF"),
        )
        for name, tier, rest in partitions:
            keys = f"Nodes={','.join(names)} MaxTime=INFINITE State=UP PriorityTier={tier}"
            lines.append(f"PartitionName={name} {keys} {rest}")
        _write(self.conf, lines)


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join([*lines, ""]))


def _kill(processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


# cred_expire is also how long a requeued job waits: 5 is the least, 120 the default.
# EnforcePartLimits: what can never run is refused by sbatch instead of pending for ever.
# MinJobAge: without a database, scontrol shows finished jobs for so long.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=10000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
EnforcePartLimits=ALL
MinJobAge=172800
KillWait=30
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=20
MessageTimeout=10
TCPTimeout=5
AccountingStorageType=accounting_storage/none
"""
