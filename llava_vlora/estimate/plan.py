"""How a model is trained, as far as memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, listing

#: Stage -> ZeRO stage, samples of a GPU and text tokens of a sample, as in the recipes in ``scripts/``.
RECIPES = {"pretrain": (2, 32, 32), "finetune": (3, 16, 256), "lora": (3, 16, 256)}
RECIPES |= {"qlora": (2, 16, 256), "frozen": (2, 16, 256)}
DTYPES = {"bfloat16": 2, "float32": 4}
ZERO = (0, 2, 3)


@dataclass(frozen=True)
class Plan:
    """What a user chooses."""

    stage: str
    zero: int
    gpus: int = 1
    offload: bool = False
    """To the CPU: the optimizer and, with ZeRO-3, the weights."""
    batch: int = 16
    """Samples of a GPU."""
    text_tokens: int = 256
    """Of a sample, without the image."""
    checkpointing: bool = True
    dtype: str = "bfloat16"
    lora_rank: int = 128
    bits: int = 4
    """Of a weight of the language model with ``qlora``."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            ConfigError: A value is unknown, too small, or goes with no other.
        """
        for flag, value, valid in (
            ("--stage", self.stage, tuple(RECIPES)),
            ("--zero", self.zero, ZERO),
            ("--dtype", self.dtype, tuple(DTYPES)),
            ("--bits", self.bits, (4, 8)),
        ):
            if value not in valid:
                raise ConfigError(f"{flag} {value!r}; valid: {listing(valid)}.")
        for flag, number in (
            ("--gpus", self.gpus),
            ("--batch", self.batch),
            ("--text-tokens", self.text_tokens),
            ("--lora-rank", self.lora_rank),
        ):
            if number < 1:
                raise ConfigError(f"{flag} must be at least 1, not {number}.")
        if self.offload and not self.zero:
            raise ConfigError("--offload is DeepSpeed's: it needs --zero 2 or --zero 3.")
        if self.stage == "qlora" and self.zero == 3:
            raise ConfigError(
                "--stage qlora with --zero 3: ZeRO-3 cannot partition quantised weights; use --zero 2."
            )
        if self.stage == "qlora" and self.dtype != "bfloat16":
            raise ConfigError("--stage qlora computes in bfloat16: leave --dtype out.")

    @property
    def width(self) -> int:
        """Bytes of a number in the dtype that is computed in."""
        return DTYPES[self.dtype]

    @property
    def trains_language_model(self) -> bool:
        """Whether the language model's own weights are trained."""
        return self.stage == "finetune"

    @property
    def autocast(self) -> bool:
        """Whether LLaVA's trainer computes in bfloat16 with a float32 connector, as it does without DeepSpeed."""
        return not self.zero and self.dtype == "bfloat16"

    @property
    def adapts(self) -> bool:
        """Whether LoRA weights are trained."""
        return self.stage in ("lora", "qlora")
