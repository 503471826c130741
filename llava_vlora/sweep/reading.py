"""YAML as its author wrote it: every value is text with a line, and a key that stands twice is noticed.

YAML's own types are left alone, because a flag is text: ``save_strategy: no`` is not false, and ``1e-3`` not a word.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import ConfigError, listing


@dataclass(frozen=True)
class Item:
    """A value and where it stands."""

    node: yaml.Node
    file: Path

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.file}, line {self.node.start_mark.line + 1}"

    def error(self, what: str) -> ConfigError:
        """An error that begins with the place."""
        return ConfigError(f"{self.place}: {what}")

    def mapping(self, what: str, valid: Collection[str] | None = None) -> dict[str, Item]:
        """The values by their keys, in the order of the file.

        Raises:
            ConfigError: It is no mapping, or a key is unknown or stands twice.
        """
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error(f"{what} must have `key: value` lines.")
        found: dict[str, Item] = {}
        for key_node, value_node in self.node.value:
            key = Item(key_node, self.file)
            name = key.text("a key")
            if name in found:
                raise key.error(f"{name!r} stands twice in {what}.")
            if valid is not None and name not in valid:
                raise key.error(f"{what} has no {name!r}; valid: {listing(valid)}.")
            found[name] = Item(value_node, self.file)
        return found

    @property
    def is_mapping(self) -> bool:
        """Whether it has keys."""
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_list(self) -> bool:
        """Whether it has items."""
        return isinstance(self.node, yaml.SequenceNode)

    def items(self, what: str) -> list[Item]:
        """The values of a list; ``ConfigError`` if it is none or empty."""
        if not isinstance(self.node, yaml.SequenceNode) or not self.node.value:
            raise self.error(f"{what} must be a list such as [a, b].")
        return [Item(node, self.file) for node in self.node.value]

    def text(self, what: str) -> str:
        """The text of a single value; ``ConfigError`` if it is none or empty."""
        node = self.node
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(f"{what} must be a single value.")
        if node.value == "" or (node.tag == "tag:yaml.org,2002:null" and node.style is None):
            raise self.error(f"{what} has no value; leave the line out, or quote the word.")
        return str(node.value)

    def number(self, what: str, least: int) -> int:
        """A whole number of at least ``least``; else ``ConfigError``."""
        text = self.text(what)
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise self.error(f"{what} must be a whole number of at least {least}, not {text!r}.")
        return value

    def truth(self, what: str) -> bool:
        """True or false; else ``ConfigError``."""
        text = self.text(what).lower()
        if text not in ("true", "false"):
            raise self.error(f"{what} must be true or false, not {text!r}.")
        return text == "true"


def read_yaml(path: Path) -> Item:
    """The document in a file.

    Raises:
        ConfigError: The file is missing, empty, or no YAML; the message names the line.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: no YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {error}.") from error
    if node is None:
        raise ConfigError(f"{path} is empty; docs/sweep.md has an example.")
    return Item(node, path)
