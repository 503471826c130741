#!/usr/bin/env python3
"""Checks that need a GPU, one result file each; gpu_results.sh runs them.

scripts/gpu_checks.py flash|sparse|tests --device cuda|cpu --out FILE [--shape 7b]

flash   flash_attention_2 beside PyTorch's attention: the same logits, and what a prompt takes; on a CPU "eager"
sparse  2:4 weights in PyTorch's sparse kernels, an image beside them; on a CPU they stay dense
tests   tests/test_gpu.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import CLIPVisionConfig, LlamaConfig  # noqa: E402

from llava_vlora import provenance  # noqa: E402
from llava_vlora.bench.calls import Calls  # noqa: E402
from llava_vlora.bench.measure import device_facts  # noqa: E402
from llava_vlora.bench.shapes import shape  # noqa: E402
from llava_vlora.bench.summary import ratio  # noqa: E402
from llava_vlora.bench.timing import in_turns  # noqa: E402
from llava_vlora.ima.linears import block_linears  # noqa: E402
from llava_vlora.ima.semi_structured import to_semi_structured  # noqa: E402
from llava_vlora.integration.fresh import Models, random_models  # noqa: E402

_ROUNDS, _TEXT = 5, 256
#: Of bfloat16 logits: kernels differ in the order of their sums.
_TOLERANCE = 0.05


def main() -> int:
    """Run one check and write what it found; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("check", choices=("flash", "sparse", "tests"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.check == "tests":
        found = tests(args.device)
    else:
        with torch.inference_mode():
            found = {"flash": flash, "sparse": sparse}[args.check](args.shape, device)
    result = {
        "kind": "check",
        "check": args.check,
        **found,
        "device": device_facts(device),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{args.check}: {found['summary']}")
    return 0 if found["passed"] else 1


def tests(device: str) -> dict[str, Any]:
    """The GPU tests; they read the device from the environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:])
    lines = done.stdout.strip().splitlines() or ["pytest said nothing"]
    return {"summary": lines[-1].strip("= "), "passed": done.returncode == 0}


def flash(name: str, device: torch.device) -> dict[str, Any]:
    """Logits and time of every model with another attention."""
    models = _models(name, device)
    calls = Calls(models, shape(name).patches)
    other = "flash_attention_2" if device.type == "cuda" else "eager"
    rows: dict[str, Any] = {}
    for system, model in {"text": models.text, **models.pictured}.items():
        call = _reading(calls, system, model)
        with _attention(model, "sdpa"):
            plain = call()
        with _attention(model, other):
            changed = call()
        seconds = in_turns({n: _timed(model, n, call) for n in ("sdpa", other)}, _ROUNDS, device)
        cells = [{"seconds": s} for s in seconds.values()]
        rows[system] = {
            "difference": _difference(plain, changed),
            "seconds": seconds,
            "over sdpa": str(ratio(cells[1], cells[0])),
        }
    worst = max(row["difference"] for row in rows.values())
    times = ", ".join(f"{system} {row['over sdpa']}" for system, row in rows.items())
    return {
        "attention": other,
        "rows": rows,
        "passed": worst < _TOLERANCE,
        "summary": f"{other} over sdpa, reading {_TEXT} text tokens: {times}; logits differ by {worst:.2%} at most",
    }


def sparse(name: str, device: torch.device) -> dict[str, Any]:
    """Logits and time with half of the weights, dense and in sparse kernels."""
    models = _models(name, device)
    calls = Calls(models, shape(name).patches)
    for linear in block_linears(models.text).values():
        by_four = linear.weight.view(len(linear.weight), -1, 4)
        by_four.scatter_(-1, by_four.abs().topk(2, dim=-1, largest=False).indices, 0)
    every = {"text": models.text, **models.pictured}
    reading = {system: _reading(calls, system, model) for system, model in every.items()}
    dense = {system: call() for system, call in reading.items()}
    before = in_turns({s: _plainly(call) for s, call in reading.items()}, _ROUNDS, device)
    count = 0
    if device.type == "cuda":
        count = to_semi_structured(models.text)
        packed = {path: linear.weight for path, linear in block_linears(models.text).items()}
        for model in models.pictured.values():
            for path, linear in block_linears(model).items():
                linear.weight = packed[path]
    after = in_turns({s: _plainly(call) for s, call in reading.items()}, _ROUNDS, device)
    rows = {
        system: {
            "difference": _difference(dense[system], call()),
            "dense seconds": before[system],
            "sparse seconds": after[system],
            "over dense": median(after[system]) / median(before[system]),
        }
        for system, call in reading.items()
    }
    worst = max(row["difference"] for row in rows.values())
    times = ", ".join(f"{system} {row['over dense']:.3g}" for system, row in rows.items())
    kernels = f"{count} layers in 2:4 kernels" if count else "dense weights (no 2:4 kernels here)"
    return {
        "layers": count,
        "rows": rows,
        "passed": worst < _TOLERANCE,
        "summary": f"{kernels}, reading {_TEXT} text tokens, time over dense: {times}; logits differ by {worst:.2%} "
        "at most",
    }


def _models(name: str, device: torch.device) -> Models:
    chosen = shape(name)
    return random_models(
        LlamaConfig(**chosen.language),
        CLIPVisionConfig(**chosen.vision),
        chosen.generators,
        device=device,
        dtype=torch.bfloat16,
    )


def _reading(calls: Calls, system: str, model: Any) -> Callable[[], Tensor]:
    """A prompt's last logits; LLaVA reads visual tokens, a generator's model sees an image beside its weights."""
    ids = calls.ids(1, _TEXT)
    if system == "llava":
        tokens = calls.noise(1, calls.patches, model.config.hidden_size)
        embeds = calls.embeddings(ids, tokens)
        return lambda: model(inputs_embeds=embeds).logits[:, -1].float()
    if system == "text":
        return lambda: model(input_ids=ids).logits[:, -1].float()
    weights = calls.weights(system, 1)

    def seen() -> Tensor:
        with model.seeing(weights):
            return model(input_ids=ids).logits[:, -1].float()  # type: ignore[no-any-return]

    return seen


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    decoder, before = model.model, model.config._attn_implementation
    decoder.config._attn_implementation = name
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def _timed(model: Any, name: str, call: Callable[[], object]) -> Any:
    @contextmanager
    def prepared() -> Iterator[Callable[[], object]]:
        with _attention(model, name):
            yield call

    return prepared


def _plainly(call: Callable[[], object]) -> Any:
    @contextmanager
    def prepared() -> Iterator[Callable[[], object]]:
        yield call

    return prepared


if __name__ == "__main__":
    sys.exit(main())
