"""Asking Slurm: its limits, our tasks in the queue, how finished ones ended, and cancelling.

Every function here is one call (`read_limits`: a handful) of a Slurm command, which is one request
to a daemon that the whole site shares.  Callers ask for all their jobs at once and not in a loop
faster than every 30 s; what the sweep's own files can answer is not asked here.

    scontrol show config      MaxArraySize (an array *index* stays below it), MaxJobCount
    sacctmgr show user, qos   how many jobs may be submitted; each array task counts as one
    squeue --me -r            pending and running tasks, and finished ones for MinJobAge (300 s)
    sacct -X                  tasks of any age, if the site keeps accounts; seconds behind squeue
    scancel

Four rules come from how Slurm fails:

- No answer is not an empty answer: a silent controller raises `SlurmUnavailable`.
- What squeue shows goes before what sacct shows: right after a preemption sacct still says PREEMPTED
  of a task that squeue shows as pending again.
- A task that neither squeue nor sacct knows is *unknown*, not dead; so is a state this module has
  never heard of (`State.UNKNOWN` is neither active nor finished).
- Preemption and requeueing keep the job id: the same id can be running, then pending, then running.

Not here: submitting (submitit does), waiting, and what is to be done about a state.
States as in https://slurm.schedmd.com/squeue.html#SECTION_JOB-STATE-CODES and in
`job_state_string` of Slurm's slurm_protocol_defs.c.
"""

from __future__ import annotations

import enum
import itertools
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from quantsweep.errors import SlurmError, did_you_mean

# A controller that is down makes a client wait 9 s by itself (MessageTimeout is 10 s); a busy one may take longer.
TIMEOUT_SECONDS = 60

# One argument list may hold 2 MiB on Linux; a thousand "4294967295_4194304" are 20 kB, and scancel
# sends one request for each id, so smaller chunks only make a failure's message shorter.
CANCEL_CHUNK = 1000

# A character that can stand in no job name that a shell script holds, while '|' can.
SEPARATOR = "\x1f"

# Which clock wrote the submission time is unknown (login node or controller), so look a little further back.
CLOCK_SLACK = timedelta(hours=1)


class SlurmUnavailable(SlurmError):
    """Slurm gave no answer: command missing, controller or database down, or too slow. Jobs are unknown."""


class CommandMissing(SlurmUnavailable):
    """A command of Slurm's is not on this machine: some sites give their nodes no scontrol, or no sacct."""


# -- states -----------------------------------------------------------------------------------------


class State(enum.Enum):
    """What Slurm says of a task: base states, and the flags that can stand in their place.

    The values are (what squeue -o %T and sacct print, compact code of squeue -o %t or "").
    """

    BOOT_FAIL = ("BOOT_FAIL", "BF")
    CANCELLED = ("CANCELLED", "CA")
    COMPLETED = ("COMPLETED", "CD")
    COMPLETING = ("COMPLETING", "CG")
    CONFIGURING = ("CONFIGURING", "CF")
    DEADLINE = ("DEADLINE", "DL")
    EXPEDITING = ("EXPEDITING", "")
    FAILED = ("FAILED", "F")
    LAUNCH_FAILED = ("LAUNCH_FAILED", "")
    NODE_FAIL = ("NODE_FAIL", "NF")
    OUT_OF_MEMORY = ("OUT_OF_MEMORY", "OOM")
    PENDING = ("PENDING", "PD")
    POWER_UP_NODE = ("POWER_UP_NODE", "")
    PREEMPTED = ("PREEMPTED", "PR")
    RECONFIG_FAIL = ("RECONFIG_FAIL", "")
    REQUEUED = ("REQUEUED", "RQ")
    REQUEUE_FED = ("REQUEUE_FED", "RF")
    REQUEUE_HOLD = ("REQUEUE_HOLD", "RH")
    RESIZING = ("RESIZING", "RS")
    RESV_DEL_HOLD = ("RESV_DEL_HOLD", "RD")
    REVOKED = ("REVOKED", "RV")
    RUNNING = ("RUNNING", "R")
    SIGNALING = ("SIGNALING", "SI")
    SPECIAL_EXIT = ("SPECIAL_EXIT", "SE")
    STAGE_OUT = ("STAGE_OUT", "SO")
    STOPPED = ("STOPPED", "ST")
    SUSPENDED = ("SUSPENDED", "S")
    TIMEOUT = ("TIMEOUT", "TO")
    UPDATE_DB = ("UPDATE_DB", "")
    UNKNOWN = ("UNKNOWN", "")

    @property
    def word(self) -> str:
        """The state's full name, as Slurm prints it."""
        return self.value[0]

    @property
    def is_active(self) -> bool:
        """True while the task runs, or can still come to run without being submitted again."""
        return self in _ACTIVE

    @property
    def is_finished(self) -> bool:
        """True once the task has ended and Slurm will not start it again by itself."""
        return self in _FINISHED


