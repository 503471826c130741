"""Answers of a VLoRA model: one image and one prompt decide them, not the batch, the cache, padding or history.

Tests named ``test_public_bug_*`` hold faults of the public VLoRA code that must not come back.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from llava_vlora.errors import ConfigError, ImageError, PromptError, WeightsError
from tests.tiny import IMAGE_SIZE, make_vlora, trainer

SLOT, NEW = -200, 6
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
MODELS = [("vlora", f, rule) for f in ("llama", "mistral") for rule in ("gap", "contiguous")]
# What else is injected changes neither families nor placeholders: each of them once.
MODELS += [("vlora_fast", "llama", "contiguous"), ("vlora_fast", "mistral", "gap")]
Makes = Callable[..., Any]


@pytest.fixture(scope="module")
def bases(llm_dir: Path, mistral_dir: Path) -> dict[str, Path]:
    """Language models by family."""
    return {"llama": llm_dir, "mistral": mistral_dir}


@pytest.fixture(scope="module")
def made(bases: dict[str, Path], tower_dir: Path) -> Makes:
    """Makes each VLoRA model once. It never ends an answer early."""
    models: dict[tuple[str, str, str], Any] = {}

    def make(kind: str, family: str, rule: str) -> Any:
        if (kind, family, rule) not in models:
            model = make_vlora(bases[family], tower_dir, kind, vlora_placeholder=rule)
            model.generation_config.eos_token_id = None
            models[kind, family, rule] = model
        return models[kind, family, rule]

    return make


@pytest.fixture(params=MODELS, ids="-".join)
def model(request: pytest.FixtureRequest, made: Makes) -> Any:
    """Each generator and family with each placeholder rule."""
    return made(*request.param)


@pytest.fixture
def llama(kind: str, made: Makes) -> Any:
    """A model of each kind of generator, for what does not depend on family and rule."""
    return made(kind, "llama", "gap")


def prompt(length: int = 9, slot: int | None = 4, seed: int = 0) -> Tensor:
    """Random token ids ``[1, length]`` with an image slot at ``slot``."""
    ids = torch.randint(5, 85, (1, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 0] = 1
    if slot is not None:
        ids[0, slot] = SLOT
    return ids


def pictures(count: int) -> Tensor:
    """Random images that differ: ``[count, 3, H, W]``."""
    random = torch.Generator().manual_seed(7)
    return 2 * torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random)


#: Two prompts with an image, at different places, and one without; all of different length.
PROMPTS = (prompt(9, 4), prompt(12, 1, seed=1), prompt(7, None, seed=2))


def padded(rows: tuple[Tensor, ...], side: str) -> dict[str, Tensor]:
    """A batch with padding on one side."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    return {"inputs": ids, "attention_mask": mask}


