"""Stored vision features: what training would compute, whole after any interruption, refused where they do not fit."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel

from llava_vlora.cache import PerceptionCache
from llava_vlora.cli import main
from llava_vlora.data.feature_writer import check_space, writing
from llava_vlora.data.features import Features
from llava_vlora.data.sizes import parse_size, size_text
from llava_vlora.errors import ConfigError, FeaturesError, ImageError
from llava_vlora.integration.extraction import (
    Options,
    TowerSettings,
    extract,
    leave_quietly,
    open_tower,
    recipe_of,
)
from tests.test_llava_generation import pictures, prompt
from tests.tiny import IMAGE_SIZE, make_vlora, trainer, training_command
from tests.two_stacks import (
    Finished,
    environment,
    run_modules,
    run_processes,
    save_noise,
    succeeded,
)

RECORD = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
TEXT = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "red"}]
ROW = 16 * 32 * 4  # bytes of an image's features in float32


def noise(path: Path, width: int, height: int, seed: int, mode: str = "RGB") -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images of several shapes and kinds, one shown by two records, and a record of text alone."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    noise(images / "wide.png", 90, 40, 0)
    noise(images / "sub/tall.jpg", 50, 120, 1)
    noise(images / "grey.png", 64, 64, 2, "L")
    noise(images / "palette.gif", 70, 60, 3, "P")
    names = ["wide.png", "sub/tall.jpg", None, "grey.png", "palette.gif", "wide.png"]
    write(tmp_path / "data.json", names)
    return tmp_path


def write(file: Path, names: list[str | None]) -> Path:
    records = [
        {
            "id": f"r{i}",
            "conversations": RECORD if name else TEXT,
            **({"image": name} if name else {}),
        }
        for i, name in enumerate(names)
    ]
    file.write_text(json.dumps(records))
    return file


Make = Callable[..., int]


@pytest.fixture
def make(data: Path, tower_dir: Path) -> Make:
    """Runs the command over the data; a flag that is None is left out."""

    def run(*flags: str, **changes: object) -> int:
        given = {
            "--image-folder": data / "images",
            "--vision-tower": tower_dir,
            "--out": data / "features",
            "--dtype": "float32",
            "--image-aspect-ratio": "pad",
            "--workers": 0,
            **{f"--{name.replace('_', '-')}": value for name, value in changes.items()},
        }
        file = given.pop("--file", data / "data.json")
        words = [str(w) for name, v in given.items() if v is not None for w in (name, v)]
        return main(["features", str(file), *words, *flags])

    return run


def dataset(model: Any, data: Path, llm: Path, **changes: Any) -> Any:
    """LLaVA's data set, as its trainer makes it for a model."""
    arguments = SimpleNamespace(
        image_folder=str(data / "images"),
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
        image_processor=model.get_vision_tower().image_processor,
    )
    vars(arguments).update(changes)
    tokenizer = AutoTokenizer.from_pretrained(llm, use_fast=False, model_max_length=256)
    tokenizer.pad_token = tokenizer.unk_token
    return trainer().LazySupervisedDataset(str(data / "data.json"), tokenizer, arguments)


def samples(found: Any) -> list[dict[str, Tensor]]:
    return [found[i] for i in range(len(found))]


def batch_of(found: Any) -> dict[str, Tensor]:
    collate = trainer().DataCollatorForSupervisedDataset(tokenizer=found.tokenizer)
    return dict(collate(samples(found)))


