"""What the models for other evaluation harnesses share, with both kinds of checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_vlora.benchmarks.base import FilePicture, Sample
from llava_vlora.errors import CheckpointError, ConfigError, PromptError
from llava_vlora.evaluation.answer_log import AnswerLog
from llava_vlora.evaluation.answering import generate
from llava_vlora.evaluation.running import Asking, answer_all
from llava_vlora.integration.api import prompt_ids
from llava_vlora.integrations.answerer import Answerer, Query, find_device
from tests.test_demo import load_tiny

QUESTION = "What colour is the image?"


@pytest.fixture(scope="module", params=["llava", "vlora"])
def answerer(request: pytest.FixtureRequest, llm_dir: Path, tower_dir: Path) -> Answerer:
    """A model of each kind, whose answers run to their full length."""
    torch.manual_seed(0)
    loaded = load_tiny(request.param, llm_dir, tower_dir)
    loaded.model.generation_config.eos_token_id = None
    return Answerer(loaded)


@pytest.fixture
def images(data_dir: Path) -> list[Image.Image]:
    """Three images of different colour."""
    return [Image.open(data_dir / "images" / f"{i}.png") for i in range(3)]


def test_answers_equal_those_of_llava_vlora_eval(
    answerer: Answerer, data_dir: Path, tmp_path: Path
) -> None:
    """With images and without, of several lengths, in one batch or alone."""
    texts = [QUESTION, QUESTION, "How many?", "What colour is the user?"]
    files = [data_dir / "images" / "0.png", data_dir / "images" / "2.png", None, None]
    samples = [
        Sample(i, text, None if file is None else FilePicture(file))
        for i, (text, file) in enumerate(zip(texts, files, strict=True))
    ]
    log = AnswerLog(tmp_path / "answers.jsonl", "tiny", "key", samples)
    answer_all(
        lambda: answerer.loaded,
        log,
        Asking(max_new_tokens=6),
        batch_size=4,
    )
    queries = [
        Query(text, None if file is None else Image.open(file))
        for text, file in zip(texts, files, strict=True)
    ]
    expected = [log.answers[i] for i in range(len(texts))]
    assert [text.strip() for text in answerer.answer(queries, max_new_tokens=6)] == expected
    alone = [answerer.answer([query], max_new_tokens=6)[0].strip() for query in queries]
    assert alone == expected
    assert len(set(expected)) == len(expected)


def test_a_plain_language_model_answers_without_the_prompt(llm_dir: Path) -> None:
    plain = Answerer.open(str(llm_dir))
    query = Query(QUESTION, None)
    ids = plain.ids(query)[None]
    tokens = plain.loaded.model.generate(ids, max_new_tokens=6, do_sample=False)
    new = plain.loaded.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert plain.answer([query], max_new_tokens=6) == [new]


def test_the_image_stands_where_the_text_has_its_slot(
    answerer: Answerer, images: list[Image.Image]
) -> None:
    before = prompt_ids(answerer.loaded, QUESTION)
    assert answerer.ids(Query(QUESTION, images[0])).equal(before)
    assert answerer.ids(Query(f"<image>\n{QUESTION}", images[0])).equal(before)
    behind = answerer.ids(Query(f"{QUESTION} <image> or <image>", images[0])).tolist()
    assert behind.count(-200) == 1
    assert behind.index(-200) > before.tolist().index(-200)
    blind = prompt_ids(answerer.loaded, QUESTION, image=False)
    for text in (QUESTION, f"<image>\n{QUESTION}"):
        assert answerer.ids(Query(text, None)).equal(blind)


def test_a_slot_in_the_text_carries_the_marks_of_the_model(
    answerer: Answerer, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answerer.loaded.model.config, "mm_use_im_start_end", True)
    marked = prompt_ids(answerer.loaded, QUESTION)
    assert answerer.ids(Query(f"<image>\n{QUESTION}", images[0])).equal(marked)
    assert len(marked) > len(prompt_ids(answerer.loaded, QUESTION, image=False)) + 2


def test_scores_are_those_of_decoding_token_by_token(
    answerer: Answerer, images: list[Image.Image]
) -> None:
    """Against the scores that ``generate`` gives for one token after the other."""
    queries = [
        Query(QUESTION, images[0]),
        Query("How many?", None),
        Query(QUESTION, images[2]),
        Query(QUESTION, images[0]),
    ]
    answers = ["red", "the user", "red", "a helpful assistant"]
    found = answerer.scores(queries, answers)
    for query, answer, (loss, greedy) in zip(queries, answers, found, strict=True):
        whole = answerer.ids(query, answer)
        start = len(answerer.ids(query))
        assert whole[-1] == answerer.loaded.tokenizer.eos_token_id
        steps = []
        for i in range(start, len(whole)):
            step = generate(
                answerer.loaded,
                whole[None, :i],
                None if query.image is None else [query.image],
                max_new_tokens=1,
                output_scores=True,
                return_dict_in_generate=True,
            )
            steps.append(step.scores[0][0].log_softmax(-1)[whole[i]].item())
        assert loss == pytest.approx(-sum(steps) / len(steps), abs=1e-4)
        assert not greedy
    assert found[0] != found[2]  # the image matters


def test_an_answer_is_greedy_if_each_token_is_the_likeliest(
    answerer: Answerer, images: list[Image.Image]
) -> None:
    """A head that is told what to say, and one that is not told the last word, the end of the answer."""
    query = Query(QUESTION, images[0])
    answer = answerer.ids(query, "red")[len(answerer.ids(query)) :].tolist()

    def score(told: int) -> tuple[float, bool]:
        def say(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros_like(logits)
            for i, token in enumerate(answer[:told]):
                logits[0, i - len(answer) - 1, token] = 100.0
            return logits

        handle = answerer.loaded.model.lm_head.register_forward_hook(say)
        try:
            return answerer.scores([query], ["red"])[0]
        finally:
            handle.remove()

    words = answerer.loaded.model.lm_head.out_features
    assert score(len(answer)) == (0.0, True)
    loss, greedy = score(len(answer) - 1)
    assert not greedy
    assert loss == pytest.approx(math.log(words) / len(answer))


def test_an_empty_answer_has_no_score(answerer: Answerer, images: list[Image.Image]) -> None:
    with pytest.raises(PromptError, match="empty"):
        answerer.scores([Query(QUESTION, images[0])], [" "])


def test_an_answer_that_llava_would_cut_off_has_no_score(
    answerer: Answerer, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its visual tokens do not fit; a VLoRA model has none."""
    query = Query(QUESTION, images[0])
    length = len(answerer.ids(query, "red"))
    monkeypatch.setattr(
        answerer.loaded.model.config, "tokenizer_model_max_length", length, raising=False
    )
    if hasattr(answerer.loaded.model, "vlora_config"):
        assert answerer.scores([query], ["red"])[0][0] > 0
    else:
        with pytest.raises(PromptError, match=f"the {length} tokens"):
            answerer.scores([query], ["red"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"conv_mode": "vicuna"}, "vicuna_v1"),
        ({"bits": 3}, "give 4 or 8"),
    ],
)
def test_wrong_settings_are_named(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Answerer.open("nowhere", **setting)


def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Answerer.open("nowhere")


def test_devices() -> None:
    assert find_device("cpu") == "cpu"
    assert find_device("auto") == str(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for name in ("tpu", "cuda:first"):
        with pytest.raises(ConfigError, match="cuda:N"):
            find_device(name)
