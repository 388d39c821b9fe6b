"""Training images a second of our self-supervised objectives, against lightly's and against an encoder that sees all.

A step is forward, backward and AdamW, on random images, at equal shapes of encoder, decoder and heads; in fp32, or with
bf16 autocast around every side's forward. With `--compile`, torch.compile of every transformer block, of ours or of
all sides. Sides:

- masked_autoencoder: `ours`; `lightly` (its masked ViT and MAE decoder over timm); `all tokens`, ours with the encoder
  over all patches and the same decoder, as where masked patches enter the encoder as tokens.
- dinov2: `ours` with running centres; `lightly` (its masked ViT over timm, heads, DINO, iBOT and KoLeo losses).

All sides run in turns in one process, the first one changing; reported are the median rate of each in images per second
of CPU time, and the median over rounds of the ratio to ours with the smallest and the largest. Lightly is for this
comparison only: install it and timm in an environment of their own (`pip install lightly timm`); without them its side
is left out, which is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# torchvision, which lightly and timm import, does not load its native library beside a torch of another build. Its
# import then asks for two operators that nothing here calls, so they are declared before anything imports it.
HAS_LIGHTLY = all(importlib.util.find_spec(name) is not None for name in ("lightly", "timm"))
if HAS_LIGHTLY:
    TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from unclipped.objectives.dinov2 import DinoV2Objective  # noqa: E402
from unclipped.objectives.dinov2_config import DinoV2Config  # noqa: E402
from unclipped.objectives.masked_autoencoder import MaskedAutoencoderObjective  # noqa: E402
from unclipped.objectives.masked_autoencoder_config import MaskedAutoencoderConfig  # noqa: E402
from unclipped.objectives.trunk import build_trunk  # noqa: E402
from unclipped.training.image_pretraining import build_autoencoder  # noqa: E402

EXAMPLES = """examples:
  python benchmarks/pretraining_step.py --batch 32
  python benchmarks/pretraining_step.py --objective dinov2 --batch 4 --side 112
  python benchmarks/pretraining_step.py --batch 16 --dtype bf16 --compile all --without "all tokens"
"""
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes that all sides share; sides in pixels."""

    batch: int
    side: int
    patch: int = 16
    width: int = 384
    layers: int = 12
    heads: int = 6
    decoder_width: int = 192
    decoder_blocks: int = 2
    decoder_heads: int = 4
    local_crops: int = 8
    local_side: int = 48
    prototypes: int = 8192
    dtype: str = "fp32"
    compiled: tuple[str, ...] = ()
    """Sides whose blocks are compiled."""

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    def shape(self) -> dict[str, Any]:
        return {
            "model_type": "vit",
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.width,
            "patch_size": self.patch,
            "image_size": self.side,
            "layer_norm_eps": 1e-6,
        }


def our_autoencoder(sizes: Sizes, mask_ratio: float) -> Step:
    config = MaskedAutoencoderConfig(
        mask_ratio=mask_ratio,
        decoder_width=sizes.decoder_width,
        decoder_blocks=sizes.decoder_blocks,
        decoder_heads=sizes.decoder_heads,
    )
    objective = MaskedAutoencoderObjective(build_autoencoder(sizes.shape(), sizes.side, config))
    pixels = torch.randn(sizes.batch, 3, sizes.side, sizes.side)

    def loss() -> Tensor:
        return objective(pixel_values=pixels, noise=torch.rand(len(pixels), sizes.patches))["loss"]

    return trained("ours", objective, loss, sizes)


def our_dinov2(sizes: Sizes) -> Step:
    config = DinoV2Config(
        local_crops=sizes.local_crops, local_size=sizes.local_side, prototypes=sizes.prototypes, centring="ema"
    )
    objective = DinoV2Objective(build_trunk(sizes.shape(), image_size=sizes.side, maskable=True), config, steps=1000)
    batch = crops(sizes)
    return trained("ours", objective, lambda: objective(**batch)["loss"], sizes, after=objective.after_step)


def crops(sizes: Sizes) -> dict[str, Tensor]:
    """Two global crops an image, of which every second is masked by 30 %, and the local ones."""
    mask = torch.rand(2 * sizes.batch, sizes.patches).argsort(dim=1) < round(0.3 * sizes.patches)
    mask[1::2] = False
    return {
        "global_crops": torch.randn(2 * sizes.batch, 3, sizes.side, sizes.side),
        "local_crops": torch.randn(sizes.local_crops * sizes.batch, 3, sizes.local_side, sizes.local_side),
        "mask": mask,
    }


def lightly_vit(sizes: Sizes) -> Any:
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=sizes.side,
        patch_size=sizes.patch,
        embed_dim=sizes.width,
        depth=sizes.layers,
        num_heads=sizes.heads,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
    )
    return MaskedVisionTransformerTIMM(vit=vit)


def lightly_autoencoder(sizes: Sizes) -> Step:
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM

    encoder = lightly_vit(sizes)
    decoder: Any = MAEDecoderTIMM(
        num_patches=sizes.patches,
        patch_size=sizes.patch,
        embed_dim=sizes.width,
        decoder_embed_dim=sizes.decoder_width,
        decoder_depth=sizes.decoder_blocks,
        decoder_num_heads=sizes.decoder_heads,
    )
    images, length = torch.randn(sizes.batch, 3, sizes.side, sizes.side), sizes.patches + 1

    def loss() -> Tensor:
        keep, hidden = utils.random_token_mask(size=(len(images), length), mask_ratio=0.75)
        seen = decoder.embed(encoder.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, (len(images), length))
        tokens = decoder.decode(utils.set_at_index(tokens, keep, seen.type_as(tokens)))
        predicted = decoder.predict(utils.get_at_index(tokens, hidden))
        target = utils.get_at_index(utils.patchify(images, sizes.patch), hidden - 1)
        return F.mse_loss(predicted, utils.normalize_mean_var(target))

    return trained("lightly", nn.ModuleList([encoder, decoder]), loss, sizes)


