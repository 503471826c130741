"""LLaVA's chat, controller, model worker and web page under the launcher.

Each module is imported under its own name, mended where its cause is present, and its main block is run. What is
mended serves stock LLaVA models as well; their answers stay the same.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import logging
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from queue import Empty
from types import ModuleType, SimpleNamespace
from typing import Any

import requests
import torch
from PIL import Image, UnidentifiedImageError
from transformers import TextIteratorStreamer

from ..cache import PerceptionCache
from ..errors import ConfigError, ImageError, VLoRAError
from .causal import VLoRAMetaForCausalLM

_log = logging.getLogger("llava_vlora")

#: Seconds after which a stream without news repeats itself: LLaVA's controller gives up after 5, its page after 10.
_ALIVE = 2.0
_UNREACHABLE = (
    "**No answer from a model worker: none is running for this model, all its places are taken, or it cannot be "
    "reached. Its log and the controller's say more.**"
)
#: What chat does where `generate` returns the prompt too; LLaVA's returns new tokens only.
_CHAT_SLICE = "output_ids[0, input_ids.shape[1]:]"


def serve(name: str, arguments: Sequence[str]) -> None:
    """Run the module ``name``, one of :data:`SERVERS`, as the main program with this command line.

    Raises:
        ConfigError: A package of the extra ``serve`` is missing, or the controller does not answer.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "gradio"):
            raise
        raise ConfigError(
            f"{name} needs {error.name}, which is not installed: pip install 'llava-vlora[serve]'."
        ) from error
    for change in SERVERS[name](module):
        # LLaVA has sent sys.stderr to a log, where each line is an error.
        print(f"llava_vlora: {name}: {change}.", file=sys.__stderr__)
    sys.argv = [str(module.__file__), *arguments]
    try:
        exec(_main_block(module), vars(module))
    except requests.exceptions.ConnectionError as error:
        url = getattr(error.request, "url", None)
        raise ConfigError(
            f"{name}: nothing answers at {url}. Start llava.serve.controller first, and name its address."
        ) from error


def _main_block(module: ModuleType) -> Any:
    """The body of ``if __name__ == "__main__":``, which an import leaves out."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            return compile(ast.Module(node.body, []), str(module.__file__), "exec")
    raise ConfigError(f"{module.__name__} in {module.__file__} has no main block to run.")


# --- the worker ------------------------------------------------------------------------------------


class AnswerStream(TextIteratorStreamer):
    """The text of one answer: it ends with the error that ended ``generate``, and ends ``generate`` when unread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but without a time limit: a first token may take long, and an error ends the stream."""
        super().__init__(*args, **{**kwargs, "timeout": None})
        self._error: BaseException | None = None
        self._unread = False

    def put(self, value: Any) -> None:
        """Take the next tokens from ``generate``; raises ``ConnectionAbortedError`` where nobody reads any more."""
        if self._unread:
            raise ConnectionAbortedError("the client has gone")
        super().put(value)

    def __iter__(self) -> Iterator[str]:
        """Texts until the end; an empty text where there is no news, so that connections stay open."""
        try:
            while True:
                try:
                    text = self.text_queue.get(timeout=_ALIVE)
                except Empty:
                    text = ""
                if text is self.stop_signal:
                    break
                yield text
        finally:
            self._unread = True
        if self._error is not None:
            raise self._error

    def close(self, error: BaseException | None = None) -> None:
        """End the stream, with ``error`` if ``generate`` raised one; ending it twice does nothing."""
        self._error = error
        self.text_queue.put(self.stop_signal)


class ServedModel:
    """The model as a worker sees it; everything that is not here is the model's own."""

    def __init__(self, model: Any) -> None:
        """A view of ``model``."""
        self._model = model

    def __getattr__(self, name: str) -> Any:
        """What the model has."""
        return getattr(self._model, name)

    def generate(self, *, streamer: AnswerStream, **options: Any) -> None:
        """Answer into ``streamer``; an error goes to its reader instead of ending a thread unseen."""
        error: BaseException | None = None
        try:
            self._model.generate(streamer=streamer, **options)
        except ConnectionAbortedError as gone:
            _log.info("An answer was stopped: %s.", gone)
        except BaseException as raised:
            error = raised
        streamer.close(error)

    def get_vision_tower(self) -> Any:
        """The tower; of a VLoRA model only that no patch of it enters the sequence, which is what a worker asks."""
        if isinstance(self._model, VLoRAMetaForCausalLM):
            return SimpleNamespace(num_patches=0)
        return self._model.get_vision_tower()


