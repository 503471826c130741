"""Every kind of problem made for real, found by the command under the right record."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from llava_vlora.cli import main
from llava_vlora.data import pool
from llava_vlora.data.findings import NOTES, PROBLEMS
from llava_vlora.data.images import check_image
from tests.tiny import IMAGE_SIZE, make_tokenizer, trainer

ROOT = Path(__file__).parents[1]
QUESTION = {"from": "human", "value": "<image>\nWhat colour is the image?"}
ANSWER = {"from": "gpt", "value": "red"}


def rec(name: object, *turns: object, **more: object) -> dict[str, Any]:
    return {"id": name, "conversations": list(turns) or [QUESTION, ANSWER], **more}


def say(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


def png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises this size."""

    def block(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(b""))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad images, two of them below another folder."""
    folder = tmp_path_factory.mktemp("data") / "images"
    (folder / "sub").mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8))
    for name in ("good.png", "good.jpg", "sub/good.webp", "../outside.png"):
        noise.save(folder / name)
    for name in ("good.png", "good.jpg"):
        data = (folder / name).read_bytes()
        (folder / name.replace("good", "cut")).write_bytes(data[: len(data) * 3 // 4])
        (folder / name.replace("good", "nearly")).write_bytes(data[: len(data) * 98 // 100])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("<html>404</html>")
    (folder / "bomb.png").write_bytes(png(20000, 20000))
    (folder / "large.png").write_bytes(png(10000, 10000))
    (folder / "link.png").symlink_to("../outside.png")
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer without a model; letters with accents are unknown to it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


Check = Callable[..., tuple[int, dict[str, list[Any]]]]


@pytest.fixture
def check(tmp_path: Path, images: Path) -> Check:
    """Writes records, runs the command, gives its exit code and the ids of each kind."""

    def run(records: list[Any], *flags: object) -> tuple[int, dict[str, list[Any]]]:
        file, report = tmp_path / "data.json", tmp_path / "report.json"
        file.write_text(json.dumps(records))
        more = ["--image-folder", images, "--workers", 1, "--json", report, *flags]
        code = main(["check-data", str(file), *map(str, more)])
        findings = json.loads(report.read_text())["findings"]
        kinds: dict[str, list[Any]] = {}
        for finding in findings:
            record = records[finding["index"]]
            assert finding["id"] == (record.get("id") if isinstance(record, dict) else None)
            kinds.setdefault(finding["kind"], []).append(finding["id"])
        return code, kinds

    return run


GOOD = [
    rec("text", say("human", "How many?"), say("gpt", "red")),
    rec("png", image="good.png"),
    rec("jpg", image="good.jpg"),
    rec("webp", image="sub/good.webp"),
    rec("link", image="link.png"),
    rec("again", image="sub/../good.png"),
    rec("later", say("human", "What?"), ANSWER, QUESTION, ANSWER, image="good.png"),
]
#: id, which says what must be found -> record
BAD = {
    "no-conversations": {"id": "no-conversations"},
    "bad-turn": rec("bad-turn", QUESTION, {"from": "gpt"}, image="good.png"),
    "unknown-role": rec("unknown-role", QUESTION, say("bot", "red"), image="good.png"),
    "first-not-human": rec("first-not-human", ANSWER, say("human", "What?"), ANSWER),
    "role-order": rec("role-order", say("human", "What?"), ANSWER, ANSWER, ANSWER),
    "odd-turns": rec("odd-turns", say("human", "What?")),
    "empty-value": rec("empty-value", QUESTION, say("gpt", " \n"), image="good.png"),
    "bad-image-name": rec("bad-image-name", image=None),
    "several-images": rec("several-images", image=["good.png", "good.jpg"]),
    "no-image-token": rec("no-image-token", say("human", "What?"), ANSWER, image="good.png"),
    "token-without-image": rec("token-without-image"),
    "several-image-tokens": rec(
        "several-image-tokens", say("human", "<image><image> What?"), ANSWER, image="good.png"
    ),
    "image-token-in-answer": rec(
        "image-token-in-answer", say("human", "What?"), say("gpt", "<image>"), image="good.png"
    ),
    "outside-folder": rec("outside-folder", image="sub/../../outside.png"),
    "missing-image": rec("missing-image", image="good.png/gone.png"),
    "not-a-file": rec("not-a-file", image="sub"),
    "empty-image": rec("empty-image", image="empty.png"),
    "unreadable-image": rec("unreadable-image", image="text.png"),
    "huge-image": rec("huge-image", image="bomb.png"),
}
DAMAGED = [rec(name, image=name) for name in ("cut.png", "cut.jpg", "nearly.png", "nearly.jpg")]


# --- findings --------------------------------------------------------------------------------------


def test_good_data_is_clean(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(GOOD) == (0, {})
    assert "7 records: no problems" in capsys.readouterr().out


@pytest.mark.parametrize("kind", BAD)
def test_each_problem_is_found_alone(
    check: Check, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check([*GOOD[:2], BAD[kind], GOOD[2]]) == (1, {kind: [kind]})
    shown = capsys.readouterr().out
    assert f"{kind}: {PROBLEMS[kind]}" in shown
    assert f"record 2 (id {kind})" in shown


def test_a_record_that_is_no_object(check: Check) -> None:
    assert check([GOOD[0], ["no object"]]) == (1, {"not-an-object": [None]})


@pytest.mark.parametrize("quick", [False, True])
def test_damaged_images(check: Check, quick: bool) -> None:
    """Only decoding finds a file that ends too early; a header is enough for all the rest."""
    rest = [BAD["huge-image"], BAD["empty-image"], BAD["unreadable-image"], BAD["missing-image"]]
    found = {record["id"]: [record["id"]] for record in rest}
    if not quick:
        found["truncated-image"] = [record["id"] for record in DAMAGED]
    assert check([*DAMAGED, *rest], *["--quick"] * quick) == (1, found)


def test_large_images_and_duplicate_ids_are_notes(check: Check) -> None:
    records = [rec("a", image="large.png"), *GOOD[:2], GOOD[1], rec(7, *GOOD[0]["conversations"])]
    assert check(records, "--quick") == (0, {"large-image": ["a"], "duplicate-id": ["png"]})
    assert not NOTES.keys() & PROBLEMS.keys()


def test_a_name_that_is_no_path(images: Path) -> None:
    for name in ("a\0b", "\ud800", "x" * 5000):
        fault = check_image(str(images), False, name)
        assert fault is not None
        assert fault[0] == "unreadable-image"


def test_an_image_of_many_records_is_reported_for_each(check: Check) -> None:
    records = [rec(i, image="cut.jpg") for i in range(3)]
    assert check(records) == (1, {"truncated-image": [0, 1, 2]})


def test_worker_processes_find_the_same(check: Check) -> None:
    """More images than one process takes at a time, with a bad one in every chunk."""
    records = []
    for i in range(100):
        name = "cut.jpg" if i % 30 == 7 else "good.jpg"
        records.append(rec(i, image=f"sub/{'../sub/' * i}../{name}"))
    assert check(records, "--workers", 2) == (1, {"truncated-image": [7, 37, 67, 97]})


def test_control_characters_never_reach_the_terminal(
    check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    check([rec("\x1b[31m[bold]x", image="\x1b]0;x\x07.png")])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b[31m[bold]x" in shown


# --- tokens ----------------------------------------------------------------------------------------

LONG = "What colour is the image? " * 40
TOKENS = [
    rec("good", image="good.png"),
    rec("unknown", QUESTION, say("gpt", "r\u00e9d"), image="good.png"),
    rec("split", QUESTION, say("gpt", "a USER: b ASSISTANT: c"), image="good.png"),
    rec("turns", QUESTION, ANSWER, say("human", "How many?"), say("gpt", "two"), image="good.png"),
    rec("text", say("human", "How many?"), say("gpt", "\u00e9"), say("human", "?"), ANSWER),
    rec("cut", QUESTION, ANSWER, say("human", LONG), ANSWER, image="good.png"),
    rec("cut text", say("human", "What?"), ANSWER, say("human", LONG), ANSWER),
    rec("lost", say("human", f"<image>\n{LONG}"), ANSWER, image="good.png"),
    rec("lost text", say("human", LONG), ANSWER),
]
LIMIT = 256


@pytest.fixture
def dataset(
    tmp_path: Path, images: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """LLaVA's data set and collator, set up as its trainer does, giving labels of a record as trained on."""
    from llava import conversation
    from transformers import AutoTokenizer, CLIPImageProcessor

    train = trainer()
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}

    def make(records: list[Any], version: str) -> list[list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_dir, model_max_length=LIMIT, padding_side="right", use_fast=False
        )
        tokenizer.pad_token = tokenizer.unk_token
        template = conversation.conv_templates[version]
        monkeypatch.setattr(conversation, "default_conversation", template)
        arguments = train.DataArguments(image_folder=str(images), is_multimodal=True)
        arguments.mm_use_im_start_end = False
        arguments.image_processor = CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=square
        )
        file = tmp_path / "dataset.json"
        file.write_text(json.dumps(records))
        data = train.LazySupervisedDataset(str(file), tokenizer, arguments)
        collate = train.DataCollatorForSupervisedDataset(tokenizer)
        return [collate([data[i]])["labels"][0].tolist() for i in range(len(data))]

    return make