_FINISHED = frozenset({
    State.BOOT_FAIL, State.CANCELLED, State.COMPLETED, State.DEADLINE, State.FAILED, State.NODE_FAIL,
    State.OUT_OF_MEMORY, State.PREEMPTED, State.TIMEOUT,
})  # fmt: skip

# REVOKED runs on another cluster of a federation; UPDATE_DB says nothing of the task.  As UNKNOWN, they are neither.
_ACTIVE = frozenset(State) - _FINISHED - {State.REVOKED, State.UPDATE_DB, State.UNKNOWN}

_WORDS = {state.word: state for state in State}
_CODES = {state.value[1]: state for state in State if state.value[1]}


def parse_state(text: str) -> State:
    """Return the state that a word of squeue, sacct or scontrol stands for.

    Takes full words, compact codes, `CANCELLED by 1000`, and words cut at a column's width
    (`OUT_OF_ME+`) where only one state begins so.  Anything else is State.UNKNOWN.
    """
    word = next(iter(text.upper().split()), "")
    if word.endswith("+"):
        begun = {state for name, state in _WORDS.items() if name.startswith(word[:-1])} if word[:-1] else set()
        return begun.pop() if len(begun) == 1 else State.UNKNOWN
    return _WORDS.get(word) or _CODES.get(word) or State.UNKNOWN


# -- the queue --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuedTask:
    """One task as squeue shows it: of an array (`array_task_id` set), or a job by itself (None).

    Tasks of an array that were cancelled before they began (scancel --user, --name or --state) are one line together,
    and that has no task id either.
    """

    job_id: str  # as scancel takes it: "123_4", or "123"
    array_job_id: int
    array_task_id: int | None
    name: str
    state: State
    reason: str  # why it is pending; "" when there is none
    node: str  # "" while pending


def queue(names: Collection[str] | None = None, *, prefix: str = "") -> list[QueuedTask]:
    """Return this user's tasks, one by one, in one squeue call; finished ones while Slurm remembers them.

    Keeps jobs whose name is one of `names` (None: any) and begins with `prefix`.
    Raises SlurmUnavailable when Slurm does not answer: what runs is then unknown, not nothing.
    """
    # No --jobs and no --name: squeue fails for an id that it has forgotten, and filters names on this side anyway.
    layout = SEPARATOR.join(["%i", "%F", "%K", "%T", "%r", "%N", "%j"])
    # --all: also what waits in hidden partitions, which squeue keeps from the jobs' own owner.
    answer = _ask(["squeue", "--me", "--all", "--array", "--noheader", "--states=all", "--format", layout])
    tasks = [_queued_task(fields) for fields in _table(answer, columns=7, separator=SEPARATOR)]
    return [task for task in tasks if task.name.startswith(prefix) and (names is None or task.name in names)]


def _queued_task(fields: Sequence[str]) -> QueuedTask:
    job_id, array_job_id, task_id, state, reason, node, name = fields
    return QueuedTask(
        job_id=job_id,
        array_job_id=int(array_job_id),
        array_task_id=int(task_id) if task_id.isdigit() else None,  # "N/A" for a job that is no array
        name=name,
        state=parse_state(state),
        reason="" if reason == "None" else reason,
        node=node,
    )


# -- accounting -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class AccountedTask:
    """One task as sacct shows it; for a requeued task, its latest run."""

    state: State
    exit_code: int
    signal: int  # the signal that ended it, 0 for none
    node: str  # "" if it never started
    elapsed_seconds: int


