"""Perplexity of models on text that is on any machine: what of its language does a model lose by learning to see?

    python scripts/perplexity.py runs/smollm2 runs/x/models/llava --out runs/x/perplexity.json
    python scripts/perplexity.py runs/smollm2 --frozen runs/x/models/fast-frozen --base runs/smollm2

The text is the documentation in Python's standard library, module after module in the order of their names. Models see
it without an image. ``--frozen`` models were trained beside a language model that does not change: the hash of their
logits must be that of the base, and the exit code is 1 if it is not. Figures compare where "text" is the same; the text
depends on the version of Python, the hash of logits on the machine too.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import math
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from llava_vlora import provenance
from llava_vlora.integration import api

#: Tokens that a model sees at once, and how many of them are only shown: with little before it a token is a guess.
WINDOW, CONTEXT = 512, 64
#: Letters below which a docstring is left out: lines that are no text.
SHORTEST = 400


@dataclass(frozen=True)
class Found:
    """What one model makes of the text."""

    model: str
    perplexity: float
    """exp of the mean loss of a token."""
    loss: float
    tokens: int
    """Tokens that were asked for."""
    logits: str
    """Hash of all logits as float32."""


def documentation() -> Iterator[str]:
    """Docstrings of modules, classes and functions of the standard library, tests apart."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                if len(text) >= SHORTEST:
                    yield text


def windows(tokenizer: object, tokens: int) -> tuple[torch.Tensor, str]:
    """Ids ``[N, WINDOW]`` of the first ``tokens`` tokens, each row with what begins a text; and the text's hash.

    Raises:
        SystemExit: There is less text than that.
    """
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    step = WINDOW - len(start)
    wanted = tokens // step * step
    ids: list[int] = []
    for text in documentation():
        ids += tokenizer(text + "\n\n", add_special_tokens=False).input_ids
        if len(ids) >= wanted > 0:
            rows = [start + ids[i : i + step] for i in range(0, wanted, step)]
            shown = tokenizer.decode(ids[:wanted])
            return torch.tensor(rows), hashlib.sha256(shown.encode()).hexdigest()[:16]
    raise SystemExit(f"--tokens {tokens}: at least {step} are needed, and there are {len(ids)}.")


@torch.inference_mode()
def measure(path: str, base: str | None, tokens: int) -> tuple[Found, str]:
    """One model's figures, and the hash of the text that it was asked."""
    loaded = api.load(path, base, device="cpu", dtype=torch.float32)
    rows, text = windows(loaded.tokenizer, tokens)
    digest, losses = hashlib.sha256(), []
    for row in rows:
        logits = loaded.model(input_ids=row[None], use_cache=False).logits[0].float()
        digest.update(logits.numpy().tobytes())
        losses.append(cross_entropy(logits[CONTEXT:-1], row[CONTEXT + 1 :], reduction="none"))
    every = torch.cat(losses).double()
    loss = every.mean().item()
    name = Path(path).name if base is None else f"{Path(path).name} on {Path(base).name}"
    return Found(name, math.exp(loss), loss, len(every), digest.hexdigest()[:16]), text


def main() -> int:
    """Reads the command line, measures, writes and compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", help="folders of complete models")
    parser.add_argument("--frozen", nargs="*", default=[], help="folders of projectors alone")
    parser.add_argument("--base", help="their language model")
    parser.add_argument("--tokens", type=int, default=20000, help="default: 20000")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.frozen and not arguments.base:
        parser.error("--frozen needs --base, the language model beside which they were trained")
    asked = [(path, None) for path in arguments.models]
    asked += [(path, arguments.base) for path in arguments.frozen]
    if arguments.base and arguments.base not in arguments.models:
        asked.insert(0, (arguments.base, None))
    if not asked:
        parser.error("give the folder of a model")
    found, texts = [], []
    for path, base in asked:
        one, text = measure(path, base, arguments.tokens)
        found.append(one)
        texts.append(text)
        print(f"{one.model}: perplexity {one.perplexity:.3f} of {one.tokens} tokens", flush=True)
    expected = {
        f.logits for f, (path, _) in zip(found, asked, strict=True) if path == arguments.base
    }
    changed = [
        f.model
        for f, (_, base) in zip(found, asked, strict=True)
        if base and {f.logits} != expected
    ]
    if arguments.out:
        result = {
            "text": {
                "what": "docstrings of Python's standard library",
                "hashes": sorted(set(texts)),
            },
            "python": platform.python_version(),
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "models": [asdict(one) for one in found],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name in changed:
        print(f"{name}: the logits are not those of {arguments.base}.", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
