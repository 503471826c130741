"""Settings: what is refused, under which name, and what a file holds."""

from __future__ import annotations

import re
from typing import Any

import pytest

from llava_vlora.config import DERIVED_KEYS, VLoRAConfig, check_derived, parse_layers
from llava_vlora.errors import ConfigError

pytestmark = pytest.mark.one_stack

#: A released checkpoint's keys, by the public code's names.
PUBLIC_KEYS = {
    "vlora_dim": 512,
    "vlora_depth": 8,
    "vlora_visual_dim": 1024,
    "vlora_pos_num": 576,
    "vlora_llm_dim": 4096,
    "vlora_llm_depth": 32,
    "vlora_rank": 64,
    "vlora_alpha": 64,
    "vlora_type": "qkvom",
    "weights_sep": True,
    "skip_layers": 4,
}


@pytest.mark.parametrize("field", ["dim", "depth", "heads", "rank", "every"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, None], ids=repr)
def test_sizes_are_whole_numbers_from_one(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"must be a whole number of at least 1, not {value!r}"):
        VLoRAConfig(**{field: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 40}, "vlora_dim 40 is not a multiple of vlora_heads 16"),
        ({"alpha": 0}, "vlora_alpha must be positive or absent, not 0"),
        ({"alpha": -1.0}, "vlora_alpha must be positive or absent, not -1.0"),
        ({"alpha": float("nan")}, "vlora_alpha must be positive"),
        ({"alpha": "big"}, "vlora_alpha must be positive"),
        ({"types": ""}, "empty or with a repeated letter; .* 'q', 'k', 'v', 'o', 'm'"),
        ({"types": "qq"}, "repeated letter; .* 'q', 'k', 'v', 'o', 'm'"),
        ({"types": 5}, "'q', 'k', 'v', 'o', 'm'"),
        ({"placeholder": "drop"}, "'drop' is unknown; valid: 'gap', 'contiguous'"),
        ({"separate": "False"}, "weights_sep must be True or False, not 'False'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_bad_value_is_refused_with_the_valid_ones(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VLoRAConfig(**settings)


def test_unknown_type_letter_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'qx' is unknown 'x'; .*: 'q', 'k', 'v', 'o', 'm'"):
        VLoRAConfig(types="qx")


def test_defaults_are_the_papers() -> None:
    config = VLoRAConfig.from_keys(PUBLIC_KEYS, where="config.json", complete=True)
    assert config == VLoRAConfig(alpha=64)
    assert config.scale == VLoRAConfig().scale == 1.0
    assert config.layers(32) == (3, 7, 11, 15, 19, 23, 27, 31)


def test_scale_is_alpha_over_rank() -> None:
    assert VLoRAConfig(alpha=8, rank=32).scale == 0.25


@pytest.mark.parametrize(
    "config",
    [
        VLoRAConfig(),
        VLoRAConfig(
            dim=64,
            depth=2,
            heads=4,
            rank=8,
            alpha=16.0,
            types="qv",
            every=1,
            layer_list=(0, 2),
            separate=False,
            placeholder="contiguous",
        ),
    ],
    ids=["defaults", "everything changed"],
)
def test_keys_round_trip(config: VLoRAConfig) -> None:
    keys = config.to_keys()
    assert VLoRAConfig.from_keys(keys, where="config.json", complete=True) == config
    assert set(PUBLIC_KEYS) - set(DERIVED_KEYS) <= set(keys)


def test_keys_of_others_are_ignored_and_none_means_default() -> None:
    keys = {"hidden_size": 1, "vlora_dim": None, "vlora_alpha": None, "vlora_layers": None}
    assert VLoRAConfig.from_keys(keys, where="flags") == VLoRAConfig()


def test_an_error_in_keys_says_where() -> None:
    with pytest.raises(ConfigError, match=r"^config\.json of x: vlora_rank must"):
        VLoRAConfig.from_keys({"vlora_rank": 0}, where="config.json of x")


@pytest.mark.parametrize("key", sorted(set(PUBLIC_KEYS) - set(DERIVED_KEYS) - {"vlora_alpha"}))
def test_a_checkpoint_must_spell_out_its_shape(key: str) -> None:
    keys = {name: value for name, value in PUBLIC_KEYS.items() if name != key}
    with pytest.raises(ConfigError, match=f"lacks '{key}'"):
        VLoRAConfig.from_keys(keys, where="config.json", complete=True)
    VLoRAConfig.from_keys(keys, where="flags")


# --- layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "count", "layers"),
    [(1, 3, (0, 1, 2)), (2, 4, (1, 3)), (4, 4, (3,))],
    ids=["all", "every second", "the last"],
)
def test_every_nth_layer_is_injected(every: int, count: int, layers: tuple[int, ...]) -> None:
    assert VLoRAConfig(every=every).layers(count) == layers


@pytest.mark.parametrize(("every", "count"), [(4, 30), (3, 32), (5, 4)])
def test_layer_count_that_does_not_divide_is_named(every: int, count: int) -> None:
    with pytest.raises(
        ConfigError, match=f"has {count} layers, which skip_layers {every} does not divide"
    ):
        VLoRAConfig(every=every).layers(count)


def test_an_explicit_layer_list_needs_no_divisor() -> None:
    assert VLoRAConfig(every=4, layer_list=(0, 5, 29)).layers(30) == (0, 5, 29)


@pytest.mark.parametrize("layers", [(), (3, 1), (1, 1), (0, 4), (-1, 2)], ids=str)
def test_a_layer_list_that_does_not_fit_is_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must name different layers from 0 to 3 in ascending"):
        VLoRAConfig(layer_list=layers).layers(4)


@pytest.mark.parametrize("value", ["3,7,11", " 3, 7,11", [3, 7, 11], (3, 7, 11)], ids=repr)
def test_layer_lists_are_read_from_flags_and_files(value: Any) -> None:
    assert parse_layers(value) == (3, 7, 11)
    assert VLoRAConfig.from_keys({"vlora_layers": value}, where="x").layer_list == (3, 7, 11)


@pytest.mark.parametrize("value", ["", "3;7", "a", [None], [1.5], 3], ids=repr)
def test_what_is_no_layer_list_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"vlora_layers {re.escape(repr(value))} is not a list"):
        VLoRAConfig.from_keys({"vlora_layers": value}, where="x")


# --- sizes that follow from the models ---------------------------------------------------------------

DERIVED = {
    "vlora_llm_dim": 4096,
    "vlora_llm_depth": 32,
    "vlora_visual_dim": 1024,
    "vlora_pos_num": 576,
}


def test_stated_sizes_that_agree_or_are_absent_pass() -> None:
    check_derived(PUBLIC_KEYS, DERIVED, where="config.json")
    check_derived({"vlora_llm_dim": None}, DERIVED, where="flags")


@pytest.mark.parametrize("key", DERIVED_KEYS)
def test_a_stated_size_that_contradicts_the_model_is_named(key: str) -> None:
    with pytest.raises(
        ConfigError, match=f"flags says {key} 7, but the loaded models have {DERIVED[key]}"
    ):
        check_derived({**PUBLIC_KEYS, key: 7}, DERIVED, where="flags")
