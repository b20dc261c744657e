"""`quantsweep.slurm`, its process boundary replaced by answers recorded from Slurm 22.05.

The same functions meet a live cluster in tests/slurm/test_queries.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from quantsweep import slurm
from quantsweep.errors import SlurmError
from quantsweep.slurm import AccountedTask, QueuedTask, SlurmUnavailable, State, parse_state

# -- records ----------------------------------------------------------------------------------------

SQUEUE = """\
5\x1f5\x1fN/A\x1fPENDING\x1fResources\x1f\x1flow
3\x1f3\x1fN/A\x1fFAILED\x1fJobLaunchFailure\x1fn0\x1falone
2_2\x1f2\x1f2\x1fPENDING\x1fJobArrayTaskLimit\x1f\x1fsweep-1|x y
14\x1f14\x1fN/A\x1fPENDING\x1fNodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions\x1f\x1flow
1_2\x1f1\x1f2\x1fRUNNING\x1fNone\x1fn0\x1fsweep-1
7_3\x1f7\x1f3\x1fPENDING\x1fJobArrayTaskLimit\x1f\x1fsweep-2
"""
SQUEUE_REFUSED = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
SQUEUE_HANGING = "slurm_load_jobs error: Socket timed out on send/recv operation\n"
SQUEUE_KILLED = "slurm_load_jobs error: Transport endpoint is not connected\n"

# Asked for the arrays 1, 2, 3 and 7; "8|…" stands for a task of another array, as sacct adds when its own number is asked for.
SACCT = """\
3|FAILED|0:9|n0|0
1_0|COMPLETED|0:0|n0|3
1_1|FAILED|1:0|n0|3
1_2|CANCELLED by 1000|0:0|n1|6
2_0|RUNNING|0:0|n0|15
2_[2,4,6%1]|PENDING|0:0|None assigned|0
5_1|COMPLETED|0:0|n0|3
7_3|NODE_FAIL|1:0|n[0-1]|8
"""
SACCT_DISABLED = "Slurm accounting storage is disabled\n"
SACCT_DOWN = """\
sacct: error: slurm_persist_conn_open_without_init: failed to open persistent connection to host:127.0.0.1:21779: Connection refused
sacct: error: Sending PersistInit msg: Connection refused
sacct: error: Problem talking to the database: Connection refused
"""

CONFIG = """\
Configuration data as of 2026-11-21T23:39:00
AccountingStorageEnforce = associations,limits,qos
AccountingStorageHost   = 127.0.0.1
AccountingStorageType   = accounting_storage/slurmdbd
AuthInfo                = socket=/tmp/qs/munge.sock,cred_expire=10
ClusterName             = quantsweep
MaxArraySize            = 101
MaxJobCount             = 10000
MaxJobId                = 67043328

Slurmctld(primary) at vm is UP
"""
PARTITIONS = """\
PartitionName=main AllowGroups=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=NONE MaxTime=UNLIMITED Nodes=n[0-1]
PartitionName=limited AllowGroups=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=tight DefaultTime=NONE MaxTime=UNLIMITED Nodes=n[0-1]
"""
QOS = "normal||||\ntight|50|||\nover|30|||OverPartQOS\ngroup||12|15|\n"
USER = "lab\nlab\n"
USER_ASSOCIATION = "lab|root|||200||normal\n"
ACCOUNT_ASSOCIATIONS = "root||||||\nlab|||root||500|\n"


def answers(out: str = "", err: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, stdout=out, stderr=err)


class Boundary:
    """Stands in for `slurm._run`: keeps what was asked, answers by a command's first matching words."""

    def __init__(self, replies: dict[str, subprocess.CompletedProcess[str]]) -> None:
        self.replies = replies
        self.asked: list[list[str]] = []

    def __call__(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.asked.append(list(argv))
        command = " ".join(argv)
        for words, reply in self.replies.items():
            if all(word in command for word in words.split()):
                return reply
        raise AssertionError(f"not recorded: {command}")


@pytest.fixture
def slurm_says(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, subprocess.CompletedProcess[str]]], Boundary]:
    def install(replies: dict[str, subprocess.CompletedProcess[str]]) -> Boundary:
        boundary = Boundary(replies)
        monkeypatch.setattr(slurm, "_run", boundary)
        return boundary

    return install


