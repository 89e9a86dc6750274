#!/usr/bin/env python
"""Times our CPU kernel beside ggml's repacked Q4_0, on one thread, in one program without Python; writes JSON.

    git clone https://github.com/ggml-org/ggml && cmake -S ggml -B ggml/build -DCMAKE_BUILD_TYPE=Release \\
        -DGGML_OPENMP=OFF -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF && cmake --build ggml/build -j
    taskset -c 1 python benchmarks/ggml.py --ggml ggml

ggml rounds x to 8-bit integers before it multiplies; ours multiplies the BF16 values as they are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
from pathlib import Path

from lm_ortho.bench.layers import get_device_name
from lm_ortho.kernels import cpu

HERE = Path(__file__).parent


def build(ggml: Path, folder: Path) -> Path:
    """Compiles the program against a built checkout of ggml and returns its path."""
    libraries = sorted({path.parent for path in (ggml / "build").rglob("libggml*.so")})
    if not libraries:
        raise SystemExit(f"ggml={ggml}: no libggml*.so below its build folder; build it as shared libraries first")
    search_paths = [option for path in libraries for option in (f"-L{path}", f"-Wl,-rpath,{path.resolve()}")]
    program = folder / "ggml_peer"
    command = [*cpu.build.compiler(), "-O2", "-std=c++17", f"-I{ggml / 'include'}", str(HERE / "ggml_peer.cpp")]
    subprocess.run(
        [*command, *search_paths, "-lggml", "-lggml-cpu", "-lggml-base", "-ldl", "-o", str(program)], check=True
    )
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, required=True, help="a checkout of ggml with its build folder")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 4, 16, 64))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument(
        "--out", type=Path, help="JSON file of the results; by default benchmarks/results/DATE-ggml.json"
    )
    arguments = parser.parse_args()
    library = cpu.find()
    if isinstance(library, cpu.MissingLibrary):
        raise SystemExit(f"our kernel is not available: {library.reason}")
    with tempfile.TemporaryDirectory() as folder:
        program = build(arguments.ggml, Path(folder))
        numbers = map(str, (*arguments.shape, arguments.rounds, *arguments.batches))
        process = subprocess.run([program, library.path, *numbers], check=True, capture_output=True, text=True)
    report = json.loads(process.stdout) | {
        "device": get_device_name(),
        "date": str(datetime.date.today()),
        "threads": 1,
    }
    head = subprocess.run(
        ["git", "-C", arguments.ggml, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    report["ggml"] = head.stdout.strip() or "unknown"
    report["rounds"], report["cpu_count"] = arguments.rounds, os.cpu_count()
    for row in report["rows"]:
        row["times_ggml"] = {name: round(row["ggml_q4_0_us"] / row[f"{name}_us"], 3) for name in ("alpha0", "density1")}
    out = arguments.out or HERE / "results" / f"{report['date']}-ggml.json"
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
