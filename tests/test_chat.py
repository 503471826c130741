"""The chat: what is streamed is what generate answers, turns are remembered, and a person's mistakes do no harm."""

from __future__ import annotations

import io
import re
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoTokenizer

from llava_vlora.chat.display import Columns, Reply, WordWrap, printable
from llava_vlora.chat.session import Session
from llava_vlora.chat.stream import AnswerStream
from llava_vlora.chat.terminal import Chat
from llava_vlora.cli import main
from llava_vlora.errors import ConfigError, ImageError, MergeError, PromptError
from llava_vlora.integration.api import Loaded, conversation_ids, pixel_values, stop_text
from tests.test_demo import load_tiny

NEW = 24
QUESTION, SECOND = "What colour is the image?", "How many?"
KINDS = ("vlora", "llava")


@pytest.fixture(scope="module")
def models(llm_dir: Path, tower_dir: Path) -> dict[str, Loaded]:
    """One model of each kind. Only the template's stop text ends an answer early."""
    made = {kind: load_tiny(kind, llm_dir, tower_dir) for kind in KINDS}
    for loaded in made.values():
        loaded.model.generation_config.eos_token_id = None
    return made


@pytest.fixture
def images(data_dir: Path) -> list[Path]:
    """Two images of different colour."""
    return [data_dir / "images" / name for name in ("0.png", "2.png")]


def session(loaded: Loaded, image: Path, **options: Any) -> Session:
    if hasattr(loaded.model, "vlora_config"):
        loaded.model.perception_cache = None
    return Session(loaded, "tiny", Image.open(image), **{"max_new_tokens": NEW, **options})


def hook_count(model: Any) -> int:
    """Hooks that run before or after any module."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def greedy(chat: Session, ids: Any, image: Path) -> str:
    """What generate answers to a prompt, in LLaVA's own call, up to the stop text."""
    loaded = chat.loaded
    with Image.open(image) as opened:
        pixels = pixel_values([opened], loaded)
    out = loaded.model.generate(
        ids,
        images=pixels,
        image_sizes=[(8, 8)],
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
        eos_token_id=loaded.tokenizer.eos_token_id,
    )
    text = loaded.tokenizer.batch_decode(
        out, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )[0]
    return str(text.strip())


# --- one model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["merged", "batched"])
def test_streamed_answer_is_the_greedy_answer_of_generate(
    models: dict[str, Loaded], images: list[Path], path: str
) -> None:
    chat, pieces = session(models["vlora"], images[0]), list[str]()
    chat.set_path(path)
    answer = chat.ask(QUESTION, pieces.append)
    chat.reset()
    assert answer.text == greedy(chat, chat.prompt(QUESTION), images[0])
    assert "".join(pieces).strip() == answer.text
    assert len(pieces) > NEW // 2
    assert (answer.tokens, answer.path) == (NEW, path)


def test_stock_llava_streams_its_greedy_answer(
    models: dict[str, Loaded], images: list[Path]
) -> None:
    chat = session(models["llava"], images[0])
    answer = chat.ask(QUESTION)
    chat.reset()
    assert answer.text == greedy(chat, chat.prompt(QUESTION), images[0])
    assert (answer.path, answer.tokens) == ("visual tokens", NEW)


@pytest.mark.parametrize("kind", KINDS)
def test_second_turn_sees_the_first_and_its_answer(
    models: dict[str, Loaded], images: list[Path], kind: str
) -> None:
    chat = session(models[kind], images[0])
    first = chat.ask(QUESTION)
    assert chat.history == [(QUESTION, first.text)]
    ids = chat.prompt(SECOND)
    text = chat.loaded.tokenizer.decode(ids[0][ids[0] != -200])
    assert first.text in text
    assert "</s>" in text
    assert text.endswith("ASSISTANT:")
    assert (ids == -200).sum() == 1
    expected = greedy(chat, ids, images[0])
    assert chat.ask(SECOND).text == expected
    fresh = session(models[kind], images[0])
    assert fresh.ask(SECOND).text != expected