def test_mismatch_and_truncation_are_those_of_the_trainer(
    check: Check, tokenizer_dir: Path, dataset: Callable[..., Any]
) -> None:
    code, found = check(TOKENS, "--model", tokenizer_dir, "--model-max-length", LIMIT)
    labels = dict(zip([r["id"] for r in TOKENS], dataset(TOKENS, "v1"), strict=True))
    ignored = {name for name, row in labels.items() if all(label == -100 for label in row)}
    assert code == 1
    assert ignored == {*found["mismatch"], *found["truncated-no-labels"]}
    assert {"unknown", "split", "text"} == {*found["mismatch"]}
    assert {"lost", "lost text"} == {*found["truncated-no-labels"]}
    assert {"cut", "cut text"} == {*found["truncated"]}
    assert all(len(labels[name]) == LIMIT for name in ("cut", "cut text", "lost", "lost text"))
    assert {"good", "turns"} == labels.keys() - {name for ids in found.values() for name in ids}


def test_truncation_says_how_many_tokens(check: Check, tokenizer_dir: Path, tmp_path: Path) -> None:
    from llava_vlora.integration.tokenising import TokenSettings, tokenising

    check(TOKENS, "--model", tokenizer_dir, "--model-max-length", LIMIT)
    report = json.loads((tmp_path / "report.json").read_text())
    details = {f["id"]: f["detail"] for f in report["findings"]}
    with tokenising(TokenSettings(str(tokenizer_dir), max_length=100_000)) as tokeniser:
        for record in TOKENS[5:]:
            whole = tokeniser.sample(record)
            assert whole.length > LIMIT
            assert details[record["id"]].startswith(f"{whole.length} tokens, {LIMIT} kept, ")


