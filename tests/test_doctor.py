from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from llava_vlora.doctor import diagnose, flavour_of
from llava_vlora.doctor.rules import broken_rules, remedy_for

REPOSITORY = Path(__file__).parents[1]


def doctor(shadow: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a folder that comes before everything installed."""
    return subprocess.run(
        [sys.executable, "-m", "llava_vlora", "doctor", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(shadow), str(REPOSITORY)])},
        cwd=shadow,
        capture_output=True,
        text=True,
    )


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_this_environment_can_train_and_answer_with_the_plugin() -> None:
    found = diagnose()
    assert found.ready
    assert [check.module for check in found.plugin if check.error] == []
    failing = {check.module: str(check.error) for check in found.plain if check.error}
    if Version(str(found.packages["transformers"])) >= Version("4.53"):
        assert list(failing) == ["llava.train.train"]
        assert "ALL_LAYERNORM_LAYERS" in failing["llava.train.train"]
    else:
        assert failing == {}


def test_broken_dependency_is_named_instead_of_llavas_false_message(tmp_path: Path) -> None:
    broken = write(tmp_path / "requests/__init__.py", "\nraise RuntimeError('broken on purpose')\n")
    # Something that LLaVA's model files import and nothing else here does.
    llava = tmp_path / "llava"
    write(llava / "__init__.py", "from .model import LlavaLlamaForCausalLM\n")
    swallow = "try:\n    from .language_model.llava_llama import LlavaLlamaForCausalLM\nexcept:\n    pass\n"
    write(llava / "model/__init__.py", swallow)
    write(llava / "model/language_model/llava_llama.py", "import requests\n")

    result = doctor(tmp_path, "--json")

    assert result.returncode == 1, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    assert not report["ready"]
    first = report["plain"][0]
    assert first["error"] == "RuntimeError: broken on purpose"
    assert first["where"] == f"{broken}:2"
    causes = [problem["cause"] for problem in report["problems"] if problem["level"] == "error"]
    assert any("broken on purpose" in cause and str(broken) in cause for cause in causes)
    assert not any("cannot import name 'LlavaLlamaForCausalLM'" in cause for cause in causes)


def test_installed_llava_with_a_broken_transformers_is_diagnosed_in_plain_words(
    tmp_path: Path,
) -> None:
    write(tmp_path / "transformers.py", "def broken(:\n")
    result = doctor(tmp_path)
    assert result.returncode == 1
    text = " ".join(result.stdout.split())
    assert "SyntaxError" in text
    assert "VLoRA cannot train and answer here." in text


def test_process_that_dies_while_importing_is_a_finding(tmp_path: Path) -> None:
    write(tmp_path / "torch.py", "import os\nos._exit(139)\n")
    result = doctor(tmp_path, "--json")
    assert result.returncode == 1
    assert "exit code 139" in result.stdout


def test_second_llava_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "llava/__init__.py")
    report = json.loads(doctor(tmp_path, "--json").stdout)
    assert report["llava"]["path"] == str(tmp_path / "llava")
    assert len(report["llava"]["shadowed"]) == 1
    assert any("more than once" in problem["cause"] for problem in report["problems"])


@pytest.mark.parametrize(
    ("marker", "flavour"),
    [
        ("model/VLoRA/__init__.py", "VLoRA fork"),
        ("model/multimodal_resampler/builder.py", "LLaVA-NeXT"),
        ("model/multimodal_encoder/clip_encoder.py", "HEAD"),
        ("model/builder.py", "wheel"),
    ],
)
def test_flavour_is_told_by_features(tmp_path: Path, marker: str, flavour: str) -> None:
    write(tmp_path / marker, "class CLIPVisionTowerS2:\n    pass\n")
    assert flavour_of(tmp_path) == flavour


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"peft": "0.15.0", "accelerate": "0.21.0"}, "clear_device_cache"),
        ({"deepspeed": "0.12.6", "torch": "2.4.0"}, "cannot import name 'log'"),
        ({"transformers": "5.0.0"}, "transformers 5"),
        ({"transformers": "4.52.3", "torch": "2.5.1"}, ".bin weights"),
        ({"numpy": "2.0.0", "torch": "2.1.2"}, "numpy 2"),
    ],
)
def test_known_incompatibility_is_found(versions: dict[str, str | None], expected: str) -> None:
    assert [expected in problem.cause for problem in broken_rules(versions)] == [True]


@pytest.mark.parametrize(
    "versions",
    [
        {"peft": "0.13.2", "accelerate": "0.21.0", "transformers": "4.37.2", "torch": "2.1.2"},
        {"peft": "0.18.1", "accelerate": "1.12.0", "transformers": "4.57.6", "torch": "2.13.0+cpu"},
        {"deepspeed": None, "torch": "2.4.0"},
        {"deepspeed": "0.14.1", "torch": "2.4.0"},
    ],
)
def test_versions_that_go_together_pass(versions: dict[str, str | None]) -> None:
    assert broken_rules(versions) == []


def test_remedy_follows_the_message() -> None:
    assert "flash-attn" in remedy_for(
        "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10"
    )
    assert "llava-vlora[llava]" in remedy_for("ModuleNotFoundError: No module named 'shortuuid'")
