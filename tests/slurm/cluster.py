"""A real Slurm cluster on one machine (needs root): slurmctld, and each slurmd in its own network namespace.

    with Cluster(Path("/tmp/slurm")) as cluster:
        subprocess.run(["srun", "-N2", "hostname"], env={**os.environ, **cluster.env})

A node has its own network namespace, hostname and /tmp, so that what finds its peers by address or hides files in /tmp
behaves as it does between machines; the file system is shared, as a cluster's is. No systemd, no accounting database.
Everything that was made is taken away again by `stop`, which also clears what a killed run left behind.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "ip", "nsenter", "unshare")
NETWORK, BRIDGE, PREFIX = "10.83.0", "ptslurm", "ptslurm-"
CONTROLLER = f"{NETWORK}.254"


def missing() -> str | None:
    """The reason why a cluster cannot run here; None if it can."""
    if os.geteuid() != 0:
        return "it needs root, for network namespaces"
    absent = [p for p in PROGRAMS if shutil.which(p) is None]
    if absent:
        return f"{', '.join(absent)} missing: apt-get install slurmctld slurmd slurm-client munge iproute2 util-linux"
    return None


def wait_until(condition: Callable[[], object], what: str, limit_s: float = 120) -> None:
    """Poll until the condition holds; the limit is generous, for a busy machine."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"after {limit_s:.0f} s still not: {what}")
        time.sleep(0.05)


def run(*command: str, check: bool = True, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


class Cluster:
    """`nodes` nodes of `cpus` CPUs and two pretended GPUs, named n1, n2, ..."""

    def __init__(self, folder: Path, *, nodes: int = 2, cpus: int = 4) -> None:
        self.folder, self.cpus = folder, cpus
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self.conf = folder / "slurm.conf"
        self.shared = folder / "shared"  # what is mounted below it, a small disk say, the nodes see too
        self.env = {"SLURM_CONF": str(self.conf)}

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    # Start and stop

    def start(self) -> None:
        self.stop()  # what a killed run left
        for name in ("log", "state", "run", "spool", "tmp", "dev", "shared"):
            (self.folder / name).mkdir(parents=True)
        run("mount", "--bind", str(self.shared), str(self.shared))
        run("mount", "--make-shared", str(self.shared))
        self._write_configuration()
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{CONTROLLER}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        run(
            "munged", "--force", f"--key-file={key}", f"--socket={self.folder}/run/munge.sock",
            f"--pid-file={self.folder}/run/munged.pid", f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={self.folder}/run/munge.seed",
        )  # fmt: skip
        self.slurm("slurmctld", "-f", str(self.conf))
        for node in self.nodes:
            self._add_network(node)
            self.start_node(node)
        self.wait_idle()

    def _write_configuration(self) -> None:
        folder, host, last = self.folder, socket.gethostname().split(".")[0], len(self.nodes)
        names = f"n[1-{last}]"
        for number in range(2):
            run("mknod", f"{folder}/dev/nvidia{number}", "c", "1", "3")  # a device file that nothing is behind
        (folder / "hosts").write_text(
            f"127.0.0.1 localhost\n{CONTROLLER} {host}\n"
            + "".join(f"{self.address(node)} {node}\n" for node in self.nodes)
        )
        (folder / "gres.conf").write_text(f"NodeName={names} Name=gpu File={folder}/dev/nvidia[0-1]\n")
        self.conf.write_text(
            f"""ClusterName=posttrain
SlurmctldHost={host}({CONTROLLER})
SlurmctldPort=28817
SlurmdPort=28818
SlurmUser=root
AuthType=auth/munge
# cred_expire is how long a requeued job waits; less than 5 counts as 120.
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
GresTypes=gpu
NodeName={names} NodeAddr={NETWORK}.[1-{last}] CPUs={self.cpus} RealMemory=8192 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=members Nodes=ALL AllowAccounts=lab State=UP
"""
        )

    def _add_network(self, node: str) -> None:
        space = PREFIX + node
        run("ip", "netns", "add", space)
        run("ip", "link", "add", f"pts{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", f"pts{node}", "master", BRIDGE, "up")
        run("ip", "-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
        run("ip", "-n", space, "link", "set", "eth0", "up")
        run("ip", "-n", space, "link", "set", "lo", "up")

    def start_node(self, node: str) -> None:
        """Start, or start again, a node's slurmd. `ip netns exec` would mount /sys anew, and slurmd die of it."""
        for name in ("spool", "tmp"):
            (self.folder / name / node).mkdir(exist_ok=True)
        (self.folder / "tmp" / node).chmod(0o1777)
        script = (
            f"hostname {node} && mount --bind {self.folder}/hosts /etc/hosts && "
            f"mount --bind {self.folder}/tmp/{node} /var/tmp && exec slurmd -f {self.conf} -N {node}"
        )
        namespaces = (
            "nsenter",
            f"--net=/run/netns/{PREFIX}{node}",
            "unshare",
            "--uts",
            "--mount",
            "--propagation=slave",
        )
        self.slurm(*namespaces, "bash", "-c", script)

    def stop(self) -> None:
        """End every process of the cluster, by its id, and remove its networks and its files."""
        spaces = [line.split()[0] for line in run("ip", "netns", "list", check=False).splitlines()]
        for space in (s for s in spaces if s.startswith(PREFIX)):
            node = space.removeprefix(PREFIX)
            self.kill(self.processes(node))
            wait_until(lambda node=node: not self.processes(node), f"{node} is empty", 20)
            run("ip", "link", "del", f"pts{node}", check=False)  # or the kernel takes its time for it
            run("ip", "netns", "del", space)
        for name in ("slurmctld", "munged"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                pid = int((self.folder / "run" / f"{name}.pid").read_text())
                if name in Path(f"/proc/{pid}/cmdline").read_text():
                    self.kill([pid])
        run("ip", "link", "del", BRIDGE, check=False)
        run("umount", "--lazy", "--recursive", str(self.shared), check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    # What tests look at and do

    def address(self, node: str) -> str:
        return f"{NETWORK}.{node.removeprefix('n')}"

    def slurm(self, *command: str, check: bool = True) -> str:
        return run(*command, check=check, env={**os.environ, **self.env})

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, as a mapping."""
        words = self.slurm("scontrol", "-o", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def queued(self) -> list[str]:
        """The ids of all jobs that are waiting or running."""
        return self.slurm("squeue", "-h", "-o", "%i").split()

    def wait_idle(self) -> None:
        wait_until(lambda: self.states() == ["idle"] * len(self.nodes), f"all nodes are idle: {self.states()}", 60)

    def states(self) -> list[str]:
        return self.slurm("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()

    def slurmd(self, node: str) -> int:
        return int((self.folder / "run" / f"slurmd-{node}.pid").read_text())

    def processes(self, node: str) -> list[int]:
        """The processes in a node's network."""
        return [int(pid) for pid in run("ip", "netns", "pids", PREFIX + node, check=False).split()]

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
