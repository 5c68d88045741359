"""A private Slurm cluster on this machine: two nodes, no munge, nothing outside one folder. Started for the tests, and stopped by them.

Two more nodes claim GPUs, so that Slurm judges scripts that ask for some; nothing runs on them.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.rank_pool import free_ports

NODES = ("n1", "n2", "g1", "g2")
FAILED = {"FAILED", "NODE_FAIL", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "BOOT_FAIL"}
CONFIGURATION = """
ClusterName=samestep
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=0
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
KillWait=10
MinJobAge=600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=g1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=65536 Gres=gpu:8 State=UNKNOWN
NodeName=g2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=8 RealMemory=65536 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=gpu Nodes=g1,g2 MaxTime=INFINITE State=UP
"""


def why_not_here() -> str:
    """Why no cluster can be started on this machine, or nothing. Installs Debian's Slurm where it can."""
    if shutil.which("slurmctld") and shutil.which("slurmd"):
        return ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "slurm-wlm is not installed; on Debian or Ubuntu: sudo apt-get install slurm-wlm"
    install = "apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y slurm-wlm"
    done = subprocess.run(["bash", "-c", install], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"apt-get could not install slurm-wlm: {done.stderr.strip()[-300:]}"


class Cluster:
    """Commands on the running cluster, with the environment that finds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.began = self.last_used = time.monotonic()

    def run(self, *words: str, cwd: Path | None = None, environ: Mapping[str, str] | None = None) -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=self.environ | dict(environ or {}))
        assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """Of a job, such as PENDING or COMPLETED."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", "-o", job).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)[name]

    def wait(self, job: str, *, until: tuple[str, ...] = ("COMPLETED",), timeout_s: float = 150) -> None:
        """Until the job is in one of these states. A job that waits for its restart is started at once."""
        end = time.monotonic() + timeout_s
        while (state := self.state(job)) not in until:
            assert time.monotonic() < end, f"job {job} is still {state}"
            assert state not in FAILED, f"job {job}: {state}"
            if state == "PENDING" and self.field(job, "Reason") == "BeginTime":
                # Started within a second of being requeued, a job's credential is still revoked (Slurm 22.05).
                time.sleep(2)
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.3)

    def start_node(self, name: str) -> None:
        """Start a node's daemon in the foreground, as a child of this process."""
        words = ["slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf")]
        self.daemons[name] = subprocess.Popen(
            words, env=self.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def stop(self, name: str) -> None:
        """Stop one daemon."""
        daemon = self.daemons.pop(name)
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it waits for a job that does not end
            daemon.kill()
            daemon.wait()


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Two nodes, up and idle; everything is stopped at the end, running jobs too."""
    (folder / "state").mkdir(parents=True)
    port, *ports = free_ports(1 + len(NODES))
    user = os.environ.get("USER", "root")
    text = CONFIGURATION.format(host=socket.gethostname(), user=user, folder=folder, port=port, ports=ports)
    (folder / "slurm.conf").write_text(text)
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"NodeName=g[1-2] Name=gpu File={folder}/gpu[0-7]\n")
    cluster = Cluster(folder)
    controller = ["slurmctld", "-D", "-f", str(folder / "slurm.conf")]
    cluster.daemons["slurmctld"] = subprocess.Popen(
        controller, env=cluster.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for name in NODES:
            cluster.start_node(name)
        end = time.monotonic() + 30
        while cluster_is_not_idle(cluster):
            assert time.monotonic() < end, "the nodes did not come up: see " + str(folder)
            time.sleep(0.3)
        yield cluster
    finally:
        for words in (["--state=PENDING"], ["--signal=KILL", "--full"]):
            subprocess.run(["scancel", f"--user={user}", *words], env=cluster.environ, capture_output=True)
        time.sleep(1)
        for name in list(cluster.daemons):
            cluster.stop(name)


def cluster_is_not_idle(cluster: Cluster) -> bool:
    """Whether a node is not yet ready."""
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=cluster.environ, capture_output=True, text=True)
    return done.stdout.split() != ["idle"] * len(NODES)
