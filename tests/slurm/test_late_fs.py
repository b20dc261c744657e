"""The late file system is late where a network file system is, and a plain file system everywhere else."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantsweep.storage import files
from tests.slurm.cluster import Cluster
from tests.slurm.late_fs import LateMount
from tests.slurm.scenarios import fill, late_hosts, small_file_system, use_up_inodes

pytestmark = pytest.mark.slurm
DELAY = 2.0
SLACK = 1.5
"""Seconds that a busy machine may be late in noticing."""


@dataclass(frozen=True)
class Hosts:
    """Two hosts' views of one folder, and the truth."""

    a: Path
    b: Path
    truth: Path


@pytest.fixture
def hosts(can_mount: None, tmp_path: Path) -> Iterator[Hosts]:
    found = Hosts(tmp_path / "a", tmp_path / "b", tmp_path / "truth")
    for folder in (found.a, found.b, found.truth):
        folder.mkdir()
    with LateMount(backing=found.truth, mount_point=found.a, delay=DELAY), LateMount(backing=found.truth, mount_point=found.b, delay=DELAY):
        yield found


def seconds_until(condition: Callable[[], bool]) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + DELAY + SLACK, "it took longer than any memory lasts"
        time.sleep(0.02)
    return time.monotonic() - started


# -- late -------------------------------------------------------------------------------------------------


def test_a_remembered_absence_hides_a_new_file_from_the_other_host_only(hosts: Hosts) -> None:
    assert not (hosts.b / "new").exists()
    assert not list(hosts.b.iterdir())
    (hosts.a / "new").write_text("x")
    assert (hosts.a / "new").read_text() == "x"
    assert [path.name for path in hosts.a.iterdir()] == ["new"]
    assert not (hosts.b / "new").exists()
    with pytest.raises(FileNotFoundError):
        (hosts.b / "new").open()
    assert list(hosts.b.iterdir()) == []
    assert seconds_until((hosts.b / "new").exists) > DELAY / 2
    assert (hosts.b / "new").read_text() == "x"
    assert seconds_until(lambda: bool(list(hosts.b.iterdir()))) < SLACK


def test_what_was_never_asked_is_seen_at_once(hosts: Hosts) -> None:
    (hosts.a / "new").write_text("x")
    assert (hosts.b / "new").read_text() == "x"


@pytest.mark.parametrize("change", ["create", "rename", "unlink", "link", "mkdir"])
def test_a_change_of_ones_own_in_a_folder_ends_all_memory_of_it(hosts: Hosts, change: str) -> None:
    (hosts.a / "own").touch()
    assert (hosts.b / "own").exists()
    assert not (hosts.b / "new").exists()
    assert [path.name for path in hosts.b.iterdir()] == ["own"]
    (hosts.a / "new").touch()
    assert not (hosts.b / "new").exists()
    if change == "create":
        files.filesystem_now(hosts.b)
    elif change == "rename":
        (hosts.b / "own").rename(hosts.b / "mine")
    elif change == "unlink":
        (hosts.b / "own").unlink()
    elif change == "link":
        os.link(hosts.b / "own", hosts.b / "mine")
    else:
        (hosts.b / "mine").mkdir()
    assert (hosts.b / "new").exists()
    assert "new" in [path.name for path in hosts.b.iterdir()]


def test_a_change_in_another_folder_does_not(hosts: Hosts) -> None:
    (hosts.a / "other").mkdir()
    assert not (hosts.b / "new").exists()
    (hosts.a / "new").touch()
    (hosts.b / "other" / "mine").touch()
    assert not (hosts.b / "new").exists()


def test_attributes_are_late_and_open_is_not(hosts: Hosts) -> None:
    (hosts.a / "file").write_text("short")
    assert (hosts.b / "file").stat().st_size == 5
    (hosts.a / "file").write_text("much longer")
    assert (hosts.b / "file").stat().st_size == 5
    assert (hosts.b / "file").read_text() == "much longer"
    assert (hosts.b / "file").stat().st_size == 11


def test_a_deleted_file_is_still_there_and_cannot_be_opened(hosts: Hosts) -> None:
    (hosts.a / "file").touch()
    assert (hosts.b / "file").exists()
    (hosts.a / "file").unlink()
    assert (hosts.b / "file").exists()
    with pytest.raises(FileNotFoundError):
        (hosts.b / "file").open()
    assert not (hosts.b / "file").exists()


def test_open_finds_the_file_that_has_the_name_now_and_an_open_one_stays_what_it_was(hosts: Hosts) -> None:
    files.write_text(hosts.a / "file", "old")
    assert (hosts.b / "file").stat().st_size == 3
    with (hosts.b / "file").open() as still_open:
        files.write_text(hosts.a / "file", "new and longer")
        assert (hosts.b / "file").read_text() == "new and longer"
        assert os.fstat(still_open.fileno()).st_size == 3
        assert still_open.read() == "old"