def accounting(array_job_ids: Collection[int], since: datetime) -> dict[tuple[int, int | None], AccountedTask] | None:
    """Return (array job id, task id) -> how it stands, in one sacct call; None if the cluster keeps no accounts.

    `since` is when the first of these jobs was submitted (local time if it names no zone): without it
    sacct looks back to midnight only.  A job by itself has the task id None, and so have, together, the
    tasks of an array that were cancelled before they began.  Tasks that the database has not heard of
    are absent; it runs some seconds behind the controller.
    Raises SlurmUnavailable when the database does not answer.
    """
    if not array_job_ids:
        return {}
    start = (since.astimezone() - CLOCK_SLACK).strftime("%Y-%m-%dT%H:%M:%S")
    argv = ["sacct", "-nPX", "--jobs", ",".join(str(number) for number in sorted(array_job_ids)), "--starttime", start]
    done = _run([*argv, "--format=JobID,State,ExitCode,NodeList,ElapsedRaw"])
    if "accounting storage is disabled" in done.stdout + done.stderr:
        return None
    answer = _answer(argv, done)
    wanted = set(array_job_ids)
    found: dict[tuple[int, int | None], AccountedTask] = {}
    for job_id, *rest in _table(answer, columns=5, separator="|"):
        for key in expand_job_id(job_id):
            # Each array task also has a number of its own: sacct, asked for job 5, may answer with task 1_1.
            if key[0] in wanted:
                found[key] = _accounted_task(rest)
    return found


def _accounted_task(fields: Sequence[str]) -> AccountedTask:
    state, exit_code, node, elapsed = fields
    code, _, number = exit_code.partition(":")
    return AccountedTask(
        state=parse_state(state),
        exit_code=int(code or 0),
        signal=int(number or 0),
        node="" if node == "None assigned" else node,
        elapsed_seconds=int(elapsed or 0),
    )


def expand_job_id(job_id: str) -> list[tuple[int, int | None]]:
    """Return the (array job id, task id) pairs that a job id stands for.

    >>> expand_job_id("12"), expand_job_id("12_3"), expand_job_id("12_[0-4:2,9%2]")
    ([(12, None)], [(12, 3)], [(12, 0), (12, 2), (12, 4), (12, 9)])
    """
    job, _, tasks = job_id.partition("_")
    # "12+1" is a part of a heterogeneous job.
    number = int(job.partition("+")[0])
    if not tasks:
        return [(number, None)]
    return [(number, task) for task in _expand_indices(tasks.strip("[]").partition("%")[0])]


def _expand_indices(text: str) -> Iterator[int]:
    for part in text.split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1, int(step or 1))


# -- cancelling -------------------------------------------------------------------------------------

_JOB_ID = re.compile(r"\d+(_(\d+|\[[\d,:%-]+\]))?")


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs, whole arrays ("123"), or tasks ("123_4", "123_[5-9]"); one that has ended is no error.

    Raises SlurmError for a text that is no job id (before anything is cancelled) and when Slurm
    refuses, SlurmUnavailable when it does not answer.
    """
    for job_id in job_ids:
        if not _JOB_ID.fullmatch(job_id):
            raise SlurmError(f"cannot cancel '{job_id}': not a job id. Give ids such as 123, 123_4 or 123_[5-9]")
    for first in range(0, len(job_ids), CANCEL_CHUNK):
        done = _run(["scancel", *job_ids[first : first + CANCEL_CHUNK]])
        refusals = [line for line in done.stderr.splitlines() if line and not _is_already_gone(line)]
        if refusals and (done.returncode != 0 or _SILENT.search(done.stderr)):
            kind = SlurmUnavailable if _SILENT.search(done.stderr) else SlurmError
            raise kind(f"scancel failed, some jobs may still run: {refusals[0]} ({len(refusals)} such lines)")


def _is_already_gone(line: str) -> bool:
    return "Invalid job id" in line or "already completing or completed" in line


# -- changing jobs in the queue -----------------------------------------------------------------------


def set_dependency(job_id: str, dependency: str) -> bool:
    """Let a pending job wait for other jobs, and for nothing else; False if it no longer waits (or Slurm does not let us)."""
    job = f"JobId={job_id.partition('_')[0]}"
    return _has_done(["scontrol", "update", job, f"Dependency={dependency}", "StartTime=now"])


def requeue(job_id: str) -> bool:
    """Put a running job back into the queue under its own id; False if Slurm does not let us."""
    return _has_done(["scontrol", "requeue", job_id])


def exclude_nodes(job_ids: Iterable[str], nodes: Collection[str]) -> bool:
    """Keep pending jobs off some nodes; False if Slurm refused for one of them."""
    listed = ",".join(sorted(nodes))
    return all(_has_done(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={listed}"]) for job_id in job_ids)


def _has_done(argv: Sequence[str]) -> bool:
    """True if a command did what it was told; one that gives no answer, or is not there, did not."""
    try:
        return _run(argv).returncode == 0
    except SlurmUnavailable:
        return False


# -- limits -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the cluster allows to be submitted, and where each number comes from."""

    max_array_size: int  # the largest array index is one less
    max_job_count: int  # for the whole cluster, all users; each array task counts
    max_submit_jobs: int | None  # pending and running tasks of ours at once; None: no limit known
    notes: tuple[str, ...]  # one sentence a limit found, or why none is known