@pytest.mark.parametrize("kind", KINDS)
def test_times_and_counts(models: dict[str, Loaded], images: list[Path], kind: str) -> None:
    chat = session(models[kind], images[0])
    hooks = hook_count(chat.loaded.model)
    answer = chat.ask(QUESTION)
    ids = conversation_ids(chat.loaded, [(QUESTION, None)])
    visual = 0 if kind == "vlora" else 16
    assert answer.prompt_tokens == len(ids) - 1 + visual
    assert 0 < answer.perceive < answer.first < answer.total
    assert answer.tokens_per_second == (NEW - 1) / (answer.total - answer.first)
    assert hook_count(chat.loaded.model) == hooks


def test_tower_runs_once_for_two_questions(models: dict[str, Loaded], images: list[Path]) -> None:
    chat, runs = session(models["vlora"], images[0]), list[int]()
    handle = chat.loaded.model.get_vision_tower().register_forward_hook(lambda *_: runs.append(1))
    try:
        assert [chat.ask(q).remembered for q in (QUESTION, SECOND)] == [False, True]
        assert len(runs) == 1
        chat.show(Image.open(images[1]))
        assert not chat.ask(QUESTION).remembered
        assert len(runs) == 2
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_another_image_begins_anew_and_is_seen(
    models: dict[str, Loaded], images: list[Path], kind: str
) -> None:
    chat = session(models[kind], images[0])
    first = chat.ask(QUESTION).text
    chat.show(Image.open(images[1]))
    assert chat.history == []
    second = chat.ask(QUESTION).text
    chat.reset()
    assert second == greedy(chat, chat.prompt(QUESTION), images[1])
    assert second != first


