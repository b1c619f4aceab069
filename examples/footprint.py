"""What converting a ViT-B takes: seconds by stage and the peak of memory, in a fresh process.

python -m examples.footprint prints one JSON document; `examples.bench` runs it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def measured() -> dict[str, Any]:
    """Run this file in a process of its own and return its record; raises RuntimeError."""
    command = [sys.executable, "-m", "examples.footprint"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the conversion of ViT-B failed: {last}")
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def _convert() -> dict[str, Any]:
    """Convert a ViT-B with random weights; memory in MiB (resident set), times in seconds.

    `ratio` is (peak - import) / weights. Pages of the weights' file that the runtime maps count
    as resident, as do the weights that the caller holds.
    """
    from effopt.measure import peak_rss_mb

    import torch  # isort: skip
    import transformers  # isort: skip

    imported = peak_rss_mb()
    import effopt

    torch.manual_seed(0)
    model: torch.nn.Module = transformers.ViTForImageClassification(transformers.ViTConfig())
    weights = sum(weight.nbytes for weight in model.parameters()) / 2**20
    built = peak_rss_mb()
    with tempfile.TemporaryDirectory(prefix="effopt-footprint-") as scratch:
        optimized = effopt.optimize(model.eval())
        optimized.save(Path(scratch) / "out")
    peak = peak_rss_mb()
    return {
        "model": "ViT-B/16 from its config",
        "threads": torch.get_num_threads(),
        "stages": [vars(stage) for stage in optimized.report.stages],
        "seconds": sum(stage.seconds for stage in optimized.report.stages),
        "import_mib": imported,
        "model_mib": built,
        "peak_mib": peak,
        "weights_mib": weights,
        "ratio": (peak - imported) / weights,
    }


if __name__ == "__main__":
    print(json.dumps(_convert()))