def answer(model: Any, inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens ``[B, T]`` and the raw logits ``[B, T, vocab]`` they were taken from."""
    settings = {"do_sample": False, "max_new_tokens": NEW, **options}
    out = model.generate(inputs, output_scores=True, return_dict_in_generate=True, **settings)
    scores = torch.stack(out.scores, dim=1)
    # Older transformers put a BOS before an answer to embeddings.
    return out.sequences[:, -scores.shape[1] :], scores


def forced(model: Any, ids: Tensor, tokens: Tensor, image: Tensor | None) -> Tensor:
    """Logits ``[1, T, vocab]`` of an answer ``[T]`` from one pass over prompt and answer."""
    with torch.no_grad():
        logits = model(torch.cat([ids, tokens[None]], dim=1), images=image).logits
    return logits[:, -len(tokens) - 1 : -1]


def hook_count(model: Any) -> int:
    """Forward hooks on all modules."""
    return sum(len(module._forward_hooks) for module in model.modules())


# --- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_of_a_mixed_batch_is_teacher_forcing(model: Any, side: str) -> None:
    images = pictures(3)
    tokens, scores = answer(model, **padded(PROMPTS, side), images=images)
    for i, ids in enumerate(PROMPTS):
        image = images[i : i + 1] if SLOT in ids else None
        torch.testing.assert_close(scores[i : i + 1], forced(model, ids, tokens[i], image), **CLOSE)


def test_public_bug_decoded_positions_slip_by_one(model: Any) -> None:
    """Its cached steps counted positions without the slot that training had counted."""
    ids, image = prompt(), pictures(1)
    tokens, scores = answer(model, ids, images=image)
    torch.testing.assert_close(scores, forced(model, ids, tokens[0], image), **CLOSE)


def test_rules_of_the_placeholder_differ(made: Makes) -> None:
    """Otherwise the tests above could not tell them apart."""
    one, other = (
        made("vlora", "llama", rule)(prompt(), images=pictures(1)).logits
        for rule in ("gap", "contiguous")
    )
    assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(model: Any, side: str) -> None:
    images = pictures(3)
    tokens, scores = answer(model, **padded(PROMPTS, side), images=images)
    for i, ids in enumerate(PROMPTS):
        image = images[i : i + 1] if SLOT in ids else None
        single, logits = answer(model, ids, images=image)
        assert torch.equal(single[0], tokens[i])
        torch.testing.assert_close(logits[0], scores[i], **CLOSE)


def test_one_image_for_each_slot_equals_one_for_each_prompt(model: Any) -> None:
    images = pictures(3)
    batch = padded(PROMPTS, "left")
    expected = answer(model, **batch, images=images)[1]
    torch.testing.assert_close(answer(model, **batch, images=images[:2])[1], expected, **CLOSE)


def test_decoding_without_a_cache_is_the_same(model: Any) -> None:
    ids, image = prompt(), pictures(1)
    expected = answer(model, ids, images=image)[1]
    torch.testing.assert_close(
        answer(model, ids, images=image, use_cache=False)[1], expected, **CLOSE
    )


def test_public_bug_attention_mask_none_crashed(model: Any) -> None:
    ids, image = prompt(), pictures(1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, images=image).logits
        found = model(ids, images=image).logits
    torch.testing.assert_close(found, expected, **CLOSE)


def test_image_matters(model: Any) -> None:
    one, other = (answer(model, prompt(), images=pictures(2)[i : i + 1])[1] for i in (0, 1))
    assert (one[:, 0] - other[:, 0]).abs().max() > 0.1


def test_public_bug_second_call_ignored_the_image(model: Any) -> None:
    """It wrote zeros over the caller's slot and mask, so that the next call saw no image."""
    batch, images = padded(PROMPTS, "left"), pictures(3)
    before = {name: tensor.clone() for name, tensor in [*batch.items(), ("images", images)]}
    tokens, scores = answer(model, **batch, images=images)
    with torch.no_grad():
        model(batch["inputs"], attention_mask=batch["attention_mask"], images=images)
    again, same = answer(model, **batch, images=images)
    assert torch.equal(tokens, again)
    assert torch.equal(scores, same)
    for name, tensor in [*batch.items(), ("images", images)]:
        assert torch.equal(tensor, before[name]), name


# --- the plain language model --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_public_bug_pure_text_crashed(
    kind: str, family: str, made: Makes, bases: dict[str, Path]
) -> None:
    """Without an image the model is the language model, bit for bit, also after it has seen one."""
    model, base = made(kind, family, "gap"), AutoModelForCausalLM.from_pretrained(bases[family])
    base.generation_config.eos_token_id = None
    base = base.to(model.dtype).eval()
    text, hooks = prompt(slot=None), hook_count(model)
    answer(model, prompt(), images=pictures(1))
    tokens, scores = answer(model, text)
    assert torch.equal(scores, answer(base, text)[1])
    assert torch.equal(tokens, answer(base, text)[0])
    with torch.no_grad():
        assert torch.equal(model(text).logits, base(text).logits)
    assert hook_count(model) == hooks


