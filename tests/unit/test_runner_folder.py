"""The run folder: locking, recovery and refusal to mix runs."""

import json
import multiprocessing
import os
import signal

import pytest

from adaskip.locks import LockedError, exclusive
from adaskip.runs.folder import FolderError, RunFolder

IDS = ["a", "b", "c", "d", "e"]


def record(name):
    return {"id": name, "prediction": f"antwoord {name} ü"}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "llama-EE-PREFILL" / "8-sublayers")


def written(folder, content: bytes):
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.records_path("trec").write_bytes(content)
    return folder


def lines(*names) -> bytes:
    return b"".join(json.dumps(record(name)).encode() + b"\n" for name in names)


@pytest.mark.parametrize(
    ("content", "batch_size", "done"),
    [
        (b"", 1, 0),
        (lines("a", "b"), 1, 2),
        (lines("a", "b") + b'{"id": "c", "predic', 1, 2),  # torn line
        (lines("a", "b")[:-1], 1, 1),  # whole JSON but no newline is torn, too
        (lines("a", "b") + b"\0\0\0", 1, 2),  # what a power cut may leave
        (b'{"id"', 1, 0),
        (lines("a", "b", "c"), 2, 2),  # half a batch
        (lines("a"), 2, 0),
        (lines(*IDS), 2, 5),  # the last batch is a short one
        (lines(*IDS[:4]) + b'{"id": "e"', 2, 4),
    ],
)
def test_recovery_keeps_whole_batches_and_cuts_the_rest(folder, content, batch_size, done):
    written(folder, content)
    assert folder.recover("trec", IDS, batch_size) == done
    assert folder.records_path("trec").read_bytes() == lines(*IDS[:done])
    assert folder.recover("trec", IDS, batch_size) == done


def test_recovery_of_nothing_writes_nothing(folder):
    assert folder.recover("trec", IDS, 1) == 0
    assert not folder.records_path("trec").exists()


def test_append_after_recovery_equals_uninterrupted_writing(folder):
    written(folder, b"")
    for name in IDS:
        folder.append("trec", [record(name)])
    whole = folder.records_path("trec").read_bytes()
    for cut in range(0, len(whole), 3):
        written(folder, whole[:cut])
        for name in IDS[folder.recover("trec", IDS, 1) :]:
            folder.append("trec", [record(name)])
        assert folder.records_path("trec").read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines("a") + b"garbage\n" + lines("c"), "line 2 of .* is no record"),
        (b"[]\n", "line 1 of .* is no record"),
        (lines("a", "x"), "line 2 of .* is sample 'x', expected 'b'"),
        (lines(*IDS, "f"), "line 6 of .* expected the end after 5 records"),
        (lines("a", "a"), "is sample 'a', expected 'b'"),
    ],
)
def test_foreign_lines_are_refused_and_left_alone(folder, content, message):
    written(folder, content)
    with pytest.raises(FolderError, match=message):
        folder.recover("trec", IDS, 1)
    assert folder.records_path("trec").read_bytes() == content


def test_manifest_is_started_once_and_finished_once(folder):
    folder.start({"seed": 0, "versions": {"torch": "1"}})
    started = folder.read_manifest()
    assert started["finished"] is None
    assert started["resumed"] == []
    folder.start({"seed": 0, "versions": {"torch": "1"}, "git_commit": "abc"})
    assert folder.read_manifest()["started"] == started["started"]
    assert [entry["git_commit"] for entry in folder.read_manifest()["resumed"]] == ["abc"]
    folder.finish()
    finished = folder.read_manifest()
    assert finished["finished"]
    folder.start({"seed": 0})
    folder.finish()
    assert folder.read_manifest() == finished


def test_another_configuration_is_refused_with_the_fields_that_differ(folder):
    folder.start({"seed": 0, "limit": 5, "batch_size": 1})
    with pytest.raises(FolderError, match=r"limit was 5, is 6; batch_size was 1, is 4\)"):
        folder.check({"seed": 0, "limit": 6, "batch_size": 4})


def test_places_may_change_but_versions_only_after_the_end(folder):
    folder.start({"seed": 0, "versions": {"torch": "1"}, "git_commit": "a", "profile": "x", "threads": 1})
    folder.check({"seed": 0, "versions": {"torch": "1"}, "git_commit": "b", "profile": "y", "threads": 4})
    with pytest.raises(FolderError, match="versions was"):
        folder.check({"seed": 0, "versions": {"torch": "2"}})
    folder.finish()
    folder.check({"seed": 0, "versions": {"torch": "2"}})


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_manifest_is_one_line(folder, content):
    folder.path.mkdir(parents=True)
    (folder.path / "manifest.json").write_text(content)
    with pytest.raises(FolderError, match=r"delete .* to start again"):
        folder.read_manifest()


def hold(path, connection):
    with exclusive(path):
        connection.send("held")
        connection.recv()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock `tmp_path / 'lock'`."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "lock", theirs))
    process.start()
    assert ours.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_a_held_lock_is_refused_with_the_holders_pid(tmp_path, holder):
    with pytest.raises(LockedError, match=rf"is in use by process {holder.pid} on "), exclusive(tmp_path / "lock"):
        pass


def test_a_lock_dies_with_its_process(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / "lock").exists()
    with exclusive(tmp_path / "lock"):
        pass


def test_a_released_lock_leaves_no_file_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        with exclusive(tmp_path / "lock"), pytest.raises(LockedError), exclusive(tmp_path / "lock"):
            pass
        assert not (tmp_path / "lock").exists()


def count_up(path, times):
    for _ in range(times):
        with exclusive(path / "lock", wait=True):
            number = int((path / "number").read_text())
            (path / "number").write_text(str(number + 1))


def test_waiting_processes_take_turns(tmp_path):
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_up, args=(tmp_path, 50)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "number").read_text() == "200"
