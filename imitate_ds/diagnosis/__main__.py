"""The process behind helper.Helper: `python -m imitate_ds.diagnosis DESCRIPTOR checks JSON`, or `... ranks SECONDS`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from imitate_ds.diagnosis.checks import run_checks
from imitate_ds.diagnosis.finding import Options
from imitate_ds.diagnosis.ranks import take_part


def main(descriptor: int, kind: str, request: str) -> None:
    def tell(message: dict[str, Any]) -> None:
        os.write(descriptor, json.dumps(message).encode() + b"\n")

    if kind == "ranks":
        take_part(tell, patience_s=float(request))
        return
    wanted = json.loads(request)
    folders = {name: Path(wanted[name]) if wanted[name] else None for name in ("shards", "run_dir")}
    run_checks(wanted["names"], Options(**folders, timeout_s=wanted["timeout_s"]), tell)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