SlurmSays = Callable[[dict[str, subprocess.CompletedProcess[str]]], Boundary]

# -- states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("CANCELLED by 1000", State.CANCELLED, id="who-cancelled"),
        pytest.param("CANCELLED+", State.CANCELLED, id="cut-after-its-end"),
        pytest.param("OUT_OF_ME+", State.OUT_OF_MEMORY, id="cut"),
        pytest.param("RE+", State.UNKNOWN, id="cut-and-ambiguous"),
        pytest.param("+", State.UNKNOWN, id="cut-to-nothing"),
        pytest.param(" RUNNING ", State.RUNNING, id="padded"),
        pytest.param("running", State.RUNNING, id="lower-case"),
        pytest.param("", State.UNKNOWN, id="empty"),
        pytest.param("?", State.UNKNOWN, id="question-mark"),
        pytest.param("DREAMING", State.UNKNOWN, id="unheard-of"),
    ],
)
def test_parse_state(text: str, expected: State) -> None:
    assert parse_state(text) is expected


@pytest.mark.parametrize("state", State, ids=lambda state: state.word)
def test_every_state_is_parsed_from_its_word_and_its_code(state: State) -> None:
    assert parse_state(state.word) is state
    assert not state.value[1] or parse_state(state.value[1]) is state


def test_no_two_states_share_a_code() -> None:
    codes = [state.value[1] for state in State if state.value[1]]
    assert len(set(codes)) == len(codes)


def test_active_and_finished_exclude_each_other_and_unknown_is_neither() -> None:
    assert not [state for state in State if state.is_active and state.is_finished]
    neither = {state for state in State if not state.is_active and not state.is_finished}
    assert neither == {State.UNKNOWN, State.REVOKED, State.UPDATE_DB}


@pytest.mark.parametrize(
    "word", ["SUSPENDED", "CONFIGURING", "RESIZING", "REQUEUE_HOLD", "REQUEUED", "COMPLETING", "SPECIAL_EXIT", "PD", "R"]
)
def test_what_may_still_run_is_active(word: str) -> None:
    assert parse_state(word).is_active


# -- queue ------------------------------------------------------------------------------------------


def test_queue_reads_tasks_and_jobs(slurm_says: SlurmSays) -> None:
    boundary = slurm_says({"squeue": answers(SQUEUE)})
    tasks = slurm.queue()
    assert len(tasks) == 6
    [asked] = boundary.asked
    assert "--all" in asked, "squeue keeps jobs in hidden partitions even from their owner, unless that is root"
    assert tasks[2] == QueuedTask(
        job_id="2_2", array_job_id=2, array_task_id=2, name="sweep-1|x y", state=State.PENDING, reason="JobArrayTaskLimit", node=""
    )
    assert tasks[1] == QueuedTask(
        job_id="3", array_job_id=3, array_task_id=None, name="alone", state=State.FAILED, reason="JobLaunchFailure", node="n0"
    )
    assert tasks[4].reason == ""


def test_queue_keeps_exact_names_or_a_prefix(slurm_says: SlurmSays) -> None:
    slurm_says({"squeue": answers(SQUEUE)})
    assert {task.name for task in slurm.queue(prefix="sweep-")} == {"sweep-1|x y", "sweep-1", "sweep-2"}
    assert [task.job_id for task in slurm.queue(["sweep-1"])] == ["1_2"]
    assert slurm.queue([]) == []


@pytest.mark.parametrize("message", [SQUEUE_REFUSED, SQUEUE_HANGING, SQUEUE_KILLED, ""])
def test_queue_raises_when_nobody_answers(slurm_says: SlurmSays, message: str) -> None:
    slurm_says({"squeue": answers(err=message, code=1)})
    with pytest.raises(SlurmUnavailable, match=r"squeue --me --all gave no answer .* is unknown"):
        slurm.queue()


