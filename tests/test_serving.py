"""LLaVA's controller, worker, web page and chat under the launcher: real processes, real requests."""

from __future__ import annotations

import ast
import asyncio
import base64
import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from transformers import AutoTokenizer

from llava_vlora.errors import ConfigError
from llava_vlora.images import open_image
from llava_vlora.integration import serving
from llava_vlora.integration.api import Loaded, load, pixel_values
from llava_vlora.integration.causal import VLoRAMetaForCausalLM
from llava_vlora.integration.serving import AnswerStream, ServedModel
from llava_vlora.turns import turns
from tests.tiny import make_vlora, trainer
from tests.two_stacks import environment, run_module, run_python

KINDS = ["vlora", "stock"]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
PROMPT = f"{SYSTEM} USER: <image>\nWhat colour is the image? ASSISTANT:"


def endless(model: Any, folder: Path, llm: Path) -> Path:
    """Save a model whose answers have no special tokens and so never end by themselves."""
    with torch.no_grad():
        model.lm_head.weight[:3] = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llm, use_fast=False).save_pretrained(folder)
    return folder


def make_stock(llm: Path, tower: Path) -> Any:
    """An ordinary LLaVA model with a random projector."""
    train = trainer()
    arguments = train.ModelArguments(
        model_name_or_path=str(llm),
        vision_tower=str(tower),
        mm_vision_select_layer=-2,
        mm_projector_type="mlp2x_gelu",
        mm_use_im_patch_token=False,
    )
    model = train.LlavaLlamaForCausalLM.from_pretrained(str(llm))
    # LLaVA's trainer reads this before it builds the projector.
    model.get_model().initialize_vision_modules(arguments)
    model.config.mm_use_im_start_end = model.config.mm_use_im_patch_token = False
    model.get_vision_tower().float()
    return model.eval()


@pytest.fixture(scope="module")
def models(llm_dir: Path, tower_dir: Path, tmp_path_factory: Any) -> dict[str, Path]:
    """Checkpoint folders whose names do not tell what they hold."""
    root = tmp_path_factory.mktemp("served")
    return {
        "vlora": endless(make_vlora(llm_dir, tower_dir), root / "a", llm_dir),
        "stock": endless(make_stock(llm_dir, tower_dir), root / "b-llava", llm_dir),
    }


@pytest.fixture(scope="module")
def loaded(models: dict[str, Path]) -> dict[str, Loaded]:
    return {kind: load(str(folder)) for kind, folder in models.items()}


def greedy(
    model: Loaded, image: Path | None, new_tokens: int | None = None, prompt: str = PROMPT
) -> str:
    """The answer through the Python API; without ``new_tokens`` until the context of 512 tokens is full."""
    from llava.mm_utils import tokenizer_image_token

    ids = tokenizer_image_token(prompt, model.tokenizer, return_tensors="pt")[None]
    options: dict[str, Any] = {}
    if image is not None:
        picture = open_image(image)
        options = {
            "images": pixel_values([picture], model).half(),
            "image_sizes": [picture.size],
        }
    out = model.model.generate(
        ids, do_sample=False, max_new_tokens=new_tokens or 512 - ids.shape[1], **options
    )
    return str(model.tokenizer.batch_decode(out, skip_special_tokens=True)[0]).strip()


# --- processes -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


@contextmanager
def server(folder: Path, module: str, *arguments: object) -> Iterator[str]:
    """Run a server under the launcher; gives its address once it answers. Its log is ``<module>.log``."""
    port = free_port()
    log = folder / f"{module}.log"
    command = [sys.executable, "-m", "llava_vlora.run", f"llava.serve.{module}"]
    command += ["--host", "localhost", "--port", str(port), *map(str, arguments)]
    address = f"http://localhost:{port}"
    if module == "model_worker":
        command += ["--worker-address", address]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=environment(GRADIO_ANALYTICS_ENABLED="False"),
        )
    try:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            try:
                requests.get(address, timeout=5)
                break
            except requests.exceptions.ConnectionError:
                time.sleep(0.2)
        yield address
        # Ctrl-C, but for gradio, which ignores it in a pipeline without a terminal.
        process.send_signal(signal.SIGTERM if module == "gradio_web_server" else signal.SIGINT)
        process.wait(20)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def controller(tmp_path_factory: Any) -> Iterator[str]:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    with server(tmp_path_factory.mktemp("controller"), "controller") as address:
        yield address


