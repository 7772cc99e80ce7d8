"""Unpacks published runs to continue them: `python dev/unpack_runs.py results/smollm2/runs.tar.xz DIR OUTPUT`.

What `pack_runs.py` withholds of the data set is read again from the data in DIR, whose fingerprint must be that of each
run. Then `adaskip grid --data-dir DIR --output-dir OUTPUT/runs` with a larger `--limit` continues the runs.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path
from typing import Any

from adaskip.common.files import write_text_atomic
from adaskip.common.folders import new_folder
from adaskip.runs.config import RunConfig
from adaskip.runs.job import Part, resolve
from adaskip.runs.manifest import describe_job


def parts_of(manifest: dict[str, Any], data_dir: str) -> tuple[Part, ...]:
    """The tasks and samples that a run was scored on. Raises ValueError if the data has other ones."""
    job = resolve(
        RunConfig(
            model=manifest["model"],
            phase=manifest["phase"],
            strategy=manifest["strategy"],
            budget=manifest["budget"]["sublayers"] or None,
            protocol=manifest["protocol"],
            tasks=tuple(manifest["tasks"]),
            limit=manifest["limit"],
            subset=manifest["subset"],
            seed=manifest["seed"],
            data_dir=data_dir,
        )
    )
    if describe_job(job)["data_fingerprint"] != manifest["data_fingerprint"]:
        raise ValueError(f"{data_dir} has other records than {manifest['run_name']} was scored on")
    return job.parts


def restore(run: Path, data_dir: str) -> None:
    """Put the withheld fields back into the records of a run."""
    for part in parts_of(json.loads((run / "manifest.json").read_text(encoding="utf-8")), data_dir):
        samples = {sample["_id"]: sample for sample in part.samples}
        path = run / f"{part.name}.jsonl"
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            sample = samples[record["id"]]
            withheld = {"references": sample["answers"], **part.benchmark.kept_of(sample)}
            lines.append(json.dumps({**record, **withheld}, ensure_ascii=False) + "\n")
        write_text_atomic(path, "".join(lines))


def unpack(archive: Path, data_dir: str, output: Path) -> int:
    """Write the archive's runs and profiles into the new folder `output`; returns the number of runs."""
    with new_folder(output) as folder, tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
        runs = sorted(manifest.parent for manifest in folder.glob("runs/*/*/manifest.json"))
        for run in runs:
            restore(run, data_dir)
    return len(runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Unpack published runs to continue them.")
    for name, kind in (("archive", Path), ("data_dir", str), ("output", Path)):
        parser.add_argument(name, type=kind)
    given = parser.parse_args()
    print(f"{unpack(given.archive, given.data_dir, given.output)} runs in {given.output / 'runs'}")
