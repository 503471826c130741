"""The calls that are compared: reading a prompt, first tokens, further tokens, and what an image costs.

Every system does the same work beyond its own: logits of the last position alone, a cache filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cache import PerceptionCache
from ..generators import Generator
from ..integration.fresh import Models
from ..placeholder import IMAGE_TOKEN_INDEX
from ..weights import PerceptualWeights
from .caches import cache_bytes, shorten, widened
from .resizing import for_patches
from .systems import BESIDE, CACHED, IDLE, LIMIT, LLAVA, MERGED, TEXT, parts_of, system
from .timing import Prepared

#: Parts of what an image costs once, for every kind of generator.
IMAGE_STEPS = (
    *("generator", "perceive", "perceive, image known"),
    *("factors from latents", "merge", "restore"),
)
#: Parts that all models share, and LLaVA's own.
SHARED_STEPS = ("vision tower", "LLaVA's projector")
#: A rank at which the cache keeps images of generators whose latents have a rank.
CACHED_RANK = 64


class Calls:
    """Calls of models of one shape on random prompts and images."""

    def __init__(self, models: Models, patches: int) -> None:
        """Calls of ``models``, whose vision tower cuts an image into ``patches``."""
        self.models, self.patches = models, patches
        like = next(models.text.parameters())
        self.device, self.dtype = like.device, like.dtype
        self.generators: dict[str, Generator] = {
            kind: model.generator for kind, model in models.vlora.items()
        }
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

    def features(self, batch: int, patches: int) -> Tensor:
        """Random patch features ``[B, V, visual_dim]``."""
        return self.noise(batch, patches, self.models.tower.hidden_size)

    def weights(self, kind: str, batch: int) -> PerceptualWeights:
        """The weights of ``batch`` different images that were perceived before."""
        return self.generators[kind](self.features(batch, self.patches)).detach()

    def embeddings(self, ids: Tensor, visual: Tensor) -> Tensor:
        """LLaVA's sequence ``[B, V + N, hidden]``: visual tokens, then the prompt."""
        return torch.cat([visual, self.models.llava.get_input_embeddings()(ids)], dim=1)

    def _seen(self, name: str, weights: PerceptualWeights) -> AbstractContextManager[None]:
        """The image behind ``weights`` in a system's calls; a merge shows the first one to all rows."""
        kind, way = parts_of(name)
        model = self.models.vlora[kind]
        shown = model.merged(weights.index([0])) if way == MERGED else model.seeing(weights)
        return shown  # type: ignore[no-any-return]

    def _context(self, name: str, batch: int) -> Callable[[], AbstractContextManager[None]]:
        """What a call of this system runs inside of: different images for the rows of a batch beside W."""
        kind, way = parts_of(name)
        if way in ("", IDLE):
            return nullcontext
        return partial(self._seen, name, self.weights(kind, batch))

    def _model(self, name: str) -> Any:
        kind, _ = parts_of(name)
        return self.models.pictured.get(kind, self.models.text)

    # --- calls -------------------------------------------------------------------------------------

    def prefill(self, name: str, text: int, visual: int, batch: int = 1) -> Prepared:
        """Reading prompts, the images being encoded already."""
        ids, model = self.ids(batch, text), self._model(name)
        inputs = {"input_ids": ids}
        if name == LLAVA:
            width = self.models.text.config.hidden_size
            inputs = {"inputs_embeds": self.embeddings(ids, self.noise(batch, visual, width))}
        return _within(self._context(name, batch), lambda: read(model, **inputs))

    def first_token(self, name: str, text: int) -> Prepared:
        """From pixels and prompt to the logits of the first token."""
        ids, image, llava = self.ids(1, text), self.images(1), self.models.llava
        if name == TEXT:
            return _within(nullcontext, lambda: read(self.models.text, input_ids=ids))
        if name == LIMIT:

            def encode_and_read() -> None:
                self.models.tower(image)
                read(self.models.text, input_ids=ids)

            return _within(nullcontext, encode_and_read)
        if name == LLAVA:
            prompt = with_slot(ids)

            def see_and_read() -> None:
                mixed = llava.prepare_inputs_labels_for_multimodal(
                    prompt, None, None, None, None, image
                )
                read(llava, inputs_embeds=mixed[4])

            return _within(nullcontext, see_and_read)
        model = self._model(name)

        def perceive_and_read() -> None:
            weights = model.perceive(image)
            with self._seen(name, weights):
                read(model, input_ids=ids)

        inside: Any = nullcontext
        if parts_of(name)[1] == CACHED:
            inside = partial(self._remembering, model, image)
        return _within(inside, perceive_and_read)

    def answer(self, name: str, text: int, tokens: int) -> Prepared:
        """LLaVA's own call: ``generate`` with an image; VLoRA's path as the system says, otherwise its own choice."""
        ids, image, model = self.ids(1, text), self.images(1), self._model(name)
        options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        options["do_sample"] = False
        _, way = parts_of(name)
        if name == TEXT or way == IDLE:
            mask = torch.ones_like(ids)
            return _within(nullcontext, lambda: model.generate(ids, attention_mask=mask, **options))
        if way in (BESIDE, MERGED):
            options["vlora_path"] = way
        prompt = with_slot(ids)
        inside: Any = partial(self._remembering, model, image) if way == CACHED else nullcontext
        return _within(inside, lambda: model.generate(prompt, images=image, **options))

    def decode(self, name: str, batch: int, text: int, visual: int, steps: int) -> Prepared:
        """``steps`` further tokens in every row, after a prompt."""
        model = self._model(name)
        length = text + (visual if name == LLAVA else 0)
        past = widened(self._past(name, text, visual), batch)
        inside = self._context(name, batch)

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
        """The steps of :data:`SHARED_STEPS`, and those of :data:`IMAGE_STEPS` for each kind of generator."""
        image, projector = self.images(1), self.models.llava.model.mm_projector
        features = self.models.tower(image)
        work = {
            "vision tower": _within(nullcontext, lambda: self.models.tower(image)),
            "LLaVA's projector": _within(nullcontext, lambda: projector(features)),
        }
        for kind in self.generators:
            own = self._image_work(kind, image, features)
            work |= {system(kind, step): prepared for step, prepared in own.items()}
        return work

    def _image_work(self, kind: str, image: Tensor, features: Tensor) -> dict[str, Prepared]:
        model, generator = self.models.vlora[kind], self.generators[kind]
        weights, latents = self.weights(kind, 1), generator.latents(features)
        calls: dict[str, Callable[[], object]] = {
            "generator": lambda: generator(features),
            "perceive": lambda: model.perceive(image),
            "factors from latents": lambda: generator.expand(latents),
        }
        work = {name: _within(nullcontext, call) for name, call in calls.items()}
        again = partial(self._remembering, model, image)
        work["perceive, image known"] = _within(again, lambda: model.perceive(image))

        @contextmanager
        def merging() -> Iterator[Callable[[], object]]:
            with ExitStack() as stack:
                yield lambda: stack.enter_context(model.merged(weights))

        @contextmanager
        def restoring() -> Iterator[Callable[[], object]]:
            with ExitStack() as stack:
                stack.enter_context(model.merged(weights))
                yield stack.close

        return work | {"merge": merging, "restore": restoring}

    def from_features(self, name: str, text: int, visual: int) -> Prepared:
        """From patch features of any number to the first token: connector and prefill.

        The way ``generator`` of a kind is the connector alone, ``prefill`` is reading with its weights alone.
        """
        ids, features = self.ids(1, text), self.features(1, visual)
        if name == TEXT:
            return _within(nullcontext, lambda: read(self.models.text, input_ids=ids))
        if name == LLAVA:
            llava = self.models.llava
            return _within(
                nullcontext,
                lambda: read(
                    llava, inputs_embeds=self.embeddings(ids, llava.model.mm_projector(features))
                ),
            )
        kind, way = parts_of(name)
        model = self.models.vlora[kind]
        generator = for_patches(self.generators[kind], model, visual)
        if way == "generator":
            return _within(nullcontext, lambda: generator(features))
        if way == "prefill":
            inside = partial(self._seen, name, generator(features))
            return _within(inside, lambda: read(model, input_ids=ids))

        def generate_and_read() -> None:
            with model.seeing(generator(features)):
                read(model, input_ids=ids)

        return _within(nullcontext, generate_and_read)

    def image_facts(self, text: int, visual: int) -> dict[str, dict[str, float]]:
        """What one image occupies in bytes while it is asked about, and what a cache keeps of it; by model.

        ``cache``: in the key-value cache; ``weights``: in its perceptual weights; ``known``: in the perception cache;
        with a rank, ``known at rank`` and the ``lost share`` of the sum of squares of these (random) weights.
        """
        base = cache_bytes(self._past(TEXT, text, visual))
        found: dict[str, dict[str, float]] = {
            LLAVA: {"cache": cache_bytes(self._past(LLAVA, text, visual)) - base}
        }
        for kind, model in self.models.vlora.items():
            weights, name = self.weights(kind, 1), system(kind, BESIDE)
            with model.seeing(weights):
                seen = cache_bytes(self._past(name, text, visual)) - base
            known, _ = self._known(model, None)
            found[kind] = {"cache": seen, "weights": weights.image_bytes, "known": known}
            if self.generators[kind].caches_rank:
                rank = min(CACHED_RANK, weights.rank)
                size, lost = self._known(model, rank)
                found[kind] |= {"rank": rank, "known at rank": size, "lost share": lost}
        return found

    def _known(self, model: Any, rank: int | None) -> tuple[int, float]:
        """Bytes that a perception cache keeps of an image, and the share that its rank leaves out."""
        cache = PerceptionCache(rank=rank)
        with self._remembering(model, self.images(1), cache):
            return cache.nbytes, cache.lost_share

    def _past(self, name: str, text: int, visual: int) -> Any:
        """The cache after a prompt."""
        ids = self.ids(1, text)
        if name != LLAVA:
            return read(self._model(name), input_ids=ids)
        tokens = self.noise(1, visual, self.models.text.config.hidden_size)
        return read(self.models.llava, inputs_embeds=self.embeddings(ids, tokens))

    @contextmanager
    def _remembering(
        self, model: Any, image: Tensor, cache: PerceptionCache | None = None
    ) -> Iterator[None]:
        """A perception cache that knows the image."""
        model.perception_cache = cache if cache is not None else PerceptionCache()
        try:
            with torch.no_grad():
                model.perceive(image)
            yield
        finally:
            model.perception_cache = None


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
