"""A small real Slurm on this machine, everything in one temporary folder, for the tests of the runner.

munged, mariadbd, slurmdbd, slurmctld and two slurmd with two pretended GPUs each, as PACE has them: accounts, and a
free QOS (embers) that the paid one (inferno) preempts by cancelling. All run in the foreground as children of this
process, on ports of their own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacctmgr")
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
NODES = ("n1", "n2")
# As on PACE: a job has to name its account, although Slurm itself keeps a default one for every user.
NO_DEFAULT_ACCOUNT = """
function slurm_job_submit(job, partitions, user)
  if job.account == nil then
    slurm.log_user("no account given (--account)")
    return slurm.ERROR
  end
  return slurm.SUCCESS
end

function slurm_job_modify(change, job, partitions, user)
  return slurm.SUCCESS
end

return slurm.SUCCESS
"""
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}


def why_not() -> str | None:
    """The reason why no cluster can be started here, or None."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=SEARCH)]
    if missing:
        return f"Slurm is not installed here (missing: {', '.join(missing)})"
    if os.geteuid() != 0:
        return "slurmd can only be started by root"
    return None


def wait_for(what: str, check: Callable[[], object], seconds: float = 60.0, every: float = 0.2) -> object:
    """Poll until check() is true; fail with `what` after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := check():
            return result
        time.sleep(every)
    raise TimeoutError(f"waited {seconds:g} s for {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes_of(job: str) -> list[int]:
    """The step daemon of a job and all that it started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit():
                continue
            daemon = (entry / "cmdline").read_bytes().startswith(f"slurmstepd: [{job}.".encode())
            if daemon or f"SLURM_JOB_ID={job}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


