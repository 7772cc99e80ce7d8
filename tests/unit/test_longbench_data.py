"""Records from a folder, a zip and the Hub's archive: the same ones, and one clear line when something is wrong."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest

from adaskip.benchmarks import longbench_files
from adaskip.benchmarks.longbench import HUB, find_set, load_records
from adaskip.benchmarks.longbench_files import check_sha256, list_sets
from adaskip.benchmarks.protocol import BenchmarkError


def record(number: int, length: int = 5000, **changes) -> dict:
    return {
        "input": f"question {number}",
        "context": "text",
        "answers": ["answer"],
        "length": length,
        "dataset": "qasper",
        "language": "en",
        "all_classes": None,
        "_id": f"id{number}",
        **changes,
    }


def write_jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def write_zip(path: Path, sets: dict[str, list]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, records in sets.items():
            text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            archive.writestr(f"data/{name}.jsonl", text)
        archive.writestr("__MACOSX/data/._qasper_e.jsonl", b"\x00")
    return path


def failure(*arguments, **options) -> str:
    with pytest.raises(BenchmarkError) as caught:
        load_records(*arguments, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


RECORDS = [record(0, 3999), record(1, 4000), record(2, 4001), record(3, 9000, input="第三\u2028 {x}"), record(4, 5000)]


# What is read


@pytest.mark.parametrize("layout", ["folder", "folder/data", "folder/data.zip", "zip"])
def test_every_local_layout_gives_the_same_records(tmp_path, layout):
    if layout == "folder":
        write_jsonl(tmp_path / "qasper_e.jsonl", RECORDS)
    elif layout == "folder/data":
        write_jsonl(tmp_path / "data" / "qasper_e.jsonl", RECORDS)
    else:
        write_zip(tmp_path / "data.zip", {"qasper_e": RECORDS})
    source = tmp_path / "data.zip" if layout == "zip" else tmp_path
    assert list(load_records("qasper", source)) == RECORDS[2:]


def test_the_filter_is_more_than_min_length(tmp_path):
    write_jsonl(tmp_path / "qasper_e.jsonl", RECORDS)
    assert [r["length"] for r in load_records("qasper", tmp_path)] == [4001, 9000, 5000]
    assert list(load_records("qasper", tmp_path, min_length=None)) == RECORDS
    assert [r["_id"] for r in load_records("qasper", str(tmp_path), limit=2)] == ["id2", "id3"]


@pytest.mark.parametrize("layout", ["folder", "zip"])
def test_the_set_that_is_taken_has_a_name(tmp_path, layout):
    if layout == "folder":
        source = write_jsonl(tmp_path / "qasper_e.jsonl", RECORDS).parent
        write_jsonl(tmp_path / "qasper.jsonl", RECORDS)
    else:
        source = write_zip(tmp_path / "data.zip", {"qasper_e": RECORDS, "qasper": RECORDS})
    for task, extended, name in (
        ("qasper", None, "qasper_e"),
        ("qasper", False, "qasper"),
        ("qasper_e", False, "qasper_e"),
    ):
        assert find_set(task, source, extended).set_name == name


def test_the_extended_set_comes_first_and_a_fallback_is_announced(tmp_path, caplog):
    plain, extended = [record(1)], [record(2)]
    write_jsonl(tmp_path / "both" / "qasper.jsonl", plain)
    write_jsonl(tmp_path / "both" / "qasper_e.jsonl", extended)
    assert list(load_records("qasper", tmp_path / "both")) == extended
    assert list(load_records("qasper", tmp_path / "both", extended=False)) == plain
    assert list(load_records("qasper_e", tmp_path / "both")) == extended
    assert not caplog.records

    write_jsonl(tmp_path / "plain" / "qasper.jsonl", plain)
    assert list(load_records("qasper", tmp_path / "plain")) == plain
    assert "has no qasper_e.jsonl (LongBench-E); using qasper.jsonl" in caplog.text
    assert "has no qasper_e (.jsonl); it has: qasper" in failure("qasper", tmp_path / "plain", extended=True)
    assert "has no qasper_e (.jsonl)" in failure("qasper_e", tmp_path / "plain")


def test_a_task_without_an_extended_set_reads_the_plain_one(tmp_path, caplog):
    write_jsonl(tmp_path / "narrativeqa.jsonl", [record(1)])
    assert list(load_records("narrativeqa", tmp_path)) == [record(1)]
    assert not caplog.records
    assert "LongBench-E has no set of 'narrativeqa'" in failure("narrativeqa", tmp_path, extended=True)


def test_text_that_looks_like_a_date_stays_text(tmp_path):
    """A JSON reader that guesses types turns it into "2012-01-01 00:00:00"; that is why lines are parsed one by one."""
    dated = [record(1, input="2012-01-01", answers=["1969-07-20"])]
    write_jsonl(tmp_path / "qasper_e.jsonl", dated)
    assert list(load_records("qasper", tmp_path)) == dated


def test_blank_lines_a_byte_order_mark_and_a_missing_last_newline_are_harmless(tmp_path):
    text = "\ufeff" + json.dumps(record(1)) + "\r\n\n" + json.dumps(record(2))
    (tmp_path / "qasper_e.jsonl").write_bytes(text.encode("utf-8"))
    assert list(load_records("qasper", tmp_path)) == [record(1), record(2)]


def test_all_classes_may_be_left_out_where_no_metric_needs_it(tmp_path):
    bare = record(1)
    del bare["all_classes"]
    write_jsonl(tmp_path / "qasper_e.jsonl", [bare])
    assert load_records("qasper", tmp_path)[0]["all_classes"] is None


# What is refused


def test_a_source_that_is_not_there_or_holds_nothing(tmp_path):
    assert f"no LongBench data at {tmp_path}/none" in failure("qasper", tmp_path / "none")
    assert "contains no <task>.jsonl files" in failure("qasper", tmp_path)
    write_zip(tmp_path / "other.zip", {})
    assert "contains no .jsonl files" in failure("qasper", tmp_path / "other.zip")
    write_jsonl(tmp_path / "trec.jsonl", [])
    assert "has no qasper_e or qasper (.jsonl); it has: trec" in failure("qasper", tmp_path)


def test_a_file_that_is_no_zip(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK\x03\x04 cut off")
    assert "neither a folder nor a readable zip archive" in failure("qasper", tmp_path / "data.zip")


def test_a_damaged_zip_member(tmp_path):
    path = write_zip(tmp_path / "data.zip", {"qasper_e": [record(n, context=f"text {n * n}") for n in range(2000)]})
    data = bytearray(path.read_bytes())
    data[200:2000] = bytes(1800)
    path.write_bytes(data)
    assert "data.zip!data/qasper_e.jsonl" in failure("qasper", path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"input": "x"', "not valid JSON (Expecting ',' delimiter at column"),
        (b"not json", "not valid JSON"),
        (b'{"input": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "a record must be a JSON object, not list"),
    ],
)
def test_a_corrupt_line_is_named_with_file_and_number(tmp_path, line, says):
    good = json.dumps(record(1)).encode()
    (tmp_path / "qasper_e.jsonl").write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
    message = failure("qasper", tmp_path)
    assert message.startswith(f"{tmp_path}/qasper_e.jsonl:3: ")
    assert says in message


@pytest.mark.parametrize("name", ["input", "context", "answers", "length", "_id"])
def test_a_record_missing_a_field_is_named(tmp_path, name):
    broken = record(2)
    del broken[name]
    write_jsonl(tmp_path / "qasper_e.jsonl", [record(1), broken])
    assert f"qasper_e.jsonl:2: the record has no field '{name}'; it has: " in failure("qasper", tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"length": "5000"}, "'length' must be int, not str"),
        ({"length": True}, "'length' must be int, not bool"),
        ({"answers": "yes"}, "'answers' must be list, not str"),
        ({"answers": []}, "'answers' must be a list of at least one string"),
        ({"answers": [1]}, "'answers' must be a list of at least one string"),
        ({"context": None}, "'context' must be str, not NoneType"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(tmp_path, changes, says):
    write_jsonl(tmp_path / "qasper_e.jsonl", [record(1, **changes)])
    assert says in failure("qasper", tmp_path)


@pytest.mark.parametrize(("changes", "says"), [({"input": "\ud800"}, "surrogates"), ({"length": 2**70}, "")])
def test_what_no_table_can_hold_is_named_with_its_file(tmp_path, changes, says):
    line = json.dumps(record(1, **changes))
    (tmp_path / "qasper_e.jsonl").write_text(line + "\n")
    message = failure("qasper", tmp_path)
    assert message.startswith(f"{tmp_path}/qasper_e.jsonl contains values that cannot be stored: ")
    assert says in message


def test_classification_needs_classes(tmp_path):
    write_jsonl(tmp_path / "trec_e.jsonl", [record(1)])
    assert "'all_classes' must be a list of strings for trec" in failure("trec", tmp_path)


def test_nothing_left_is_an_error_not_an_empty_run(tmp_path):
    write_jsonl(tmp_path / "qasper_e.jsonl", [record(1, 100)])
    assert "qasper_e.jsonl holds no record of more than 4000 words" in failure("qasper", tmp_path)
    assert "limit is 0" in failure("qasper", tmp_path, limit=0)


# The Hub


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose download is the given function; no network."""

    def install(download):
        longbench_files.hub_archive.cache_clear()
        monkeypatch.setattr(longbench_files, "hf_hub_download", download)

    yield install
    longbench_files.hub_archive.cache_clear()