def _mend_worker(module: Any) -> list[str]:
    from starlette.concurrency import iterate_in_threadpool

    # A request that merges would make the others wait until its answer is complete.
    VLoRAMetaForCausalLM.vlora_path = "batched"
    worker = module.ModelWorker
    stock_init = worker.__init__

    @functools.wraps(stock_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        # LLaVA looks for "llava" in the folder's name.
        if isinstance(self.model, VLoRAMetaForCausalLM):
            self.is_multimodal = True
            self.model.perception_cache = PerceptionCache()
        self.model = ServedModel(self.model)
        if not hasattr(self, "heart_beat_thread"):
            # With --no-register every request would still report to a controller, for ever if there is none.
            self.send_heart_beat = lambda: None

    async def generate_stream_gate(self: Any, params: Any) -> AsyncIterator[bytes]:
        messages = _messages(self.generate_stream(params))
        try:
            async for message in iterate_in_threadpool(messages):
                yield message
        finally:
            messages.close()  # the garbage collector would do it, but only after many tokens for nobody

    worker.__init__, worker.generate_stream_gate = __init__, generate_stream_gate
    _end_with_the_server(module)
    module.TextIteratorStreamer = AnswerStream
    module.load_image_from_base64 = _checked(module.load_image_from_base64)
    return ["errors reach the client with their text, and an answer stops when its client has gone"]


def _messages(answer: Iterator[bytes]) -> Generator[bytes, None, None]:
    """The messages of an answer; an error becomes the last one, with its text."""
    try:
        yield from answer
    except Exception as error:
        known = isinstance(error, VLoRAError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        _log.error("A request failed: %s", text, exc_info=None if known else error)
        # The page reads Markdown, where <image> would be an element without a text.
        text = re.sub("<[^<>]*>", r"`\g<0>`", text)
        yield json.dumps({"text": text, "error_code": 1}).encode() + b"\0"


def _checked(stock: Callable[[str], Image.Image]) -> Callable[[str], Image.Image]:
    @functools.wraps(stock)
    def load_image_from_base64(data: str) -> Image.Image:
        try:
            return stock(data).convert("RGB")  # as LLaVA's evaluators do
        except (OSError, ValueError, TypeError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "it is in no known image format" if unknown else error
            raise ImageError(
                f"An image of the request cannot be read: {reason}. Send whole image files, base64-encoded."
            ) from error

    return load_image_from_base64


def _end_with_the_server(module: Any) -> None:
    # The threads that send and check heart beats run for ever, and would keep a process that was told to end.
    module.threading = SimpleNamespace(Thread=functools.partial(threading.Thread, daemon=True))


# --- the controller and the page -------------------------------------------------------------------


def _mend_controller(module: Any) -> list[str]:
    _end_with_the_server(module)
    return _name_the_cause(module)


def _name_the_cause(module: Any) -> list[str]:
    module.server_error_msg = _UNREACHABLE
    return ["where no worker answers it says so instead of 'high traffic'"]


def _mend_page(module: Any) -> list[str]:
    changes = _name_the_cause(module)
    blocks = module.gr.Blocks
    stock = blocks.load
    if "_js" not in inspect.signature(stock).parameters:

        @functools.wraps(stock)
        def load(*args: Any, _js: Any = None, **kwargs: Any) -> Any:
            return stock(*args, **kwargs, **({} if _js is None else {"js": _js}))

        blocks.load = load
        changes.append("gradio calls js what LLaVA calls _js")
    return changes


# --- chat ------------------------------------------------------------------------------------------


def _mend_chat(module: Any) -> list[str]:
    if _CHAT_SLICE not in inspect.getsource(module.main):
        return []
    stock = module.load_pretrained_model

    @functools.wraps(stock)
    def load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
        tokenizer, model, *rest = stock(*args, **kwargs)
        model.generate = _with_prompt(model.generate, tokenizer.all_special_ids)
        return (tokenizer, model, *rest)

    module.load_pretrained_model = load_pretrained_model
    return ["later turns remember earlier answers, which this release of LLaVA cuts away"]


def _with_prompt(stock: Callable[..., Any], special: Sequence[int]) -> Callable[..., Any]:
    """``generate`` for one prompt ``[1, N]``, whose result begins with the prompt also where the stock one's does not.

    The answer comes without ``special`` tokens: chat puts its own end behind it in the next prompt, and
    transformers up to 4.37 begins an answer with ``<s>``.
    """

    @functools.wraps(stock)
    def generate(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        out = stock(inputs, *args, **kwargs)
        begins = out[:, : inputs.shape[1]]
        if begins.shape == inputs.shape and bool((begins == inputs).all()):
            return out
        answer = out[~torch.isin(out, torch.tensor(special, device=out.device))]
        return torch.cat([inputs, answer[None]], dim=1)

    return generate


#: LLaVA's modules that are mended before they run; each function returns what it changed.
SERVERS: dict[str, Callable[[Any], list[str]]] = {
    "llava.serve.cli": _mend_chat,
    "llava.serve.controller": _mend_controller,
    "llava.serve.model_worker": _mend_worker,
    "llava.serve.gradio_web_server": _mend_page,
}