def test_queue_does_not_trust_an_exit_status_of_zero(slurm_says: SlurmSays) -> None:
    slurm_says({"squeue": answers(err=SQUEUE_REFUSED)})
    with pytest.raises(SlurmUnavailable):
        slurm.queue()


def test_queue_drops_no_line_that_it_cannot_read(slurm_says: SlurmSays) -> None:
    slurm_says({"squeue": answers("CLUSTER: one\n" + SQUEUE + "something else\n")})
    with pytest.raises(SlurmError, match="'something else' has 1 fields, 7 were asked for"):
        slurm.queue()


# -- accounting -------------------------------------------------------------------------------------


def test_accounting_reads_tasks_and_expands_pending_ones(slurm_says: SlurmSays) -> None:
    boundary = slurm_says({"sacct": answers(SACCT)})
    found = slurm.accounting([7, 1, 3, 2], datetime(2026, 11, 21, 12, tzinfo=UTC))
    assert found is not None
    assert set(found) == {(3, None), (1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (2, 4), (2, 6), (7, 3)}
    assert found[3, None] == AccountedTask(state=State.FAILED, exit_code=0, signal=9, node="n0", elapsed_seconds=0)
    assert found[1, 2] == AccountedTask(state=State.CANCELLED, exit_code=0, signal=0, node="n1", elapsed_seconds=6)
    assert found[2, 4] == AccountedTask(state=State.PENDING, exit_code=0, signal=0, node="", elapsed_seconds=0)
    [argv] = boundary.asked
    assert argv[argv.index("--jobs") + 1] == "1,2,3,7"


def test_accounting_asks_with_a_start_time_in_local_time(slurm_says: SlurmSays) -> None:
    boundary = slurm_says({"sacct": answers()})
    assert slurm.accounting([1], datetime(2026, 11, 21, 12, 30)) == {}
    assert boundary.asked[0][boundary.asked[0].index("--starttime") + 1] == "2026-11-21T11:30:00"


def test_accounting_of_nothing_asks_nothing(slurm_says: SlurmSays) -> None:
    boundary = slurm_says({})
    assert slurm.accounting([], datetime.now(tz=UTC)) == {}
    assert boundary.asked == []


def test_accounting_is_none_without_a_database_and_raises_when_it_is_down(slurm_says: SlurmSays) -> None:
    slurm_says({"sacct": answers(err=SACCT_DISABLED, code=1)})
    assert slurm.accounting([1], datetime.now(tz=UTC)) is None
    slurm_says({"sacct": answers(err=SACCT_DOWN, code=1)})
    with pytest.raises(SlurmUnavailable, match="Connection refused"):
        slurm.accounting([1], datetime.now(tz=UTC))


@pytest.mark.parametrize(
    ("job_id", "expected"),
    [
        pytest.param("12", [(12, None)], id="job"),
        pytest.param("12_3", [(12, 3)], id="task"),
        pytest.param("12_[0-2,7]", [(12, 0), (12, 1), (12, 2), (12, 7)], id="pending"),
        pytest.param("12_[0-6:3%40]", [(12, 0), (12, 3), (12, 6)], id="step-and-throttle"),
        pytest.param("12+1", [(12, None)], id="heterogeneous"),
    ],
)
def test_expand_job_id(job_id: str, expected: list[tuple[int, int | None]]) -> None:
    assert slurm.expand_job_id(job_id) == expected


# -- cancel -----------------------------------------------------------------------------------------


def test_cancel_goes_in_chunks(slurm_says: SlurmSays) -> None:
    boundary = slurm_says({"scancel": answers()})
    ids = [f"1_{task}" for task in range(slurm.CANCEL_CHUNK + 1)]
    slurm.cancel(ids)
    assert [len(argv) - 1 for argv in boundary.asked] == [slurm.CANCEL_CHUNK, 1]
    assert [job_id for argv in boundary.asked for job_id in argv[1:]] == ids


@pytest.mark.parametrize("bad", ["--user=root", "1_", "", "1 2", "12;true", "1_[x]"])
def test_cancel_refuses_what_is_no_job_id_before_cancelling_any(slurm_says: SlurmSays, bad: str) -> None:
    boundary = slurm_says({"scancel": answers()})
    with pytest.raises(SlurmError, match=r"Give ids such as"):
        slurm.cancel(["1", bad])
    assert boundary.asked == []


def test_cancel_ignores_what_is_gone_and_tells_refusal_from_silence(slurm_says: SlurmSays) -> None:
    slurm_says({"scancel": answers(err="scancel: error: Kill job error on job id 99: Invalid job id specified\n", code=1)})
    slurm.cancel(["99"])
    slurm_says({"scancel": answers(err="scancel: error: Kill job error on job id 7: Access/permission denied\n", code=1)})
    with pytest.raises(SlurmError, match="Access/permission denied") as refused:
        slurm.cancel(["7"])
    assert not isinstance(refused.value, SlurmUnavailable)
    hanging = "scancel: error: Kill job error on job id 77: Socket timed out on send/recv operation\n"
    slurm_says({"scancel": answers(err=hanging, code=140)})
    with pytest.raises(SlurmUnavailable):
        slurm.cancel(["77"])


# -- limits -----------------------------------------------------------------------------------------


def _records(**changed: str) -> dict[str, subprocess.CompletedProcess[str]]:
    texts = {"config": CONFIG, "partition": PARTITIONS, "qos": QOS, "user": USER, "own": USER_ASSOCIATION, "accounts": ACCOUNT_ASSOCIATIONS}
    text = texts | changed
    return {
        "scontrol show config": answers(text["config"]),
        "scontrol show partition": answers(text["partition"]),
        "sacctmgr show qos": answers(text["qos"]),
        "sacctmgr withassoc": answers(text["user"]),
        "sacctmgr assoc account=": answers(text["own"]),
        "sacctmgr assoc user=": answers(text["accounts"]),
    }


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "user_name", lambda: "root")


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("qos", "partition", "expected"),
    [
        pytest.param(None, None, ["MaxSubmitJobs=200 of user root in account lab", "GrpSubmitJobs=500 of account lab"], id="association"),
        pytest.param("tight", None, ["MaxSubmitJobsPerUser=50 of QOS tight", "GrpSubmitJobs=500 of account lab"], id="qos"),
        pytest.param(None, "limited", ["MaxSubmitJobsPerUser=50 of QOS tight", "GrpSubmitJobs=500 of account lab"], id="partition-qos"),
        pytest.param("over", "limited", ["MaxSubmitJobsPerUser=30 of QOS over", "GrpSubmitJobs=500 of account lab"], id="over-partition"),
        pytest.param(
            "group", "limited",
            ["MaxSubmitJobsPerUser=50 of QOS tight", "MaxSubmitJobsPerAccount=12 of QOS group", "GrpSubmitJobs=15 of QOS group"],
            id="each-kind-from-the-first-that-sets-it",
        ),
    ],
)  # fmt: skip
def test_the_limits_that_bind(slurm_says: SlurmSays, qos: str | None, partition: str | None, expected: list[str]) -> None:
    slurm_says(_records())
    limits = slurm.read_limits(qos=qos, partition=partition)
    assert list(limits.notes) == expected
    assert limits.max_submit_jobs == min(int(note.partition("=")[2].split()[0]) for note in expected)
    assert (limits.max_array_size, limits.max_job_count) == (101, 10_000)