def failing(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    return capsys.readouterr().err


# --- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["square", "pad"])
@pytest.mark.parametrize(("layer", "select"), [(-2, "patch"), (-1, "cls_patch")])
def test_features_are_those_of_transformers_tower_on_llavas_own_samples(
    ratio: str, layer: int, select: str, make: Make, data: Path, llm_dir: Path, tower_dir: Path
) -> None:
    flags = {"image_aspect_ratio": ratio, "mm_vision_select_layer": layer}
    assert make(**flags, mm_vision_select_feature=select) == 0
    stock = dataset(make_vlora(llm_dir, tower_dir), data, llm_dir, image_aspect_ratio=ratio)
    tower = CLIPVisionModel.from_pretrained(tower_dir)
    features = Features(data / "features")
    for i, sample in enumerate(stock):
        with torch.no_grad():
            states = tower(sample["image"][None], output_hidden_states=True).hidden_states[layer][0]
        expected = states[1:] if select == "patch" else states
        found = features.read(stock.list_data_dict[i].get("image"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert found.std() > 0.1
        if i == len(stock) - 1:
            break


def test_reading_processes_and_batches_change_nothing(make: Make, data: Path) -> None:
    names = [f"{i}.png" for i in range(70)]
    for i, name in enumerate(names):
        noise(data / "images" / name, 40 + i, 60, i)
    write(data / "data.json", [*names])
    assert make(out=data / "one", batch_size=1) == 0
    assert make(out=data / "two", workers=2, batch_size=8, shard_size=f"{ROW * 9 / 1000}kB") == 0
    one, two = Features(data / "one"), Features(data / "two")
    assert [len(shard.images) for shard in two.index.shards] == [9] * 7 + [8]
    for name in (None, *names):
        torch.testing.assert_close(two.read(name), one.read(name), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_is_the_rounded_number(
    dtype: str, tolerance: float, make: Make, data: Path
) -> None:
    assert make(dtype=dtype, out=data / "half") == 0
    assert make() == 0
    half, whole = Features(data / "half"), Features(data / "features")
    for name in (None, "wide.png", "grey.png"):
        assert half.read(name).dtype is getattr(torch, dtype)
        torch.testing.assert_close(
            half.read(name).float(), whole.read(name), rtol=tolerance, atol=1e-6
        )


def test_loss_and_gradients_are_those_of_pixels(
    kind: str, make: Make, data: Path, llm_dir: Path, tower_dir: Path
) -> None:
    """A batch with and without images, through LLaVA's collator and DataLoader workers."""
    assert make() == 0
    losses, gradients = [], []
    for folder in (None, str(data / "features")):
        torch.manual_seed(0)  # the queries
        model = make_vlora(llm_dir, tower_dir, kind, vlora_features=folder).train()
        found = dataset(model, data, llm_dir)
        collate = trainer().DataCollatorForSupervisedDataset(tokenizer=found.tokenizer)
        batch = next(iter(DataLoader(found, len(found), collate_fn=collate, num_workers=2)))
        assert batch["images"].shape[1:] == ((1, 16, 32) if folder else (3, 56, 56))
        if folder:  # nothing can be computed from pixels here
            model.get_vision_tower().forward = None
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.generator.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert all(gradient.any() for name, gradient in gradients[0].items() if gradient.ndim > 1)
    for name, gradient in gradients[0].items():
        # How a sum is rounded depends on the number of images that the tower gets at a time.
        atol = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=atol, msg=name)


def test_text_of_a_sample_is_that_of_stock_llava(
    make: Make, data: Path, llm_dir: Path, tower_dir: Path
) -> None:
    assert make() == 0
    stock, found = (
        samples(dataset(make_vlora(llm_dir, tower_dir, vlora_features=f), data, llm_dir))
        for f in (None, str(data / "features"))
    )
    for one, other in zip(stock, found, strict=True):
        assert one.keys() == other.keys()
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["labels"], other["labels"])


def test_features_serve_for_images_in_generation_and_pass_a_cache(
    make: Make, data: Path, llm_dir: Path, tower_dir: Path
) -> None:
    assert make() == 0
    model = make_vlora(llm_dir, tower_dir)
    pixels, stored = dataset(model, data, llm_dir)[0]["image"][None], Features(data / "features")
    model.perception_cache = PerceptionCache()
    options = {"max_new_tokens": 8, "do_sample": False}
    answers = [
        model.generate(prompt(), images=images, **options)
        for images in (pixels, stored.read("wide.png")[None, None])
    ]
    assert torch.equal(*answers)
    assert not torch.equal(
        answers[0], model.generate(prompt(), images=stored.read("grey.png")[None, None], **options)
    )


def test_features_of_another_size_are_refused(llm_dir: Path, tower_dir: Path) -> None:
    model = make_vlora(llm_dir, tower_dir)
    with pytest.raises(ImageError, match="16 patches, 32"):
        model.perceive(torch.zeros(2, 1, 16, 31))


def test_first_stage_keeps_no_tower_and_can_still_load_it(
    make: Make, data: Path, llm_dir: Path, tower_dir: Path
) -> None:
    assert make() == 0
    folder = str(data / "features")
    model = make_vlora(llm_dir, tower_dir, vlora_features=folder, tune_mm_mlp_adapter=True)
    assert not list(model.get_vision_tower().parameters())
    with_tower = make_vlora(llm_dir, tower_dir)
    stored = Features(folder).read("wide.png")[None, None]
    model.generator.load_state_dict(with_tower.generator.state_dict())
    found = model(prompt(), images=stored).logits
    assert not model.get_vision_tower().is_loaded
    pixels = dataset(with_tower, data, llm_dir)[0]["image"][None]
    torch.testing.assert_close(model(prompt(), images=pixels).logits, found, rtol=0, atol=1e-4)


def continued(path: Path, tower: Path, features: Path, **config: object) -> Any:
    """A model that training takes up from a folder, set up for stage 1."""
    train = trainer()
    arguments = train.ModelArguments(
        model_name_or_path=str(path),
        vision_tower=str(tower),
        mm_vision_select_layer=-2,
        mm_projector_type="vlora",
        tune_mm_mlp_adapter=True,
        vlora_features=str(features),
    )
    model = train.LlavaLlamaForCausalLM.from_pretrained(str(path))
    model.config.update(config)
    model.get_model().initialize_vision_modules(arguments)
    return model.eval()


def test_checkpoint_is_trained_on_without_its_tower(
    make: Make, data: Path, llm_dir: Path, tower_dir: Path, tmp_path: Path
) -> None:
    assert make() == 0
    before = make_vlora(llm_dir, tower_dir)
    before.generation_config.pad_token_id = 0
    before.save_pretrained(tmp_path / "model")
    model = continued(tmp_path / "model", tower_dir, data / "features")
    assert not list(model.get_vision_tower().parameters())
    stored = Features(data / "features").read("wide.png")[None, None]
    with torch.no_grad():
        expected, found = (m(prompt(), images=stored).logits for m in (before, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_tower_that_was_trained_is_refused(
    make: Make, data: Path, llm_dir: Path, tower_dir: Path
) -> None:
    assert make() == 0
    with pytest.raises(FeaturesError, match="unfreeze_mm_vision_tower"):
        continued(llm_dir, tower_dir, data / "features", unfreeze_mm_vision_tower=True)


# --- whole after any interruption ------------------------------------------------------------------


def test_each_image_is_stored_once(make: Make, data: Path) -> None:
    assert make() == 0
    (shard,) = Features(data / "features").index.shards
    names = ["wide.png", "sub/tall.jpg", "grey.png", "palette.gif"]
    assert [image.name for image in shard.images] == [None, *names]
    path = data / "features" / shard.file
    assert load_file(path)["features"].shape == (5, 16, 32)
    assert path.stat().st_mode == (data / "features" / "index.json").stat().st_mode


def test_killed_run_goes_on(make: Make, data: Path, tower_dir: Path) -> None:
    names = [f"{i}.png" for i in range(400)]
    for name in names:
        shutil.copy(data / "images/wide.png", data / "images" / name)
    write(data / "data.json", [*names])
    words = [data / "data.json", "--image-folder", data / "images", "--vision-tower", tower_dir]
    words += ["--out", data / "features", "--dtype", "float32", "--image-aspect-ratio", "pad"]
    words += ["--shard-size", f"{ROW * 2 / 1000}kB", "--workers", 0, "--batch-size", 2]
    child = subprocess.Popen(
        [sys.executable, "-m", "llava_vlora", "features", *map(str, words)],
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    folder = data / "features"
    end = time.monotonic() + 120
    while len(list(folder.glob("*.safetensors"))) < 5 and time.monotonic() < end:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    journal = folder / "unfinished.jsonl"
    complete = [json.loads(line)["file"] for line in journal.read_text().split("\n")[1:-1]]
    assert 3 <= len(complete) < 200
    with pytest.raises(FeaturesError, match="not finished"):
        Features(folder)
    # What a kill may leave besides: half a line, half a shard, a shard that no line knows.
    with journal.open("a") as file:
        file.write('{"file": "features-00099.safe')
    (folder / "features-00099.safetensors.part").write_bytes(b"half")
    (folder / f"features-{len(complete) + 1:05d}.safetensors").write_bytes(b"unknown")
    before = {name: (folder / name).stat().st_mtime_ns for name in complete}
    assert make(shard_size=f"{ROW * 50 / 1000}kB") == 0
    assert before == {name: (folder / name).stat().st_mtime_ns for name in complete}
    assert not [f for f in folder.iterdir() if f.suffix in (".part", ".jsonl")]
    features = Features(folder)
    assert len(features) == 400
    same = [features.read(f"{i}.png") for i in range(400)]
    torch.testing.assert_close(torch.stack(same), same[0].expand(400, 16, 32), rtol=0, atol=1e-5)
    assert make("--verify") == 0


def test_interrupt_ends_at_once_and_leaves_no_process(data: Path, tower_dir: Path) -> None:
    noise(data / "images/0.png", 300, 300, 0)
    for i in range(1, 300):
        shutil.copy(data / "images/0.png", data / "images" / f"{i}.png")
    write(data / "data.json", [f"{i}.png" for i in range(300)])
    words = [data / "data.json", "--image-folder", data / "images", "--vision-tower", tower_dir]
    words += ["--out", data / "features", "--workers", 2, "--batch-size", 4]
    words += ["--shard-size", f"{ROW * 4 / 1000}kB"]
    child = subprocess.Popen(
        [sys.executable, "-m", "llava_vlora", "features", *map(str, words)],
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # A background job of a shell ignores interrupts, and its children would.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 120
    while not list((data / "features").glob("*.safetensors")) and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


Advance = Callable[[int, dict[str, str]], object]


@pytest.fixture
def extraction(data: Path, tower_dir: Path) -> Iterator[Callable[[Advance], dict[str, str]]]:
    """Reads twelve images in two processes, three at a time."""
    names = [f"{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        noise(data / "images" / name, 60, 60, i)
    tower = open_tower(TowerSettings(str(tower_dir)))
    options = Options(data / "images", torch.device("cpu"), batch_size=3, workers=2)
    recipe = recipe_of(tower, "pad", "float32")
    with writing(data / "features", recipe, ROW * 100) as writer:
        yield lambda advance: extract(tower, names, writer, options, advance)


def test_interrupt_ends_the_readers_before_it_goes_on(
    extraction: Callable[[Advance], object],
) -> None:
    """Not when the last reference to them goes, which the traceback still has here."""
    readers = []

    def interrupt(count: int, faults: dict[str, str]) -> None:
        readers.extend(multiprocessing.active_children())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        extraction(interrupt)
    assert raised.tb is not None
    assert [reader.is_alive() for reader in readers] == [False, False]


def test_interrupt_while_readers_start_ends_them_too(
    extraction: Callable[[Advance], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, readers = DataLoader.__iter__, []

    def interrupted(loader: DataLoader[Any]) -> Any:
        found = start(loader)
        readers.extend(multiprocessing.active_children())
        signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(DataLoader, "__iter__", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        extraction(lambda count, faults: pytest.fail("nothing was read yet"))
    assert raised.tb is not None
    assert [reader.is_alive() for reader in readers] == [False, False]


def test_readers_never_get_an_interrupt(extraction: Callable[[Advance], dict[str, str]]) -> None:
    """A terminal's goes to all processes; this one decides what it means."""
    counts = []

    def interrupt(count: int, faults: dict[str, str]) -> None:
        counts.append(count)
        for reader in multiprocessing.active_children():
            os.kill(reader.pid or 0, signal.SIGINT)

    assert extraction(interrupt) == {}
    assert counts == [3, 3, 3, 3]


def test_readers_say_nothing_of_a_parent_that_fetches_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: told.append(error[0]))
    leave_quietly(0)
    for kind in (ConnectionResetError, BrokenPipeError, EOFError, OSError, ValueError):
        sys.excepthook(kind, kind(), None)
    assert told == [OSError, ValueError]


def test_another_data_file_adds_its_images(make: Make, data: Path) -> None:
    assert make() == 0
    old = (data / "features/features-00001.safetensors").stat().st_mtime_ns
    noise(data / "images/new.png", 30, 30, 9)
    assert make(file=write(data / "more.json", ["new.png", "grey.png"])) == 0
    features = Features(data / "features")
    assert (data / "features/features-00001.safetensors").stat().st_mtime_ns == old
    assert [i.name for i in features.index.shards[1].images] == ["new.png"]
    assert len(features) == 5
    assert "wide.png" in features


def test_changed_image_is_noticed_and_made_again(
    make: Make, data: Path, llm_dir: Path, tower_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make() == 0
    before = Features(data / "features").read("wide.png")
    noise(data / "images/wide.png", 91, 40, 7)
    model = make_vlora(llm_dir, tower_dir, vlora_features=str(data / "features"))
    with pytest.raises(ImageError, match=r"wide\.png has \d+ bytes.*record 0 \(id 'r0'\)"):
        dataset(model, data, llm_dir)[0]
    assert make("--verify") == 1
    assert "wide.png has" in capsys.readouterr().out
    assert make() == 0
    features = Features(data / "features")
    assert not torch.equal(features.read("wide.png"), before)
    assert [i.name for i in features.index.shards[1].images] == ["wide.png"]
    assert make("--verify") == 0


def test_contents_of_the_same_size_are_compared_where_the_time_differs(
    make: Make, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make() == 0
    path = data / "images/palette.gif"
    os.utime(path, ns=(1, 1))  # copied, say
    assert make() == 0
    assert len(Features(data / "features").index.shards) == 1
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert make("--verify") == 1
    assert "palette.gif has other contents" in capsys.readouterr().out
    assert make() == 0
    assert [i.name for i in Features(data / "features").index.shards[1].images] == ["palette.gif"]


def test_images_may_be_gone_when_features_are_there(
    make: Make, data: Path, llm_dir: Path, tower_dir: Path
) -> None:
    assert make() == 0
    shutil.rmtree(data / "images")
    model = make_vlora(llm_dir, tower_dir, vlora_features=str(data / "features"))
    assert batch_of(dataset(model, data, llm_dir))["images"].shape == (6, 1, 16, 32)
    assert make("--verify") == 0


def test_damaged_shard_is_noticed_row_by_row_and_made_again(
    make: Make, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make() == 0
    path = data / "features/features-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the last row
    path.write_bytes(content)
    features = Features(data / "features")
    features.read("wide.png")
    with pytest.raises(FeaturesError, match=r"row 4, palette\.gif, does not have its checksum"):
        features.read("palette.gif")
    assert make("--verify") == 1
    assert "does not have its checksum" in capsys.readouterr().out
    path.unlink()
    with pytest.raises(FeaturesError, match=r"features-00001\.safetensors is missing"):
        Features(data / "features")
    assert make() == 0
    assert "5 images are made again" in capsys.readouterr().out
    assert make("--verify") == 0


def test_cut_shard_is_noticed_at_once(make: Make, data: Path) -> None:
    assert make() == 0
    path = data / "features/features-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FeaturesError, match="cut off"):
        Features(data / "features")


def test_damaged_index_is_named(make: Make, data: Path) -> None:
    assert make() == 0
    index = data / "features/index.json"
    whole = index.read_text()
    for text, said in (
        (whole[:-9], "cannot be read"),
        (whole.replace('"version": 1', '"version": 2'), "version 2"),
        ("[]", "format None"),
        (whole.replace('"blake2b"', '"blake3"'), "incomplete or damaged"),
    ):
        index.write_text(text)
        with pytest.raises(FeaturesError, match=said):
            Features(index.parent)
    index.unlink()
    with pytest.raises(FeaturesError, match=r"has no index\.json"):
        Features(index.parent)


# --- what is refused -------------------------------------------------------------------------------


def test_unreadable_images_are_all_named_and_can_be_left_out(
    make: Make, data: Path, llm_dir: Path, tower_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "images/grey.png").write_text("<html>404</html>")
    tall = data / "images/sub/tall.jpg"
    tall.write_bytes(tall.read_bytes()[:-600])
    said = failing(capsys, make())
    assert "2 of 4 images cannot be read" in said
    assert "grey.png: no image format that PIL knows" in said
    assert "tall.jpg: image file is truncated" in said
    assert make("--skip-broken") == 1
    assert "Left out, 2 images" in capsys.readouterr().out
    model = make_vlora(llm_dir, tower_dir, vlora_features=str(data / "features"))
    with pytest.raises(
        FeaturesError, match=r"tall\.jpg of record 1 \(id 'r1'\).*left out.*truncated"
    ):
        dataset(model, data, llm_dir)


def test_missing_images_are_told_before_the_work(
    make: Make, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "images/grey.png").unlink()
    said = failing(capsys, make())
    assert "1 of 4 images are not in" in said
    assert "grey.png" in said
    assert not list((data / "features").glob("*.safetensors"))
    assert "4 of 4 images are not in" in failing(capsys, make("--skip-broken", image_folder=data))
    assert make("--skip-broken") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_tower": None}, "--vision-tower"),
        ({"vision_tower": "nowhere"}, "nowhere"),
        ({"image_folder": "nowhere"}, "--image-folder nowhere is not a folder"),
        ({"mm_vision_select_layer": -9}, "layers -4 to 3"),
        ({"device": "cuda"}, "no GPU"),
        ({"file": "nowhere.json"}, "nowhere.json cannot be read"),
    ],
)
def test_mistakes_are_named(
    changes: dict[str, Any], said: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert said in failing(capsys, make(**changes))


def test_record_without_one_file_name_is_named(
    make: Make, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "data.json").write_text(json.dumps([{"id": "x", "image": [], "conversations": TEXT}]))
    assert "Record 0 (id 'x')" in failing(capsys, make())


def test_features_of_two_kinds_are_not_mixed(
    make: Make, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make() == 0
    said = failing(capsys, make(dtype="float16", image_aspect_ratio="square"))
    assert "image_aspect_ratio pad / square; dtype float32 / float16" in said


def test_two_runs_do_not_write_to_one_folder(make: Make, data: Path) -> None:
    assert make() == 0
    recipe = Features(data / "features").recipe
    with (
        writing(data / "features", recipe, 100),
        pytest.raises(FeaturesError, match="Another process"),
        writing(data / "features", recipe, 100),
    ):
        pass


def test_full_disk_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(FeaturesError, match=r"needs 1\.0 PB, but .* are free"):
        check_space(tmp_path / "not/yet", 10**15)
    assert check_space(tmp_path / "not/yet", 1) > 1


def test_overflow_of_float16_is_named(
    make: Make, tower_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = CLIPVisionModel.from_pretrained(tower_dir)
    layer = tower.vision_model.encoder.layers[0].mlp.fc2
    torch.nn.init.constant_(layer.bias, 1e5)
    loud = tmp_path / "openai-loud"
    tower.save_pretrained(loud)
    CLIPImageProcessor.from_pretrained(tower_dir).save_pretrained(loud)
    assert "overflow float16" in failing(capsys, make(vision_tower=loud, dtype="float16"))


def test_moved_tower_in_another_format_is_the_same_and_other_weights_are_not(
    make: Make, data: Path, tower_dir: Path, llm_dir: Path, tmp_path: Path
) -> None:
    assert make() == 0
    moved, other = tmp_path / "openai-moved", tmp_path / "openai-other"
    tower = CLIPVisionModel.from_pretrained(tower_dir)
    for folder in (moved, other):
        folder.mkdir()
        tower.config.save_pretrained(folder)
        CLIPImageProcessor.from_pretrained(tower_dir).save_pretrained(folder)
    torch.save(tower.state_dict(), moved / "pytorch_model.bin")
    tower.vision_model.post_layernorm.bias.data[0] += 1
    tower.save_pretrained(other)
    dataset(make_vlora(llm_dir, moved, vlora_features=str(data / "features")), data, llm_dir)
    model = make_vlora(llm_dir, other, vlora_features=str(data / "features"))
    with pytest.raises(
        FeaturesError, match=r"vision_tower \S*openai-clip-tiny\S* \(weights .* / \S*openai-other"
    ):
        dataset(model, data, llm_dir)


def test_features_made_in_another_way_are_refused(
    make: Make, data: Path, tower_dir: Path, llm_dir: Path
) -> None:
    assert make() == 0
    model = make_vlora(
        llm_dir,
        tower_dir,
        vlora_features=str(data / "features"),
        mm_vision_select_layer=-1,
        mm_vision_select_feature="cls_patch",
    )
    with pytest.raises(FeaturesError) as raised:
        dataset(model, data, llm_dir, image_aspect_ratio="square")
    assert (
        "(features / run): mm_vision_select_layer -2 / -1; mm_vision_select_feature patch / cls_patch; "
        "image_aspect_ratio pad / square; patches 16 / 17"
    ) in str(raised.value)


def test_another_image_processor_is_refused(
    make: Make, data: Path, tower_dir: Path, llm_dir: Path
) -> None:
    assert make() == 0
    model = make_vlora(llm_dir, tower_dir, vlora_features=str(data / "features"))
    model.get_vision_tower().image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(FeaturesError, match=r"image_mean.*0\.48.* / .*0\.5, 0\.5"):
        dataset(model, data, llm_dir)


def test_image_without_features_is_named(
    make: Make, data: Path, tower_dir: Path, llm_dir: Path
) -> None:
    assert make() == 0
    write(data / "data.json", ["grey.png", "gone.png"])
    model = make_vlora(llm_dir, tower_dir, vlora_features=str(data / "features"))
    with pytest.raises(
        FeaturesError, match=r"gone\.png of record 1 \(id 'r1'\).*data\.json is not"
    ):
        dataset(model, data, llm_dir)
    assert make("--verify") == 1


def test_flag_is_refused_with_another_projector() -> None:
    with pytest.raises(
        ConfigError, match=r"--vlora_features there is for --mm_projector_type vlora"
    ):
        trainer().ModelArguments(mm_projector_type="mlp2x_gelu", vlora_features="there")


def test_sizes_as_people_write_them() -> None:
    assert [parse_size(t) for t in ("1GB", "512mb", "1.5 kB")] == [10**9, 512 * 10**6, 1500]
    assert size_text(576 * 1024 * 2) == "1.2 MB"
    assert size_text(999) == "999 bytes"
    for text in ("1", "GB", "-1GB", "1 XB", ""):
        with pytest.raises(ValueError):  # noqa: PT011 -- as argparse expects
            parse_size(text)


# --- training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(data_dir: Path, tower_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the training data for both stages, below one folder."""
    folder = tmp_path_factory.mktemp("features")
    for stage, ratio in (("pretrain", "square"), ("finetune", "pad")):
        for dtype in ("float32", "float16"):
            words = [data_dir / f"{stage}.json", "--image-folder", data_dir / "images"]
            words += ["--vision-tower", tower_dir, "--image-aspect-ratio", ratio, "--dtype", dtype]
            words += ["--out", folder / f"{stage}-{dtype}", "--shard-size", "8kB"]
            assert main(["features", *map(str, words)]) == 0
    return folder


#: Run -> its kind of generator: each kind once.
TRAINED = {"pretrain": "vlora", "finetune": "vlora_fast", "lora": "vlora"}


@pytest.fixture(scope="module")
def runs(
    stored: Path,
    llm_dir: Path,
    tower_dir: Path,
    data_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Mapping[str, Finished]]:
    """Both stages and LoRA with images, with features and with halved features; with features, no images."""
    root = tmp_path_factory.mktemp("runs")
    noise = {k: save_noise(llm_dir, tower_dir, root / k, k) for k in TRAINED.values()}
    no_images = root / "no-images"
    no_images.mkdir()
    commands = {}
    for kind in ("pixels", "float32", "float16"):
        for name in ("pretrain", "finetune", "lora"):
            stage = "pretrain" if name == "pretrain" else "finetune"
            more: dict[str, object] = {
                "pretrain_mm_mlp_adapter": noise[TRAINED[name]],
                "mm_vision_dtype": "float32",
                "max_steps": 4,
                "save_steps": 4,
                # Adam divides by the root of tiny second moments, which would magnify rounding.
                "optim": "sgd",
                "learning_rate": 5e-3,
            }
            if name == "lora":
                more |= {"lora_enable": True, "lora_r": 4}
            if kind != "pixels":
                more |= {"vlora_features": stored / f"{stage}-{kind}", "image_folder": no_images}
                more |= {"dataloader_num_workers": 2}
            out = root / f"{kind}-{name}"
            flags = training_command(
                stage, llm_dir, tower_dir, data_dir, out, TRAINED[name], **more
            )
            commands[f"{kind}-{name}"] = ["--seed", 3, "llava.train.train", *flags]
    return root, succeeded(run_modules(commands, root))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune", "lora"])
def test_training_is_the_same(stage: str, runs: tuple[Path, Mapping[str, Finished]]) -> None:
    root, results = runs
    losses = {k: results[f"{k}-{stage}"].losses() for k in ("pixels", "float32", "float16")}
    assert len(losses["pixels"]) == 4
    assert losses["float32"] == pytest.approx(losses["pixels"], abs=1.1e-4)  # four decimals
    assert losses["float16"][0] == pytest.approx(losses["pixels"][0], abs=2e-3)
    # Random models are steep: a step magnifies what rounding does to the gradient.
    assert losses["float16"] == pytest.approx(losses["pixels"], abs=0.1)
    assert "the vision tower does not run" in results[f"float32-{stage}"].errors
    trained = [tensors(root / f"{kind}-{stage}") for kind in ("pixels", "float32")]
    assert trained[0].keys() == trained[1].keys()
    start = torch.load(root / TRAINED[stage] / "mm_projector.bin", weights_only=True)
    moved = {
        name: (trained[0][key] - tensor).abs().max()
        for name, tensor in start.items()
        for key in trained[0]
        if key.endswith(name)
    }
    assert moved.keys() == start.keys()
    assert max(moved.values()) > 2e-5
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=0, atol=1e-5, msg=name)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that a run saved."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    for name in ("mm_projector.bin", "non_lora_trainables.bin"):
        if (folder / name).is_file():
            found |= torch.load(folder / name, weights_only=True)
    assert found
    return found


@pytest.mark.slow
def test_checkpoints_of_features_load_and_answer(
    runs: tuple[Path, Mapping[str, Finished]], llm_dir: Path
) -> None:
    from llava_vlora.integration.api import load

    root, _ = runs
    for stage, base in (("pretrain", str(llm_dir)), ("finetune", None), ("lora", str(llm_dir))):
        logits = []
        for kind in ("pixels", "float32"):
            model = load(str(root / f"{kind}-{stage}"), base, dtype=torch.float32).model
            with torch.no_grad():
                logits.append(model(prompt(), images=pictures(1)).logits)
                blind = model(prompt(slot=None)).logits[:, -1]
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-3)
        assert (logits[1][:, -1] - blind).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_deepspeed_trains_with_features(
    zero: str, stored: Path, llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Two processes; in every fourth sample there is no image."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    losses = []
    for folder in (None, stored / "finetune-float32"):
        more = {"max_steps": 4, "save_strategy": "no", "per_device_train_batch_size": 1}
        more |= {"mm_vision_dtype": "float32", "group_by_modality_length": None}
        more |= {"deepspeed": Path(__file__).parents[1] / "scripts" / f"{zero}.json"}
        flags = training_command(
            "finetune",
            llm_dir,
            tower_dir,
            data_dir,
            tmp_path / "out",
            "vlora",
            vlora_features=folder,
            **more,
        )
        done = run_processes("--seed", 3, "llava.train.train", *flags)
        assert done.code == 0, done.errors[-3000:]
        losses.append(done.losses())
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


@pytest.mark.slow
def test_mistake_ends_training_in_one_message(
    stored: Path, llm_dir: Path, tower_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    place = (llm_dir, tower_dir, data_dir)
    image = shutil.copytree(data_dir, tmp_path / "changed") / "images/0.png"
    Image.new("RGB", (IMAGE_SIZE, 90)).save(image)
    changes: dict[str, dict[str, Any]] = {
        "ratio": {"vlora_features": stored / "pretrain-float32"},
        "nothing": {"vlora_features": tmp_path},
        "mlp": {"vlora_features": stored, "mm_projector_type": "mlp2x_gelu"},
        "changed": {
            "vlora_features": stored / "finetune-float32",
            "image_folder": image.parent,
            "dataloader_num_workers": 1,
        },
    }
    commands = {}
    for name, more in changes.items():
        kind = more.pop("mm_projector_type", "vlora")
        flags = training_command("finetune", *place, tmp_path / f"out-{name}", kind, **more)
        commands[name] = ["llava.train.train", *flags]
    results = run_modules(commands, tmp_path)
    said = {
        "ratio": ["FeaturesError", "image_aspect_ratio square / pad"],
        "nothing": ["FeaturesError", "has no index.json"],
        "mlp": ["ConfigError", "--vlora_features", "mlp2x_gelu"],
        "changed": ["ImageError", "0.png", "record 0 (id '0')", "finetune.json"],
    }
    for name, parts in said.items():
        assert results[name].code == 2, results[name].errors[-3000:]
        assert "Traceback" not in results[name].errors
        for part in parts:
            assert part in results[name].errors.strip().splitlines()[-1]
