"""The hard test of a data set with free positions: small digits and two-step relations.

Its scenes are held out and are in no other test, so nothing is chosen by them. Half of them have objects of the usual
size and are asked where things are (``free position``) and for two-step relations; the other half have digits smaller
than any in training and are asked what these are (``small digit``).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava_vlora.sceneqa.questions import Question, QuestionSampler, all_questions
from llava_vlora.sceneqa.scene import Scene, sample_scene
from llava_vlora.sceneqa.sizes import HARD_CATEGORIES, TWO_STEP, SceneSize

#: Size of a small digit; the smallest of them is a fifth of the cell's side in radius.
SMALL = 0.65
#: Two-step relations need three objects.
_LEAST = 3
_PLACES, _, _DIGITS = HARD_CATEGORIES
#: Forms of questions about digits and of two-step relations.
_READING = ("digit", "pair digit")
_STEPS = ("find", "side")


@dataclass(frozen=True)
class HardFiles:
    """Paths of the hard test, beside those of :class:`~llava_vlora.sceneqa.SceneQAFiles`.

    Attributes:
        questions: questions for LLaVA's evaluators.
        answers: their labels.
    """

    questions: Path
    answers: Path


def hard_files(root: Path) -> HardFiles:
    """Names the files below a data set's folder without touching them."""
    return HardFiles(root / "test_hard_questions.jsonl", root / "test_hard_answers.jsonl")


@dataclass(frozen=True)
class HardQuestion:
    """A question with the hard category that it stands for."""

    group: str
    question: Question


@dataclass(frozen=True)
class HardScene:
    """A scene with what is asked about it."""

    scene: Scene
    asked: tuple[HardQuestion, ...]


def hard_scenes(
    size: SceneSize, count: int, split: str, seed: str, taken: Iterable[int]
) -> list[HardScene]:
    """Draws ``count`` scenes for places and relations and ``count`` with small digits.

    Args:
        size: a size of free layout.
        count: scenes of each sort.
        split: split of the scenes.
        seed: of scenes and questions.
        taken: keys of scenes that must not be among them.
    """
    rng = random.Random(seed)
    used = set(taken)
    sampler = QuestionSampler(rng)
    found: list[HardScene] = []
    for make in (_placed, _with_small_digits):
        target = len(found) + count
        while len(found) < target:
            scene = sample_scene(replace(size, min_objects=_LEAST), rng, split)
            hard = None if scene.key in used else make(scene, sampler)
            if hard is not None:
                used.add(scene.key)
                found.append(hard)
    return found


def _placed(scene: Scene, sampler: QuestionSampler) -> HardScene | None:
    """A scene that allows both forms of two-step relations, with these, a position and a relation."""
    steps = all_questions(scene, (TWO_STEP,))
    pools = [[q for q in steps if q.template == form] for form in _STEPS]
    if not all(pools):
        return None
    asked = [(_PLACES, q) for q in sampler.draw(scene, 2, ("position", "relation"))]
    asked += [(TWO_STEP, q) for pool in pools for q in sampler.draw_from(pool, 1, (TWO_STEP,))]
    return HardScene(scene, tuple(HardQuestion(group, q) for group, q in asked))


def _with_small_digits(scene: Scene, sampler: QuestionSampler) -> HardScene | None:
    """A scene with its digits made small, with three questions about them; two differ, so one must be read."""
    shrunk = (replace(o, scale=SMALL) if o.is_digit else o for o in scene.objects)
    small = Scene(scene.size, tuple(shrunk))
    if len({o.kind for o in small.objects if o.is_digit}) < 2:
        return None
    categories = ("digit", "color", "existence")
    pool = [q for q in all_questions(small, categories) if q.template in _READING]
    drawn = sampler.draw_from(pool, len(categories), categories)
    return HardScene(small, tuple(HardQuestion(_DIGITS, q) for q in drawn))


def by_group(scenes: Sequence[HardScene]) -> Iterator[tuple[str, list[Question]]]:
    """The questions of each hard category."""
    for group in HARD_CATEGORIES:
        yield group, [h.question for s in scenes for h in s.asked if h.group == group]
