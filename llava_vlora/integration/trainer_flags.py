"""The flags of LLaVA's trainer, so that a command can be checked long before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError, listing
from .registration import register

#: Turns a flag's text into its value; ``ValueError`` says what is wrong with it.
ReadFlag = Callable[[str], object]


def trainer_flags() -> dict[str, ReadFlag]:
    """Every flag of ``llava.train.train`` with the plugin, by name without dashes.

    Raises:
        ConfigError: LLaVA's trainer cannot be imported here.
    """
    problem = register().training
    if problem is not None:
        raise ConfigError(
            f"LLaVA's trainer cannot be imported: {problem}. `llava-vlora doctor` says what to install."
        )
    from llava.train import train
    from transformers import HfArgumentParser

    groups: Any = (train.ModelArguments, train.DataArguments, train.TrainingArguments)
    actions = HfArgumentParser(groups)._actions
    return {a.dest: _reader(a) for a in actions if f"--{a.dest}" in a.option_strings if a.type}


def _reader(action: argparse.Action) -> ReadFlag:
    convert: Any = action.type

    def read(text: str) -> object:
        try:
            value: object = convert(text)
        except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
            raise ValueError(f"{text!r} cannot be read ({error})") from error
        if action.choices is not None and value not in action.choices:
            raise ValueError(f"{text!r} is unknown; valid: {listing(action.choices)}")
        return value

    return read