@pytest.mark.parametrize("path", ["merged", "batched"])
def test_stopping_leaves_the_model_usable(
    models: dict[str, Loaded], images: list[Path], path: str
) -> None:
    chat = session(models["vlora"], images[0])
    chat.set_path(path)
    before = {name: t.clone() for name, t in chat.loaded.model.state_dict().items()}
    expected = chat.ask(QUESTION).text
    chat.reset()
    stop, pieces = threading.Event(), list[str]()

    def on_text(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            stop.set()

    answer = chat.ask(QUESTION, on_text, stop)
    assert answer.stopped
    assert answer.tokens < NEW // 2
    assert expected.startswith(answer.text)
    assert answer.text
    assert chat.history == [(QUESTION, answer.text)]
    after = chat.loaded.model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    chat.reset()
    answers = list[str]()
    other = threading.Thread(target=lambda: answers.append(chat.ask(QUESTION).text))
    other.start()
    other.join(60)
    assert answers == [expected]


def test_a_full_context_is_said(models: dict[str, Loaded], images: list[Path]) -> None:
    chat = session(models["llava"], images[0])
    with pytest.raises(PromptError, match=r"context has 512; begin a new one \(/reset\)"):
        chat.ask("What colour is the image? " * 100)
    assert chat.history == []


def test_an_answer_ends_at_the_edge_of_the_context(
    models: dict[str, Loaded], images: list[Path]
) -> None:
    chat = session(models["llava"], images[0], max_new_tokens=10_000)
    answer = chat.ask(QUESTION)
    assert answer.prompt_tokens + answer.tokens == 511


def test_templates(
    models: dict[str, Loaded], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [stop_text(mode) for mode in ("vicuna_v1", "v0", "mpt", "mistral_instruct")] == [
        "</s>",
        "###",
        "<|im_end|>",
        "</s>",
    ]
    assert session(models["vlora"], images[0]).conv_mode == "vicuna_v1"
    with pytest.raises(ConfigError, match=r"'v9' is unknown; LLaVA has .*'vicuna_v1'"):
        session(models["vlora"], images[0], conv_mode="v9")
    monkeypatch.setattr(models["llava"].model.config, "model_type", "llava_mistral")
    assert session(models["llava"], images[0]).conv_mode == "mistral_instruct"


def test_a_plain_language_model_is_refused(models: dict[str, Loaded], images: list[Path]) -> None:
    loaded = models["llava"]
    blind = Loaded(loaded.tokenizer, loaded.model, None, loaded.context_len)
    with pytest.raises(ImageError, match="plain language model"):
        session(blind, images[0])


# --- the stream ---------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are bytes: the hardest case for a stream of whole characters."""

    unk_token_id = None

    def __init__(self, special: dict[str, int] | None = None) -> None:
        self.special = special or {}

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.special.get(token)

    def decode(self, ids: list[int], **options: Any) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def stream(text: str, stop: str = "###", tokenizer: Any = None, extra: int | None = None) -> Any:
    pieces: list[str] = []
    tokenizer = tokenizer or Bytes()
    made = AnswerStream(tokenizer, stop, pieces.append, lambda: None, threading.Event())
    made.put(torch.tensor([[1, 2]]))
    for token in [*text.encode(), *([extra] if extra is not None else [])]:
        made.put(torch.tensor([token]))
        if made(torch.zeros(1, 1), torch.zeros(1, 1)).all():
            break
    made.end()
    return pieces, made


def test_stream_gives_whole_characters_at_once() -> None:
    text = "né 🙂 日本, a #hash and ##"
    pieces, made = stream(text)
    assert "".join(pieces) == made.text == text
    assert "🙂" in pieces
    assert made.tokens == len(text.encode())


def test_stream_ends_at_the_stop_text_and_never_shows_a_part_of_it() -> None:
    pieces, made = stream("red # 1###USER: more")
    assert "".join(pieces) == "red # 1"
    assert made.tokens == len("red # 1###")
    pieces, _ = stream("red", "<|im_end|>", Bytes({"<|im_end|>": 300}), extra=300)
    assert "".join(pieces) == "red"


def test_stream_writes_what_the_tokenizer_writes(llm_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llm_dir, use_fast=False)
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, len(tokenizer), (30,), generator=random).tolist()
        pieces: list[str] = []
        made = AnswerStream(tokenizer, "</s>", pieces.append, lambda: None, threading.Event())
        made.put(torch.tensor([[1]]))
        for token in ids:
            made.put(torch.tensor([token]))
        made.end()
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces) == whole


# --- what a person sees -------------------------------------------------------------------------


class Keyboard(io.StringIO):
    """Standard input that claims to be a terminal."""

    def __init__(self, text: str, tty: bool = False) -> None:
        super().__init__(text)
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def talk(
    sessions: list[Session], lines: list[str], monkeypatch: pytest.MonkeyPatch, width: int = 80
) -> tuple[int, str]:
    """Exit code and output of a chat whose input and output claim to be terminals."""
    monkeypatch.setattr(sys, "stdin", Keyboard("\n".join(lines) + "\n", tty=True))
    monkeypatch.setattr("llava_vlora.chat.reading._quiet", nullcontext)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=20, highlight=False)
    code = Chat(console, sessions, Path("0.png")).run()
    return code, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())


def both(models: dict[str, Loaded], image: Path) -> list[Session]:
    sessions = [session(models[kind], image) for kind in KINDS]
    for chat, kind in zip(sessions, KINDS, strict=True):
        chat.name = f"my {kind}"
    return sessions


