"""Packs runs for the repository: `python dev/pack_runs.py results/smollm2`, into its `runs.tar.xz`.

The archive contains only the ids of the data set: references and classes of the records become null. Profiles are named
by their place in it. Tables then read the scores from each run's `scores.json`, which `eval/tables.py` must have
written before. The same runs give the same bytes.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

from adaskip.common.files import write_bytes_atomic
from adaskip.studies.study import read_json
from adaskip.studies.tables.runs import load_run

WITHHELD = ("references", "all_classes")


def packed(path: Path) -> bytes:
    """The file as it goes into the archive."""
    if path.name == "manifest.json":
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("profile"):  # wherever it lay, it lies in the archive's folder
            record["profile"] = f"profiles/{Path(record['profile']).name}"
        return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    if path.suffix != ".jsonl" or path.parent.name == "times":
        return path.read_bytes()
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    lines = (json.dumps({**record, **dict.fromkeys(WITHHELD)}, ensure_ascii=False) for record in records)
    return "".join(f"{line}\n" for line in lines).encode()


def pack(folder: Path) -> Path:
    """Write `folder`/runs.tar.xz from its folders `runs` and `profiles`, whole or not at all.

    Raises:
        ValueError: a run has no scores, or those of other answers.
    """
    runs = sorted(manifest.parent for manifest in folder.glob("runs/*/*/manifest.json"))
    unscored = [str(run) for run in runs if not is_scored(run)]
    if not runs or unscored:
        raise ValueError(f"no scores of the answers in {', '.join(unscored) or folder}; eval/tables.py writes them")
    files = [path for part in ("runs", "profiles") for path in sorted((folder / part).rglob("*.json*"))]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz", preset=9) as tar:
        for path in files:
            content = packed(path)
            entry = tarfile.TarInfo(str(path.relative_to(folder)))
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return write_bytes_atomic(folder / "runs.tar.xz", archive.getvalue())


def is_scored(folder: Path) -> bool:
    """Whether the run has scores of its answers."""
    saved = read_json(folder / "scores.json").get("made_from", {})
    return saved.get("answers") == {name: task.answers_sha256 for name, task in load_run(folder).tasks.items()}


if __name__ == "__main__":
    print(pack(Path(sys.argv[1])))
