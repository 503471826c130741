"""The calls that are compared: reading a prompt, first tokens, further tokens, and what an image costs.

Every system does the same work beyond its own: logits of the last position alone, a cache filled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import PerceptionCache
from ..generators import PerceptualWeightsGenerator
from ..integration.fresh import Models
from ..integration.perception import VLoRAPerception
from ..placeholder import IMAGE_TOKEN_INDEX
from ..weights import PerceptualWeights
from .timing import Prepared

#: What is compared; ``text`` is the plain language model, which sees no image.
SYSTEMS = {
    "text": "text only",
    "llava": "LLaVA",
    "batched": "VLoRA beside W",
    "merged": "VLoRA merged",
    "cached": "VLoRA, image known",
    "idle": "VLoRA, no image",
}
#: Parts of what an image costs once.
IMAGE_STEPS = (
    *("vision tower", "generator", "perceive", "perceive, image known"),
    *("factors from latents", "merge", "restore", "LLaVA's projector"),
)


class Calls:
    """Calls of three models of one shape on random prompts and images."""

    def __init__(self, models: Models, patches: int) -> None:
        """Calls of ``models``, whose vision tower cuts an image into ``patches``."""
        self.models, self.patches = models, patches
        like = next(models.text.parameters())
        self.device, self.dtype = like.device, like.dtype
        self.generator: PerceptualWeightsGenerator = models.vlora.generator
        self.vocab = int(models.text.config.vocab_size)

    # --- inputs ------------------------------------------------------------------------------------

    def ids(self, batch: int, length: int) -> Tensor:
        """Random prompts ``[B, N]``."""
        return torch.randint(3, self.vocab, (batch, length), device=self.device)

    def noise(self, *shape: int) -> Tensor:
        """Random numbers in the models' dtype."""
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def images(self, batch: int) -> Tensor:
        """Random images ``[B, 3, H, W]``."""
        size = self.models.tower.config.image_size
        return self.noise(batch, 3, size, size)

    def weights(self, batch: int) -> PerceptualWeights:
        """The weights of ``batch`` different images that were perceived before."""
        layers, dim = len(self.generator.layers), self.generator.config.dim
        return self.generator.expand(
            {letter: self.noise(batch, layers, dim) for letter in self.generator.config.types}
        )

    def embeddings(self, ids: Tensor, visual: Tensor) -> Tensor:
        """LLaVA's sequence ``[B, V + N, hidden]``: visual tokens, then the prompt."""
        return torch.cat([visual, self.models.llava.get_input_embeddings()(ids)], dim=1)

    def _seen(self, system: str, weights: PerceptualWeights) -> AbstractContextManager[None]:
        """The image behind ``weights`` in VLoRA's calls; a merge shows the first one to all rows."""
        vlora: VLoRAPerception = self.models.vlora
        return vlora.merged(weights.index([0])) if system == "merged" else vlora.seeing(weights)

    def _context(self, system: str, batch: int) -> Callable[[], AbstractContextManager[None]]:
        """What a call of this system runs inside of: different images for the rows of VLoRA's batched calls."""
        if system in ("text", "llava", "idle"):
            return nullcontext
        return partial(self._seen, system, self.weights(batch))

    def _model(self, system: str) -> Any:
        return {"text": self.models.text, "llava": self.models.llava}.get(system, self.models.vlora)

    # --- calls -------------------------------------------------------------------------------------

    def prefill(self, system: str, text: int, visual: int) -> Prepared:
        """Reading a prompt, the image being encoded already."""
        ids, model = self.ids(1, text), self._model(system)
        inputs = {"input_ids": ids}
        if system == "llava":
            width = self.models.text.config.hidden_size
            inputs = {"inputs_embeds": self.embeddings(ids, self.noise(1, visual, width))}
        return _within(self._context(system, 1), lambda: read(model, **inputs))

    def first_token(self, system: str, text: int) -> Prepared:
        """From pixels and prompt to the logits of the first token."""
        ids, image = self.ids(1, text), self.images(1)
        vlora, llava = self.models.vlora, self.models.llava
        if system == "text":
            return _within(nullcontext, lambda: read(self.models.text, input_ids=ids))
        if system == "llava":
            prompt = with_slot(ids)

            def see_and_read() -> None:
                mixed = llava.prepare_inputs_labels_for_multimodal(
                    prompt, None, None, None, None, image
                )
                read(llava, inputs_embeds=mixed[4])

            return _within(nullcontext, see_and_read)

        def perceive_and_read() -> None:
            weights = vlora.perceive(image)
            with self._seen(system, weights):
                read(vlora, input_ids=ids)

        if system == "cached":
            inside = partial(self._remembering, image)
            return _within(inside, perceive_and_read)
        return _within(nullcontext, perceive_and_read)

    def answer(self, system: str, text: int, tokens: int) -> Prepared:
        """LLaVA's own call: ``generate`` with an image; VLoRA's path as the system says, otherwise its own choice."""
        ids, image, model = self.ids(1, text), self.images(1), self._model(system)
        options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        options["do_sample"] = False
        if system in ("text", "idle"):
            mask = torch.ones_like(ids)
            return _within(nullcontext, lambda: model.generate(ids, attention_mask=mask, **options))
        if system in ("batched", "merged"):
            options["vlora_path"] = system
        prompt = with_slot(ids)
        inside = partial(self._remembering, image) if system == "cached" else nullcontext
        return _within(inside, lambda: model.generate(prompt, images=image, **options))

    def decode(self, system: str, batch: int, text: int, visual: int, steps: int) -> Prepared:
        """``steps`` further tokens in every row, after a prompt."""
        model = self._model(system)
        length = text + (visual if system == "llava" else 0)
        past = widened(self._past(system, text, visual), batch)
        inside = self._context(system, batch)

        def go_on() -> None:
            token, cache = self.ids(batch, 1), past
            for _ in range(steps):
                output = model(input_ids=token, past_key_values=cache, use_cache=True)
                token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values

        @contextmanager
        def prepared() -> Iterator[Callable[[], object]]:
            shorten(past, length)
            with inside():
                yield go_on

        return prepared

    def image_work(self) -> dict[str, Prepared]:
        """The steps :data:`IMAGE_STEPS`."""
        vlora, generator = self.models.vlora, self.generator
        image, weights = self.images(1), self.weights(1)
        features = vlora.image_features(image)
        latents = generator.latents(features)
        calls: dict[str, Callable[[], object]] = {
            "vision tower": lambda: vlora.image_features(image),
            "generator": lambda: generator(features),
            "perceive": lambda: vlora.perceive(image),
            "factors from latents": lambda: generator.expand(latents),
            "LLaVA's projector": lambda: self.models.llava.model.mm_projector(features),
        }
        work = {name: _within(nullcontext, call) for name, call in calls.items()}
        again = partial(self._remembering, image)
        work["perceive, image known"] = _within(again, lambda: vlora.perceive(image))

        @contextmanager
        def merging() -> Iterator[Callable[[], object]]:
            with ExitStack() as stack:
                yield lambda: stack.enter_context(vlora.merged(weights))

        @contextmanager
        def restoring() -> Iterator[Callable[[], object]]:
            with ExitStack() as stack:
                stack.enter_context(vlora.merged(weights))
                yield stack.close

        return work | {"merge": merging, "restore": restoring}

    def from_features(self, system: str, text: int, visual: int) -> Prepared:
        """From patch features of any number to the first token: connector and prefill."""
        ids = self.ids(1, text)
        features = self.noise(1, visual, self.generator.visual_dim)
        if system == "text":
            return _within(nullcontext, lambda: read(self.models.text, input_ids=ids))
        if system == "llava":
            llava = self.models.llava
            return _within(
                nullcontext,
                lambda: read(
                    llava, inputs_embeds=self.embeddings(ids, llava.model.mm_projector(features))
                ),
            )
        generator = _for_patches(self.generator, self.noise(1, visual, self.generator.config.dim))

        def generate_and_read() -> None:
            with self.models.vlora.seeing(generator(features)):
                read(self.models.vlora, input_ids=ids)

        return _within(nullcontext, generate_and_read)

    def image_bytes(self, text: int, visual: int) -> dict[str, int]:
        """What one image occupies while it is asked about, measured on live caches and weights."""
        base = cache_bytes(self._past("text", text, visual))
        with self.models.vlora.seeing(self.weights(1)):
            with_image = cache_bytes(self._past("batched", text, visual))
        weights = self.weights(1)
        generated = [t for f in weights.factors.values() for t in (f.a, f.b) if t.ndim == 4]
        latents = self.generator.latents(self.noise(1, self.patches, self.generator.visual_dim))
        return {
            "key-value cache, LLaVA": cache_bytes(self._past("llava", text, visual)) - base,
            "key-value cache, VLoRA": with_image - base,
            "generated factors, VLoRA": sum(t.numel() * t.element_size() for t in generated),
            "latents in the perception cache, VLoRA": sum(
                t.numel() * t.element_size() for t in latents.values()
            ),
        }

    def _past(self, system: str, text: int, visual: int) -> Any:
        """The cache after a prompt."""
        ids = self.ids(1, text)
        if system != "llava":
            return read(self._model(system), input_ids=ids)
        tokens = self.noise(1, visual, self.models.text.config.hidden_size)
        return read(self.models.llava, inputs_embeds=self.embeddings(ids, tokens))

    @contextmanager
    def _remembering(self, image: Tensor) -> Iterator[None]:
        """A perception cache that knows the image."""
        vlora = self.models.vlora
        vlora.perception_cache = PerceptionCache()
        try:
            vlora.perceive(image)
            yield
        finally:
            vlora.perception_cache = None