# As 22.05 prints them, cut to what is read; the first line is whole.
PARTITION_TABLE = """\
PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=NONE DisableRootJobs=NO \
ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[0-3] \
PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=32 \
TotalNodes=4 SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED
PartitionName=gpu AllowAccounts=lab,guests DenyQos=tight Default=NO DefaultTime=00:30:00 MaxNodes=2 MaxTime=1-12:00:00 \
OverSubscribe=EXCLUSIVE State=DRAIN TotalNodes=8
"""


def test_what_a_partition_allows(slurm_says: SlurmSays) -> None:
    slurm_says({"scontrol partition": answers(PARTITION_TABLE)})
    main, gpu = slurm.partition_limits(), slurm.partition_limits("gpu")
    assert (main.name, main.max_minutes, main.default_minutes, main.max_nodes, main.num_nodes) == ("main", None, None, None, 4)
    assert (main.whole_nodes, main.state, main.allow_accounts, main.deny_accounts, main.allow_qos) == (False, "UP", None, (), None)
    assert (gpu.name, gpu.max_minutes, gpu.default_minutes, gpu.max_nodes, gpu.num_nodes) == ("gpu", 36 * 60, 30, 2, 8)
    assert (gpu.whole_nodes, gpu.state, gpu.allow_accounts, gpu.deny_qos) == (True, "DRAIN", ("lab", "guests"), ("tight",))