def read_limits(account: str | None = None, qos: str | None = None, partition: str | None = None) -> Limits:
    """Read the limits that a submission with these options will meet; None stands for the cluster's default.

    Raises SlurmUnavailable when the controller does not answer.  Limits of account and QOS are an
    extra: without accounting, or when sacctmgr fails, `max_submit_jobs` is None and a note says why.
    """
    config = _read_config()
    limit, notes = _submit_limit(config, account=account, qos=qos, partition=partition)
    return Limits(
        max_array_size=int(config["MaxArraySize"]),
        max_job_count=int(config["MaxJobCount"]),
        max_submit_jobs=limit,
        notes=tuple(notes),
    )


def _read_config() -> dict[str, str]:
    answer = _ask(["scontrol", "show", "config"])
    lines = (line.partition("=") for line in answer.splitlines())
    config = {key.strip(): value.strip() for key, equals, value in lines if equals}
    if heading := re.search(r"as of (\S+)", answer):
        config["as of"] = heading[1]
    if absent := {"MaxArraySize", "MaxJobCount"} - config.keys():
        raise SlurmError(f"scontrol show config names no {', '.join(sorted(absent))}: not an answer of Slurm's that is understood here")
    return config


def _submit_limit(
    config: Mapping[str, str], *, account: str | None, qos: str | None, partition: str | None
) -> tuple[int | None, list[str]]:
    """Return the tightest limit on submitted tasks, and the notes on all that were found."""
    if config.get("AccountingStorageType", "").endswith("none"):
        return None, ["the cluster keeps no accounts, so no limit on submitted jobs is known"]
    enforced = set(config.get("AccountingStorageEnforce", "").split(","))
    if not enforced & {"limits", "safe", "all"}:
        return None, ["the cluster does not enforce limits (AccountingStorageEnforce), so submitted jobs are not limited"]
    try:
        found = _find_submit_limits(cluster=config.get("ClusterName", ""), account=account, qos=qos, partition=partition)
    except SlurmError as error:
        return None, [f"limits on submitted jobs are unknown: {error}"]
    if not found:
        return None, ["no limit on submitted jobs is set for this user, account, QOS and partition"]
    return min(limit.value for limit in found), [f"{limit.name}={limit.value} of {limit.source}" for limit in found]


@dataclass(frozen=True, kw_only=True, slots=True)
class _SubmitLimit:
    value: int
    name: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Association:
    account: str
    user: str  # "" for the account's own row
    partition: str
    parent: str
    max_submit: str
    grp_submit: str
    default_qos: str


