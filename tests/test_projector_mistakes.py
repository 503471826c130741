"""Mistakes about which projector a run has: each ends LLaVA's trainer with one message, before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_vlora.cli import main
from tests.tiny import GENERATOR_FLAGS, IMAGE_SIZE, PATCH, training_command
from tests.two_stacks import Finished, run_modules, train_all, train_fast, trained

pytestmark = pytest.mark.slow

#: Name of a run -> what its message must say.
MISTAKES = {
    "unknown": ["ConfigError", "'vlora-fast' is unknown", "'vlora', 'vlora_fast'", "'mlp2x_gelu'"],
    "paper-flag": ["ConfigError", "vlora_fast has no setting '--vlora_rank'", "'--vlora_window'"],
    "fast-flag": ["ConfigError", "vlora has no setting '--vlora_gate'", "'--vlora_rank'"],
    "paper-into-fast": [
        "CheckpointError",
        "mm_projector.bin",
        "vlora, and this run has vlora_fast",
    ],
    "fast-into-paper": [
        "CheckpointError",
        "mm_projector.bin",
        "vlora_fast, and this run has vlora.",
    ],
    "mlp-into-fast": ["CheckpointError", "mlp2x_gelu, and this run has vlora_fast"],
    "fast-into-mlp": ["CheckpointError", "vlora_fast, and this run has mlp2x_gelu"],
    "nameless": ["CheckpointError", "does not fit this model", "--mm_projector_type"],
    "model-as-other": [
        "ConfigError",
        "--mm_projector_type vlora_fast, the command line asks for vlora",
    ],
    "window": ["ConfigError", "vlora_window 1 is smaller than vlora_stride 2"],
    "features": ["FeaturesError", "vision_tower", "openai-clip-wide", "openai-clip-tiny"],
}


@pytest.fixture(scope="module")
def refused(
    llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, Finished]]:
    """Runs with one mistake each."""
    place = (llm_dir, tower_dir, data_dir)
    train_all(*place)
    train_fast(*place)
    folder, out = tmp_path_factory.mktemp("projectors"), trained(data_dir)
    start = {s: out / f"{s}-pretrain" / "mm_projector.bin" for s in ("vlora", "fast", "mlp")}
    (folder / "nameless").mkdir()
    shutil.copy(start["fast"], folder / "nameless")
    unsaid = {kind: dict.fromkeys(flags) for kind, flags in GENERATOR_FLAGS.items()}
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        "unknown": ("vlora-fast", {}),
        "paper-flag": ("vlora_fast", {"vlora_rank": 4}),
        "fast-flag": ("vlora", {"vlora_gate": False}),
        "paper-into-fast": ("vlora_fast", {"pretrain_mm_mlp_adapter": start["vlora"]}),
        "fast-into-paper": ("vlora", {"pretrain_mm_mlp_adapter": start["fast"]}),
        "mlp-into-fast": ("vlora_fast", {"pretrain_mm_mlp_adapter": start["mlp"]}),
        "fast-into-mlp": ("mlp2x_gelu", {"pretrain_mm_mlp_adapter": start["fast"]}),
        "nameless": (
            "vlora",
            {"pretrain_mm_mlp_adapter": folder / "nameless" / start["fast"].name},
        ),
        "model-as-other": (
            "vlora",
            {"model_name_or_path": out / "fast-finetune", **unsaid["vlora"]},
        ),
        "window": ("vlora_fast", {"vlora_window": 1, "vlora_stride": 2}),
        "features": ("vlora_fast", {"vlora_features": wide_features(tower_dir, data_dir, folder)}),
    }
    commands = {
        name: [
            "llava.train.train",
            *training_command("finetune", *place, folder / f"out-{name}", kind, **more),
        ]
        for name, (kind, more) in runs.items()
    }
    return folder, run_modules(commands, folder)


def wide_features(tower: Path, data: Path, folder: Path) -> Path:
    """Features of a tower with as many patches, but of another width."""
    wide = folder / "openai-clip-wide"
    shutil.copytree(tower, wide)
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    CLIPVisionModel(config).save_pretrained(wide)
    command = ["features", str(data / "finetune.json"), "--image-folder", str(data / "images")]
    command += ["--vision-tower", str(wide), "--image-aspect-ratio", "pad"]
    assert (
        main([*command, "--device", "cpu", "--dtype", "float32", "--out", str(folder / "features")])
        == 0
    )
    return folder / "features"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_ends_in_one_message_before_the_first_step(
    refused: tuple[Path, Mapping[str, Finished]], mistake: str
) -> None:
    folder, results = refused
    done = results[mistake]
    assert done.code == 2, done.errors[-3000:]
    assert "Traceback" not in done.errors
    message = done.errors.strip().splitlines()[-1]
    for part in MISTAKES[mistake]:
        assert part in message, message
    assert not done.losses()
    written = folder / f"out-{mistake}"
    assert not written.exists() or not [f for f in written.rglob("*") if f.is_file()]