def test_row_without_an_image_is_the_language_model(model: Any, bases: dict[str, Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        bases["mistral" if "mistral" in model.config.model_type else "llama"]
    )
    base.generation_config.eos_token_id = None
    tokens, scores = answer(model, **padded(PROMPTS, "left"), images=pictures(3))
    text, logits = answer(base.to(model.dtype).eval(), PROMPTS[2])
    assert torch.equal(tokens[2], text[0])
    torch.testing.assert_close(scores[2], logits[0], **CLOSE)


# --- ways of decoding ----------------------------------------------------------------------------


def test_public_bug_beams_in_a_batch_crashed(model: Any) -> None:
    """Beams of a batch are those of its rows."""
    batch, images = padded(PROMPTS, "left"), pictures(3)
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": NEW}
    together = model.generate(**batch, images=images, **options)
    for i, ids in enumerate(PROMPTS):
        image = images[i : i + 1] if SLOT in ids else None
        assert torch.equal(model.generate(ids, images=image, **options)[0], together[i])


def test_public_bug_return_sequences_in_a_batch_crashed(model: Any) -> None:
    """Each sampled sequence sees its own row's image."""
    images, count = pictures(2), 3
    torch.manual_seed(5)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": count}
    tokens, scores = answer(model, **padded(PROMPTS[:2], "left"), images=images, **options)
    assert tokens.shape == (2 * count, NEW)
    assert len({tuple(row.tolist()) for row in tokens}) > 2
    for j, row in enumerate(tokens):
        i = j // count
        expected = forced(model, PROMPTS[i], row, images[i : i + 1])
        torch.testing.assert_close(scores[j : j + 1], expected, **CLOSE)


def test_sampling_repeats_with_its_seed(llama: Any) -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(
            answer(llama, prompt(), images=pictures(1), do_sample=True, max_new_tokens=20)[0]
        )
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_public_bug_streaming_crashed(llama: Any, llm_dir: Path) -> None:
    """Its ``streamer`` went to the place of another argument. As LLaVA's model worker streams:"""
    tokenizer = AutoTokenizer.from_pretrained(llm_dir, use_fast=False)
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60
    )
    options = {
        "inputs": prompt(),
        "images": pictures(1),
        "image_sizes": [(IMAGE_SIZE, IMAGE_SIZE)],
        "do_sample": False,
        "max_new_tokens": NEW,
        "use_cache": True,
    }
    thread = Thread(target=llama.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    whole = llama.generate(**options)
    assert streamed == tokenizer.batch_decode(whole, skip_special_tokens=True)[0]
    assert streamed


def test_keywords_stop_an_answer(llama: Any, llm_dir: Path) -> None:
    from llava.mm_utils import KeywordsStoppingCriteria

    tokenizer = AutoTokenizer.from_pretrained(llm_dir, use_fast=False)
    ids, image = prompt(), pictures(1)
    tokens = answer(llama, ids, images=image)[0][0]
    stop = KeywordsStoppingCriteria(["x"], tokenizer, ids)
    stop.keyword_ids = [tokens[2:4]]
    stopped = answer(llama, ids, images=image, stopping_criteria=[stop])[0][0]
    ends = [i for i in range(2, NEW + 1) if torch.equal(tokens[i - 2 : i], tokens[2:4])]
    assert torch.equal(stopped, tokens[: ends[0]])


def test_weights_of_an_image_serve_many_questions(model: Any) -> None:
    images = pictures(2)
    weights = model.perceive(images)
    for ids in (prompt(), prompt(12, 1, seed=1)):
        batch = ids.expand(2, -1)
        expected = answer(model, batch, images=images)[1]
        with model.seeing(weights):
            torch.testing.assert_close(answer(model, batch)[1], expected, **CLOSE)


def test_text_without_a_slot_sees_the_image_in_use(model: Any) -> None:
    text, image = prompt(slot=None), pictures(1)
    plain = answer(model, text)[1]
    with model.seeing(model.perceive(image)):
        tokens, scores = answer(model, text)
        torch.testing.assert_close(scores, forced(model, text, tokens[0], None), **CLOSE)
    assert (plain - scores).abs().max() > 0.1
    if model.vlora_config.placeholder == "contiguous":
        slotted = torch.cat([text[:, :4], torch.tensor([[SLOT]]), text[:, 4:]], dim=1)
        torch.testing.assert_close(answer(model, slotted, images=image)[1], scores, **CLOSE)


def test_module_hooks_find_tensors_in_what_the_generator_returns(llama: Any) -> None:
    """DeepSpeed's ZeRO-3 gathers parameters for the backward pass from such a hook; it knows no other class."""
    returned: list[Any] = []
    hook = llama.generator.register_forward_hook(lambda _, inputs, output: returned.append(output))
    weights = llama.perceive(pictures(2))
    hook.remove()
    core = [] if weights.core is None else ["core"]
    assert list(returned[0]) == [*weights.factors, *core]
    assert all(type(part) is Tensor for parts in returned[0].values() for part in parts)


def test_threads_that_look_at_two_images_do_not_meet(llama: Any) -> None:
    images, ids = pictures(2), prompt()

    def ask(i: int) -> Tensor:
        return answer(llama, ids, images=images[i : i + 1], max_new_tokens=20)[0]

    alone = [ask(0), ask(1)]
    assert not torch.equal(*alone)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, [0, 1] * 4))
    for i, tokens in enumerate(together):
        assert torch.equal(tokens, alone[i % 2])


def test_inference_mode_and_half_images_work(llama: Any) -> None:
    """LLaVA's evaluators call so, whatever the dtype of the model."""
    image = pictures(1)
    expected = answer(llama, prompt(), images=image.half().float())[1]
    with torch.inference_mode():
        found = answer(llama, prompt(), images=image.half())[1]
    torch.testing.assert_close(found, expected, **CLOSE)


# --- images --------------------------------------------------------------------------------------


def test_forms_of_images_mean_the_same(llama: Any) -> None:
    """A list was a TypeError in the public code."""
    images = pictures(2)
    batch = prompt().expand(2, -1)
    expected = answer(llama, batch, images=images)[1]
    for form in (list(images), images[:, None], [image[None] for image in images]):
        torch.testing.assert_close(answer(llama, batch, images=form)[1], expected, **CLOSE)
    single = answer(llama, prompt(), images=images[:1])[1]
    torch.testing.assert_close(answer(llama, prompt(), images=images[0])[1], single, **CLOSE)