def _find_submit_limits(*, cluster: str, account: str | None, qos: str | None, partition: str | None) -> list[_SubmitLimit]:
    """Return the limits that bind.

    Of each kind (per user, per account, of a whole group) the first one set counts, and those behind
    it are not looked at, in the order of https://slurm.schedmd.com/resource_limits.html: QOS of the
    partition, QOS of the job (the other way round if it has the flag OverPartQOS), association of
    the user, accounts above it.
    """
    user = user_name()
    account = account or _default_account(user, cluster)
    rows = _associations(user, account, cluster)
    table = _qos_table()
    listed, named = _partitions(), _names_of(partition)
    found = [
        limit
        for name in named or (None,)
        for limit in _limits_that_bind(rows, table, user, account, qos, name, _partition_qos(listed, name))
    ]
    return list(dict.fromkeys(found))


def _limits_that_bind(
    rows: Sequence[_Association],
    table: Mapping[str, Mapping[str, str]],
    user: str,
    account: str,
    qos: str | None,
    partition: str | None,
    partition_qos: str,
) -> list[_SubmitLimit]:
    """The same of one partition, from what was read."""
    chain = _association_chain(rows, user, account, partition)
    default_qos = next((row.default_qos for row in chain if row.default_qos), "")
    policies = _qos_order(table, partition=partition_qos, job=qos or default_qos or "normal")

    def first_of_qos(column: str) -> list[_SubmitLimit]:
        found = (_limit(table[name][column], column, f"QOS {name}") for name in policies)
        return [limit for limit in found if limit][:1]

    own = [_limit(row.max_submit, "MaxSubmitJobs", _describe(row)) for row in chain[:1]]
    groups = [_limit(row.grp_submit, "GrpSubmitJobs", _describe(row)) for row in chain]
    return [
        *(first_of_qos("MaxSubmitJobsPerUser") or [limit for limit in own if limit]),
        *first_of_qos("MaxSubmitJobsPerAccount"),
        *(first_of_qos("GrpSubmitJobs") or [limit for limit in groups if limit]),
    ]


def _limit(text: str, name: str, source: str) -> _SubmitLimit | None:
    # An unset limit is empty; sacctmgr of some versions writes -1.
    return _SubmitLimit(value=int(text), name=name, source=source) if text.isdigit() else None


def _describe(row: _Association) -> str:
    return f"user {row.user} in account {row.account}" if row.user else f"account {row.account}"


def _default_account(user: str, cluster: str) -> str:
    argv = ["sacctmgr", "-nP", "show", "user", user, "withassoc", "where", f"cluster={cluster}", "format=DefaultAccount"]
    return next((fields[0] for fields in _table(_ask(argv), columns=1, separator="|") if fields[0]), "")


def _associations(user: str, account: str, cluster: str) -> list[_Association]:
    """Return this user's rows and those of all accounts (`user=''`), which hold the limits of the parents."""
    columns = "Account,User,Partition,ParentName,MaxSubmitJobs,GrpSubmitJobs,DefaultQOS"
    base = ["sacctmgr", "-nP", "show", "assoc", f"format={columns}", "where", f"cluster={cluster}"]
    answers = [_ask([*base, f"user={user}", f"account={account}"]), _ask([*base, "user="])]
    keys = ("account", "user", "partition", "parent", "max_submit", "grp_submit", "default_qos")
    rows = (dict(zip(keys, row, strict=True)) for answer in answers for row in _table(answer, columns=7, separator="|"))
    return [_Association(**row) for row in rows]


def _association_chain(rows: Iterable[_Association], user: str, account: str, partition: str | None) -> list[_Association]:
    """Return the user's association with the account, then the accounts above it up to the root."""
    listed = list(rows)
    own = [row for row in listed if row.user == user and row.account == account and row.partition in ("", partition)]
    # An association for one partition goes before the one for all.
    own.sort(key=lambda row: row.partition == "")
    accounts = {row.account: row for row in listed if not row.user}
    chain = own[:1]
    name = account
    while (row := accounts.pop(name, None)) is not None:
        chain.append(row)
        name = row.parent
    return chain


def _partition_qos(listed: Iterable[Mapping[str, str]], partition: str | None) -> str:
    """Return the QOS bound to a partition (None: to the default partition), "" for none."""
    row = next((row for row in listed if (row["PartitionName"] == partition if partition else row.get("Default") == "YES")), {})
    bound = row.get("QoS", "N/A")
    return "" if bound == "N/A" else bound


