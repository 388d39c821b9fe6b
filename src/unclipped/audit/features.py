"""Frozen features of images, taken in batches and kept on disk under a key of their content.

A chunk of features is a safetensors file named by a digest of the weights, the image rule and the images themselves.
So an interrupted extraction goes on where it stopped, runs share a cache folder, and a changed image, size or weight
is never served from it.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unclipped.core.errors import UnclippedError, UsageError, guarded
from unclipped.core.files import whole_file
from unclipped.core.progress import Counter, counting
from unclipped.data.sample import ImagePart
from unclipped.encoders.base import VisionEncoder
from unclipped.encoders.build import build_encoder
from unclipped.images.config import ImageRule
from unclipped.images.decode import read_header
from unclipped.images.prepare import prepare

CHUNK = 512
"""Images in one file of features."""
NUM_BLOCKS = 4
WORKERS = min(8, os.cpu_count() or 1)

Kind = Literal["pooled", "patches"]


class Extractor(Protocol):
    """Turns prepared images into features. `fingerprint` differs whenever the features may."""

    rule: ImageRule
    fingerprint: str

    def __call__(self, patches: Tensor, kind: Kind) -> dict[str, Tensor]:
        """patches (B, n, C·ph·pw), normalised, of images that all have the rule's size.

        pooled: {"pooled" (B, blocks, D), the last block first, and, where it says something else, "mean_patch" (B, D)};
        patches: {"patches" (B, n, D)}.
        """
        ...


def pooled(states: Tensor, num_prefix_tokens: int) -> Tensor:
    """(B, prefix + n, D) → (B, D): the class token where the family has one, else the mean of the patches."""
    return states[:, 0] if num_prefix_tokens else states.mean(dim=1)


class EncoderExtractor:
    """Features of a frozen encoder.

    Pooled is the class token where the family has one, else the mean of the patches. The last block stands after the
    encoder's final norm, the blocks before it as they are.
    """

    def __init__(self, encoder: VisionEncoder, rule: ImageRule, device: torch.device | str = "cpu") -> None:
        self.encoder = encoder.eval().to(device)
        self.rule = rule
        self.device = torch.device(device)
        self.fingerprint = weights_digest(encoder)

    @torch.no_grad()
    def __call__(self, patches: Tensor, kind: Kind) -> dict[str, Tensor]:
        grid = grid_of_rule(self.rule)
        prefix = self.encoder.spec.num_prefix_tokens
        dtype = self.encoder.model.dtype
        output = self.encoder.run(patches.to(self.device, dtype), [grid] * len(patches), kind == "pooled")
        last = output.last_hidden_state.float()  # (B, prefix + n, D)
        if kind == "patches":
            return {"patches": last[:, prefix:].cpu()}
        blocks = min(NUM_BLOCKS, len(output.hidden_states) - 1)
        states = [last, *(state.float() for state in reversed(output.hidden_states[-blocks:-1]))]
        features = {"pooled": torch.stack([pooled(state, prefix) for state in states], dim=1).cpu()}  # (B, blocks, D)
        if prefix:
            features["mean_patch"] = last[:, prefix:].mean(dim=1).cpu()
        return features


class RawPixels:
    """The pixels themselves: the whole image as one vector, and each patch as one."""

    def __init__(self, rule: ImageRule) -> None:
        self.rule = rule
        self.fingerprint = "raw pixels"

    def __call__(self, patches: Tensor, kind: Kind) -> dict[str, Tensor]:
        return {"patches": patches} if kind == "patches" else {"pooled": patches.flatten(1)[:, None]}


def grid_of_rule(rule: ImageRule) -> tuple[int, int]:
    """Rows and columns of patches of every image under a rule of fixed size."""
    if rule.size is None:
        raise UsageError(f"probes need images of one size; found rule {rule.rule}")
    return rule.size[0] // rule.patch_size[0], rule.size[1] // rule.patch_size[1]


def probe_rule(encoder: VisionEncoder, image_size: int | None, resize: str) -> ImageRule:
    """The rule that gives every image one size. Raises UsageError when the encoder has none and none is given."""
    spec = encoder.spec
    size = (image_size, image_size) if image_size is not None else spec.image_size
    if size is None:
        raise UsageError(
            f"image_size: the encoder ({spec.family}) takes images of any size; give one, a multiple of its patch of "
            f"{spec.patch_size[0]}x{spec.patch_size[1]} px"
        )
    if any(side % patch for side, patch in zip(size, spec.patch_size, strict=True)):
        raise UsageError(
            f"image_size: {size[0]}x{size[1]} px is no multiple of the patch of {spec.patch_size[0]}x"
            f"{spec.patch_size[1]} px; choose one"
        )
    fields: dict[str, Any] = {"rule": resize, "size": size, "patch_size": spec.patch_size}
    fields |= {"channels": spec.channels, "mean": spec.mean, "std": spec.std}
    return ImageRule(**fields)


def raw_rule(rule: ImageRule, size: int) -> ImageRule:
    """The rule of raw pixels: the images' own treatment, reduced to `size` px, as one patch."""
    fields: dict[str, Any] = rule.model_dump() | {"size": (size, size), "patch_size": (size, size)}
    return ImageRule(**fields)