def lightly_dinov2(sizes: Sizes) -> Step:
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models import utils
    from lightly.models.modules import DINOProjectionHead

    def side() -> nn.ModuleDict:
        heads = [DINOProjectionHead(sizes.width, 2048, 256, sizes.prototypes, norm_last_layer=False) for _ in range(2)]
        return nn.ModuleDict({"vit": lightly_vit(sizes), "dino": heads[0], "ibot": heads[1]})

    student, teacher = side(), side()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False).eval()
    dino = DINOLoss(output_dim=sizes.prototypes)
    ibot, koleo = IBOTPatchLoss(output_dim=sizes.prototypes), KoLeoLoss()
    batch, grid = crops(sizes), sizes.side // sizes.patch
    mask = batch["mask"]
    with_class = torch.cat((torch.zeros(len(mask), 1, dtype=torch.bool), mask), dim=1)

    def loss() -> Tensor:
        with torch.no_grad():
            seen = teacher["vit"].encode(batch["global_crops"])
            views, patches = teacher["dino"](seen[:, 0]), teacher["ibot"](seen[:, 1:][mask])
        own = student["vit"].encode(batch["global_crops"], mask=with_class)
        local = student["vit"].encode(batch["local_crops"])[:, 0]
        scores = [*student["dino"](own[:, 0]).chunk(2), *student["dino"](local).chunk(sizes.local_crops)]
        total = dino(teacher_out=list(views.chunk(2)), student_out=scores, teacher_temp=0.04)
        total = total + ibot(patches, student["ibot"](own[:, 1:][mask]), mask.unflatten(1, (grid, grid)))
        return total + 0.1 * sum(koleo(view) for view in own[:, 0].chunk(2))

    both = nn.ModuleList([student, teacher])
    return trained("lightly", both, loss, sizes, after=lambda: utils.update_momentum(student, teacher, m=0.994))


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Transformer blocks: the members of every list of alike modules that hold a layer norm."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    alike = [part for part in lists if len({type(block) for block in part}) == 1]
    return [block for part in alike for block in part if any(isinstance(m, nn.LayerNorm) for m in block.children())]


def trained(side: str, module: nn.Module, loss: Step, sizes: Sizes, after: Callable[[], None] = lambda: None) -> Step:
    """A step of training: forward, backward, AdamW (fused, on every side), and what follows the step."""
    if side in sizes.compiled:
        for block in blocks_of(module):
            block.compile(dynamic=False)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=sizes.dtype == "bf16"):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        after()
        return value

    return step


def compare(sides: dict[str, Step], batch: int, repeats: int) -> None:
    """Run the sides in turns and print rates and ratios to the first."""
    for step in sides.values():
        value = step()
        assert torch.isfinite(value), "a loss is not finite"
        step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        order = list(sides.items())
        for name, step in order[turn % len(order) :] + order[: turn % len(order)]:
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    first, *others = sides
    for name, values in seconds.items():
        rates = [batch / value for value in values]
        print(f"{name}: {statistics.median(rates):.2f} images/s [{min(rates):.2f}, {max(rates):.2f}]")
    for name in others:
        ratios = [theirs / own for theirs, own in zip(seconds[name], seconds[first], strict=True)]
        print(f"{first} / {name}: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=("masked_autoencoder", "dinov2"), default="masked_autoencoder")
    parser.add_argument("--batch", type=int, default=32, help="images in a step (default 32)")
    parser.add_argument("--side", type=int, default=224, help="side of an image or global crop in pixels (default 224)")
    parser.add_argument("--decoder", type=int, nargs=2, default=(192, 2), metavar=("WIDTH", "BLOCKS"))
    parser.add_argument("--repeats", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, on every side")
    parser.add_argument("--compile", choices=("none", "ours", "all"), default="none", help="of transformer blocks")
    parser.add_argument("--without", nargs="*", default=(), choices=("lightly", "all tokens"), help="sides left out")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    width, blocks = given.decoder
    compiled = {"none": (), "ours": ("ours",), "all": ("ours", "lightly")}[given.compile]
    sizes = Sizes(
        batch=given.batch, side=given.side, decoder_width=width, decoder_blocks=blocks, dtype=given.dtype,
        compiled=compiled,
    )  # fmt: skip
    is_mae = given.objective == "masked_autoencoder"
    sides = {"ours": our_autoencoder(sizes, 0.75) if is_mae else our_dinov2(sizes)}
    if HAS_LIGHTLY and "lightly" not in given.without:
        sides["lightly"] = lightly_autoencoder(sizes) if is_mae else lightly_dinov2(sizes)
    elif not HAS_LIGHTLY:
        print("lightly and timm are not installed: their side is left out")
    if is_mae and "all tokens" not in given.without:
        sides["all tokens"] = our_autoencoder(sizes, 0.0)
    print(f"{given.objective}, torch {torch.__version__}, {given.threads} thread(s), {sizes}")
    compare(sides, sizes.batch, given.repeats)


if __name__ == "__main__":
    main()