_QOS_COLUMNS = ("Name", "MaxSubmitJobsPerUser", "MaxSubmitJobsPerAccount", "GrpSubmitJobs", "Flags")


def _qos_table() -> dict[str, dict[str, str]]:
    answer = _ask(["sacctmgr", "-nP", "show", "qos", f"format={','.join(_QOS_COLUMNS)}"])
    rows = (dict(zip(_QOS_COLUMNS, fields, strict=True)) for fields in _table(answer, columns=5, separator="|"))
    return {row["Name"]: row for row in rows}


def _qos_order(table: Mapping[str, Mapping[str, str]], *, partition: str, job: str) -> list[str]:
    overrides = "OverPartQOS" in table.get(job, {}).get("Flags", "")
    order = [job, partition] if overrides else [partition, job]
    return [name for name in order if name in table]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionLimits:
    """What one partition allows; minutes are rounded down, since Slurm's time limits have a grain of one."""

    name: str
    max_minutes: int | None  # longest time limit; None: no limit
    default_minutes: int | None  # given to a job that asks for none; None: the partition's longest
    max_nodes: int | None  # nodes that one job may have; None: no limit
    num_nodes: int
    whole_nodes: bool  # a job gets whole nodes, whatever it asks for (OverSubscribe=EXCLUSIVE)
    state: str  # "UP" takes and starts jobs; DOWN, DRAIN and INACTIVE do not
    allow_accounts: tuple[str, ...] | None  # None: any but those denied
    deny_accounts: tuple[str, ...]
    allow_qos: tuple[str, ...] | None
    deny_qos: tuple[str, ...]


def partition_limits(name: str | None = None) -> PartitionLimits:
    """Return what a partition allows, in one call; None stands for the cluster's default partition.

    Of several (`a,b`: a job starts in whichever can start it first) the widest of each limit is returned, and all their nodes.
    Raises SlurmError when there is no such partition (it names those that exist), SlurmUnavailable
    when the controller does not answer.
    """
    listed = _partitions()
    if not name:
        if (row := next((row for row in listed if row.get("Default") == "YES"), None)) is None:
            raise _no_partition("no default partition", listed)
        return _partition(row)
    by_name = {row["PartitionName"]: row for row in listed}
    wanted = _names_of(name)
    if absent := [one for one in wanted if one not in by_name]:
        raise SlurmError(f"{did_you_mean('partition', absent[0], list(by_name))}. Choose with cluster.partition=…")
    rows = [by_name[one] for one in wanted]
    return _widest([_partition(row) for row in rows], [row.get("Nodes", "") for row in rows])


def _names_of(partition: str | None) -> list[str]:
    return [one.strip() for one in (partition or "").split(",") if one.strip()]


def _no_partition(what: str, listed: Iterable[Mapping[str, str]]) -> SlurmError:
    known = ", ".join(row["PartitionName"] for row in listed) or "(none)"
    return SlurmError(f"{what}. Available: {known}. Choose with cluster.partition=…")


def _partition(fields: Mapping[str, str]) -> PartitionLimits:
    return PartitionLimits(
        name=fields["PartitionName"],
        max_minutes=parse_minutes(fields.get("MaxTime", "UNLIMITED")),
        default_minutes=parse_minutes(fields.get("DefaultTime", "NONE")),
        max_nodes=_count(fields.get("MaxNodes", "UNLIMITED")),
        num_nodes=_count(fields.get("TotalNodes", "0")) or 0,
        whole_nodes=fields.get("OverSubscribe") == "EXCLUSIVE",
        state=fields.get("State", "UP"),
        allow_accounts=_names(fields.get("AllowAccounts", "ALL")),
        deny_accounts=_names(fields.get("DenyAccounts", "")) or (),
        allow_qos=_names(fields.get("AllowQos", "ALL")),
        deny_qos=_names(fields.get("DenyQos", "")) or (),
    )


