"""Questions about scenes, drawn so that every answer of a template is about equally frequent."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from llava_vlora.sceneqa.scene import Scene, SceneObject
from llava_vlora.sceneqa.sizes import CATEGORIES, DIGITS


@dataclass(frozen=True)
class Question:
    """A question with its only right answer; ``template`` names its form within the category."""

    category: str
    template: str
    text: str
    answer: str


def _name(scene: Scene, item: SceneObject) -> str | None:
    """Shortest phrase that fits this object alone, or None where colour and kind do not do."""
    same_kind = [o for o in scene.objects if o.kind == item.kind]
    if len(same_kind) == 1:
        return item.kind
    if sum(o.color == item.color for o in same_kind) == 1:
        return f"{item.color} {item.kind}"
    return None


def _attribute_questions(scene: Scene) -> Iterator[Question]:
    """Colour of a kind that occurs once; shape or digit of a colour that occurs once on such."""
    kinds = Counter(o.kind for o in scene.objects)
    by_color = Counter((o.is_digit, o.color) for o in scene.objects)
    for item in scene.objects:
        word = "digit" if item.is_digit else "shape"
        if kinds[item.kind] == 1:
            yield Question("color", word, f"What color is the {item.kind}?", item.color)
        if by_color[item.is_digit, item.color] == 1:
            yield Question(word, word, f"Which {word} is {item.color}?", item.kind)


def _place_questions(scene: Scene) -> Iterator[Question]:
    """Region of an object, and the side of one object as seen from another."""
    named = [(item, name) for item in scene.objects if (name := _name(scene, item)) is not None]
    for item, name in named:
        yield Question("position", "region", f"Where is the {name}?", scene.region(item))
        for other, other_name in named:
            if item.column != other.column:
                side = "left" if item.column < other.column else "right"
                text = f"Is the {name} left or right of the {other_name}?"
                yield Question("relation", "horizontal", text, side)
            if item.row != other.row:
                side = "above" if item.row < other.row else "below"
                text = f"Is the {name} above or below the {other_name}?"
                yield Question("relation", "vertical", text, side)


def _counting_questions(scene: Scene) -> Iterator[Question]:
    """Number of objects in all, of one colour, of one shape, and of digits."""
    kinds = Counter(o.kind for o in scene.objects)
    colors = Counter(o.color for o in scene.objects)
    digits = sum(o.is_digit for o in scene.objects)
    yield Question("counting", "all", "How many objects?", str(len(scene.objects)))
    yield Question("counting", "digits", "How many digits?", str(digits))
    for color in scene.size.colors:
        yield Question("counting", "color", f"How many {color} objects?", str(colors[color]))
    for shape in scene.size.shapes:
        plural = shape + ("es" if shape.endswith("s") else "s")
        yield Question("counting", "shape", f"How many {plural}?", str(kinds[shape]))


def _existence_questions(scene: Scene) -> Iterator[Question]:
    """Presence of a kind, or of a colour and kind together.

    The negatives of the second form pair a colour and a kind that are both in the scene, so that
    noticing the two separately is not enough.
    """
    kinds = {o.kind for o in scene.objects}
    colors = sorted({o.color for o in scene.objects})
    pairs = {(o.color, o.kind) for o in scene.objects}
    for kind in (*scene.size.shapes, *DIGITS):
        form = "digit" if kind in DIGITS else "shape"
        answer = "yes" if kind in kinds else "no"
        yield Question("existence", form, f"Is there a {kind}?", answer)
        for color in colors if kind in kinds else ():
            answer = "yes" if (color, kind) in pairs else "no"
            yield Question("existence", "pair " + form, f"Is there a {color} {kind}?", answer)


def all_questions(scene: Scene) -> list[Question]:
    """Every question that has exactly one right answer in the scene."""
    return [
        *_attribute_questions(scene),
        *_place_questions(scene),
        *_counting_questions(scene),
        *_existence_questions(scene),
    ]


@dataclass
class QuestionSampler:
    """Draws questions and keeps the answers of every template in balance.

    A model without the image can then do little better than guess among the answers.
    """

    rng: random.Random
    _asked: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def draw(self, scene: Scene, count: int) -> list[Question]:
        """Draws ``count`` different questions, every category once before any twice.

        Fewer come back only where the scene does not allow more.
        """
        pool = all_questions(scene)
        drawn: list[Question] = []
        while len(drawn) < count and pool:
            for category in self.rng.sample(CATEGORIES, len(CATEGORIES)):
                candidates = [q for q in pool if q.category == category]
                if candidates and len(drawn) < count:
                    question = self._balanced(candidates)
                    drawn.append(question)
                    pool = [q for q in pool if q.text != question.text]
        return drawn

    def _balanced(self, candidates: list[Question]) -> Question:
        """Takes a random template, then its answer that was asked least so far."""
        template = self.rng.choice(sorted({q.template for q in candidates}))
        answers: dict[str, list[Question]] = {}
        for question in candidates:
            if question.template == template:
                answers.setdefault(question.answer, []).append(question)
        category = candidates[0].category
        least = min(
            sorted(answers), key=lambda a: (self._asked[category, template, a], self.rng.random())
        )
        self._asked[category, template, least] += 1
        return self.rng.choice(answers[least])