def test_the_hub_is_asked_for_the_pinned_archive_and_its_hash_is_checked(tmp_path, monkeypatch, hub):
    archive = write_zip(tmp_path / "data.zip", {"qasper_e": [record(1)]})
    asked = []

    def download(*arguments, **options):
        asked.append((arguments, options))
        return str(archive)

    hub(download)
    message = failure("qasper", HUB)
    assert f"data.zip has sha256 {hashlib.sha256(archive.read_bytes()).hexdigest()}, expected cb45b11a" in message
    revision = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
    assert asked == [
        (("zai-org/LongBench", "data.zip"), {"repo_type": "dataset", "revision": revision, "local_files_only": False})
    ]

    monkeypatch.setattr(longbench_files, "check_sha256", lambda path, expected: None)
    assert list(load_records("qasper", HUB)) == [record(1)]
    assert list(load_records("qasper", HUB)) == [record(1)]
    assert len(asked) == 2, "one download per process"
    assert list(load_records("qasper")) == [record(1)]
    assert asked[-1][1]["local_files_only"], "no network unless asked"


def test_no_network_is_one_line_that_says_what_to_do(hub):
    def download(*arguments, **options):
        raise ConnectionError("Name or service not known.\nA second line.")

    hub(download)
    message = failure("qasper", HUB)
    assert message.startswith(
        "cannot get data.zip of zai-org/LongBench at 5e628be from the Hub (Name or service not known). "
    )
    assert "pass a local data.zip or a folder" in message