def _widest(limits: Sequence[PartitionLimits], hosts: Sequence[str]) -> PartitionLimits:
    """What a job may that names all these partitions.  hosts: the nodes of each, as Slurm lists them; partitions share nodes."""
    if len(limits) == 1:
        return limits[0]
    nodes = {host for text in hosts for host in expand_hosts(text)}
    return PartitionLimits(
        name=",".join(one.name for one in limits),
        max_minutes=_largest([one.max_minutes for one in limits]),
        default_minutes=_largest([one.default_minutes for one in limits]),
        max_nodes=_largest([one.max_nodes for one in limits]),
        num_nodes=len(nodes) or max(one.num_nodes for one in limits),
        whole_nodes=any(one.whole_nodes for one in limits),
        state="UP" if any(one.state == "UP" for one in limits) else limits[0].state,
        allow_accounts=_all_of([one.allow_accounts for one in limits]),
        deny_accounts=_in_each([one.deny_accounts for one in limits]),
        allow_qos=_all_of([one.allow_qos for one in limits]),
        deny_qos=_in_each([one.deny_qos for one in limits]),
    )


def _largest(bounds: Sequence[int | None]) -> int | None:
    known = [bound for bound in bounds if bound is not None]
    return max(known) if len(known) == len(bounds) else None


def _all_of(names: Sequence[tuple[str, ...] | None]) -> tuple[str, ...] | None:
    known = [each for each in names if each is not None]
    return tuple(dict.fromkeys(name for each in known for name in each)) if len(known) == len(names) else None