def _images(form: str) -> Any:
    tiles = torch.zeros(1, 5, 3, IMAGE_SIZE, IMAGE_SIZE)
    return {
        "other size": torch.zeros(1, 3, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE),
        "not square": torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE + 14),
        "one channel": torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE),
        "anyres": tiles,
        "list of anyres": list(tiles),
        "no image": [],
    }[form]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("other size", "Image 0 has shape .3, 112, 112.*reads .3, 56, 56"),
        ("not square", r"\(3, 56, 70\)"),
        ("one channel", r"\(1, 56, 56\)"),
        ("anyres", "5 tiles"),
        ("list of anyres", "5 tiles"),
    ],
)
def test_images_of_another_shape_are_refused(llama: Any, form: str, message: str) -> None:
    for call in (llama.generate, llama):
        with pytest.raises(ImageError, match=message):
            call(prompt(), images=_images(form))


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        (prompt(), None, "no image was given"),
        (prompt(), [], "0 images for 1 prompts"),
        (prompt(), pictures(2), "2 images for 1 prompts"),
        (torch.cat([prompt(), prompt()], dim=1), pictures(1), "Row 0 has 2 <image> slots"),
        (torch.cat([prompt(), prompt()], dim=1), pictures(2), "Row 0 has 2 <image> slots"),
    ],
)
def test_public_bug_two_slots_were_accepted(
    llama: Any, ids: Tensor, images: Any, message: str
) -> None:
    """Slots and images that do not go together are refused by both calls."""
    for call in (llama.generate, llama):
        with pytest.raises(PromptError, match=message):
            call(ids, images=images)


def test_images_for_a_prompt_without_a_slot_are_refused(llama: Any) -> None:
    with pytest.raises(PromptError, match="no prompt has an <image>"):
        llama.generate(prompt(slot=None), images=pictures(1))


def test_generate_refuses_what_it_cannot_honour(llama: Any) -> None:
    ids = prompt()
    for options in (
        {"inputs_embeds": torch.zeros(1, 4, 64)},
        {"position_ids": torch.arange(9)[None]},
    ):
        with pytest.raises(PromptError):
            llama.generate(ids, images=pictures(1), **options)
    with llama.seeing(llama.perceive(pictures(2))), pytest.raises(WeightsError, match="2 rows"):
        llama.generate(prompt(slot=None).expand(3, -1))


def test_public_bug_pretraining_tp_ignored_the_image(llm_dir: Path, tower_dir: Path) -> None:
    model = make_vlora(llm_dir, tower_dir)
    model.config.pretraining_tp = 2
    for call in (model.generate, model):
        with pytest.raises(ConfigError, match="pretraining_tp is 2"):
            call(prompt(), images=pictures(1))


def test_public_bug_layers_that_skip_layers_does_not_divide(
    kind: str, llm_dir: Path, tower_dir: Path
) -> None:
    """A reshape failed deep inside; a list of layers serves such models."""
    with pytest.raises(ConfigError, match="4 layers, which skip_layers 3 does not divide"):
        make_vlora(llm_dir, tower_dir, kind, skip_layers=3)
    model = make_vlora(llm_dir, tower_dir, kind, skip_layers=3, vlora_layers="0,2")
    assert model.generator.layers == (0, 2)


def test_public_bug_tower_by_any_local_name(llm_dir: Path, tower_dir: Path) -> None:
    """LLaVA takes a tower from any folder that exists, and the generator takes its sizes from it."""
    generator = make_vlora(llm_dir, tower_dir).generator
    assert (generator.num_patches, generator.visual_dim) == (16, 32)


def test_plain_model_of_the_trainer_has_no_generator_yet(llm_dir: Path, tower_dir: Path) -> None:
    make_vlora(llm_dir, tower_dir)  # leaves the trainer asking for VLoRA
    model = trainer().LlavaLlamaForCausalLM.from_pretrained(str(llm_dir))
    with pytest.raises(ConfigError, match="no generator yet"):
        model.perceive(pictures(1))


@pytest.mark.parametrize("shape", [(0, 5), (1, 0), (5,)], ids=["no prompt", "no token", "no batch"])
def test_an_empty_batch_is_named(model: Any, shape: tuple[int, ...]) -> None:
    ids = torch.full(shape, 5)
    with pytest.raises(PromptError, match="at least one prompt"):
        model.generate(ids, max_new_tokens=2)
    with pytest.raises(PromptError, match="at least one prompt"):
        model(ids, images=pictures(1))
