from __future__ import annotations

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import llava_vlora
from llava_vlora.cli import main

pytestmark = pytest.mark.one_stack

REPOSITORY = Path(__file__).parents[1]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_help_lists_the_verbs_and_imports_neither_torch_nor_llava() -> None:
    code = (
        "import sys\nfrom llava_vlora.cli import main\n"
        "try:\n    main(['--help'])\nfinally:\n    print(sorted({'torch', 'transformers', 'llava'} & {*sys.modules}))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "doctor" in result.stdout
    assert "demo" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"llava-vlora {llava_vlora.__version__}\n"


def test_unknown_verb_lists_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["docter"])
    assert stopped.value.code == 2
    assert "doctor" in capsys.readouterr().err


def test_both_stacks_pin_every_direct_requirement() -> None:
    config = ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    used = ("llava", "lora", "serve", "deepspeed", "bench", "dev")
    extras = "\n".join(config["options.extras_require"][name] for name in used)
    wanted = {
        line.partition(">")[0].strip()
        for line in (config["options"]["install_requires"] + extras).splitlines()
        if line.strip() and not line.startswith("#")
    }
    for stack in ("current", "pinned"):
        text = (REPOSITORY / "scripts" / f"constraints-{stack}.txt").read_text(encoding="utf-8")
        assert wanted <= {line.partition("==")[0] for line in text.splitlines()}


def test_package_is_marked_as_typed() -> None:
    assert (Path(llava_vlora.__file__).parent / "py.typed").is_file()
