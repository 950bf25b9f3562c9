"""A SLURM of two nodes on this machine: a real controller, two real node daemons, no accounting."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import launch

SCRIPT = launch.ROOT / "experiments/slurm.sh"
NODES = {"n1": 6821, "n2": 6822}
"""Names and ports; all have the address of this machine."""

# Started jobs wait for cred_expire seconds before they may start again. A node that is silent for
# SlurmdTimeout seconds has failed.
CONFIG = """
ClusterName=testbed
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort=6817
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=10
CompleteWait=0
MinJobAge=86400
SlurmctldTimeout=30
SlurmdTimeout=10
"""


class Cluster:
    """The cluster. `start` it, submit jobs, `stop` it.

    Args:
        folder: an empty folder, for its state, sockets and logs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "MASTER_ADDR": "127.0.0.1",  # the names of the nodes mean nothing here
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def start(self) -> None:
        """Starts the daemons and waits for the nodes.

        Raises:
            RuntimeError: something that it takes is missing, or does not start.
        """
        programs = {name: shutil.which(name, path=f"{os.defpath}:/usr/sbin") for name in PROGRAMS}
        missing = [name for name, path in programs.items() if path is None]
        if missing or os.geteuid() != 0:
            raise RuntimeError(
                f"no SLURM can be started here (missing: {', '.join(missing) or 'root'}): as root, "
                "apt-get install --no-install-recommends slurm-wlm munge"
            )
        host = socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
            for name, port in NODES.items()
        ]
        partitions = [
            "PartitionName=dev Nodes=ALL Default=YES MaxTime=60 DefaultTime=30 GraceTime=60",
            "PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=30 PriorityTier=10",
        ]
        config = CONFIG.format(host=host, folder=self.folder)
        (self.folder / "slurm.conf").write_text("\n".join([config, *nodes, *partitions, ""]))
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key-file"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--{name}={self.folder}/munge.{name}" for name in MUNGE_FILES]
        self.launch("munged", [programs["munged"], "-F", "-f", *munge])
        self.wait_until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self.launch("slurmctld", [programs["slurmctld"], "-D"])
        for node in NODES:
            self.start_node(node)
        self.wait_until(
            lambda: self.ask("sinfo", "-h", "-o", "%T").split() == ["idle"], "the nodes"
        )

    def launch(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("a") as output:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output
            )

    def start_node(self, node: str) -> None:
        self.launch(node, [shutil.which("slurmd", path="/usr/sbin"), "-D", "-N", node])

    def kill_node(self, node: str, job: int) -> None:
        """Kills a node as a power failure would: its daemon and all that runs there of a job."""
        self.daemons.pop(node).kill()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has just ended
            is_step = command.startswith(f"slurmstepd: [{job}.".encode())
            if is_step or f"SLURM_JOB_ID={job}".encode() in environment:
                os.kill(int(process.name), signal.SIGKILL)

    def stop(self) -> None:
        if "slurmctld" in self.daemons:
            subprocess.run(["scancel", "--user=root"], env=self.environment, check=False)
        for name in reversed(self.daemons):
            self.daemons[name].terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()

    # --- jobs -------------------------------------------------------------------------------------

    def submit(self, *arguments: str, options: tuple[str, ...] = ()) -> int:
        """Submits `experiments/slurm.sh` and returns the number of the job."""
        output = f"--output={self.folder}/job-%A_%a.out"
        return int(self.ask("sbatch", "--parsable", output, *options, str(SCRIPT), *arguments))

    def ask(self, *command: str) -> str:
        answer = subprocess.run(
            command, env=self.environment, cwd=launch.ROOT, capture_output=True, text=True
        )
        assert answer.returncode == 0, f"{' '.join(command)}: {answer.stderr}\n{self.logs()}"
        return answer.stdout.strip()

    def show(self, job: int | str) -> dict[str, str]:
        """Returns what the controller knows of a job."""
        words = self.ask("scontrol", "show", "job", "--oneliner", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
        """Waits, and fails with the logs if it takes too long or a daemon dies."""
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            assert not dead, f"{dead} ended\n{self.logs()}"
            assert time.monotonic() < deadline, f"no sign of {what}\n{self.logs()}"
            time.sleep(0.05)

    def finish(self, job: int | str) -> dict[str, str]:
        """Waits for the end of a job and returns what the controller knows of it."""
        over = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "OUT_OF_MEMORY")
        self.wait_until(lambda: self.show(job)["JobState"] in over, f"the end of job {job}", 600)
        return self.show(job)

    def output(self, job: int) -> str:
        (path,) = self.folder.glob(f"job-{job}_*.out")
        return path.read_text()

    def logs(self) -> str:
        paths = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths)


PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
MUNGE_FILES = ("key-file", "socket", "pid-file", "log-file", "seed-file")