@pytest.fixture(scope="module")
def workers(
    models: dict[str, Path], controller: str, tmp_path_factory: Any
) -> Iterator[dict[str, str]]:
    """Addresses: VLoRA behind the controller with two places, stock LLaVA without a controller."""
    vlora = ["--controller-address", controller, "--limit-model-concurrency", 2]
    stock = ["--controller-address", "http://localhost:9", "--no-register"]
    folders = {kind: tmp_path_factory.mktemp(f"worker-{kind}") for kind in KINDS}
    with (
        server(folders["vlora"], "model_worker", "--model-path", models["vlora"], *vlora) as first,
        server(folders["stock"], "model_worker", "--model-path", models["stock"], *stock) as second,
    ):
        yield {"vlora": first, "stock": second, "log": str(folders["vlora"] / "model_worker.log")}


def send(address: str, *images: bytes, prompt: str = PROMPT, **more: object) -> requests.Response:
    request = {
        "model": "a",
        "prompt": prompt,
        "images": [base64.b64encode(image).decode() for image in images],
        "temperature": 0,
        "max_new_tokens": 24,
        "stop": "</s>",
        **more,
    }
    url = f"{address}/worker_generate_stream"
    return requests.post(url, json=request, stream=True, timeout=60)


def stream(address: str, *images: bytes, **more: object) -> list[dict[str, Any]]:
    """The messages of an answer, in order."""
    lines = send(address, *images, **more).iter_lines(delimiter=b"\0")
    return [json.loads(line) for line in lines if line]


def ask(address: str, *images: bytes, prompt: str = PROMPT, **more: object) -> str:
    last = stream(address, *images, prompt=prompt, **more)[-1]
    assert last["error_code"] == 0, last
    assert last["text"].startswith(prompt)
    return str(last["text"][len(prompt) :]).strip()


def picture(data_dir: Path, i: int) -> Path:
    return data_dir / "images" / f"{i}.png"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_answer_is_the_greedy_one(
    workers: dict[str, str], loaded: dict[str, Loaded], data_dir: Path, kind: str
) -> None:
    image = picture(data_dir, 0)
    messages = stream(workers[kind], image.read_bytes(), max_new_tokens=60)
    texts = [message["text"] for message in messages]
    assert len(set(texts)) > 2  # transformers' streamer waits for the end of a word
    assert all(text.startswith(PROMPT) for text in texts)
    assert all(later.startswith(early) for early, later in pairwise(texts))
    expected = greedy(loaded[kind], image, 60)
    assert texts[-1][len(PROMPT) :].strip() == expected
    assert expected != greedy(loaded[kind], picture(data_dir, 1), 60)


@pytest.mark.slow
def test_requests_at_once_get_the_answers_to_their_own_images(
    workers: dict[str, str], controller: str, loaded: dict[str, Loaded], data_dir: Path
) -> None:
    """Through the controller; more requests than places, so that some wait."""
    images = [picture(data_dir, i) for i in range(4)]
    expected = [greedy(loaded["vlora"], image, 60) for image in images]
    assert len(set(expected)) == 4
    models = requests.post(f"{controller}/list_models", timeout=10).json()["models"]
    assert models == ["a"]
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(ask, controller, image.read_bytes(), max_new_tokens=60)
            for image in 2 * images
        ]
        assert [job.result() for job in jobs] == 2 * expected
    log = Path(workers["log"]).read_text()
    assert log.count("batched path") >= 8
    assert "merged path" not in log


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_context_is_reduced_by_what_the_image_takes(
    workers: dict[str, str], loaded: dict[str, Loaded], data_dir: Path, kind: str
) -> None:
    """An image takes nothing from a VLoRA model's 512 tokens, and 16 from stock LLaVA's, as upstream counts it."""
    image, taken = picture(data_dir, 0), {"vlora": 0, "stock": 16}[kind]
    whole = greedy(loaded[kind], image)
    found = ask(workers[kind], image.read_bytes(), max_new_tokens=1024)
    assert whole.startswith(found)
    assert (found == whole) == (taken == 0)