@pytest.mark.parametrize("version", ["v1", "plain", "llava_llama_2"])
def test_labels_of_every_sample_are_those_of_the_trainer(
    tokenizer_dir: Path, dataset: Callable[..., Any], version: str
) -> None:
    from llava_vlora.integration.tokenising import TokenSettings, tokenising

    records = [TOKENS[0], TOKENS[1], TOKENS[7]] if version == "plain" else TOKENS
    expected = dataset(records, version)
    with tokenising(TokenSettings(str(tokenizer_dir), version, LIMIT)) as tokeniser:
        assert [tokeniser.sample(r).labels.tolist() for r in records] == expected
    # This tokenizer's blanks do not suit llama_2: LLaVA ignores every sample.
    assert any(label != -100 for label in expected[0]) == (version != "llava_llama_2")


def test_the_printed_mask_is_the_labels(
    check: Check,
    tokenizer_dir: Path,
    dataset: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What stands in brackets, tokenised, is what LLaVA's labels hold."""
    from transformers import AutoTokenizer

    asked = say("human", "What colour is the image?\n<image>")  # LLaVA moves it to the front
    sample = rec(
        "x", asked, say("gpt", "it is red"), say("human", "Sure?"), ANSWER, image="good.png"
    )
    check([TOKENS[1], sample], "--model", tokenizer_dir)
    shown = capsys.readouterr().out
    head, _, text = shown.partition("(in [[ ]]):\n")
    assert "Record 1 (id x)" in head
    text = text.split("\n\n")[0]
    pieces = [part.partition("]]")[0] for part in text.split("[[")[1:]]
    # With this tokenizer LLaVA learns the colon too: its own is off by one here.
    assert pieces == [": it is red</s>", ": red</s>"]
    labels = [label for label in dataset([sample], "v1")[0] if label != -100]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, use_fast=False)
    assert tokenizer.decode(labels).split() == " ".join(pieces).split()
    assert f"{len(labels)} learned" in head
    assert "USER:<image> What colour is the image? ASSISTANT[[: it" in text


def test_learned_words_are_coloured_in_a_terminal() -> None:
    from llava_vlora.data.report import sample_text

    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(sample_text([("What?", False), (" red", True)], colour=True))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "\x1b[2mWhat?\x1b[0m\x1b[1;32m red\x1b[0m\n"


def test_what_llava_cannot_tokenise(check: Check, tokenizer_dir: Path) -> None:
    records = [TOKENS[0], rec("two", *TOKENS[3]["conversations"], image="good.png")]
    flags = ("--model", tokenizer_dir, "--version", "plain")
    assert check(records, *flags) == (1, {"cannot-tokenise": ["two"]})


