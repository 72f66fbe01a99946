"""Makes the evidence that is shipped for `peft-mllm advise` from finished studies.

peft-mllm study run studies/main-tiny.yaml
python scripts/update_evidence.py runs/studies/main-tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft_mllm.assets import EVIDENCE
from peft_mllm.study.evidence import read_evidence, write_evidence
from peft_mllm.study.sources import evidence_at


def main() -> None:
    parser = argparse.ArgumentParser(description="Ship what studies found.")
    parser.add_argument("directories", nargs="+", type=Path, help="of finished studies, relative to the repository")
    parser.add_argument("--into", type=Path, default=EVIDENCE, help="folder of the files")
    said = parser.parse_args()
    for directory in said.directories:
        evidence = evidence_at(directory)
        if evidence.missing:
            raise SystemExit(f"{directory}: {evidence.missing} runs have no result yet; finish the study first.")
        said.into.mkdir(exist_ok=True)
        file = said.into / f"{directory.resolve().name}.json"
        write_evidence(file, evidence)
        if read_evidence(file) != evidence:
            raise SystemExit(f"{file}: reads back as something else.")
        print(f"{file}: {len(evidence.lines)} lines, {len(evidence.choices)} choices, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
