"""The real DeepSpeed engine on two CPU processes: the same losses and weights as PyTorch's own two processes."""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_vlora.integration.api import load
from llava_vlora.integration.zero import warn_of_abandoned_builds
from tests.test_llava_generation import pictures, prompt
from tests.tiny import training_command
from tests.two_stacks import Finished, run_processes

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
STEPS = 4


def train(
    out: Path,
    llm: Path,
    tower: Path,
    data: Path,
    kind: str = "vlora",
    zero: str | None = None,
    **more: object,
) -> Finished:
    """Two processes, one sample each a step: in every fourth sample there is no image."""
    more["deepspeed"] = SCRIPTS / f"{zero}.json" if zero else None
    common = {"max_steps": STEPS, "save_steps": STEPS, "per_device_train_batch_size": 1}
    common |= {"mm_vision_dtype": "float32", "group_by_modality_length": None}
    flags = training_command("finetune", llm, tower, data, out, kind, **{**common, **more})
    done = run_processes("--seed", 3, "llava.train.train", *flags)
    assert done.code == 0, done.errors[-3000:]
    return done


Engines = Callable[..., tuple[Finished, Path]]


@pytest.fixture(scope="module")
def engines(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Engines:
    """Runs of two processes, each made once: PyTorch's own, or by one of the recipes' DeepSpeed files."""

    @functools.cache
    def run(zero: str | None, kind: str = "vlora") -> tuple[Finished, Path]:
        out = tmp_path_factory.mktemp(zero or "ddp") / "out"
        return train(out, llm_dir, tower_dir, data_dir, kind, zero=zero), out

    return run


@pytest.mark.parametrize(
    ("kind", "zero"),
    [
        ("vlora", "zero2"),
        ("vlora", "zero3"),
        ("vlora", "zero3_offload"),
        ("vlora_fast", "zero2"),
        ("vlora_fast", "zero3"),
    ],
)
def test_losses_and_weights_are_those_without_deepspeed(
    kind: str, zero: str, engines: Engines, llm_dir: Path
) -> None:
    (plain, folder), (done, out) = engines(None, kind), engines(zero, kind)
    # The engine's own checkpoint: without it, the run would have been PyTorch's again.
    assert (out / f"checkpoint-{STEPS}" / f"global_step{STEPS}").is_dir()
    assert len(plain.losses()) == STEPS
    assert done.losses() == pytest.approx(plain.losses(), abs=2e-4)  # logged with four decimals
    expected, found = (load_file(f / "model.safetensors") for f in (folder, out))
    assert expected.keys() == found.keys()
    before = load_file(llm_dir / "model.safetensors")
    for name, tensor in expected.items():
        # Adam divides by the root of tiny second moments, which magnifies the order of a sum.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-3, msg=name)
    changed = [n for n, t in before.items() if not torch.allclose(expected[n], t, atol=2e-3)]
    assert changed, "nothing was trained, so equality says nothing"


@pytest.mark.parametrize("named", ["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"])
def test_a_lock_that_a_killed_run_left_is_named(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch waits for it without end and without a word."""
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv(named, str(tmp_path))
    lock = Path(_get_build_directory("cpu_adam", verbose=False)) / "lock"
    lock.touch()
    warn_of_abandoned_builds()
    assert not capsys.readouterr().err  # a build that has just begun
    os.utime(lock, (time.time() - 600,) * 2)
    warn_of_abandoned_builds()
    assert f"{lock} is 10 min old" in capsys.readouterr().err


# One order of samples, whatever versions shuffle: update i takes records 2i and 2i + 1.
_IN_ORDER = """
from torch.utils.data import SequentialSampler
from llava.train.llava_trainer import LLaVATrainer
LLaVATrainer._get_train_sampler = lambda self, *a: SequentialSampler(self.train_dataset)
"""
IN_ORDER = {"max_steps": 8, "save_strategy": "no", "mm_vision_dtype": "float32"}
IN_ORDER |= {"learning_rate": 5e-4, "group_by_modality_length": None}


@pytest.fixture(scope="module")
def one_process(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], Path, Path]:
    """Losses and folder of a run of one process, and its data.

    All answers have the same number of tokens, because LLaVA's loss is the mean of each process's own tokens. The
    first updates are half text, half image, the fifth and sixth text alone.
    """
    data = tmp_path_factory.mktemp("even") / "data"
    shutil.copytree(data_dir, data)
    records = json.loads((data / "finetune.json").read_text().replace('"white"', '"red"'))
    text = [r for r in records if "image" not in r] * 2
    image = [r for r in records if "image" in r]
    mixed = [r for pair in zip(image[:4], text[:4], strict=True) for r in pair]
    (data / "finetune.json").write_text(json.dumps(mixed + text[4:] + image[4:8]))
    out = data.parent / "one"
    more = {**IN_ORDER, "per_device_train_batch_size": 2}
    flags = training_command("finetune", llm_dir, tower_dir, data, out, "vlora", **more)
    done = run_processes("--seed", 3, "llava.train.train", *flags, before=_IN_ORDER, count=1)
    assert done.code == 0, done.errors[-3000:]
    return done.losses(), out, data


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_processes_are_as_good_as_one(
    zero: str,
    one_process: tuple[list[float], Path, Path],
    llm_dir: Path,
    tower_dir: Path,
    tmp_path: Path,
) -> None:
    losses, folder, data = one_process
    more = {**IN_ORDER, "per_device_train_batch_size": 1, "deepspeed": SCRIPTS / f"{zero}.json"}
    flags = training_command(
        "finetune", llm_dir, tower_dir, data, tmp_path / "out", "vlora", **more
    )
    done = run_processes("--seed", 3, "llava.train.train", *flags, before=_IN_ORDER)
    assert done.code == 0, done.errors[-3000:]
    assert len(losses) == 8
    assert done.losses() == pytest.approx(losses, abs=1e-3)
    expected, found = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-3, msg=name)
    before = load_file(llm_dir / "model.safetensors")
    assert any(not torch.allclose(expected[n], t, atol=2e-3) for n, t in before.items())


def test_what_zero3_saves_loads_and_sees(engines: Engines) -> None:
    models = [load(str(engines(zero)[1])).model for zero in ("zero3", None)]
    with torch.no_grad():
        found, expected = (m(prompt(), images=pictures(1)).logits for m in models)
        blind = models[0](prompt(slot=None)).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert (found[:, -1] - blind).abs().max() > 0.2


@pytest.mark.parametrize("kind", ["vlora", "mlp2x_gelu"])
def test_zero3_trains_in_bfloat16(
    kind: str, llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """LLaVA's own recipe; stock LLaVA ends in an assertion, because its projector is float32."""
    done = train(tmp_path / "out", llm_dir, tower_dir, data_dir, kind, zero="zero3", bf16=True)
    assert "ZeRO-3 takes one dtype: mm_projector becomes torch.bfloat16" in done.errors
    assert len(done.losses()) == STEPS
    assert done.losses()[-1] < done.losses()[0]


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_stage_1_saves_a_whole_generator(
    zero: str, llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "one"
    common = {
        "max_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "mm_vision_dtype": "float32",
    }
    flags = training_command(
        "pretrain",
        llm_dir,
        tower_dir,
        data_dir,
        out,
        "vlora",
        deepspeed=SCRIPTS / f"{zero}.json",
        **common,
    )
    done = run_processes("--seed", 3, "llava.train.train", *flags)
    assert done.code == 0, done.errors[-3000:]
    saved = torch.load(out / "mm_projector.bin", weights_only=True)
    assert all(tensor.numel() for tensor in saved.values())
    model = load(str(out), str(llm_dir)).model
    for name, tensor in model.generator.state_dict().items():
        assert torch.equal(saved[f"model.mm_projector.{name}"].to(tensor.dtype), tensor), name
