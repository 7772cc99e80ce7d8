"""The run folder: locking, recovery and refusal to mix runs."""

import json
import multiprocessing
import os
import signal

import pytest

from adaskip.common.locks import LockedError, exclusive
from adaskip.runs import folder as runs_folder
from adaskip.runs.folder import FolderError, RunFolder, check_alike

IDS = ["a", "b", "c", "d", "e"]
ORDER = ["d", "a", "e", "c", "b"]


def record(name, **times):
    return {"id": name, "prediction": f"antwoord {name} ü", **times}


def timed(name):
    return record(name, ttft_s=0.1 + ord(name), tpot_ms=None)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "llama-EE-PREFILL" / "8-sublayers")


def part(folder, name, content: bytes):
    path = folder.path / "parts" / f"trec.{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def lines(*names, make=record) -> bytes:
    return b"".join(json.dumps(make(name), ensure_ascii=False).encode() + b"\n" for name in names)


def merged(folder) -> bytes:
    path = folder.records_path("trec")
    return path.read_bytes() if path.exists() else b""


def times(folder) -> list[dict]:
    return [json.loads(line) for line in folder.times_path("trec").read_text().splitlines()]


@pytest.mark.parametrize("where", ["part", "merged"])
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
def test_merging_keeps_whole_batches_and_leaves_out_the_rest(folder, content, batch_size, done, where):
    part(folder, "0", content)
    if where == "merged":
        (folder.path / "parts" / "trec.0.jsonl").rename(folder.records_path("trec"))
    missing = list(range(0, len(IDS), batch_size))[-(-done // batch_size) :]
    for _ in range(2):
        assert folder.merge("trec", IDS, batch_size) == missing
        assert merged(folder) == lines(*IDS[:done])
        assert folder.part_paths("trec") == []


def test_merging_nothing_writes_nothing(folder):
    assert folder.merge("trec", IDS, 2) == [0, 2, 4]
    assert not folder.path.exists()


def test_parts_are_merged_in_the_order_of_the_samples_and_their_times_apart(folder):
    part(folder, "0-here-7", lines("e", make=timed))
    part(folder, "1-there-7", lines("c", "d", make=timed))
    assert folder.merge("trec", IDS, 2) == [0]
    assert merged(folder) == lines("c", "d", "e")
    part(folder, "1-there-8", lines("a", "b", make=timed))
    assert folder.merge("trec", IDS, 2) == []
    assert merged(folder) == lines(*IDS)
    assert times(folder) == [{"id": name, "ttft_s": timed(name)["ttft_s"], "tpot_ms": None} for name in IDS]


def test_parts_stay_until_both_merged_files_are_whole(folder, monkeypatch):
    """A kill after any write, then the merge anew: nothing is lost and nothing doubled."""
    for kill_at in (1, 2):
        part(folder, "0", lines("a", "b", make=timed))
        part(folder, "1", lines("c", "d", "e", make=timed))
        writes, write = [], runs_folder.write_bytes_atomic

        def killed(path, data, writes=writes, write=write, kill_at=kill_at):
            writes.append(path)
            if len(writes) == kill_at:
                raise KeyboardInterrupt
            write(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(runs_folder, "write_bytes_atomic", killed)
            with pytest.raises(KeyboardInterrupt):
                folder.merge("trec", IDS, 1)
        assert len(folder.part_paths("trec")) == 2
        assert folder.merge("trec", IDS, 1) == []
        assert merged(folder) == lines(*IDS)
        assert [line["id"] for line in times(folder)] == IDS
        folder.records_path("trec").unlink()
        folder.times_path("trec").unlink()


def test_a_sample_that_is_made_again_has_its_new_times(folder):
    part(folder, "0", lines(*IDS, make=timed))
    folder.merge("trec", IDS, 1)
    folder.records_path("trec").write_bytes(lines(*IDS[:4]))
    part(folder, "0", lines("e", make=lambda name: record(name, ttft_s=9.0, tpot_ms=9.0)))
    assert folder.merge("trec", IDS, 1) == []
    assert json.loads(folder.times_path("trec").read_text().splitlines()[4]) == {
        "id": "e",
        "ttft_s": 9.0,
        "tpot_ms": 9.0,
    }


def test_appending_in_any_order_after_any_cut_equals_uninterrupted_writing(folder):
    for name in ORDER:
        folder.append("trec", [record(name)], rank=ord(name) % 2)
    assert len(folder.part_paths("trec")) == 2
    folder.merge("trec", IDS, 1)
    whole = merged(folder)
    for cut in range(0, len(whole), 3):
        folder.records_path("trec").write_bytes(whole[:cut])
        for start in folder.merge("trec", IDS, 1):
            folder.append("trec", [record(IDS[start])])
        folder.merge("trec", IDS, 1)
        assert merged(folder) == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines("a") + b"garbage\n" + lines("c"), "line 2 of .* is not a record"),
        (b"[]\n", "line 1 of .* is not a record"),
        (lines("a", "x"), "line 2 of .* is of sample 'x', which the data does not contain"),
    ],
)
def test_foreign_lines_are_refused_and_left_alone(folder, content, message):
    part(folder, "0", content)
    with pytest.raises(FolderError, match=message):
        folder.merge("trec", IDS, 1)
    assert folder.part_paths("trec")[0].read_bytes() == content


def test_samples_that_share_an_id_are_refused(folder):
    with pytest.raises(FolderError, match=r"5 samples of .* have only 4 different ids"):
        folder.merge("trec", [*IDS[:4], "a"], 1)


def test_processes_that_would_run_different_things_are_refused():
    manifest = {"weights_fingerprint": "x", "device_name": "A100"}
    check_alike([manifest, {**manifest, "device_name": "H100"}])
    with pytest.raises(FolderError, match=r"process 1 .* \(weights_fingerprint was \"x\", is \"y\"\)"):
        check_alike([manifest, {**manifest, "weights_fingerprint": "y"}])


def test_manifest_is_started_once_and_finished_once(folder):
    folder.start({"seed": 0, "versions": {"torch": "1"}})
    started = folder.read_manifest()
    assert started["finished"] is None
    assert started["resumed"] == []
    folder.start({"seed": 0, "versions": {"torch": "1"}, "git_commit": "abc"})
    assert folder.read_manifest()["started"] == started["started"]
    assert [entry["git_commit"] for entry in folder.read_manifest()["resumed"]] == ["abc"]
    folder.finish()
    assert folder.read_manifest()["finished"]


def test_a_finished_run_that_starts_again_lacks_records_and_is_repaired_with_its_own_versions(folder):
    described = {"seed": 0, "versions": {"torch": "1"}}
    folder.start(described)
    folder.finish()
    folder.check({**described, "versions": {"torch": "2"}})  # it may be read with other versions
    with pytest.raises(FolderError, match="versions was"):
        folder.start({**described, "versions": {"torch": "2"}})
    assert folder.read_manifest()["finished"]
    folder.start({**described, "git_commit": "abc"})
    assert folder.read_manifest()["finished"] is None
    assert [entry["git_commit"] for entry in folder.read_manifest()["resumed"]] == ["abc"]


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
