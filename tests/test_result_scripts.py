"""The scripts that write the committed results: their plumbing on a tiny model, and what README makes of results."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.one_stack

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *pieces: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *pieces],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_gpu_the_script_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("gpu_results.sh")
    assert done.returncode == 2
    assert "no GPU here" in done.stderr


@pytest.mark.parametrize("script", ["cpu_results.sh", "gpu_results.sh"])
def test_an_unknown_piece_is_named(script: str, tmp_path: Path) -> None:
    done = run(script, "cost", "nothing", DEVICE="cpu", RESULTS=str(tmp_path), IMAGES=str(tmp_path))
    assert done.returncode == 2
    assert "there is no piece" in done.stderr
    assert "choose from:" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gpu_pieces_on_a_cpu_go_on_after_one_that_fails(tmp_path: Path) -> None:
    out = {"RESULTS": str(tmp_path), "IMAGES": str(tmp_path), "PATIENCE": "20"}
    done = run("gpu_results.sh", "flash", "sparse", DEVICE="cpu", SHAPE="nosuch", **out)
    assert done.returncode == 1
    assert "FAILED: cpu-flash\nFAILED: cpu-sparse" in done.stderr
    done = run("gpu_results.sh", "train", "flash", "sparse", DEVICE="cpu", SHAPE="tiny", **out)
    assert done.returncode == 0, done.stderr
    names = {"bench-train-tiny-cpu-bfloat16", "cpu-flash", "cpu-sparse"}
    for name in names:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert {"device", "commit", "versions"} <= found.keys()
    assert "eager over sdpa" in json.loads((tmp_path / "cpu-flash.json").read_text())["summary"]


@pytest.fixture(scope="module")
def blocks() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))["bench_blocks"].__dict__


def test_old_and_missing_results_are_named(
    blocks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(blocks, "RESULTS", tmp_path)
    with pytest.raises(blocks["NoResult"], match=r"bench-1b-cpu.json is missing; run scripts/cpu_"):
        blocks["bench_block"]()
    (tmp_path / "bench-1b-cpu.json").write_text('{"cells": []}')
    with pytest.raises(blocks["NoResult"], match=r"bench-1b-cpu.json is of an older format; run"):
        blocks["bench_block"]()
    assert "none has been measured yet" in blocks["gpu_block"]()[0]


@pytest.mark.slow
def test_tables_are_made_of_whichever_results_are_there(
    blocks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_vlora.cli import main

    monkeypatch.setitem(blocks, "RESULTS", tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(f"bench --rounds 1 --steps 2 --batch 1,2 --out {tmp_path}".split()) == 0
    assert main(f"bench train --rounds 1 --text-tokens 8 --out {tmp_path}".split()) == 0
    found = json.loads((tmp_path / "tiny-cpu-float32.json").read_text())
    # Targets are for the larger shapes; growth starts at this shape's patches.
    found["shape"] |= {"name": "1b", "patches": 576}
    for name in ("bench-1b-cpu", "bench-7b-gpu-bfloat16"):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    trained = json.loads((tmp_path / "train-tiny-cpu-bfloat16.json").read_text())
    trained["shape"]["name"] = "1b"
    (tmp_path / "bench-train-1b-cpu-bfloat16.json").write_text(json.dumps(trained))
    text = "\n".join(blocks["bench_block"]())
    for column in ("VLoRA beside W", "VLoRA fast beside W", "VLoRA fast, image known"):
        assert f"| {column} |" in text
    assert "**VLoRA fast**: target, on a CPU" in text
    assert "time to the first token over vision tower + text only | <= 1.05 |" in text
    assert "| KiB of an image while decoding | 512 | 80 |  | 80 | 4 |  | 4 |" in text
    text = "\n".join(blocks["training_block"]())
    assert "| stage 1 | VLoRA fast |" in text
    assert "| target | goal | paper, 7B on 8 GPUs | VLoRA | VLoRA fast |" in text
    assert any("VLoRA fast merged" in line for line in blocks["gpu_block"]())
