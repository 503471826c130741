"""A patched LLaVA tree loads the plugin by itself: its own scripts compute what they do under the launcher."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from tests.tiny import make_vlora, training_command
from tests.two_stacks import REPO, Finished, environment, run_modules, succeeded

TREES = ["wheel", "head"]
CHANGED = ["llava/__init__.py", "llava/train/train.py"]
KINDS = {"vlora": "vlora", "mlp": "mlp2x_gelu"}
SCRIPT = REPO / "scripts" / "patch_llava.sh"


def source(tree: str) -> Path:
    """The folder of an unpatched LLaVA package."""
    if tree == "wheel":
        spec = importlib.util.find_spec("llava")
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent
    named = os.environ.get("LLAVA_VLORA_LLAVA_HEAD")
    if not named:
        pytest.skip("LLAVA_VLORA_LLAVA_HEAD names no checkout of LLaVA's repository")
    return Path(named) / "llava"


def copied(tree: str, folder: Path) -> Path:
    """A fresh copy of the tree in ``folder``, which it returns."""
    shutil.copytree(
        source(tree), folder / "llava", ignore=shutil.ignore_patterns("__pycache__", "*.jpg")
    )
    return folder


def script() -> Any:
    """scripts/patch_llava.py as a module."""
    spec = importlib.util.spec_from_file_location("patch_llava", SCRIPT.with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def patch(action: str, folder: Path) -> Finished:
    """Run the command in this process, for there are many."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = script().main([action, str(folder)])
    return Finished(code, output.getvalue(), errors.getvalue())


def shell(*arguments: object, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does; ``more`` are environment variables."""
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    given = {**os.environ, "PYTHON": sys.executable, **more}
    return subprocess.run(command, env=given, cwd=cwd, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and mode of each file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mode) for f in files}


def metadata(folder: Path, plugin: bool) -> Path:
    """A folder that stands for the installed package: with this checkout's entry points, or with none."""
    info = folder / "llava_vlora-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-vlora\nVersion: 0\n")
    if plugin:
        lines = [f"[llava.plugins]\n{entry.name} = {entry.value}\n" for entry in declared()]
        (info / "entry_points.txt").write_text("".join(lines))
    return folder


def declared() -> list[EntryPoint]:
    """The plugins that setup.cfg declares."""
    config = ConfigParser()
    config.read(REPO / "setup.cfg", encoding="utf-8")
    lines = config["options.entry_points"]["llava.plugins"].strip().splitlines()
    return [EntryPoint(*map(str.strip, line.split("=")), "llava.plugins") for line in lines]  # type: ignore[call-arg]


# --- the script ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", TREES)
def test_apply_and_revert(tree: str, tmp_path: Path) -> None:
    folder = copied(tree, tmp_path)
    (folder / CHANGED[1]).chmod(0o640)
    stock = contents(folder)
    name = "1.2.2.post1" if tree == "wheel" else "c121f04"
    for action, code, says in (
        ("check", 1, "not patched"),
        ("revert", 0, "not patched; nothing to do"),
        ("apply", 0, "patched"),
        ("check", 0, "patched"),
        ("apply", 0, "patched already; nothing to do"),
    ):
        done = patch(action, folder)
        assert done.code == code, done.errors
        assert done.output.splitlines()[0].endswith(f", {says}")
        assert name in done.output
    now = contents(folder)
    assert now.keys() == stock.keys()
    assert [path for path in stock if now[path] != stock[path]] == CHANGED
    assert {now[path][1] for path in CHANGED} == {stock[path][1] for path in CHANGED}
    assert patch("revert", folder).code == 0
    assert contents(folder) == stock


def test_lines_are_few() -> None:
    text = (REPO / "patches" / "llava-plugins.patch").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("+++", "---"))]
    assert sum(line.startswith("+") for line in lines) <= 7
    assert not any(line.startswith("-") for line in lines)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_applies_the_same(tmp_path: Path) -> None:
    ours, gits = (copied("wheel", tmp_path / name) for name in ("ours", "git"))
    assert patch("apply", ours).code == 0
    file = REPO / "patches" / "llava-plugins.patch"
    command = ["git", "apply", str(file)]
    # Below another repository git would take the paths for that one's and apply nothing.
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    subprocess.run(command, cwd=gits, env=outside, check=True)
    assert contents(gits) == contents(ours)