def test_the_default_conversation_is_restored(
    check: Check, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava import conversation
    from llava.train import train

    before = conversation.conv_templates["mpt"]
    monkeypatch.setattr(conversation, "default_conversation", before)
    check([TOKENS[0]], "--model", tokenizer_dir, "--version", "plain")
    assert conversation.default_conversation is before
    assert "print" not in vars(train)


# --- files and exit codes --------------------------------------------------------------------------


def test_clean_records_are_written_and_pass(
    check: Check, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = tmp_path / "new" / "clean.json"
    mixed = [r for pair in zip(GOOD, BAD.values(), strict=False) for r in pair]
    assert check(mixed, "--write-clean", clean)[0] == 1
    assert json.loads(clean.read_text()) == GOOD
    assert "7 records; left out: 7 with problems" in capsys.readouterr().out
    assert main(["check-data", str(clean), "--image-folder", str(images), "--workers", "1"]) == 0
    assert [p.name for p in clean.parent.iterdir()] == ["clean.json"]


def test_json_lines(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "data.jsonl", tmp_path / "clean.jsonl"
    records = [*GOOD, BAD["empty-image"], rec("\u2028", *GOOD[0]["conversations"])]
    file.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n")
    flags = ["--image-folder", str(images), "--workers", "1", "--write-clean", str(out)]
    assert main(["check-data", str(file), *flags]) == 1
    shown = capsys.readouterr().out
    assert "record 7 (id empty-image)" in shown
    assert "LLaVA's trainer reads a JSON list" in shown
    assert [json.loads(line) for line in out.read_text().splitlines()] == [*GOOD, records[-1]]


def test_limit(check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clean.json"
    assert check([*GOOD, *BAD.values()], "--limit", 3, "--write-clean", out) == (0, {})
    assert json.loads(out.read_text()) == GOOD[:3]
    assert "the 23 behind --limit" in capsys.readouterr().out


MISTAKES = {
    "not json": ('[\n{"id": 1},\n{"id": }]', [], ["line 3, column 8", "not valid JSON"]),
    "not json lines": ('{"id": 1}\n\n{"id"}\n', [], ["line 3, column 6"]),
    "latin": (b'[\n{"id": "\xe9"}]', [], ["line 2, byte 9", "UTF-8"]),
    "nothing": (" \n", [], ["is empty"]),
    "no records": ("[]", [], ["empty list"]),
    "deep": ("[" * 100_000, [], ["nested too deeply"]),
    "no folder": (json.dumps(GOOD), ["--image-folder", "/gone"], ["/gone is not a folder"]),
    "no flag": (json.dumps(GOOD), [], ["give their --image-folder"]),
    "version": (json.dumps(GOOD[:1]), ["--model", "x", "--version", "v2"], ["'v2'", "vicuna_v1"]),
    "model": (json.dumps(GOOD[:1]), ["--model", "/gone"], ["--model /gone", "no tokenizer"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_the_user(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, flags, words = MISTAKES[name]
    file = tmp_path / "data.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["check-data", str(file), *flags]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", str(tmp_path / "gone.json")]) == 2
    assert "gone.json cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--write-clean", "--json"])
def test_the_input_is_never_overwritten(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, link = tmp_path / "data.json", tmp_path / "link.json"
    file.write_text(json.dumps([BAD["odd-turns"]]))
    before = file.read_bytes()
    os.link(file, link)
    for out in (file, link, tmp_path / "x" / ".." / "data.json"):
        assert main(["check-data", str(file), flag, str(out)]) == 2
        assert "would overwrite" in capsys.readouterr().err
    assert file.read_bytes() == before


# --- processes -------------------------------------------------------------------------------------


def test_a_dead_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(pool.WorkerError, match="--workers 1"):
        pool.run(os._exit, (9,), ["a", "b"], workers=2, chunk=1, advance=lambda n: None)  # type: ignore[arg-type]


def test_an_interrupt_ends_the_command_and_its_workers(tmp_path: Path) -> None:
    """Ctrl-C reaches every process of a terminal's group."""
    file, images = tmp_path / "data.json", tmp_path / "images"
    images.mkdir()
    # Enough work for the interrupt to find the workers at it, however busy the machine is.
    Image.new("RGB", (5000, 5000)).save(images / "large.png")
    for i in range(200):
        (images / f"{i}.png").hardlink_to(images / "large.png")
    file.write_text(json.dumps([rec(i, image=f"{i}.png") for i in range(200)]))
    code = (
        "import sys, llava_vlora.data.images as i, llava_vlora.cli as c\n"
        f"sys.exit(c.main(['check-data', {str(file)!r}, '--image-folder', {str(images)!r}, '--workers', '2']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background job of a shell ignores interrupts, and its children would.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 20
    while len(members(child.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(members(child.pid)) >= 3
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=10)
    assert child.returncode == 130, (out, err)
    assert err == "llava-vlora check-data: interrupted\n"
    while members(child.pid) and time.monotonic() < deadline:  # Python's own tracker ends after it
        time.sleep(0.02)
    assert not members(child.pid)


def members(group: int) -> list[int]:
    """Running processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found