def test_what_the_server_decides_is_exact(hosts: Hosts) -> None:
    """O_EXCL, link and mkdir fail on what another host has made, also where it is remembered as absent."""
    for name in ("file", "link", "folder"):
        assert not (hosts.b / name).exists()
    (hosts.b / "mine").touch()
    for name in ("file", "link"):
        assert not (hosts.b / name).exists()
        (hosts.a / name).touch()
    (hosts.a / "folder").mkdir()
    with pytest.raises(FileExistsError):
        (hosts.b / "file").open("x")
    with pytest.raises(FileExistsError):
        os.link(hosts.b / "mine", hosts.b / "link")
    (hosts.b / "folder").mkdir(exist_ok=True)
    os.link(hosts.b / "mine", hosts.b / "second")
    assert (hosts.b / "mine").stat().st_nlink == 2
    assert all((hosts.b / name).exists() for name in ("file", "link", "folder"))


# -- and otherwise a file system --------------------------------------------------------------------------


def test_parquet_is_written_and_read_mapped_or_not(hosts: Hosts) -> None:
    table = pa.table({"number": list(range(50_000)), "text": ["some text"] * 50_000})
    files.write_table(hosts.a / "table.parquet", table)
    assert pq.read_table(hosts.b / "table.parquet", memory_map=True).equals(table)
    assert pq.read_table(hosts.a / "table.parquet").equals(table)
    assert [path.name for path in hosts.truth.iterdir()] == ["table.parquet"]


def test_the_calls_of_a_file_system(hosts: Hosts) -> None:
    path = hosts.a / "file"
    path.write_bytes(b"0123456789" * 30_000)
    os.truncate(path, 12)
    path.chmod(0o640)
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    status, true = path.stat(), (hosts.truth / "file").stat()
    assert (status.st_size, status.st_mode & 0o777, status.st_atime_ns, status.st_mtime_ns) == (12, 0o640, 1_000_000_001, 2_000_000_002)
    assert (status.st_ino, status.st_nlink, status.st_uid, status.st_ctime_ns) == (true.st_ino, 1, true.st_uid, true.st_ctime_ns)
    with path.open("r+b") as file:
        file.seek(3)
        file.write(b"abc")
        path.unlink()
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        assert (file.read(), os.fstat(file.fileno()).st_size) == (b"012abc678901", 12)
    (hosts.a / "link").symlink_to("target")
    assert os.readlink(hosts.a / "link") == "target"
    (hosts.a / "folder").mkdir()
    (hosts.a / "folder" / "x").touch()
    with pytest.raises(OSError, match="not empty"):
        (hosts.a / "folder").rmdir()
    assert os.statvfs(hosts.a).f_blocks == os.statvfs(hosts.truth).f_blocks
    names = {f"many-{number:04d}" for number in range(1_000)}
    for name in names:
        (hosts.a / "folder" / name).touch()
    assert {entry.name for entry in os.scandir(hosts.a / "folder") if entry.is_file()} == names | {"x"}


def test_umask_and_mode_are_the_callers(hosts: Hosts) -> None:
    descriptor = os.open(hosts.a / "secret", os.O_CREAT | os.O_WRONLY, 0o600)
    os.close(descriptor)
    assert (hosts.truth / "secret").stat().st_mode & 0o777 == 0o600


def test_two_writers_append_to_one_log(hosts: Hosts) -> None:
    """Slurm appends to a requeued job's log, and a worker beside its child."""
    with (hosts.a / "log").open("ab", buffering=0) as first, (hosts.a / "log").open("ab", buffering=0) as second:
        for number in range(50):
            (first, second)[number % 2].write(f"{number}\n".encode())
    assert (hosts.b / "log").read_text().split() == [str(number) for number in range(50)]


