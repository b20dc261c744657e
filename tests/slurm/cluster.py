"""A real Slurm cluster on this machine, on loopback, for as long as a test needs it.

The launcher's claims (arrays are split under `MaxArraySize`, a requeued task resumes, a limit is
met and not run into) are only worth something against the scheduler itself, so no part of Slurm is
faked here.  What runs:

    munged        signs every message; own key and socket
    mariadbd      own data folder and socket, no TCP port         (with accounting=True)
    slurmdbd      accounting, associations, QOS                   (with accounting=True)
    slurmctld     the controller
    slurmd (N)    one process a node, all on this host: 8 CPUs and 2 pretended GPUs each

Everything lives under one folder: configuration, logs, pid files, spools.  Nothing needs systemd,
ports are picked free, so several clusters may run at once.  All state that matters is on disk:
a `Cluster` object holds only its settings, and `Cluster(root=folder).stop()` works from any process.

What this cluster does not do: contain jobs (no cgroups; a job may use more than it asked for), run
as another user than root, or be fast: a node claims more CPUs than the machine has.

    with Cluster(root=folder, qos={"tight": {"MaxSubmitJobsPerUser": "50"}}) as cluster:
        cluster.run(["sbatch", "--array=0-9", "--wrap", "hostname"])

    $ eval "$(python -m tests.slurm.cluster start /tmp/qs)"; sinfo; python -m tests.slurm.cluster stop /tmp/qs
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

CLUSTER_NAME = "quantsweep"
ACCOUNT = "lab"

# Folders made by the test session begin so; `reap_orphans` looks for them.
TEMPORARY_PREFIX = "qs-slurm-"

# sun_path holds 108 bytes with its closing zero; the longest socket is "<root>/spool-n99/n99_4294967295.4294967295".
LONGEST_ROOT = 60

# Below the range that the kernel hands to outgoing connections (32768 and up), so that a port found
# free stays free until its daemon binds it.
PORTS = range(18000, 32000)

# Two partitions over the same nodes; a job of `high` pushes jobs of `low` back into the queue.
PREEMPTION_PARTITIONS: Mapping[str, str] = {
    "low": "PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
    "high": "PriorityTier=10 PreemptMode=OFF",
}

DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacctmgr")


class ClusterError(RuntimeError):
    """The cluster could not be started or did not answer; the message ends with its logs."""


def missing_programs(*, accounting: bool = True) -> list[str]:
    """Return the programs that a cluster needs and that are not installed here."""
    needed = [name for name in DAEMONS if accounting or name not in ("mariadbd", "slurmdbd")]
    return [name for name in needed if _program(name) is None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Settings of one cluster; `start` brings it up, `stop` leaves no process behind.

    Raises ClusterError at once for a root that is too long for Unix sockets.
    """

    root: Path
    nodes: int = 4
    max_array_size: int = 1001
    max_job_count: int = 10_000
    accounting: bool = True
    #: QOS name -> its limits as `sacctmgr add qos` takes them; every QOS is open to the user.
    qos: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    #: Limits of the user's association, such as {"MaxSubmitJobs": "200"}.
    association: Mapping[str, str] = field(default_factory=dict)
    #: Partition name -> the rest of its line in slurm.conf; `main` exists always and is the default.
    partitions: Mapping[str, str] = field(default_factory=dict)
    #: Adds the partitions `low` and `high`, see PREEMPTION_PARTITIONS.
    preemption: bool = False
    #: Node name -> (source, target) folders: the node's processes see `source` at the path `target`, as another host
    #: would, while everybody else goes on seeing what is there.  Both must exist when the node starts, and what is
    #: mounted elsewhere after that is not seen by it.
    node_mounts: Mapping[str, Sequence[tuple[Path, Path]]] = field(default_factory=dict)
    #: Seconds a requeued job waits before it may start again (Slurm's own default is 120).
    requeue_delay: int = 10
    #: Any other line of slurm.conf, overriding ours.
    settings: Mapping[str, str] = field(default_factory=dict)
    #: Seconds each daemon may take until it answers.
    timeout: float = 60.0

    def __post_init__(self) -> None:
        root = Path(self.root).resolve()
        object.__setattr__(self, "root", root)
        if len(str(root)) > LONGEST_ROOT:
            raise ClusterError(
                f"root '{root}' has {len(str(root))} characters; Unix sockets below it need at most {LONGEST_ROOT}. "
                "Choose a shorter folder, such as one under /tmp."
            )
        if unknown := sorted(set(self.node_mounts) - set(self.node_names)):
            raise ClusterError(f"node_mounts names {', '.join(unknown)}; the nodes are {', '.join(self.node_names)}")

    # -- use ------------------------------------------------------------------------------------

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment to talk to this cluster."""
        return {"SLURM_CONF": str(self.root / "slurm.conf")}

    @property
    def node_names(self) -> list[str]:
        """n0, n1, …"""
        return [f"n{index}" for index in range(self.nodes)]

    def run(
        self, argv: Sequence[str], *, check: bool = True, timeout: float = 60.0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command against this cluster, output captured as text.

        Raises ClusterError with its output if it fails and `check` is set.
        """
        done = subprocess.run(
            list(argv), env={**_clean_environment(), **self.env, **(env or {})},
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise ClusterError(f"{' '.join(argv)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def submit(self, *options: str, script: str) -> int:
        """Submit a one-line script with sbatch and return its job id."""
        return int(self.run(["sbatch", "--parsable", *options, "--wrap", script]).stdout.partition(";")[0])

    def job_processes(self) -> list[int]:
        """Pids of this cluster's step daemons and of all processes of its jobs, on all nodes."""
        return _job_processes(self.env["SLURM_CONF"])

    def cancel_all(self) -> None:
        """Cancel every job and wait until the nodes are free of them."""
        self.run(["scancel", "--user", "root"])
        self.wait_until(lambda: not self.run(["squeue", "--noheader"]).stdout, "an empty queue")

    def wait_until(self, condition: Callable[[], bool], what: str, *, timeout: float | None = None) -> None:
        """Poll `condition` until it holds; raise ClusterError with the logs' ends when it does not in time."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while not condition():
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {limit:.0f} s for: {what}\n{self.log_tails()}")
            time.sleep(0.1)

    def log_tails(self, lines: int = 15) -> str:
        """Return the last lines of every log, for a failure's message."""
        logs = sorted((self.root / "log").glob("*"))
        return "\n".join(f"--- {log.name}\n{_tail(log, lines)}" for log in logs if log.stat().st_size)

    # -- life -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> Self:
        """Bring every daemon up and return when all nodes are idle; on failure stop what runs."""
        if os.geteuid() != 0:
            raise ClusterError("the cluster's daemons run jobs as their users, so it must be started as root")
        if missing := missing_programs(accounting=self.accounting):
            raise ClusterError(f"not installed: {', '.join(missing)}. Run .ci/install_slurm.sh")
        if (self.root / "slurm.conf").exists():
            raise ClusterError(f"'{self.root}' holds a cluster already; stop it and remove the folder, or choose another")
        try:
            self._write_files()
            self._start_munge()
            if self.accounting:
                self._start_accounting()
            self.start_controller(clean=True)
            for node in self.node_names:
                self.start_node(node)
            self.wait_until(self._all_idle, f"{self.nodes} idle nodes in sinfo")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End every process of this cluster: daemons by pid file, then steps and jobs left behind."""
        # Nodes before the controller, or it would note them as failed; the database last.
        names = [path.stem for path in sorted((self.root / "run").glob("*.pid"))]
        order = ["slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged"]
        for daemon in order:
            self._end([name for name in names if name == daemon or name.startswith(f"{daemon}-")], signal.SIGTERM)
        _end_processes(self.job_processes(), signal.SIGKILL)

    def start_node(self, node: str, *, rebooted: bool = False) -> None:
        """Start the slurmd of one node (again); `rebooted` says that nothing runs on it any more, as after a power cut."""
        slurmd = ["slurmd", *(["-b"] if rebooted else []), "-N", node]
        self._launch(f"slurmd-{node}", _with_mounts(self.node_mounts.get(node, ()), slurmd))

    def kill_node(self, node: str) -> None:
        """Kill the slurmd of one node as a crash would; its running steps live on, as they do for real."""
        self._end([f"slurmd-{node}"], signal.SIGKILL)

    def start_controller(self, *, clean: bool = False) -> None:
        """Start slurmctld and wait until it answers; `clean` forgets all jobs of an earlier run."""
        self._launch("slurmctld", ["slurmctld", *(["-c"] if clean else [])])
        self.wait_until(lambda: "UP" in self.run(["scontrol", "ping"], check=False).stdout, "slurmctld to answer")

    def stop_controller(self) -> None:
        """Stop slurmctld; `start_controller` brings it back with its jobs."""
        self._end(["slurmctld"], signal.SIGTERM)

    # -- parts ----------------------------------------------------------------------------------

    def _write_files(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        # 0700: the folder holds the munge key and a database without a password.
        self.root.chmod(0o700)
        for folder in ("log", "run", "state", "db"):
            (self.root / folder).mkdir()
        (self.root / "owner.pid").write_text(f"{os.getpid()}\n")
        (self.root / "munge.key").write_bytes(os.urandom(128))
        (self.root / "munge.key").chmod(0o600)
        ports = free_ports(2 + self.nodes)
        (self.root / "slurm.conf").write_text(self._slurm_conf(ports))
        (self.root / "gres.conf").write_text(f"NodeName=n[0-{self.nodes - 1}] Name=gpu File=/dev/null,/dev/zero\n")
        if self.accounting:
            (self.root / "slurmdbd.conf").write_text(self._slurmdbd_conf(port=ports[1]))
            # slurmdbd refuses a file that others may read.
            (self.root / "slurmdbd.conf").chmod(0o600)

    def _slurm_conf(self, ports: Sequence[int]) -> str:
        host = socket.gethostname().split(".")[0]
        last = self.nodes - 1
        lines = {
            "ClusterName": CLUSTER_NAME,
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": str(ports[0]),
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            # cred_expire is also the time a requeued job waits before it may start again.
            "AuthInfo": f"socket={self.root}/munge.sock,cred_expire={self.requeue_delay}",
            "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",
            "StateSaveLocation": f"{self.root}/state",
            "SlurmdSpoolDir": f"{self.root}/spool-%n",
            "SlurmctldPidFile": f"{self.root}/run/slurmctld.pid",
            "SlurmdPidFile": f"{self.root}/run/slurmd-%n.pid",
            "SlurmctldLogFile": f"{self.root}/log/slurmctld.log",
            "SlurmdLogFile": f"{self.root}/log/slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "MailProg": "/bin/true",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            # A node may claim more CPUs than this machine has.
            "SlurmdParameters": "config_overrides",
            "ReturnToService": "2",
            "GresTypes": "gpu",
            "MaxArraySize": str(self.max_array_size),
            "MaxJobCount": str(self.max_job_count),
            # Finished jobs count toward MaxJobCount until they are this old; Slurm's default is 300.
            "MinJobAge": "10",
            "KillWait": "2",
            "SlurmdTimeout": "30",
            "SchedulerParameters": "bf_interval=5,sched_interval=5,batch_sched_delay=0",
            **self._accounting_lines(port=ports[1]),
            **({"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"} if self.preemption else {}),
            **self.settings,
        }
        nodes = (
            f"NodeName=n[0-{last}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[2]}-{ports[2] + last}] "
            "CPUs=8 RealMemory=6000 Gres=gpu:2"
        )
        partitions = {
            "main": "Default=YES" + (" PreemptMode=OFF" if self.preemption else ""),
            **(PREEMPTION_PARTITIONS if self.preemption else {}),
            **self.partitions,
        }
        return "\n".join(
            [
                *(f"{key}={value}" for key, value in lines.items()),
                nodes,
                *(f"PartitionName={name} Nodes=ALL {rest}" for name, rest in partitions.items()),
                "",
            ]
        )

    def _accounting_lines(self, *, port: int) -> dict[str, str]:
        if not self.accounting:
            return {}
        return {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": str(port),
            # The name of a munge socket stands where a password would.
            "AccountingStoragePass": f"{self.root}/munge.sock",
            "AccountingStorageEnforce": "associations,limits,qos",
            "JobAcctGatherType": "jobacct_gather/linux",
        }

    def _slurmdbd_conf(self, *, port: int) -> str:
        return f"""\
AuthType=auth/munge
AuthInfo=socket={self.root}/munge.sock
CommunicationParameters=NoInAddrAny
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
LogFile={self.root}/log/slurmdbd.log
PidFile={self.root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""

    def _start_munge(self) -> None:
        files = {"key-file": "munge.key", "socket": "munge.sock", "log-file": "log/munged.log", "seed-file": "munge.seed"}
        options = [f"--{option}={self.root / name}" for option, name in files.items()]
        # --force: it would refuse a folder below /tmp, which others may write to.
        self._launch("munged", ["munged", "--force", f"--pid-file={self._pid_file('munged')}", *options])
        self.wait_until((self.root / "munge.sock").exists, "munged's socket")

    def _start_accounting(self) -> None:
        self._start_database()
        # Over its socket the database needs no port; the client library reads the socket's name here.
        self._launch("slurmdbd", ["slurmdbd"], env={"MYSQL_UNIX_PORT": str(self.root / "db.sock")})
        show = ["sacctmgr", "-nP", "show", "cluster"]
        self.wait_until(lambda: self.run(show, check=False).returncode == 0, "slurmdbd to answer")
        self._add_accounts()

    def _start_database(self) -> None:
        common = ["--no-defaults", f"--datadir={self.root}/db", "--user=root", "--innodb-log-file-size=16M",
                  # A test's database may lose a second in a power cut; fsync at each commit is most of its time.
                  "--innodb-flush-log-at-trx-commit=0"]  # fmt: skip
        self._log_call(
            "mariadb-install-db",
            ["mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"],
        )
        server = ["mariadbd", *common, f"--socket={self.root}/db.sock", f"--pid-file={self._pid_file('mariadbd')}",
                  "--skip-networking", f"--log-error={self.root}/log/mariadbd.log"]  # fmt: skip
        # mariadbd stays in the foreground; setsid puts it behind us.
        self._launch("mariadbd", ["setsid", "--fork", *server])
        ping = ["mariadb-admin", "--no-defaults", f"--socket={self.root}/db.sock", "ping"]
        self.wait_until(lambda: self.run(ping, check=False).returncode == 0, "mariadbd to answer")

    def _add_accounts(self) -> None:
        """Register cluster, QOS, account and user; slurmctld must find them when it starts."""
        limits = [f"{name}={value}" for name, value in self.association.items()]
        sacctmgr = ["sacctmgr", "-i"]
        self.run([*sacctmgr, "add", "cluster", CLUSTER_NAME])
        for name, values in self.qos.items():
            self.run([*sacctmgr, "add", "qos", name, *(f"{key}={value}" for key, value in values.items())])
        allowed = ",".join(["normal", *self.qos])
        self.run([*sacctmgr, "add", "account", ACCOUNT, f"cluster={CLUSTER_NAME}"])
        # root exists in every new database; it only lacks this account.
        self.run([*sacctmgr, "add", "user", "root", f"account={ACCOUNT}", f"defaultaccount={ACCOUNT}", f"qos={allowed}",
                  "defaultqos=normal", *limits])  # fmt: skip

    def _all_idle(self) -> bool:
        states = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], check=False).stdout.split()
        return states == ["idle"] * self.nodes

    def _pid_file(self, name: str) -> Path:
        return self.root / "run" / f"{name}.pid"

    def _log_call(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Run a command to its end (a daemon: until it has gone to the background), its output to a log."""
        program = _program(argv[0]) or argv[0]
        log = self.root / "log" / f"{name}.out"
        try:
            with log.open("ab") as output:
                done = subprocess.run(
                    [program, *argv[1:]], env={**_clean_environment(), **self.env, **(env or {})}, cwd=self.root,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=self.timeout, check=False,
                )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{name} took more than {self.timeout:.0f} s\n{self.log_tails()}") from None
        if done.returncode != 0:
            raise ClusterError(f"{name} ended with {done.returncode}\n{self.log_tails()}")

    def _launch(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._log_call(name, argv, env)
        self.wait_until(lambda: _read_pid(self._pid_file(name)) is not None, f"the pid file of {name}")

    def _end(self, names: Iterable[str], first: signal.Signals) -> None:
        files = [self._pid_file(name) for name in names]
        pids = [pid for pid in map(_read_pid, files) if pid is not None and _belongs_to(pid, self.root)]
        _end_processes(pids, first)
        for file in files:
            file.unlink(missing_ok=True)


# -- ports ------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Return `count` consecutive ports that nobody listens on; slurm.conf writes nodes' ports as a range."""
    for _ in range(200):
        first = random.randrange(PORTS.start, PORTS.stop - count)
        block = list(range(first, first + count))
        if all(_is_free(port) for port in block):
            return block
    raise ClusterError(f"no {count} consecutive free ports between {PORTS.start} and {PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


# -- processes --------------------------------------------------------------------------------------


def reap_orphans(parent: Path) -> list[Path]:
    """Stop and remove clusters below `parent` whose test session was killed; return their folders."""
    reaped = []
    # Test sessions put several clusters side by side into one such folder.
    for root in sorted({*parent.glob(f"{TEMPORARY_PREFIX}*"), *parent.glob(f"{TEMPORARY_PREFIX}*/*")}):
        owner = _read_pid(root / "owner.pid")
        if owner is not None and not _is_alive(owner):
            Cluster(root=root).stop()
            shutil.rmtree(root, ignore_errors=True)
            reaped.append(root)
    return reaped


def _with_mounts(mounts: Sequence[tuple[Path, Path]], argv: Sequence[str]) -> list[str]:
    """Wrap a command so that it, and all that it starts, has its own mounts; nobody else sees them."""
    if not mounts:
        return list(argv)
    script = 'while [ "$1" != -- ]; do mount --bind "$1" "$2"; shift 2; done; shift; exec "$@"'
    folders = [str(folder) for pair in mounts for folder in pair]
    return ["unshare", "--mount", "--propagation=private", "sh", "-ec", script, "sh", *folders, "--", *argv]


def _program(name: str) -> str | None:
    """Find a program; daemons live in /usr/sbin, which a user's PATH may lack."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def _clean_environment() -> dict[str, str]:
    """Our environment without what would bend Slurm's commands, as inside another cluster's job."""
    prefixes = ("SLURM", "SBATCH_", "SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_", "SALLOC_", "SRUN_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
    return {**kept, "PATH": f"{kept.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}


def _tail(path: Path, lines: int) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text().strip())
    except (OSError, ValueError):
        return None


def _read_process(pid: int, name: str) -> bytes:
    """Return /proc/<pid>/<name>, empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _is_alive(pid: int) -> bool:
    """True for a process that still runs; a zombie has ended, whoever should collect it."""
    status = _read_process(pid, "stat")
    return bool(status) and status.rpartition(b") ")[2][:1] != b"Z"


def _belongs_to(pid: int, root: Path) -> bool:
    """Guard against a pid file that outlived its process: the number may be someone else's by now."""
    text = str(root).encode() + b"/"
    return text in _read_process(pid, "cmdline") or text in _read_process(pid, "environ")


def _job_processes(slurm_conf: str) -> list[int]:
    """Return the step daemons and job processes of one cluster.

    They are told from a shell that merely exported SLURM_CONF by their name or by SLURM_JOB_ID.
    """
    ours = f"SLURM_CONF={slurm_conf}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        variables = _read_process(int(entry.name), "environ").split(b"\0")
        is_step = _read_process(int(entry.name), "comm").startswith(b"slurmstepd")
        in_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
        if ours in variables and (is_step or in_job):
            found.append(int(entry.name))
    return found


def _end_processes(pids: Sequence[int], first: signal.Signals, *, patience: float = 15.0) -> None:
    """Signal all, wait for all, and kill those that stay."""
    for number in (first, signal.SIGKILL):
        for pid in filter(_is_alive, pids):
            os.kill(pid, number)
        deadline = time.monotonic() + patience
        while any(map(_is_alive, pids)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return


# -- command line -----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """`start DIR` prints the line to evaluate in a shell; `stop DIR` ends the cluster and keeps its logs."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description="A real Slurm cluster on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="start a cluster and print how to reach it")
    start.add_argument("root", type=Path)
    start.add_argument("--nodes", type=int, default=4)
    start.add_argument("--max-array-size", type=int, default=1001)
    start.add_argument("--max-job-count", type=int, default=10_000)
    start.add_argument("--no-accounting", action="store_true")
    start.add_argument("--preemption", action="store_true")
    start.add_argument("--qos", action="append", default=[], metavar="NAME:LIMIT=N", help="such as tight:MaxSubmitJobsPerUser=50")
    stop = commands.add_parser("stop", help="stop the cluster in a folder and remove its state")
    stop.add_argument("root", type=Path)
    arguments = parser.parse_args(argv)
    try:
        return _stop(arguments.root) if arguments.command == "stop" else _start(arguments)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _start(arguments: argparse.Namespace) -> int:
    qos: dict[str, dict[str, str]] = {}
    for text in arguments.qos:
        name, _, limit = text.partition(":")
        key, _, value = limit.partition("=")
        if not (name and key and value):
            raise ClusterError(f"--qos {text}: expected NAME:LIMIT=N, such as tight:MaxSubmitJobsPerUser=50")
        qos.setdefault(name, {})[key] = value
    cluster = Cluster(
        root=arguments.root, nodes=arguments.nodes, max_array_size=arguments.max_array_size,
        max_job_count=arguments.max_job_count, accounting=not arguments.no_accounting,
        preemption=arguments.preemption, qos=qos,
    )  # fmt: skip
    cluster.start()
    # It is meant to outlive this command, so nobody owns it.
    (cluster.root / "owner.pid").unlink()
    print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}")
    return 0


def _stop(root: Path) -> int:
    if not (root / "slurm.conf").exists():
        raise ClusterError(f"'{root}' holds no cluster; it has no slurm.conf")
    cluster = Cluster(root=root)
    cluster.stop()
    # Logs stay for reading; with slurm.conf gone the folder counts as stopped.
    for path in cluster.root.iterdir():
        if path.name != "log":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