@pytest.mark.parametrize("width", [80, 140])
def test_side_by_side(
    models: dict[str, Loaded], images: list[Path], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    sessions = both(models, images[0])
    expected = [chat.ask(QUESTION).text for chat in sessions]
    for chat in sessions:
        chat.reset()
    code, out = talk(sessions, [QUESTION, "/time", "/quit"], monkeypatch, width)
    assert code == 0
    assert [chat.history for chat in sessions] == [[(QUESTION, text)] for text in expected]
    assert expected[0] != expected[1]
    for text in expected:
        assert text.split()[0][:30] in out
    assert "my vlora" in out
    assert "my llava" in out
    assert "visual tokens" in out
    assert "batched (24 new tokens" in out
    assert ("╭" in out) == (width == 140)


def test_commands_and_mistakes(
    models: dict[str, Loaded], images: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sessions = both(models, images[0])
    monkeypatch.chdir(tmp_path)
    Path("damaged.png").write_bytes(images[0].read_bytes()[:40])
    lines = ["/time", "/foo", "/image", "/image none.png", "/image damaged.png", "/path sideways"]
    lines += ["/path batched", QUESTION, "/time on", "/time never", "/help", "/reset", ""]
    code, out = talk(sessions, lines, monkeypatch)
    assert code == 0
    for part in (
        "There is no answer yet",
        "There is no command /foo; there are /image, /time",
        "/image needs the path",
        "none.png cannot be read",
        "damaged.png cannot be read",
        "'sideways' is unknown; valid: 'auto', 'merged', 'batched'",
        "my vlora answers on the path: batched",
        "/time never is unknown",
        "how a VLoRA model shows its image",
        "The conversation is forgotten",
    ):
        assert part in " ".join(out.split()), part
    assert sessions[0].path == "batched"
    assert [chat.history for chat in sessions] == [[], []]


def test_image_command_switches_both(
    models: dict[str, Loaded], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = both(models, images[0])
    before = [chat.ask(QUESTION).text for chat in sessions]
    _, out = talk(sessions, [f"/image '{images[1]}'", QUESTION], monkeypatch)
    assert "A new conversation begins" in " ".join(out.split())
    after = [chat.history for chat in sessions]
    assert [len(turns) for turns in after] == [1, 1]
    assert all(turns[0][1] != text for turns, text in zip(after, before, strict=True))


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(
    models: dict[str, Loaded], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = both(models, images[0])
    ask, presses = sessions[0].ask, iter([True])

    def press(question: str, on_text: Any, stop: threading.Event) -> Any:
        def pressing(text: str) -> None:
            on_text(text)
            if next(presses, False):
                signal.raise_signal(signal.SIGINT)

        return ask(question, pressing, stop)

    monkeypatch.setattr(sessions[0], "ask", press)
    before = signal.getsignal(signal.SIGINT)
    code, out = talk(sessions, [QUESTION, "/quit"], monkeypatch)
    assert code == 0
    assert "(stopped)" in out
    assert "(not asked)" in out
    assert signal.getsignal(signal.SIGINT) is before
    assert len(sessions[0].history[0][1]) < 20
    assert sessions[1].history == []
    _, out = talk(sessions, [SECOND], monkeypatch)
    assert "stopped" not in out
    assert [len(chat.history) for chat in sessions] == [2, 1]


def test_ctrl_c_at_the_prompt_leaves_only_a_script(
    models: dict[str, Loaded], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(prompt: str) -> str:
        presses.append(prompt)
        raise KeyboardInterrupt if len(presses) == 1 else EOFError

    presses: list[str] = []
    monkeypatch.setattr("builtins.input", pressed)
    sessions = [session(models["vlora"], images[0])]
    code, out = talk(sessions, [], monkeypatch)
    assert (code, len(presses)) == (0, 2)
    assert "Ctrl-D or /quit leaves." in out
    presses.clear()
    monkeypatch.setattr(sys, "stdin", Keyboard(""))
    with pytest.raises(KeyboardInterrupt):
        Chat(Console(file=io.StringIO()), sessions, images[0]).run()


def test_a_failed_answer_is_said_and_not_remembered(
    models: dict[str, Loaded], images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = both(models, images[0])

    def fail(*_: Any) -> Any:
        raise MergeError("it cannot be merged")

    monkeypatch.setattr(sessions[0], "ask", fail)
    for width in (80, 140):
        _, out = talk(sessions, [QUESTION], monkeypatch, width)
        assert "it cannot be merged" in out
    assert [len(chat.history) for chat in sessions] == [0, 2]


def test_a_long_answer_is_not_lost_and_no_markup_is_read() -> None:
    replies = [Reply("one", "cyan", "\n".join(f"[bold]line {i}[/x]" for i in range(100)))]
    replies.append(Reply("[red]two", "magenta", "short"))
    view = Columns(replies)
    for whole in (False, True):
        out = io.StringIO()
        view.whole = whole
        Console(file=out, width=120, height=20).print(view)
        assert ("[bold]line 0[/x]" in out.getvalue()) == whole
        assert "[bold]line 99[/x]" in out.getvalue()
        assert "[red]two" in out.getvalue()
        assert len(out.getvalue().splitlines()) == (102 if whole else 19)


def test_words_are_wrapped_as_they_come() -> None:
    written: list[str] = []
    wrap = WordWrap(written.append, 10)
    for char in "red green blue\nabcdefghijklmno 日本語日本語":
        wrap.feed(char)
    wrap.flush()
    assert "".join(written) == "red green\nblue\nabcdefghij\nklmno 日本\n語日本語"
    assert printable("a\x1b[2Jb\rc\n\td") == "a[2Jbc\n\td"


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(models: dict[str, Loaded], tmp_path: Path, llm_dir: Path) -> dict[str, Path]:
    """Both models as folders."""
    for kind, loaded in models.items():
        loaded.model.save_pretrained(tmp_path / kind)
        AutoTokenizer.from_pretrained(llm_dir, use_fast=False).save_pretrained(tmp_path / kind)
    return {kind: tmp_path / kind for kind in models}


def test_piped_questions_are_answered(
    checkpoints: dict[str, Path],
    models: dict[str, Loaded],
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = f"{QUESTION}\n\n/image {images[1]}\n{QUESTION}\n/quit\nnever asked\n"
    command = ["chat", str(images[0]), "--device", "cpu", "--max-new-tokens", str(NEW)]
    command += ["--model", str(checkpoints["vlora"])]
    monkeypatch.setattr(sys, "stdin", Keyboard(lines))
    assert main(command) == 0
    expected = [session(models["vlora"], image).ask(QUESTION).text for image in images]
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{text}\n" for text in expected)
    assert "A new conversation begins" in printed.err
    monkeypatch.setattr(sys, "stdin", Keyboard(f"{QUESTION}\n/image none.png"))
    assert main([*command, "--beside", str(checkpoints["llava"])]) == 2
    printed = capsys.readouterr()
    other = session(models["llava"], images[0]).ask(QUESTION).text
    assert printed.out == f"vlora: {expected[0]}\nllava: {other}\n"
    assert "none.png cannot be read" in printed.err


def test_user_mistakes_end_with_2(
    checkpoints: dict[str, Path],
    images: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = ["--model", str(checkpoints["vlora"]), "--device", "cpu"]
    for command, message in (
        ([str(images[0]), "--model", str(tmp_path / "none")], "There is no checkpoint folder"),
        ([str(tmp_path / "none.png"), *model], "none.png cannot be read"),
        ([str(images[0]), *model, "--conv-mode", "v9"], "'v9' is unknown; LLaVA has"),
        ([str(images[0]), *model, "--beside-base", "x"], "name it with --beside"),
        ([str(images[0]), *model, "--load-4bit"], "needs bitsandbytes"),
    ):
        assert main(["chat", *command]) == 2
        assert message in capsys.readouterr().err
    for flag in (["--max-new-tokens", "0"], ["--temperature", "-1"]):
        with pytest.raises(SystemExit):
            main(["chat", str(images[0]), *model, *flag])
        assert "is not" in capsys.readouterr().err