def test_of_several_partitions_the_widest_limit_holds_and_shared_nodes_count_once(slurm_says: SlurmSays) -> None:
    short = "PartitionName=short MaxTime=01:00:00 DefaultTime=00:10:00 MaxNodes=1 TotalNodes=3 Nodes=n[0-2] State=UP DenyQos=a,b\n"
    long = "PartitionName=long MaxTime=2-00:00:00 DefaultTime=NONE MaxNodes=4 TotalNodes=3 Nodes=n[1-3] State=DOWN DenyQos=b "
    long += "OverSubscribe=EXCLUSIVE\n"
    slurm_says({"scontrol partition": answers(short + long)})
    both = slurm.partition_limits("short,long")
    assert (both.name, both.max_minutes, both.default_minutes, both.max_nodes, both.num_nodes) == ("short,long", 2880, None, 4, 4)
    assert (both.state, both.whole_nodes, both.deny_qos, both.allow_qos) == ("UP", True, ("b",), None)
    with pytest.raises(SlurmError, match=r"unknown partition 'lang'. Did you mean 'long'"):
        slurm.partition_limits("short,lang")


@pytest.mark.parametrize(
    ("table", "name", "message"),
    [
        pytest.param(PARTITION_TABLE, "gpus", r"unknown partition 'gpus'. Did you mean 'gpu'\? Available: gpu, main", id="misspelt"),
        pytest.param(PARTITION_TABLE.splitlines()[1], None, r"no default partition. Available: gpu", id="no-default"),
        pytest.param("No partitions in the system\n", None, r"Available: \(none\)", id="none-at-all"),
        pytest.param(PARTITION_TABLE.replace("1-12:00:00", "a while"), "gpu", r"cannot read the time 'a", id="unreadable-time"),
    ],
)
def test_a_partition_that_cannot_be_read(slurm_says: SlurmSays, table: str, name: str | None, message: str) -> None:
    slurm_says({"scontrol partition": answers(table)})
    with pytest.raises(SlurmError, match=message):
        slurm.partition_limits(name)


@pytest.mark.parametrize(
    ("text", "minutes"), [("00:00:59", 0), ("02:00:00", 120), ("1-00:00:00", 1440), ("365-00:00:00", 525_600), ("INFINITE", None)]
)
def test_times_as_slurm_prints_them(text: str, minutes: int | None) -> None:
    assert slurm.parse_minutes(text) == minutes


@pytest.mark.usefixtures("as_root")
def test_an_association_for_the_partition_goes_before_the_general_one(slurm_says: SlurmSays) -> None:
    slurm_says(_records(own="lab|root|||200||normal\nlab|root|main||70||normal\n"))
    assert slurm.read_limits(partition="main").max_submit_jobs == 70
    assert slurm.read_limits(partition="limited", qos="normal").max_submit_jobs == 50
    assert slurm.read_limits().max_submit_jobs == 200


