"""The progress of a search on disk: torn lines, a full disk, two processes; whole-file writes that are killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from adaskip.calibration import progress
from adaskip.calibration.progress import Progress, held
from adaskip.calibration.select import select
from adaskip.common.files import remove_torn, write_text_atomic
from adaskip.common.locks import LockedError
from adaskip.core.plan import Sublayer
from tests.families import random_model, random_prompts

SETS = [frozenset({Sublayer("ffn", layer)}) for layer in range(4)]
IDENTITY = {"phase": "decode"}


def values(path: Path, value: float, identity=IDENTITY) -> list[float]:
    """What a search finds that would measure `value` everywhere."""
    measure = Progress(lambda chosen, prompt: value, path, identity)
    return [measure(chosen, [0])[0] for chosen in SETS]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_end_costs_the_torn_line_only(tmp_path, cut):
    path = tmp_path / "partial.jsonl"
    assert values(path, 1.0) == [1.0] * 4
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    last = 1.0 if cut == 1 else 2.0  # without its newline a line is still whole
    assert values(path, 2.0) == [1.0] * 3 + [last]
    assert values(path, 3.0) == [1.0] * 3 + [last]


@pytest.mark.parametrize("length", range(0, 30, 5))
def test_a_torn_first_line_is_begun_again(tmp_path, length):
    path = tmp_path / "partial.jsonl"
    values(path, 1.0)
    path.write_bytes(path.read_bytes()[:length])
    assert values(path, 2.0) == [2.0] * 4
    assert values(path, 3.0) == [2.0] * 4


@pytest.mark.parametrize("damage", ["", "{", "null", "[]", '{"set": 1}', '{"set": [["ffn", 9]]}', "\x00\x00", "\ufffd"])
def test_a_damaged_line_in_the_middle_is_measured_again(tmp_path, damage):
    path = tmp_path / "partial.jsonl"
    values(path, 1.0)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], damage, *lines[3:]]) + "\n")
    assert values(path, 2.0) == [1.0, 2.0, 1.0, 1.0]


def test_bytes_that_are_no_text_are_passed_over(tmp_path):
    path = tmp_path / "partial.jsonl"
    values(path, 1.0)
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
    assert values(path, 2.0) == [1.0] * 4


def test_searches_that_share_a_file_keep_each_others_measurements(tmp_path):
    path = tmp_path / "partial.jsonl"
    values(path, 1.0)
    assert values(path, 2.0, {"phase": "prefill"}) == [2.0] * 4
    assert values(path, 3.0) == [1.0] * 4
    assert values(path, 4.0, {"phase": "prefill"}) == [2.0] * 4


def test_a_disk_that_is_full_in_the_middle_of_a_line_loses_that_line_only(tmp_path, monkeypatch):
    path = tmp_path / "partial.jsonl"
    append, written = progress._append, []

    def full(to, line):
        written.append(line)
        if len(written) == 4:
            with to.open("a") as file:
                file.write(line[: len(line) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(to, line)

    with monkeypatch.context() as patched:
        patched.setattr(progress, "_append", full)
        with pytest.raises(OSError, match="No space left"):
            values(path, 1.0)
    assert values(path, 2.0) == [1.0, 1.0, 2.0, 2.0]


def _hold(path: Path, ready, done) -> None:
    with held(path):
        ready.set()
        done.wait(60)


def test_a_second_process_is_refused_before_it_computes_anything(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "partial.jsonl"
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(path, ready, done))
    holder.start()
    try:
        assert ready.wait(60)
        model = random_model("llama")
        monkeypatch.setattr(torch.nn.Module, "__call__", lambda *args, **options: pytest.fail("ran the model"))
        with pytest.raises(LockedError, match=f"{path} is in use by process {holder.pid} on "):
            select(
                *(model, random_prompts([9, 8]), "decode"),
                **{"up_to": 1, "eos_token_ids": [2], "pad_token_id": 0, "progress_path": path},
            )
    finally:
        done.set()
        holder.join()
    with held(path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_is_on_disk_with_its_name_before_the_write_returns(tmp_path, monkeypatch):
    """Content first, then the name, then the folder that holds the name."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(Path(f"/proc/self/fd/{fd}").resolve().name) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("renamed") or replace(a, b))
    write_text_atomic(tmp_path / "profile.json", "{}")
    temporary, renamed, folder = done
    assert temporary.startswith(".profile.json.")
    assert (renamed, folder) == ("renamed", tmp_path.name)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_text_atomic(tmp_path / "profile.json", "old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for target in (path, tmp_path / "new" / "folders" / "profile.json"):
        with pytest.raises(OSError, match=f"No space left on device: '{target}'"):
            write_text_atomic(target, "new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("profile.json", "old")]


def test_what_killed_writers_left_is_removed_for_that_file_only(tmp_path):
    kept = [".a.json.b.x1234567.tmp", ".a.json.lock", ".b.json.x1234567.tmp", "a.json"]
    for name in (".a.json.x1234567.tmp", ".a.json._234567x.tmp", *kept):
        (tmp_path / name).write_text("")
    remove_torn(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