def _in_each(names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(name for name in names[0] if all(name in each for each in names))


def expand_hosts(text: str) -> list[str]:
    """Return the hosts that a list of Slurm's stands for.

    >>> expand_hosts("login,n[08-10,20],r[1-2]g[1-2]")
    ['login', 'n08', 'n09', 'n10', 'n20', 'r1g1', 'r1g2', 'r2g1', 'r2g2']
    """
    if text in ("", "(null)"):
        return []
    found = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        pieces = [_numbers(piece[1:-1]) if piece.startswith("[") else [piece] for piece in re.findall(r"\[[^\]]*\]|[^\[\]]+", part)]
        found += ["".join(choice) for choice in itertools.product(*pieces)]
    return found


def _numbers(text: str) -> list[str]:
    numbers = []
    for span in text.split(","):
        first, _, last = span.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers


def largest_node(partition: str | None = None) -> tuple[int, int]:
    """Return the most memory (MB) and the most GPUs that one node of a partition has, in one call; 0 where Slurm states none."""
    argv = ["sinfo", "--noheader", "--Node", "--format=%m|%G", *(["--partition", partition] if partition else [])]
    rows = list(_table(_ask(argv), columns=2, separator="|"))
    memory = max((int(re.sub(r"\D", "", fields[0]) or 0) for fields in rows), default=0)
    return memory, max((_num_gpus(fields[1]) for fields in rows), default=0)


def _num_gpus(gres: str) -> int:
    """`gpu:2`, `gpu:h100:8(S:0-1)`, `gpu:a100:4,shard:8` → the number of GPUs."""
    plain = re.sub(r"\([^)]*\)", "", gres)
    return sum(int(parts[-1]) for part in plain.split(",") if (parts := part.split(":"))[0] == "gpu" and parts[-1].isdigit())


def parse_minutes(text: str) -> int | None:
    """Return whole minutes of a time as Slurm prints it; None for UNLIMITED, INFINITE and NONE.

    >>> [parse_minutes(text) for text in ("02:00:00", "1-00:30:59", "UNLIMITED")]
    [120, 1470, None]
    """
    if text in ("UNLIMITED", "INFINITE", "NONE"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if match is None:
        raise SlurmError(f"cannot read the time '{text}' in Slurm's answer: [days-]hours:minutes:seconds or UNLIMITED is expected")
    days, hours, minutes, _ = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes


def _count(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _names(text: str) -> tuple[str, ...] | None:
    return None if text == "ALL" else tuple(name for name in text.split(",") if name)


def _partitions() -> list[dict[str, str]]:
    lines = _ask(["scontrol", "--all", "--oneliner", "show", "partition"]).splitlines()  # --all: hidden ones too
    rows = [dict(field.partition("=")[::2] for field in line.split()) for line in lines]
    return [row for row in rows if "PartitionName" in row]  # "No partitions in the system" is a line too


def cluster_name() -> str:
    """Return the name of the cluster whose commands these are, in at most one call; "" where it says none."""
    return os.environ.get("SLURM_CLUSTER_NAME") or _read_config().get("ClusterName", "")


def version() -> str:
    """Return Slurm's version as its commands print it ("slurm-wlm 22.05.8"); asks no daemon."""
    return _ask(["scontrol", "--version"]).strip()


def configuration() -> dict[str, str]:
    """Return what `scontrol show config` says, in one call; "as of" is the controller's clock when it answered.

    Raises SlurmUnavailable when the controller does not answer.
    """
    return _read_config()


@dataclass(frozen=True, kw_only=True, slots=True)
class UserAssociation:
    """One account that this user may charge, with what it allows."""

    account: str
    partition: str  # "" for any
    qos: tuple[str, ...]


def user_associations() -> list[UserAssociation]:
    """Return this user's associations on the default cluster, in one call of sacctmgr; empty if there are none.

    Raises SlurmUnavailable when the database does not answer (also: where the site keeps no accounts).
    """
    argv = ["sacctmgr", "-nP", "show", "assoc", "format=Account,Partition,QOS", "where", f"user={user_name()}"]
    rows = _table(_ask(argv), columns=3, separator="|")
    return [UserAssociation(account=account, partition=partition, qos=_names(qos) or ()) for account, partition, qos in rows]


def user_name() -> str:
    """Slurm goes by the user id; the environment's USER may say something else."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


# -- the process boundary ---------------------------------------------------------------------------


def available() -> bool:
    """True where jobs can be submitted: sbatch is on PATH."""
    return shutil.which("sbatch") is not None


def _environment() -> dict[str, str]:
    """Our environment without what would quietly filter or reformat an answer (SQUEUE_PARTITION, SLURM_TIME_FORMAT, …)."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))}
    kept.pop("SLURM_TIME_FORMAT", None)
    # 0: print an array's pending indices whole; the default cuts them after 64 characters.
    return {**kept, "SLURM_BITSTR_LEN": "0", "LC_ALL": "C.UTF-8"}


def _run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one command of Slurm's; the only door to the outside, and what unit tests replace."""
    try:
        return subprocess.run(
            list(argv), env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise CommandMissing(
            f"'{argv[0]}' is not on PATH. Load the site's Slurm module, or run on a login node (or locally, with hydra/launcher=basic)"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(
            f"{argv[0]} gave no answer in {TIMEOUT_SECONDS} s; the state of its jobs is unknown. Try again later"
        ) from None


def _ask(argv: Sequence[str]) -> str:
    """Return what a command printed that only asks."""
    return _answer(argv, _run(argv))


def _answer(argv: Sequence[str], done: subprocess.CompletedProcess[str]) -> str:
    """Return a question's answer; whatever the reason that there is none, what was asked is unknown.

    squeue of some versions ends with 0 after "Unable to contact slurm controller".
    """
    if done.returncode != 0 or _SILENT.search(done.stderr):
        raise SlurmUnavailable(
            f"{' '.join(argv[:3])} gave no answer ({_one_line(done)}); the state of its jobs is unknown. "
            "Is this a login node of the cluster, and is its controller up?"
        )
    return done.stdout


# Recorded from 22.05 with slurmctld stopped, killed, and hanging, and with slurmdbd stopped.
_SILENT = re.compile(r"unable to contact|connection refused|timed out|is not connected|problem talking to the database", re.IGNORECASE)


def _one_line(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}, no message"


def _table(answer: str, *, columns: int, separator: str) -> Iterator[list[str]]:
    """Split machine-readable output; a line that does not fit is an error, since dropping it would hide a job."""
    for line in answer.splitlines():
        # Printed before each cluster's part when SLURM_CLUSTERS is set.
        if not line.strip() or line.startswith("CLUSTER: "):
            continue
        fields = line.split(separator, columns - 1)
        if len(fields) != columns:
            raise SlurmError(f"cannot read a line of Slurm's answer: '{line}' has {len(fields)} fields, {columns} were asked for")
        yield [field.strip() for field in fields] if separator == "|" else fields