@pytest.mark.usefixtures("as_root")
def test_of_several_partitions_the_tightest_limit_binds(slurm_says: SlurmSays) -> None:
    slurm_says(_records(own="lab|root|||200||normal\nlab|root|main||70||normal\n"))
    assert slurm.read_limits(partition="limited,main", qos="normal").max_submit_jobs == 50


@pytest.mark.usefixtures("as_root")
def test_accounts_in_a_circle_end(slurm_says: SlurmSays) -> None:
    slurm_says(_records(accounts="lab|||lab||9|\n"))
    assert slurm.read_limits().max_submit_jobs == 9


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("changed", "note"),
    [
        pytest.param({"config": CONFIG.replace("/slurmdbd", "/none")}, "keeps no accounts", id="no-accounting"),
        pytest.param({"config": CONFIG.replace(",limits", "")}, "does not enforce limits", id="not-enforced"),
        pytest.param({"own": "lab|root|||||\n", "accounts": ""}, "no limit on submitted jobs is set", id="none-set"),
    ],
)
def test_no_limit_is_known(slurm_says: SlurmSays, changed: dict[str, str], note: str) -> None:
    slurm_says(_records(**changed))
    limits = slurm.read_limits()
    assert limits.max_submit_jobs is None
    assert [note in text for text in limits.notes] == [True]


@pytest.mark.usefixtures("as_root")
def test_a_silent_database_leaves_the_limit_unknown_and_a_silent_controller_raises(slurm_says: SlurmSays) -> None:
    slurm_says(_records() | {"sacctmgr withassoc": answers(err="sacctmgr: error: Sending PersistInit msg: Connection refused\n", code=1)})
    limits = slurm.read_limits()
    assert limits.max_submit_jobs is None
    assert "Connection refused" in limits.notes[0]
    slurm_says({"scontrol": answers(err="slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)\n", code=1)})
    with pytest.raises(SlurmUnavailable):
        slurm.read_limits()


def test_an_answer_without_the_limits_is_not_guessed_at(slurm_says: SlurmSays) -> None:
    slurm_says({"scontrol": answers("ClusterName = x\n")})
    with pytest.raises(SlurmError, match="MaxArraySize, MaxJobCount"):
        slurm.read_limits()


# -- the boundary itself ----------------------------------------------------------------------------


def _install(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_available_looks_for_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.available()
    _install(tmp_path, "sbatch", "true")
    assert slurm.available()


def test_a_missing_command_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmUnavailable, match="'squeue' is not on PATH"):
        slurm.queue()


def test_a_command_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "squeue", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "TIMEOUT_SECONDS", 0.1)
    with pytest.raises(SlurmUnavailable, match=r"no answer in 0\.1 s"):
        slurm.queue()


def test_variables_that_would_bend_an_answer_are_not_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "squeue", f"env > {tmp_path}/seen")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SQUEUE_PARTITION", "debug")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/other.conf")
    slurm.queue()
    seen = (tmp_path / "seen").read_text().splitlines()
    assert "SLURM_CONF=/etc/slurm/other.conf" in seen
    assert "SLURM_BITSTR_LEN=0" in seen
    assert not [line for line in seen if line.startswith("SQUEUE_")]


def test_the_module_imports_nothing_heavy() -> None:
    code = "import sys, quantsweep.slurm; print(sorted({'torch', 'hydra', 'pandas', 'submitit', 'omegaconf'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_node_without_scontrol_changes_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an exception in the middle of a worker's end: what is left is submitted anew by whoever can."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert not slurm.requeue("7_0")
    assert not slurm.set_dependency("7", "afterany:6")
    assert not slurm.exclude_nodes(["7"], ["n1"])
    with pytest.raises(slurm.CommandMissing):
        slurm.queue()


def test_a_user_without_an_entry_in_passwd_goes_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers: Slurm shows the number too."""
    monkeypatch.setattr("os.getuid", lambda: 987_654_321)
    assert slurm.user_name() == "987654321"