def random_weights(encoder: VisionEncoder, seed: int) -> VisionEncoder:
    """The same architecture and pixel statistics with fresh weights drawn from `seed`; the global stream is kept."""
    spec = encoder.spec
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = copy.deepcopy(encoder.model.config)
        return build_encoder(config, baseline=True, mean=spec.mean, std=spec.std).eval()


def weights_digest(module: torch.nn.Module) -> str:
    """A digest of all parameters and buffers: names, types, shapes and values."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def image_digest(part: ImagePart) -> str:
    """A digest of an image's file or pixels. Raises ImageError when the header cannot be read."""
    source = part.source
    if isinstance(source, str | Path):
        read_header(source, part.label)  # raises the error that names file and remedy
        data = Path(source).read_bytes()
    elif isinstance(source, bytes):
        data = source
    else:
        data = f"{source.mode}{source.size}".encode() + source.tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digests_of(images: Sequence[ImagePart]) -> list[str]:
    """`image_digest` of each, read by several threads."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(image_digest, images))


def extract(
    extractor: Extractor,
    images: Sequence[ImagePart],
    digests: Sequence[str],
    folder: Path,
    *,
    kind: Kind = "pooled",
    batch_size: int = 64,
    title: str = "features",
    console: Console | None = None,
) -> dict[str, Tensor]:
    """Features of all images, in order; each tensor's first axis is theirs.

    Chunks found in `folder` are read, the others computed and written as soon as they are whole. Raises ImageError for
    an image that cannot be read, UnclippedError for a cache file that cannot be read or written.
    """
    console = console or Console(stderr=True, quiet=True)
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    paths = [folder / f"{_key(extractor, kind, [digests[i] for i in chunk])}.safetensors" for chunk in chunks]
    done = sum(len(chunk) for chunk, path in zip(chunks, paths, strict=True) if path.is_file())
    parts = []
    with ThreadPoolExecutor(WORKERS) as pool, counting(title, len(images), done, console) as counter:
        for chunk, path in zip(chunks, paths, strict=True):
            if path.is_file():
                parts.append(_read(path, kind, len(chunk)))
                continue
            found = _chunk_features(extractor, [images[i] for i in chunk], kind, batch_size, pool, counter)
            _write(path, found)
            parts.append(found)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _chunk_features(
    extractor: Extractor,
    images: Sequence[ImagePart],
    kind: Kind,
    batch_size: int,
    pool: ThreadPoolExecutor,
    counter: Counter,
) -> dict[str, Tensor]:
    parts = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        patches = torch.stack(
            list(pool.map(lambda part: prepare(part, extractor.rule).patches, batch))
        )  # (B, n, C·ph·pw)
        parts.append(extractor(patches, kind))
        counter.advance(len(batch))
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def _key(extractor: Extractor, kind: Kind, digests: Sequence[str]) -> str:
    text = "\n".join([extractor.fingerprint, extractor.rule.model_dump_json(), kind, *digests])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read(path: Path, kind: Kind, count: int) -> dict[str, Tensor]:
    remedy = "delete the file, and they are computed again"
    with (
        guarded(lambda reason: UnclippedError(f"{path}: cached features cannot be read ({reason}); {remedy}")),
        safe_open(path, framework="pt") as file,
    ):
        tensors, kept = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    if _DIGEST in kept and kept[_DIGEST] != _digest(tensors):
        raise UnclippedError(f"{path}: the content of cached features is not what was written; {remedy}")
    names = {"pooled", "mean_patch"} if kind == "pooled" else {"patches"}
    if not tensors or not set(tensors) <= names or any(len(tensor) != count for tensor in tensors.values()):
        raise UnclippedError(f"{path}: expected features of {count} images, found others; {remedy}")
    return tensors


_DIGEST = "digest"


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Under a temporary name first: a reader never finds half a chunk."""
    try:
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={_DIGEST: _digest(tensors)})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UnclippedError(f"cannot write {path}: {reason}; free space or set cache to another folder") from None
