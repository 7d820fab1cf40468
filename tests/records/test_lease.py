"""Leases between processes of this machine, and what looks like another one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Timer

import pytest
from PIL import Image

from nemo_bench.errors import UnwritableError
from nemo_bench.records import lease
from nemo_bench.records.io import read_file, write_json
from nemo_bench.records.lease import Leases, is_dead, read_lease
from nemo_bench.records.schema import Lease, Progress
from nemo_bench.records.store import Store
from owned_writes import watch_writes


def start(code: str) -> subprocess.Popen[str]:
    words = "from pathlib import Path; from nemo_bench.records.lease import Leases; leases = Leases(); "
    return subprocess.Popen([sys.executable, "-c", words + code], stdout=subprocess.PIPE, text=True)


def test_a_folder_that_is_held_is_refused_until_it_is_given_back(tmp_path: Path) -> None:
    first, second = Leases(), Leases()
    assert first.claim(tmp_path / "cell")
    assert not second.claim(tmp_path / "cell")
    owner = read_lease(tmp_path / "cell")
    assert owner is not None
    assert not is_dead(owner)
    first.release(tmp_path / "cell")
    assert read_lease(tmp_path / "cell") is None
    assert second.claim(tmp_path / "cell")
    second.release_all()
    assert list((tmp_path / "cell").iterdir()) == []


def test_a_folder_of_a_process_that_was_killed_is_taken_at_once(tmp_path: Path) -> None:
    process = start(f"print(leases.claim(Path({str(tmp_path)!r})), flush=True); import time; time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    leases = Leases()
    assert not leases.claim(tmp_path)
    process.kill()
    process.wait()
    owner = read_lease(tmp_path)
    assert owner is not None
    assert is_dead(owner)
    assert leases.claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lease.1.json"]
    leases.release_all()


def test_of_many_processes_one_gets_a_folder(tmp_path: Path) -> None:
    for number in range(2):  # a folder that nobody had, and one of a dead owner
        processes = [
            start(f"print(leases.claim(Path({str(tmp_path)!r})), flush=True); import time; time.sleep(60)")
            for _ in range(3)
        ]
        assert sorted(process.stdout.readline() for process in processes if process.stdout) == [
            "False\n", "False\n", "True\n"
        ], number  # fmt: skip
        for process in processes:
            process.kill()
            process.wait()


def test_an_owner_on_another_machine_is_dead_once_it_gives_no_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Leases()
    assert away.claim(tmp_path)
    file = tmp_path / ".lease.0.json"
    elsewhere = read_file(file, Lease).model_copy(update={"place": "another machine"})
    write_json(file, elsewhere)
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    leases = Leases(patience=60)
    assert not leases.claim(tmp_path)
    now[0] += 50
    write_json(file, elsewhere.model_copy(update={"beat": 1}))  # a sign of life
    assert not leases.claim(tmp_path)
    now[0] += 59
    assert not leases.claim(tmp_path)
    now[0] += 2
    assert leases.claim(tmp_path)
    away.release_all()
    leases.release_all()


def test_a_lease_that_is_being_written_counts_as_held(tmp_path: Path) -> None:
    (tmp_path / ".lease.3.json").touch()
    assert not Leases().claim(tmp_path)
    assert read_lease(tmp_path) is None


def test_a_full_disk_leaves_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fill)
        with pytest.raises(UnwritableError, match="free space on its disk"):
            Leases().claim(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with Leases().owning(tmp_path):
        pass


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableError, match=r"file/run can't be written"):
        Leases().claim(tmp_path / "file" / "run")


def test_files_are_those_of_an_owner_in_its_own_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, others = watch_writes(monkeypatch, tmp_path)
    with Leases().owning(tmp_path):
        write_json(tmp_path / "own.json", {})
    write_json(tmp_path / "of_nobody.json", {})
    process = start(f"print(leases.claim(Path({str(tmp_path)!r})), flush=True); import time; time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    Store(tmp_path).save_image("of_another.png", Image.new("RGB", (1, 1)))
    process.kill()
    process.wait()
    assert (held, others) == ({"own.json"}, {"of_nobody.json", "of_another.png"})


def test_who_waits_for_a_folder_says_for_whom_once_and_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(lease, "POLL", 0.01)
    first, second = Leases(), Leases()
    assert first.claim(tmp_path)
    Timer(0.2, first.release, [tmp_path]).start()
    with suppress(KeyboardInterrupt), second.owning(tmp_path):
        assert not Leases().claim(tmp_path)
        raise KeyboardInterrupt
    assert read_lease(tmp_path) is None
    (line,) = said
    assert line.startswith(f"{tmp_path}: process {os.getpid()} on ")
    assert line.endswith("; waiting")


def test_signs_of_life_tell_how_far_the_work_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.01)
    leases = Leases()
    assert leases.claim(tmp_path)
    progress = Progress(stage="generate", label="none", done=3, total=9, seconds=2.0, computed=1)
    leases.note(progress)
    while True:
        owner = read_lease(tmp_path)
        assert owner is not None
        if owner.beat > 1:
            break
    assert owner.progress == progress
    assert (progress.rate, progress.left) == (0.5, 12.0)
    leases.release_all()