def with_slot(ids: Tensor) -> Tensor:
    """Prompts ``[B, N]`` with LLaVA's ``<image>`` slot after the first token."""
    slot = ids.new_full((len(ids), 1), IMAGE_TOKEN_INDEX)
    return torch.cat([ids[:, :1], slot, ids[:, 1:]], dim=1)


def read(model: Any, **inputs: Tensor) -> Any:
    """Read a prompt, score the vocabulary after it, and return the cache."""
    output = model.model(use_cache=True, **inputs)
    model.lm_head(output[0][:, -1:])
    return output.past_key_values


def _within(
    inside: Callable[[], AbstractContextManager[Any]], call: Callable[[], object]
) -> Prepared:
    @contextmanager
    def prepared() -> Iterator[Callable[[], object]]:
        with inside():
            yield call

    return prepared


def _for_patches(
    generator: PerceptualWeightsGenerator, positions: Tensor
) -> PerceptualWeightsGenerator:
    """The same generator for another number of patches; all other weights are shared."""
    other = copy.copy(generator)
    other._parameters = {**generator._parameters, "pos_embed": nn.Parameter(positions, False)}
    other.num_patches = positions.shape[1]
    return other


# --- key-value caches: tuples in old transformers, an object in new ones -----------------------------


def _tensors(past: Any) -> list[Tensor]:
    if hasattr(past, "to_legacy_cache"):
        past = past.to_legacy_cache()
    return [t for layer in past for t in layer]


def cache_bytes(past: Any) -> int:
    """Bytes of a key-value cache."""
    return sum(t.numel() * t.element_size() for t in _tensors(past))


def widened(past: Any, batch: int) -> Any:
    """The cache of one row for ``batch`` rows."""
    if hasattr(past, "batch_repeat_interleave"):
        past.batch_repeat_interleave(batch)
        return past
    return tuple(tuple(t.repeat_interleave(batch, dim=0) for t in layer) for layer in past)


def shorten(past: Any, length: int) -> None:
    """Forget all but the first ``length`` tokens; a cache of tuples was never written to."""
    if hasattr(past, "crop"):
        past.crop(length)