@pytest.mark.slow
def test_errors_arrive_with_their_text(workers: dict[str, str], data_dir: Path) -> None:
    image = picture(data_dir, 0).read_bytes()
    cases: list[tuple[Sequence[bytes], str, str]] = [
        ([image, image], PROMPT, "Number of images does not match"),
        ([image, image], PROMPT + " <image>", "A VLoRA model sees one image"),
        ([image[: len(image) // 2]], PROMPT, "An image of the request cannot be read"),
        ([b"no image"], PROMPT, "it is in no known image format"),
        ([], PROMPT, "no image was given"),
    ]
    for images, prompt, part in cases:
        (message,) = stream(workers["vlora"], *images, prompt=prompt)
        assert message["error_code"] == 1
        assert part in message["text"]
        assert "HIGH TRAFFIC" not in message["text"]
    (message,) = stream(workers["vlora"], image, prompt=PROMPT + " What" * 600)
    assert "Exceeds max token length" in message["text"]
    (message,) = stream(workers["stock"], image, image)
    assert message == {
        "text": "ValueError: Number of images does not match number of `<image>` tokens in prompt",
        "error_code": 1,
    }


@pytest.mark.slow
def test_model_without_a_worker_is_said_by_the_controller(controller: str) -> None:
    message = stream(controller, model="nobody")[0]
    assert message["error_code"] == 2
    assert "none is running for this model" in message["text"]


@pytest.mark.slow
def test_answer_that_nobody_reads_stops_and_leaves_its_place(
    workers: dict[str, str], loaded: dict[str, Loaded], data_dir: Path
) -> None:
    image, address = picture(data_dir, 2), workers["vlora"]
    for _ in range(3):  # one more than there are places
        response = send(address, image.read_bytes(), max_new_tokens=1024)
        next(response.iter_content(64))
        response.close()
    assert ask(address, image.read_bytes()) == greedy(loaded["vlora"], image, 24)
    end = time.monotonic() + 20
    status = f"{address}/worker_get_status"
    while requests.post(status, timeout=10).json()["queue_length"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert Path(workers["log"]).read_text().count("the client has gone") == 3


@pytest.mark.slow
def test_page_shows_answers_and_errors(
    workers: dict[str, str],
    controller: str,
    loaded: dict[str, Loaded],
    data_dir: Path,
    tmp_path: Path,
) -> None:
    gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed")
    with server(tmp_path, "gradio_web_server", "--controller-url", controller) as address:
        page = gradio_client.Client(address, verbose=False, download_files=False)

        def answer(text: str, image: Any) -> str:
            page.predict(api_name="/clear_history")
            page.predict(text, image, "Default", api_name="/add_text")
            return str(page.predict("a", 0.0, 1.0, 24, api_name="/http_bot")[-1][1])

        image = picture(data_dir, 0)
        found = answer("What colour is the image?", gradio_client.handle_file(str(image)))
        assert found == greedy(loaded["vlora"], image, 24)
        found = answer("What is <image>?", None)
        assert found == (
            "The prompt has an `<image>`, but no image was given. Pass images=..., or call inside "
            "`with model.seeing(model.perceive(images)):`. (error_code: 1)"
        )


_MISSING = """
import sys
from llava_vlora import run
for package, module in (("fastapi", "model_worker"), ("uvicorn", "controller"), ("gradio", "gradio_web_server")):
    sys.modules[package] = None
    assert run.main([f"llava.serve.{module}"]) == 2
    del sys.modules[package]
"""


_TWICE = """
import importlib, sys
from llava_vlora.integration import registration, serving
registration.register()
module = importlib.import_module("llava.serve.model_worker")
serving.SERVERS[module.__name__](module)
path, prompt, image = sys.argv[1:]
worker = module.ModelWorker("", "", "w", True, path, None, "m", False, False, "cpu")
runs = []
worker.model.model.vision_tower.vision_tower.register_forward_pre_hook(lambda *_: runs.append(1))
request = {"prompt": prompt, "images": [image], "temperature": 0, "max_new_tokens": 4, "stop": "</s>"}
first, second = (list(worker.generate_stream(request))[-1] for _ in range(2))
assert first == second
assert len(runs) == 1, runs
"""


@pytest.mark.slow
def test_worker_encodes_an_image_once(
    models: dict[str, Path], data_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    image = base64.b64encode(picture(data_dir, 0).read_bytes()).decode()
    done = run_python("-c", _TWICE, str(models["vlora"]), PROMPT, image, cwd=tmp_path)
    assert done.code == 0, done.errors[-3000:]


@pytest.mark.slow
def test_missing_packages_are_named(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    done = run_python("-c", _MISSING, cwd=tmp_path)
    assert done.code == 0, done.errors[-3000:]
    assert re.findall(
        r"llava.serve.(\w+) needs (\w+),.* pip install 'llava-vlora\[serve\]'", done.errors
    ) == [
        ("model_worker", "fastapi"),
        ("controller", "uvicorn"),
        ("gradio_web_server", "gradio"),
    ]
    assert "Traceback" not in done.errors


@pytest.mark.slow
def test_worker_without_its_controller_says_so(models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    address = f"http://localhost:{free_port()}"
    command = ["--model-path", models["vlora"], "--controller-address", address]
    done = run_module("llava.serve.model_worker", *command, cwd=tmp_path)
    assert done.code == 2
    assert f"nothing answers at {address}/register_worker" in done.errors


# --- chat ------------------------------------------------------------------------------------------


def chat(folder: Path, image: Path, *more: object) -> list[dict[str, str]]:
    """Two turns of LLaVA's chat: what it was asked with and what it answered."""
    command = ["--model-path", folder, "--image-file", image, "--conv-mode", "vicuna_v1"]
    command += ["--temperature", 0, "--max-new-tokens", 12, "--debug", *more]
    turns = "What colour is the image?\nHow many?\n"
    done = run_module("llava.serve.cli", *command, stdin=turns, cwd=image.parent)
    assert done.code == 0, done.errors[-3000:]
    assert "later turns remember earlier answers" in done.errors
    return [ast.literal_eval(found) for found in re.findall(r"\{'prompt'.*\}", done.output)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_chat_remembers_its_answers(
    models: dict[str, Path], loaded: dict[str, Loaded], data_dir: Path, kind: str
) -> None:
    image = picture(data_dir, 0)
    first, second = chat(models[kind], image)
    assert first["prompt"] == PROMPT
    assert first["outputs"] == greedy(loaded[kind], image, 12)
    assert second["prompt"].startswith(f"{PROMPT} {first['outputs']}</s>USER: How many?")
    assert second["outputs"] == greedy(loaded[kind], image, 12, prompt=second["prompt"])


@pytest.mark.slow
def test_chat_in_four_bits(models: dict[str, Path], data_dir: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed on this stack")
    from llava_vlora.integration.loading import load_pretrained_model

    image = picture(data_dir, 0)
    small = Loaded(*load_pretrained_model(str(models["vlora"]), None, "", load_4bit=True))
    first, second = chat(models["vlora"], image, "--load-4bit")
    assert first["outputs"] == greedy(small, image, 12)
    assert first["outputs"] in second["prompt"]


# --- the parts -------------------------------------------------------------------------------------


def start(model: Any, loaded: Loaded, **options: Any) -> tuple[AnswerStream, Thread]:
    answer = AnswerStream(loaded.tokenizer, skip_prompt=True, timeout=15)
    thread = Thread(target=ServedModel(model).generate, kwargs={"streamer": answer, **options})
    thread.start()
    return answer, thread


def test_reader_who_leaves_ends_generate_and_frees_the_model(loaded: dict[str, Loaded]) -> None:
    model = loaded["vlora"].model
    answer, thread = start(
        model, loaded["vlora"], inputs=torch.tensor([[1, 5, 9]]), max_new_tokens=500
    )
    reader = iter(answer)
    next(reader)
    del reader
    thread.join(10)
    assert not thread.is_alive()
    assert answer.text_queue.qsize() < 250
    with turns(model.model.layers).alone():
        pass


def test_error_in_generate_reaches_the_reader(loaded: dict[str, Loaded]) -> None:
    model = loaded["vlora"].model
    answer, thread = start(model, loaded["vlora"], inputs=torch.tensor([[1, -200, 9]]))
    with pytest.raises(ValueError, match="no image was given"):
        list(answer)
    thread.join(10)


def test_wait_for_the_first_token_has_no_limit(
    loaded: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_ALIVE", 0.01)

    class Slow:
        def generate(self, streamer: AnswerStream) -> None:
            time.sleep(0.2)
            streamer.put(torch.tensor([[1]]))
            streamer.put(torch.tensor([5]))
            streamer.end()

    answer, _ = start(Slow(), loaded["vlora"])
    texts = list(answer)
    assert answer.timeout is None
    assert texts[:3] == ["", "", ""]
    assert "".join(texts) == loaded["vlora"].tokenizer.decode([5])


def test_abandoned_answer_does_not_wait_for_the_garbage_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    responses = pytest.importorskip("starlette.responses", reason="no extra serve here")
    closed = threading.Event()

    class Worker:
        is_multimodal, model = False, None

        def generate_stream(self, params: object) -> Iterator[bytes]:
            try:
                while True:
                    time.sleep(0.01)
                    yield b"more"
            finally:
                closed.set()

    monkeypatch.setattr(VLoRAMetaForCausalLM, "vlora_path", "auto")
    module = SimpleNamespace(ModelWorker=Worker, load_image_from_base64=str)
    serving._mend_worker(module)

    async def answer() -> None:
        sent = asyncio.Event()

        async def receive() -> dict[str, str]:
            await sent.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, object]) -> None:
            if message.get("body"):
                sent.set()

        response = responses.StreamingResponse(module.ModelWorker().generate_stream_gate({}))
        await response({"type": "http"}, receive, send)
        assert closed.is_set()

    gc.disable()
    try:
        asyncio.run(answer())
    finally:
        gc.enable()


def test_module_without_a_main_block_is_an_error() -> None:
    with pytest.raises(ConfigError, match="has no main block"):
        serving._main_block(serving)
