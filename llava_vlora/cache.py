"""Remembering what images became: many questions about one image run the vision tower and generator once.

An entry is the generator's latents and not the weights, which are larger and one matrix product away: one vector for
each weight type and injected layer with the paper's generator (40 KiB for LLaVA-1.5-7B), and as many vectors of the
image's width as the cache has for its rank with fast weights (32 KiB for 64 of 256 in half precision).
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError
from .generators import Generator
from .tensor_files import digest, read_tensors
from .weights import PerceptualWeights

_log = logging.getLogger(__name__)
_VERSION = "1"
Latents = dict[str, Tensor]


class _Fingerprint:
    """Hash of modules, computed again only after a parameter was written to or replaced.

    It is asked for with every image, so it looks at the modules' own dictionaries: a ``state_dict`` of a tower
    and a generator takes longer than all the rest of finding a known image. Writing to an inference tensor
    leaves no trace; replacing it does.
    """

    def __init__(self) -> None:
        self._modules: tuple[nn.Module, ...] = ()
        self._tensors: list[Mapping[str, Tensor | None]] = []
        self._children: list[Mapping[str, nn.Module | None]] = []
        self._state: object = None
        self._kept: list[
            Tensor
        ] = []  # an address tells tensors apart only while none of them is freed
        self._hash: str | None = None

    def of(self, *modules: nn.Module) -> str | None:
        """The hash; None where weights are offloaded, so that nobody can tell whether they have changed."""
        if modules != self._modules or self._look() != self._state:
            every = [part for module in modules for part in module.modules()]
            self._modules = modules
            self._tensors = [
                *(part._parameters for part in every),
                *(part._buffers for part in every),
            ]
            self._children = [part._modules for part in every]
            self._state, self._kept = self._look(), self._now()
            if any(t.is_meta for t in self._kept):
                self._hash = None
                return None
            named = {
                f"{i}.{n}": t for i, m in enumerate(modules) for n, t in m.state_dict().items()
            }
            self._hash = digest(named)
        return self._hash

    def _now(self) -> list[Tensor]:
        return [t for group in self._tensors for t in group.values() if t is not None]

    def _look(self) -> object:
        return (
            [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._now()],
            [id(child) for group in self._children for child in group.values()],
        )


class PerceptionCache:
    """Latents by image content and by the weights of tower and generator; safe to use from many threads."""

    def __init__(
        self,
        max_bytes: int = 256 * 2**20,
        folder: str | Path | None = None,
        rank: int | None = None,
    ) -> None:
        """An empty cache.

        Args:
            max_bytes: In memory; the entries that were used least recently go first.
            folder: Also keep entries here, one file each, for later processes.
            rank: Keep so many vectors of an image, the nearest weights of that rank, and show these from the first
                time on; ``lost_share`` tells what that leaves out. None keeps all. For generators whose latents have a
                rank, such as fast weights.

        Raises:
            ConfigError: ``max_bytes`` or the rank is not positive.
        """
        if rank is not None and rank < 1:
            raise ConfigError(f"The rank of a cache must be at least 1, not {rank}.")
        if max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, not {max_bytes}.")
        self.max_bytes, self.folder = max_bytes, Path(folder) if folder is not None else None
        self.rank = rank
        self.lost_share = 0.0
        """Largest share of the sum of squares of an image's weights that the rank has left out."""
        self.hits = self.misses = 0
        self._entries: OrderedDict[str, Latents] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._fingerprint = _Fingerprint()
        self._last: tuple[object, PerceptualWeights] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in memory."""
        return self._bytes

    def __len__(self) -> int:
        """Entries in memory."""
        return len(self._entries)

    def clear(self) -> None:
        """Forget the entries in memory; files stay."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0
            self._last = None

    def perceive(
        self,
        images: Tensor,
        generator: Generator,
        tower: nn.Module,
        features: Callable[[Tensor], Tensor],
    ) -> PerceptualWeights:
        """The weights of ``images [B, 3, H, W]``; ``features`` runs for images that are not known yet.

        The factors of the last single image are kept besides: in a conversation it is the next one too.
        """
        with self._lock:
            source = self._fingerprint.of(generator, tower)
        if source is None:
            return generator(features(images))
        cut = "" if self.rank is None else f"-rank{self.rank}"
        keys = [f"{source}-{digest({'image': image})}{cut}" for image in images]
        found = {key: entry for key in dict.fromkeys(keys) if (entry := self._get(key)) is not None}
        fresh = [key for key in dict.fromkeys(keys) if key not in found]
        if fresh:
            new = generator.latents(features(images[[keys.index(key) for key in fresh]]))
            if self.rank is not None:
                new, lost = generator.shorten(new, self.rank)
                with self._lock:
                    self.lost_share = max(self.lost_share, float(lost.max()))
            for row, key in enumerate(fresh):
                entry = {name: latent[row].detach().clone() for name, latent in new.items()}
                found[key] = entry
                self._put(key, entry)
        with self._lock:
            self.misses += len(fresh)
            self.hits += len(keys) - len(fresh)
        like = generator.like
        # Tensors made in inference mode are of no use outside it.
        mark = (*keys, like.device, like.dtype, torch.is_inference_mode_enabled())
        last = self._last
        if last is not None and last[0] == mark:
            return last[1]
        weights = generator.expand(
            {
                name: torch.stack([found[key][name].to(like) for key in keys])
                for name in found[keys[0]]
            }
        )
        if len(keys) == 1:
            self._last = (mark, weights)
        return weights

    def _get(self, key: str) -> Latents | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        entry = self._read(key)
        if entry is not None:
            self._keep(key, entry)
        return entry

    def _put(self, key: str, entry: Latents) -> None:
        self._keep(key, entry)
        if self.folder is not None:
            self._write(self.folder / f"{key}.safetensors", entry)

    def _keep(self, key: str, entry: Latents) -> None:
        size = _size(entry)
        with self._lock:
            if key in self._entries or size > self.max_bytes:
                return
            self._entries[key] = entry
            self._bytes += size
            while self._bytes > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self._bytes -= _size(oldest)

    def _read(self, key: str) -> Latents | None:
        path = self.folder / f"{key}.safetensors" if self.folder is not None else None
        if path is None or not path.is_file():
            return None
        try:
            header, entry = read_tensors(path)
        except CheckpointError as error:
            _log.warning("%s is damaged and is made again: %s", path, error)
            return None
        if header.get("version") != _VERSION or header.get("digest") != digest(entry):
            _log.warning("%s is damaged or of another version and is made again.", path)
            return None
        return entry

    def _write(self, path: Path, entry: Latents) -> None:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        cpu = {name: tensor.cpu().contiguous() for name, tensor in entry.items()}
        save_file(cpu, str(part), metadata={"version": _VERSION, "digest": digest(cpu)})
        part.replace(path)  # whole or not at all, also with several processes


def _size(entry: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in entry.values())