def test_locks_are_local_to_a_host(hosts: Hosts) -> None:
    with (hosts.a / "lock").open("w") as here, (hosts.b / "lock").open("w") as there, (hosts.a / "lock").open("w") as again:
        fcntl.flock(here, fcntl.LOCK_EX)
        fcntl.flock(there, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_full_disk_is_told(can_mount: None, tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    with (
        small_file_system(tmp_path / "disk", megabytes=2) as disk,
        LateMount(backing=disk, mount_point=tmp_path / "mount"),
    ):
        ballast = fill(disk)
        with pytest.raises(OSError, match="No space left"):
            files.write_text(tmp_path / "mount" / "file", "x" * 10_000)
        assert [path.name for path in disk.iterdir()] == [".ballast"]
        ballast.unlink()
        files.write_text(tmp_path / "mount" / "file", "x" * 10_000)


def test_a_disk_without_inodes_is_told(can_mount: None, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", inodes=20) as disk:
        use_up_inodes(disk, leave=1)
        (disk / "last").touch()
        with pytest.raises(OSError, match="No space left"):
            files.write_text(disk / "file", "x")
    assert list((tmp_path / "disk").iterdir()) == []


def test_readers_see_whole_files_while_both_hosts_replace_them(hosts: Hosts) -> None:
    """Six threads, two hosts, one name: whatever is read is one writer's table, whole.

    (`pq.read_table(path)` would not do: it opens the path twice, and mixes two tables on any file system.)
    """
    path = "table.parquet"
    files.write_table(hosts.a / path, pa.table({"value": [0] * 1_000}))
    stop = threading.Event()

    def write(folder: Path, number: int) -> int:
        written = 0
        while not stop.is_set():
            files.write_table(folder / path, pa.table({"value": [number] * (1_000 * number)}))
            written += 1
        return written

    def read(folder: Path) -> int:
        whole = 0
        while not stop.is_set():
            try:
                with (folder / path).open("rb") as file:
                    values = pq.read_table(file).column("value")
            except OSError as error:
                if error.errno != errno.ESTALE:  # replaced twice within one open
                    raise
                continue
            assert len(set(values.to_pylist())) == 1
            assert len(values) == 1_000 * (values[0].as_py() or 1)
            whole += 1
        return whole

    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(write, folder, number) for number, folder in enumerate((hosts.a, hosts.b, hosts.a), start=1)]
        readers = [pool.submit(read, folder) for folder in (hosts.a, hosts.b, hosts.b)]
        time.sleep(4)
        stop.set()
        assert all(task.result() > 0 for task in [*writers, *readers])


def test_only_one_of_many_processes_on_both_hosts_gets_a_name(hosts: Hosts) -> None:
    script = (
        "import os, sys\n"
        "for n in range(100):\n"
        "  try: os.close(os.open(f'{sys.argv[1]}/{n}', os.O_CREAT | os.O_EXCL)); print(n)\n"
        "  except FileExistsError: pass"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
        for folder in (hosts.a, hosts.b) * 2
    ]  # fmt: skip
    won = [number for process in started for number in process.communicate()[0].split()]
    assert sorted(won, key=int) == [str(number) for number in range(100)]


def test_it_ends_when_unmounted_or_when_its_parent_dies(can_mount: None, tmp_path: Path) -> None:
    for name in ("a", "b", "truth"):
        (tmp_path / name).mkdir()
    mount = LateMount(backing=tmp_path / "truth", mount_point=tmp_path / "a").start()
    subprocess.run(["umount", str(tmp_path / "a")], check=True)
    os.waitpid(mount.pid, 0)
    mount.stop()
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.slurm.late_fs import LateMount\n"
        "m = LateMount(backing=Path(sys.argv[1]), mount_point=Path(sys.argv[2])).start(); print(m.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "truth"), str(tmp_path / "b")], cwd=root, stdout=subprocess.PIPE, text=True
    )
    process = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 10
    while process.exists() and "(zombie)" not in (process / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not os.path.ismount(tmp_path / "b")


# -- on the cluster ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_node_is_another_host(can_mount: None, own_root: Path) -> None:
    """n0 shares the login side's view of the path, n1 has its own: it sees a file later than it was written."""
    watch = (
        "test -e {shared}/new && echo early; touch {logs}/$SLURMD_NODENAME.ready; "
        "until test -e {shared}/new; do sleep 0.05; done; date +%s.%N; cat {shared}/new; echo $SLURMD_NODENAME > {shared}/$SLURMD_NODENAME"
    )
    with (
        late_hosts(own_root, delay=4) as hosts,
        Cluster(root=own_root / "two", nodes=2, accounting=False, node_mounts=hosts.node_mounts("n1")) as cluster,
    ):
        script = watch.format(shared=hosts.shared, logs=hosts.logs)
        for node in ("n0", "n1"):
            cluster.submit(f"--nodelist={node}", f"--chdir={hosts.logs}", f"--output={hosts.logs}/{node}.log", script=script)
        cluster.wait_until(lambda: len(list(hosts.logs.glob("*.ready"))) == 2, "both nodes to have looked")
        (hosts.shared / "new").write_text("content\n")
        written = time.time()
        cluster.wait_until(lambda: not cluster.run(["squeue", "-h"]).stdout, "both jobs to end")
        said = {node: (hosts.logs / f"{node}.log").read_text().split() for node in ("n0", "n1")}
        assert all(words[1:] == ["content"] for words in said.values()), said
        late = {node: float(words[0]) - written for node, words in said.items()}
        assert late["n0"] < 1 < late["n1"] < 4 + SLACK, late
        assert sorted(path.name for path in hosts.backing.iterdir()) == ["n0", "n1", "new"]
        cluster.kill_node("n1")
        cluster.start_node("n1")
        again = hosts.logs / "again"
        cluster.submit(
            "--nodelist=n1",
            f"--chdir={hosts.logs}",
            f"--output={again}",
            script=f"stat -f -c %T {hosts.shared}; findmnt -n -o TARGET -T {hosts.shared} | tail -1",
        )
        cluster.wait_until(lambda: again.exists() and len(again.read_text().split()) == 2, "a job on the node that came back")
        assert again.read_text().split() == ["fuseblk", str(hosts.shared)]
