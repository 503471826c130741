"""Text that the shipped language model learns from: captions, look-ups and questions.

A model that only answers questions learns *what* a scene holds long before it learns *which is which*.
Look-up lessons teach the second directly: a list of objects, then the same objects again in another order,
where every word that follows from the first list must be told.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from transformers import PreTrainedTokenizerBase

from llava_vlora.sceneqa.questions import Question, QuestionSampler, all_questions
from llava_vlora.sceneqa.scene import Scene, sample_scene
from llava_vlora.sceneqa.sizes import DIGITS, SIZES, SceneSize

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Weight of the words that are given and not answered; they matter for the language, not the task.
CONTEXT_WEIGHT = 0.05
CAPTION_WEIGHT = 0.2
TURNS = 10
CELLS = [f"{column}{row}" for column in "abcdef" for row in range(1, 7)]
KINDS = sorted({kind for size in SIZES.values() for kind in (*size.shapes, *DIGITS)})
COLORS = sorted({color for size in SIZES.values() for color in size.colors})


@dataclass(frozen=True)
class Mixture:
    """Shares of the lessons; what remains are questions about described scenes."""

    captions: float
    lists: float
    """Look-ups in lists of random words on a grid of 6x6."""
    scenes: float
    """Look-ups in captions of scenes, with the named region as a further word."""
    places: float
    """Share of the question samples that ask for positions and relations alone."""


class Lessons:
    """Draws samples: token ids and, per token, the weight of predicting it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """Lessons in the pieces of ``tokenizer``."""
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.sampler = {name: QuestionSampler(self.rng) for name in SIZES}
        self.comma, self.end = self._after("d1", "d1, d2")[:1], self._after("d1", "d1.\n")
        self.stop = [tokenizer.eos_token_id]

    def draw(self, mixture: Mixture) -> tuple[list[int], list[float]]:
        """One sample."""
        luck = self.rng.random()
        size = SIZES["small" if self.rng.random() < 0.9 else "full"]
        if luck < mixture.captions:
            return self.caption(size)
        if luck < mixture.captions + mixture.lists:
            return self.list_lookups()
        if luck < mixture.captions + mixture.lists + mixture.scenes:
            return self.scene_lookups(size)
        return self.questions(size, self.rng.random() < mixture.places)

    def caption(self, size: SceneSize) -> tuple[list[int], list[float]]:
        """A caption alone, half of them in another order of words and objects."""
        objects = [(o.color, o.kind, o.cell) for o in self._scene(size).objects]
        if self.rng.random() < 0.5:
            order = self.rng.sample(range(3), 3)
            self.rng.shuffle(objects)
            objects = [(o[order[0]], o[order[1]], o[order[2]]) for o in objects]
        ids = [self.tokenizer.bos_token_id, *self._listed(objects)]
        return ids, [CAPTION_WEIGHT] * len(ids)

    def list_lookups(self) -> tuple[list[int], list[float]]:
        """Look-ups among two to eight random objects."""
        cells = sorted(self.rng.sample(CELLS, self.rng.randint(2, 8)))
        return self._lookups([(self.rng.choice(COLORS), self.rng.choice(KINDS), c) for c in cells])

    def scene_lookups(self, size: SceneSize) -> tuple[list[int], list[float]]:
        """Look-ups in the caption of a scene."""
        scene = self._scene(size)
        return self._lookups([(o.color, o.kind, o.cell, scene.region(o)) for o in scene.objects])

    def questions(self, size: SceneSize, places: bool) -> tuple[list[int], list[float]]:
        """A described scene with questions, in LLaVA's format."""
        scene = self._scene(size)
        asked = self._places(scene) if places else None
        asked = asked or self.sampler[size.name].draw(scene, TURNS)
        opening = f"{SYSTEM} USER: {size.cells}x{size.cells} scene:"
        ids = [self.tokenizer.bos_token_id, *self._pieces(opening)]
        ids += self._listed([(o.color, o.kind, o.cell) for o in scene.objects])
        weights = [0.0] + [CONTEXT_WEIGHT] * (len(ids) - 1)
        for number, question in enumerate(asked):
            text = f"{question.text} ASSISTANT:"
            context = self._pieces("USER: " + text) if number else self._after("x\n", f"x\n{text}")
            answer = self._after("ASSISTANT:", f"ASSISTANT: {question.answer}") + self.stop
            ids += [*context, *answer]
            weights += [CONTEXT_WEIGHT] * len(context) + [1.0] * len(answer)
        return ids, weights

    def _scene(self, size: SceneSize) -> Scene:
        # Scenes of one object are the first that can be understood.
        return sample_scene(replace(size, min_objects=1), self.rng, "train")

    def _places(self, scene: Scene) -> list[Question]:
        """Questions on positions and relations, all answers about equally often."""
        by_answer: dict[tuple[str, str], list[Question]] = {}
        for question in all_questions(scene):
            if question.category in ("position", "relation"):
                by_answer.setdefault((question.category, question.answer), []).append(question)
        chosen: list[Question] = []
        while by_answer and len(chosen) < TURNS:
            key = self.rng.choice(sorted(by_answer))
            chosen.append(by_answer[key].pop(self.rng.randrange(len(by_answer[key]))))
            if not by_answer[key]:
                del by_answer[key]
        return chosen

    def _lookups(self, objects: Sequence[tuple[str, ...]]) -> tuple[list[int], list[float]]:
        """The objects once in reading order, then twice shuffled with their words in another order.

        Only words that follow weigh: not the first of an object, and none before the order is known.
        """
        ids = [self.tokenizer.bos_token_id, *self._listed([o[:3] for o in objects])]
        weights = [0.0] * len(ids)
        order = self.rng.sample(range(len(objects[0])), len(objects[0]))
        for turn in range(2):
            for number, item in enumerate(self.rng.sample(objects, len(objects))):
                before = self.comma if number else []
                ids += before
                weights += [0.0] * len(before)
                fitting = list(objects)
                for place, field in enumerate(order):
                    follows = len({o[field] for o in fitting}) == 1
                    known = follows and place > 0 and turn + number > 0
                    pieces = self._pieces(item[field])
                    ids += pieces
                    weights += [1.0 if known else 0.0] * len(pieces)
                    fitting = [o for o in fitting if o[field] == item[field]]
            ids += self.end
            weights += [0.0] * len(self.end)
        return ids, weights

    def _listed(self, objects: Sequence[tuple[str, ...]]) -> list[int]:
        ids: list[int] = []
        for item in objects:
            ids += [*(self.comma if ids else []), *self._pieces(" ".join(item))]
        return ids + self.end

    @cache  # noqa: B019  few texts, and the lessons live as long as the script
    def _pieces(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _after(self, start: str, text: str) -> list[int]:
        """The pieces of ``text`` that come after those of its beginning ``start``."""
        first, whole = self._pieces(start), self._pieces(text)
        while whole[: len(first)] != first:  # the end of the start is one piece with what follows
            first = first[:-1]
        return whole[len(first) :]
