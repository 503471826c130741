"""Errors that a user can cause, each with a message that says what, where and what to do.

VLoRAError
├── ConfigError              a setting is unknown, missing or contradicts another one
├── UnsupportedDecoderError  the language model has no named linear layers to write to
├── WeightsError             perceptual weights do not fit the model or the batch
├── MergeError               weights cannot be folded into the model
├── ImageError               an image or image tensor cannot be used
├── PromptError              a prompt and its images do not go together
├── CheckpointError          a checkpoint folder lacks a file or holds the wrong one
├── DataError                a data file is not in LLaVA's format
├── FeaturesError            stored vision features are missing, damaged or of another run's making
├── AnswersError             an answer file is damaged, incomplete or of another model
└── IMAError                 an analysis of alignment lacks tokens, examples or finite states
"""

from __future__ import annotations

from collections.abc import Iterable


class VLoRAError(Exception):
    """Base of all errors raised on purpose by this package."""

    def for_terminal(self) -> str:
        """Its name and message, without the traceback that a DataLoader worker puts before the message."""
        name = type(self).__name__
        message = str(self).rpartition(f"{type(self).__module__}.{name}: ")[2].strip()
        return f"{name}: {message}"


class ConfigError(VLoRAError, ValueError):
    """A setting is unknown, missing or contradicts another one."""


class UnsupportedDecoderError(VLoRAError, ValueError):
    """The language model lacks the named linear layers that perceptual weights go to."""


class WeightsError(VLoRAError, ValueError):
    """Perceptual weights do not fit the model, the batch or the requested operation."""


class MergeError(WeightsError):
    """Perceptual weights cannot be folded into the weights of the language model."""


class ImageError(VLoRAError, ValueError):
    """An image or image tensor cannot be used."""


class PromptError(VLoRAError, ValueError):
    """A prompt and its images do not go together."""


class CheckpointError(VLoRAError, OSError):
    """A checkpoint folder lacks a file or holds one that does not fit."""


class DataError(VLoRAError, ValueError):
    """A data file is not in the format that LLaVA reads."""


class FeaturesError(VLoRAError, ValueError):
    """Stored vision features are missing, damaged, or made in another way than the run needs."""


class AnswersError(VLoRAError, ValueError):
    """An answer file is damaged, incomplete, or holds answers of another model or to other prompts."""


class IMAError(VLoRAError, ValueError):
    """An analysis of alignment lacks tokens, examples or finite states, or its parts do not fit together."""


def listing(names: Iterable[object]) -> str:
    """Names in one line for a message, in the given order: ``'a', 'b'``."""
    return ", ".join(repr(name) for name in names)