class ReadTimeout(Exception):
    """What the Hub client's HTTP library raises is no OSError."""


def test_an_error_of_the_hubs_http_library_is_one_line(hub):
    def download(*arguments, **options):
        raise ReadTimeout("The read operation timed out")

    hub(download)
    assert "at 5e628be from the Hub (The read operation timed out). Without a network, " in failure("qasper", HUB)


def test_without_a_source_only_the_local_cache_is_read(tmp_path, monkeypatch):
    longbench_files.hub_archive.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = failure("qasper")
    assert "is not in the local Hub cache; give 'hub' to download it, or a local data.zip or folder" in message


def test_the_hub_client_offline_is_one_line(tmp_path, monkeypatch):
    longbench_files.hub_archive.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "cannot get data.zip of zai-org/LongBench" in failure("qasper", HUB)


@pytest.mark.network
@pytest.mark.skipif("ADASKIP_NETWORK" not in os.environ, reason="downloads 114 MB; set ADASKIP_NETWORK=1 to run it")
def test_the_hub_has_every_set():
    sets = list_sets(HUB)
    assert len(sets) == 34
    sizes = {"multifieldqa_en": 83, "triviaqa": 200, "trec": 200, "gov_report": 200, "multi_news": 194}
    assert {name: len(load_records(name, HUB)) for name in sizes} == sizes


def test_check_sha256_accepts_the_right_hash(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    check_sha256(tmp_path / "x", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