@pytest.mark.parametrize("changed", CHANGED)
@pytest.mark.parametrize("first", ["stock", "patched"])
def test_a_file_that_is_not_llavas_own_is_left_alone(
    changed: str, first: str, tmp_path: Path
) -> None:
    folder = copied("wheel", tmp_path)
    if first == "patched":
        patch("apply", folder)
    with (folder / changed).open("a") as file:
        file.write("# mine\n")
    before = contents(folder)
    for action in ("check", "apply", "revert"):
        done = patch(action, folder)
        assert done.code == 2
        assert f"{changed} is not the file of llava-torch 1.2.2.post1" in done.errors
        assert "Nothing was changed" in done.errors
    assert contents(folder) == before


def test_another_llava_with_the_same_two_files_is_named_as_such(tmp_path: Path) -> None:
    folder = copied("wheel", tmp_path)
    (folder / "llava" / "model" / "builder.py").write_text("# a fork's\n")
    assert "builder.py is of no known release, patched" in patch("apply", folder).output


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_a_half_patched_tree_is_completed(action: str, tmp_path: Path) -> None:
    folder = copied("wheel", tmp_path)
    stock = contents(folder)
    patch("apply", folder)
    patched = contents(folder)
    (folder / CHANGED[1]).write_bytes(stock[CHANGED[1]][0])
    assert "half patched" in patch("check", folder).output
    assert patch(action, folder).code == 0
    assert contents(folder) == (patched if action == "apply" else stock)


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_an_error_in_the_middle_leaves_the_tree_as_it_was(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied("wheel", tmp_path)
    if action == "revert":
        patch("apply", folder)
    before, replace, calls = contents(folder), os.replace, []

    def full_disk(old: str, new: Path) -> None:
        calls.append(new)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", full_disk)
    done = patch(action, folder)
    assert done.code == 2
    assert "No space left on device" in done.errors
    assert calls[0] == calls[2]
    assert contents(folder) == before


def test_which_tree(tmp_path: Path) -> None:
    """A checkout in which the script is called, else the one that python imports."""
    folder = copied("wheel", tmp_path / "checkout")
    for cwd, *named in ((folder,), (tmp_path, folder / "llava"), (tmp_path,)):
        done = shell("check", *named, cwd=cwd, PYTHONPATH=str(folder if cwd == tmp_path else ""))
        assert done.stdout.startswith(f"{folder}: "), done.stderr
        assert done.returncode == 1
    nothing = shell("check", tmp_path, cwd=tmp_path)
    assert nothing.returncode == 2
    assert f"{tmp_path} holds no LLaVA source" in nothing.stderr


def test_it_says_whether_this_python_has_a_plugin(tmp_path: Path) -> None:
    folder = copied("wheel", tmp_path / "checkout")
    for plugin, says in ((True, "has the plugins: vlora"), (False, "has no plugin for it")):
        path = str(metadata(tmp_path / str(plugin), plugin))
        done = shell("apply", cwd=folder, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        assert says in done.stdout


def test_setup_declares_the_plugin() -> None:
    assert [entry.name for entry in declared()] == ["vlora"]
    assert callable(declared()[0].load())


# --- LLaVA's own scripts in a patched tree ---------------------------------------------------------


@pytest.fixture(scope="module", params=TREES)
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched tree."""
    folder = copied(request.param, tmp_path_factory.mktemp(request.param))
    assert patch("apply", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """What makes the plugin known to LLaVA, and what hides it also where it is installed."""
    return {on: metadata(tmp_path_factory.mktemp("site"), on) for on in (True, False)}


def starts(llm: Path, tower: Path, root: Path) -> dict[str, Path]:
    """Files of projectors to start from, for LLaVA's trainer draws a new one without a seed."""
    layers = [torch.nn.Linear(32, 64), torch.nn.Linear(64, 64)]
    parts = {"vlora": make_vlora(llm, tower).generator, "mlp": torch.nn.Sequential(*layers)}
    names = {"vlora": {}, "mlp": {"1.weight": "2.weight", "1.bias": "2.bias"}}
    found = {}
    for kind, part in parts.items():
        found[kind] = root / f"start-{kind}" / "mm_projector.bin"
        found[kind].parent.mkdir()
        state = {names[kind].get(k, k): v for k, v in part.state_dict().items()}
        torch.save({f"model.mm_projector.{k}": v for k, v in state.items()}, found[kind])
    return found


class Runs:
    """Runs of LLaVA in trees, with their checkpoints in one folder."""

    def __init__(self, llm: Path, tower: Path, data: Path, root: Path, site: Any) -> None:
        self.llm, self.tower, self.data, self.root, self.site = llm, tower, data, root, site
        self.starts = starts(llm, tower, root)
        self.count = 0

    def flags(self, kind: str, **more: object) -> tuple[Path, list[str]]:
        """Where stage 1 writes, and the trainer's command line."""
        self.count += 1
        out = self.root / f"llava-{kind}-{self.count}"
        more = {"pretrain_mm_mlp_adapter": self.starts[kind], "mm_vision_dtype": "float32", **more}
        given = (self.llm, self.tower, self.data, out, KINDS[kind])
        return out, training_command("pretrain", *given, **more)

    def python(self, tree: Path, *arguments: object, plugin: bool = True) -> Finished:
        """Run the interpreter in ``tree``, with nothing between it and LLaVA's file."""
        path = os.pathsep.join(map(str, (tree, self.site[plugin], REPO)))
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=environment(PYTHONPATH=path),
            cwd=tree,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def train(self, tree: Path, *program: str, kind: str = "vlora", **more: Any) -> Trained:
        """Stage 1 by this program."""
        plugin = more.pop("plugin", True)
        out, flags = self.flags(kind, **more)
        done = self.python(tree, *program, *flags, plugin=plugin)
        assert done.code == 0, done.errors[-3000:]
        return Trained(done, out)

    def evaluation(self, out: Path, answers: Path) -> list[object]:
        """The command line of LLaVA's evaluator."""
        questions = self.root / "questions.jsonl"
        asked = {"question_id": 7, "image": "0.png", "text": "What colour is the image?"}
        questions.write_text(json.dumps(asked) + "\n")
        flags = {
            "model-path": out,
            "model-base": self.llm,
            "image-folder": self.data / "images",
            "question-file": questions,
            "answers-file": answers,
            "conv-mode": "vicuna_v1",
            "temperature": 0,
            "max_new_tokens": 8,
        }
        return [part for name, value in flags.items() for part in (f"--{name}", value)]


class Trained:
    """A training run that has ended well."""

    def __init__(self, done: Finished, out: Path) -> None:
        self.losses, self.errors, self.out = done.losses(), done.errors, out
        assert len(self.losses) == 3

    def projector(self) -> dict[str, torch.Tensor]:
        return torch.load(self.out / "mm_projector.bin", weights_only=True)  # type: ignore[no-any-return]

    def equals(self, other: Trained) -> None:
        assert self.losses == other.losses
        mine, its = self.projector(), other.projector()
        assert mine.keys() == its.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, its[name], rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def runs(
    llm_dir: Path,
    tower_dir: Path,
    data_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    installed: dict[bool, Path],
) -> Runs:
    return Runs(llm_dir, tower_dir, data_dir, tmp_path_factory.mktemp("runs"), installed)


@pytest.fixture(scope="module")
def launched(runs: Runs) -> dict[str, Trained]:
    """The same stage 1 of the unpatched LLaVA, under the launcher."""
    commands, folders = {}, {}
    for kind in KINDS:
        folders[kind], flags = runs.flags(kind)
        commands[kind] = ["llava.train.train", *flags]
    finished = succeeded(run_modules(commands, runs.root))
    return {kind: Trained(finished[kind], folders[kind]) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        ["llava/train/train_mem.py"],
        ["llava/train/train.py"],
        ["-m", "llava.train.train"],
        ["-W", "error::RuntimeWarning", "-mllava.train.train"],
        ["-m", "llava_vlora.run", "llava.train.train"],
    ],
    ids=" ".join,
)
def test_training_is_that_of_the_launcher(
    program: list[str], tree: Path, runs: Runs, launched: dict[str, Trained]
) -> None:
    done = runs.train(tree, *program)
    done.equals(launched["vlora"])
    assert "found in sys.modules" not in done.errors  # what -m says of a module imported before
    config = json.loads((done.out / "config.json").read_text())
    assert config["mm_projector_type"] == "vlora"


#: What stands for threads that abort an interpreter which shuts down, in each process that torchrun starts.
_ABORTS = """
import atexit, os
if "RANK" in os.environ:
    atexit.register(os.abort)
"""


@pytest.fixture
def aborting(tree: Path) -> Iterator[None]:
    """Processes that can only end without the interpreter's shutdown."""
    file = tree / "sitecustomize.py"
    file.write_text(_ABORTS)
    yield
    file.unlink()


@pytest.mark.slow
@pytest.mark.usefixtures("aborting")
def test_torchrun_trains_two_processes(tree: Path, runs: Runs) -> None:
    """Both ways to start end with code 0 once the work is done, whatever a thread does as the interpreter ends."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    patched = runs.train(tree, *launch, "llava/train/train_mem.py")
    patched.equals(runs.train(tree, *launch, "-m", "llava_vlora.run", "llava.train.train"))


@pytest.mark.slow
def test_a_stock_projector_is_trained_as_before(
    tree: Path, runs: Runs, launched: dict[str, Trained]
) -> None:
    runs.train(tree, "llava/train/train_mem.py", kind="mlp").equals(launched["mlp"])


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("4.38"),
    reason="LLaVA without the plugin trains with its own release of transformers only",
)
def test_without_a_plugin_the_patch_changes_nothing(tree: Path, runs: Runs, tmp_path: Path) -> None:
    flags = {"kind": "mlp", "plugin": False, "mm_vision_dtype": None}
    stock = runs.train(copied("wheel", tmp_path), "llava/train/train.py", **flags)
    runs.train(tree, "llava/train/train.py", **flags).equals(stock)


@pytest.fixture(scope="module")
def answers(runs: Runs, launched: dict[str, Trained]) -> dict[str, str]:
    """What each model answers under the launcher."""
    files = {kind: runs.root / f"{kind}.jsonl" for kind in launched}
    commands = {
        kind: ["llava.eval.model_vqa_loader", *runs.evaluation(launched[kind].out, file)]
        for kind, file in files.items()
    }
    succeeded(run_modules(commands, runs.root))
    return {kind: json.loads(file.read_text())["text"] for kind, file in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "program"),
    [
        ("vlora", ["-m", "llava.eval.model_vqa_loader"]),
        ("vlora", ["llava/eval/model_vqa_loader.py"]),
        ("mlp", ["-m", "llava.eval.model_vqa_loader"]),
    ],
)
def test_evaluation_is_that_of_the_launcher(
    kind: str,
    program: list[str],
    tree: Path,
    runs: Runs,
    launched: dict[str, Trained],
    answers: dict[str, str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "answers.jsonl"
    done = runs.python(tree, *program, *runs.evaluation(launched[kind].out, file))
    assert done.code == 0, done.errors[-3000:]
    assert json.loads(file.read_text())["text"] == answers[kind]
    assert any(answers.values())


@pytest.mark.slow
def test_a_mistake_ends_with_one_message(tree: Path, runs: Runs) -> None:
    _, flags = runs.flags("vlora", vlora_rank=0)
    done = runs.python(tree, "llava/train/train.py", *flags)
    assert done.code == 2
    assert "ConfigError: " in done.errors
    assert "vlora_rank" in done.errors
    assert "Traceback" not in done.errors


_IMPORTED = """
import sys, torch
before = sys.excepthook, torch.Tensor.to
import llava, llava.model.builder
from llava.train import train
assert before == (sys.excepthook, torch.Tensor.to)
flags = train.ModelArguments.__dataclass_fields__
print("vlora_rank" in flags, llava.model.builder.load_pretrained_model.__module__)
"""


@pytest.mark.slow
def test_a_program_that_imports_llava_gets_the_projector_and_nothing_else(
    tree: Path, runs: Runs
) -> None:
    found = runs.python(tree, "-c", _IMPORTED)
    assert found.output.split()[-2:] == ["True", "llava_vlora.integration.loading"], found.errors
    done = runs.python(tree, "-c", f"import llava_vlora; llava_vlora.register()\n{_IMPORTED}")
    assert done.output.split()[-2:] == found.output.split()[-2:], done.errors
    inner = "import llava_vlora.integration.causal, llava_vlora; llava_vlora.register()"
    done = runs.python(tree, "-c", f"{inner}\n{_IMPORTED}")
    assert done.output.split()[-2:] == found.output.split()[-2:], done.errors
    code = "import sys, llava; print('llava_vlora' in sys.modules)"
    hidden = runs.python(tree, "-c", code, plugin=False)
    assert hidden.output.split()[-1] == "False", hidden.errors