class Cluster:
    """Start with start(), stop with stop(); `environment` is what commands that talk to it need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH}
        for name in [
            name for name in self.environment if name.startswith(("SBATCH_", "SLURM_")) and name != "SLURM_CONF"
        ]:
            del self.environment[name]
        self.ports = {name: free_port() for name in ("ctld", "dbd", "sql", *NODES)}

    # -- life ----------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        for name in ("state", "spool", "sql", "log"):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        self._write_configuration()
        self._spawn("munged", "--foreground", "--force", "--num-threads=2", *self._munge_files())
        wait_for("munged", lambda: (self.folder / "munge.socket").exists())
        self._start_database()
        self._spawn("slurmdbd", "-D")
        wait_for("slurmdbd", lambda: self.run("sacctmgr", "-n", "show", "cluster", check=False).returncode == 0)
        self.run("sacctmgr", "-i", "add", "cluster", "test")
        self._spawn("slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf"))
        wait_for("slurmctld", lambda: self.run("scontrol", "ping", check=False).returncode == 0)
        self._add_accounts()
        for node in NODES:
            self.start_node(node)
        self.wait_idle()

    def stop(self) -> None:
        """Jobs first, then the daemons in the order in which they need each other."""
        self.run("scancel", "--user=root", "--state=PENDING", check=False)
        self.run("scancel", "--user=root", check=False)
        for name in (*NODES, "slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(name)

    def _spawn(self, name: str, *arguments: str, key: str | None = None) -> None:
        program = shutil.which(name, path=SEARCH)
        with (self.folder / "log" / f"{key or name}.out").open("ab") as log:
            self.processes[key or name] = subprocess.Popen(
                [program, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _end(self, key: str, kill: bool = False) -> None:
        process = self.processes.pop(key, None)
        if process is None:
            return
        process.kill() if kill else process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def start_node(self, node: str) -> None:
        self._spawn("slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"), key=node)

    def cut_power(self, node: str) -> None:
        """End everything on a node at once, so that nobody there can report anything."""
        jobs = self.run("squeue", "-h", "-w", node, "-o", "%A").stdout.split()
        processes = [process for job in jobs for process in processes_of(job)]
        for sent in (signal.SIGSTOP, signal.SIGKILL):
            for process in [self.processes[node].pid, *processes]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, sent)
        self._end(node, kill=True)

    def wait_idle(self) -> None:
        def idle() -> bool:
            states = self.run("sinfo", "-N", "-h", "-o", "%T").stdout.split()
            return states == ["idle"] * len(NODES)

        wait_for("the nodes to be idle", idle)

    # -- configuration -------------------------------------------------------------------------------------------------
    def _munge_files(self) -> list[str]:
        names = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
        names |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        return [f"--{option}={self.folder / name}" for option, name in names.items()]

    def _start_database(self) -> None:
        data = self.folder / "sql"
        options = [f"--datadir={data}", "--user=root"]
        self.run("mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal", *options)
        self._spawn(
            "mariadbd",
            "--no-defaults",
            *options,
            f"--socket={self.folder / 'sql.socket'}",
            f"--port={self.ports['sql']}",
            "--bind-address=127.0.0.1",
            "--skip-grant-tables",
            "--innodb-buffer-pool-size=32M",
            "--innodb-flush-log-at-trx-commit=0",
        )

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.ports["sql"])) == 0

        wait_for("mariadbd", answers)

    def _add_accounts(self) -> None:
        for words in (
            "add qos embers MaxWall=08:00:00 MaxSubmitJobsPerUser=50 MaxJobsAccruePerUser=1 PreemptExemptTime=00:00:02",
            "add qos inferno preempt=embers priority=100 MaxWall=3-00:00:00 MaxSubmitJobsPerUser=500",
            "modify qos inferno set MaxTRESPerUser=gres/gpu=32",
            "add account gts-lab,gts-other",
            "add user root account=gts-lab,gts-other",
            "modify user root set qos+=embers,inferno defaultqos=embers",
        ):
            self.run("sacctmgr", "-i", *words.split())

    def _write_configuration(self) -> None:
        folder, host = self.folder, socket.gethostname()
        for gpu in range(3):
            (folder / f"gpu{gpu}").touch()
        (folder / "gres.conf").write_text(
            f"NodeName=n[1-2] Name=gpu Type=rtx_6000 File={folder}/gpu[0-1]\n"
            f"NodeName=n[1-2] Name=gpu Type=l40s File={folder}/gpu2\n"
        )
        (folder / "job_submit.lua").write_text(NO_DEFAULT_ACCOUNT)
        authentication = f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket\n"
        dbd = folder / "slurmdbd.conf"
        dbd.write_text(
            f"DbdHost=localhost\nDbdPort={self.ports['dbd']}\nSlurmUser=root\nStorageType=accounting_storage/mysql\n"
            f"StorageHost=127.0.0.1\nStoragePort={self.ports['sql']}\nStorageUser=root\nStorageLoc=slurm_acct\n"
            f"LogFile={folder}/log/slurmdbd.log\nPidFile={folder}/slurmdbd.pid\n{authentication}"
        )
        dbd.chmod(0o600)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.ports[node]} CPUs=16 RealMemory=300000"
            " Gres=gpu:rtx_6000:2,gpu:l40s:1"
            for node in NODES
        )
        (folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
{authentication}SlurmctldPort={self.ports["ctld"]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=10
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePass={folder}/munge.socket
AccountingStoragePort={self.ports["dbd"]}
AccountingStorageEnforce=associations,qos,limits,safe
AccountingStorageTRES=gres/gpu
JobSubmitPlugins=lua
JobRequeue=0
PreemptType=preempt/qos
PreemptMode=CANCEL
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=3-00:00:00 State=UP
"""
        )

    # -- use -----------------------------------------------------------------------------------------------------------
    def run(self, *command: str, check: bool = True, **options: object) -> subprocess.CompletedProcess:
        options = {"env": self.environment} | options
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
        if check and result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result

    def jobs(self) -> list[dict[str, str]]:
        """All jobs that the accounting knows, oldest first."""
        fields = ("JobIDRaw", "JobID", "JobName", "State", "ExitCode", "NodeList", "WorkDir", "QOS", "Timelimit")
        lines = self.run("sacct", "-X", "-n", "-P", "-a", "-S", "now-1day", "-o", ",".join(fields)).stdout.splitlines()
        jobs = [dict(zip(fields, line.split("|"), strict=True)) for line in lines]
        for job in jobs:
            job["State"] = job["State"].split()[0]
        return sorted(jobs, key=lambda job: int(job["JobIDRaw"]))

    def state(self, job_id: str) -> str:
        return next((job["State"] for job in self.jobs() if job["JobIDRaw"] == job_id), "")
