"""A real Slurm on this machine for tests: two nodes with CPUs, one with two pretended GPUs.

No systemd and no database; memory is enforced by Slurm's own accounting. Needs root, munge and
Debian's slurmctld, slurmd and slurm-client, and owns /etc/slurm meanwhile: the jobs' inner `srun`
reads its configuration nowhere else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CONFIGURATION = Path("/etc/slurm")
MARK = "# Written by the tests of mergelab; they delete it at their end.\n"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
NODES = ("node1", "node2", "gpu1")
SLURM_CONF = """\
ClusterName=mergelab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
SlurmctldPort=16817
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.%n.pid
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool.%n
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=2
MinJobAge=600
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
GresTypes=gpu
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=4 RealMemory=9000
NodeName=gpu1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17003 CPUs=4 RealMemory=9000 \
Gres=gpu:fake:2
PartitionName=cpu Nodes=node[1-2] Default=YES MaxTime=120 DefaultTime=5
PartitionName=gpu Nodes=gpu1 MaxTime=120 DefaultTime=5
PartitionName=all Nodes=node[1-2],gpu1 MaxTime=120 DefaultTime=5
"""
GRES_CONF = "NodeName=gpu1 Name=gpu Type=fake File={place}/dev/gpu[0-1]\n"


def why_not() -> str:
    """Why Slurm cannot run here, or nothing."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install munge slurm-wlm"
    conf = CONFIGURATION / "slurm.conf"
    if conf.exists() and not conf.read_text().startswith(MARK):
        return f"{conf} belongs to another Slurm"
    return ""


def wait(condition: Callable[[], object], what: str, seconds: float = 180) -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for: {what}"
        time.sleep(0.02)


class Slurm:
    """The running cluster; `place` holds state, logs and pid files."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def start(self) -> None:
        """Start every daemon and wait until all nodes are idle."""
        host = socket.gethostname().partition(".")[0]
        (self.place / "state").mkdir()
        (self.place / "dev").mkdir()
        for number in range(2):  # Slurm wants character devices
            os.mknod(self.place / f"dev/gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        CONFIGURATION.mkdir(exist_ok=True)
        texts = {"slurm.conf": SLURM_CONF, "gres.conf": GRES_CONF, "cgroup.conf": ""}
        for name, text in texts.items():
            (CONFIGURATION / name).write_text(MARK + text.format(host=host, place=self.place))
        shutil.chown(self.place, "munge", "munge")
        files = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        files["seed-file"] = "munged.seed"
        options = [f"--{option}={self.place / name}" for option, name in files.items()]
        self.call("runuser", "-u", "munge", "--", shutil.which("munged") or "munged", *options)
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        wait(lambda: self.states() == dict.fromkeys(NODES, "idle"), f"idle nodes: {self.states()}")

    def stop(self) -> None:
        """Stop every daemon and take the configuration away."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.call("scancel", "--user=root")
        for node in NODES:
            self.kill_node(node)
        for name in ("slurmctld", "munged"):
            self.kill(name)
        for name in ("slurm.conf", "gres.conf", "cgroup.conf"):
            (CONFIGURATION / name).unlink(missing_ok=True)

    def start_controller(self) -> None:
        """Start slurmctld; it goes on with the jobs that it finds."""
        self.call("slurmctld")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self.call("slurmd", "-N", node)

    def kill(self, name: str) -> None:
        """Kill the daemon of a pid file."""
        path = self.place / f"{name}.pid"
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)
        path.unlink(missing_ok=True)

    def kill_node(self, node: str) -> None:
        """Take the power away from a node: slurmd and everything that runs on it."""
        here = [job for job in self.jobs() if job.get("NodeList") == node]
        signs = tuple(f"slurmstepd: [{job['JobId']}." for job in here)
        self.kill(f"slurmd.{node}")
        for pid in [pid for pid, text in processes() if signs and text.startswith(signs)]:
            kill_tree(pid)

    def states(self) -> dict[str, str]:
        """Each node's state."""
        return dict(line.split() for line in self.call("sinfo", "-hN", "-o", "%N %t").splitlines())

    def jobs(self) -> list[dict[str, str]]:
        """What Slurm knows of every job: JobState, Partition, NodeList, TimeLimit, Comment, ..."""
        lines = self.call("scontrol", "show", "jobs", "-o").splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if "JobId=" in line]

    def save_state(self, job: str) -> None:
        """Wait until the controller has written what it knows of a job, as it does now and then."""
        before = time.time_ns()
        self.call("scontrol", "update", f"jobid={job}", "admincomment=known")
        file = self.place / "state/job_state"
        wait(lambda: file.exists() and file.stat().st_mtime_ns > before, "the controller to save")

    def call(self, *command: str) -> str:
        """Run a command; its output."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


def processes() -> Iterator[tuple[int, str]]:
    """Process id and command line of every process."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            yield int(path.name), text


def kill_tree(pid: int) -> None:
    """Kill a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for other, _ in processes():
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int(Path(f"/proc/{other}/stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(other)
    every = [pid]
    for each in every:
        every += children.get(each, [])
    for each in every:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


@contextlib.contextmanager
def running() -> Iterator[Slurm]:
    """A started cluster; another test process that wants one waits."""
    with open("/run/lock/mergelab-slurm", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place = Path(tempfile.mkdtemp(prefix="mergelab-slurm-", dir="/tmp"))
        place.chmod(0o755)
        slurm = Slurm(place)
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()
            shutil.rmtree(place, ignore_errors=True)
