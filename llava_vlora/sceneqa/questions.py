"""Questions about scenes, drawn so that every answer of a template is about equally frequent.

What could be argued about is not asked: objects are beside one another from half a cell on, and in a region from a
quarter of a cell inside its borders on. On a grid both hold for all objects of different columns, rows and regions.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llava_vlora.sceneqa.scene import Scene, SceneObject
from llava_vlora.sceneqa.sizes import CATEGORIES, DIGITS, TWO_STEP

#: Side -> axis of the image, and 1 if pixels count away from it.
_SIDES = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}
#: The words that name a side, and those that ask for one on each axis.
_PHRASES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_CHOICE = ("left or right of", "above or below")


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
        if _inside(scene, item):
            yield Question("position", "region", f"Where is the {name}?", scene.region(item))
        for other, other_name in named:
            for axis, form in enumerate(("horizontal", "vertical")):
                if side := _side(scene, item, other, axis):
                    text = f"Is the {name} {_CHOICE[axis]} the {other_name}?"
                    yield Question("relation", form, text, side)


def _inside(scene: Scene, item: SceneObject) -> bool:
    """Whether an object lies clearly within its region."""
    span = scene.size.image_px // scene.size.regions
    borders = range(span, scene.size.image_px, span)
    near = scene.size.cell_px / 4
    return all(abs(place - border) >= near for place in scene.center(item) for border in borders)


def _ahead(scene: Scene, item: SceneObject, other: SceneObject, axis: int) -> float:
    """By how many pixels the first lies before the second: to the left of it, or above it."""
    return scene.center(other)[axis] - scene.center(item)[axis]


def _side(scene: Scene, item: SceneObject, other: SceneObject, axis: int) -> str | None:
    """On which side of the second the first lies, or None where that is not clear."""
    ahead = _ahead(scene, item, other, axis)
    if abs(ahead) < scene.size.cell_px / 2:
        return None
    return next(side for side, (a, sign) in _SIDES.items() if a == axis and sign * ahead > 0)


def _only(scene: Scene, side: str, base: SceneObject) -> SceneObject | None:
    """The object on one side of another, or None if there is none, a second, or one too close to tell."""
    axis, sign = _SIDES[side]
    found = [o for o in scene.objects if o is not base and sign * _ahead(scene, o, base, axis) > 0]
    return found[0] if len(found) == 1 and _side(scene, found[0], base, axis) else None


def _two_step_questions(scene: Scene) -> Iterator[Question]:
    """What lies beside "the object above the circle", and on which side of it another object lies.

    The second step goes across the first: along it, the first would give the answer away.
    """
    named = [(item, name) for item in scene.objects if (name := _name(scene, item)) is not None]
    for item, name in named:
        for side, (axis, _) in _SIDES.items():
            middle, across = _only(scene, side, item), 1 - axis
            if middle is None:
                continue
            middle_name = f"the object {_PHRASES[side]} the {name}"
            for second in (s for s, (a, _) in _SIDES.items() if a == across):
                last = _only(scene, second, middle)
                if last is not None and last is not item:
                    text = f"What is {_PHRASES[second]} {middle_name}?"
                    yield Question(TWO_STEP, "find", text, f"{last.color} {last.kind}")
            for other, other_name in named:
                answer = _side(scene, other, middle, across)
                if answer and other is not item and other is not middle:
                    text = f"Is the {other_name} {_CHOICE[across]} {middle_name}?"
                    yield Question(TWO_STEP, "side", text, answer)


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


def all_questions(scene: Scene, categories: Sequence[str] = CATEGORIES) -> list[Question]:
    """Every question of these categories that has exactly one right answer in the scene."""
    found = [
        *_attribute_questions(scene),
        *_place_questions(scene),
        *_counting_questions(scene),
        *_existence_questions(scene),
        *(_two_step_questions(scene) if TWO_STEP in categories else ()),
    ]
    return [question for question in found if question.category in categories]


@dataclass
class QuestionSampler:
    """Draws questions and keeps the answers of every template in balance.

    A model without the image can then do little better than guess among the answers.
    """

    rng: random.Random
    _asked: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def draw(
        self, scene: Scene, count: int, categories: Sequence[str] = CATEGORIES
    ) -> list[Question]:
        """Draws ``count`` different questions, every category once before any twice.

        Fewer come back only where the scene does not allow more.
        """
        return self.draw_from(all_questions(scene, categories), count, categories)

    def draw_from(
        self, pool: list[Question], count: int, categories: Sequence[str]
    ) -> list[Question]:
        """Draws as :meth:`draw` does from questions of these categories."""
        drawn: list[Question] = []
        while len(drawn) < count and pool:
            for category in self.rng.sample(categories, len(categories)):
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
