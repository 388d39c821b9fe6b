"""A training step of our model against transformers' plain LLaVA class: equal shapes, weights, inputs and loss.

Both are a ViT-B/16-like encoder at 128 px (64 visual tokens), a two-layer MLP and a 135M decoder (30 layers, width 576,
vocabulary 49,152, tied), 222M parameters in all, on sequences of 128 of which 64 are visual. LLaVA computes logits at
all 128 positions; ours is called as our trainer calls it (`supervised_only=True`), so only at the supervised ones.

Before anything is timed, losses in fp32 must agree within 1e-5 (relative) and gradients are compared at a tensor of
each part. Then steps (forward and backward, with --optimizer its step too) run in turns in one process; the side that
goes first changes. Reported is the median of the ratios of times, with the smallest and the largest. Peak memory is
measured in processes of their own, one a side: how far a step rises above the built model with its inputs.

bf16 is autocast over fp32 weights, as in our trainer. A CPU without bf16 arithmetic (AVX2 only) runs it 40 to 90 times
slower than fp32: there, measure bf16 with --scale small, which keeps all widths and the vocabulary but has 2 encoder
and 5 decoder layers. The output layer is then a larger share of the work, so its ratio is not that of the full shape.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, ViTConfig

from unclipped.core.files import write_json
from unclipped.images.patches import patchify
from unclipped.models.configuration import UnclippedConfig
from unclipped.models.modeling import UnclippedForConditionalGeneration

EXAMPLES = """examples:
  python benchmarks/training_step.py                                 CPU, fp32, batch 4
  python benchmarks/training_step.py --threads 2 --repeats 9 --json step.json
  python benchmarks/training_step.py --scale small --dtype bf16 --batch 1   CPU without bf16 arithmetic
  python benchmarks/training_step.py --device cuda --dtype bf16      batch 1, 8, 32, 128 and 256
"""
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
BF16_LOSS_TOLERANCE = 1e-2
IMAGE_TOKEN = 0
SIDES = ("ours", "llava")
COMPARED = {  # one tensor of each part: our name -> LLaVA's
    "model.vision_tower.model.embeddings.patch_embeddings.projection.weight": (
        "model.vision_tower.embeddings.patch_embeddings.projection.weight"
    ),
    "model.connector.projection.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.language_model.layers.0.self_attn.q_proj.weight": "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.language_model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a comparison; the image side and the patch in pixels, one visual token a patch."""

    vision_hidden: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    image_size: int = 128
    patch_size: int = 16
    text_hidden: int = 576
    text_layers: int = 30
    text_heads: int = 9
    key_value_heads: int = 3
    text_intermediate: int = 1536
    vocabulary: int = 49_152
    sequence: int = 128

    @property
    def visual_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def vision_config(self) -> ViTConfig:
        return ViTConfig(
            hidden_size=self.vision_hidden,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            intermediate_size=4 * self.vision_hidden,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )

    def text_config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.text_hidden,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_heads,
            num_key_value_heads=self.key_value_heads,
            intermediate_size=self.text_intermediate,
            vocab_size=self.vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )


SHAPES = {
    "full": Shape(),
    "small": Shape(vision_layers=2, text_layers=5),
    "tiny": Shape(
        vision_hidden=32, vision_layers=2, vision_heads=2, image_size=16, patch_size=4, text_hidden=36, text_layers=2,
        text_heads=6, key_value_heads=2, text_intermediate=64, vocabulary=300, sequence=48,
    ),
}  # fmt: skip


def build_ours(shape: Shape, device: torch.device) -> nn.Module:
    """Our model with fresh weights. The last hidden state before the final norm is what LLaVA reads, so we do too."""
    torch.manual_seed(0)
    config = UnclippedConfig(
        vision_config=shape.vision_config(),
        text_config=shape.text_config(),
        connector_config="mlp(2)",
        image_token_id=IMAGE_TOKEN,
        vision_feature_layers=[-1],
        tie_word_embeddings=True,
    )
    return UnclippedForConditionalGeneration(config).to(device).train()


def build_llava(shape: Shape, device: torch.device) -> nn.Module:
    """LLaVA of the same shape with fresh weights, without the pooling layer that it builds and never reads."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=shape.vision_config(),
        text_config=shape.text_config(),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=shape.visual_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # the class token is left out
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.pooler = None
    return model.to(device).train()


BUILDERS = {"ours": build_ours, "llava": build_llava}


def copy_weights(ours: Any, llava: Any) -> None:
    """Our weights into LLaVA, tensor for tensor; raises when a name or a shape of either side is left over."""
    llava.model.vision_tower.load_state_dict(ours.model.vision_tower.model.state_dict())
    llava.model.language_model.load_state_dict(ours.model.language_model.state_dict())
    projection = ours.model.connector.projection
    llava.model.multi_modal_projector.linear_1.load_state_dict(projection[0].state_dict())
    llava.model.multi_modal_projector.linear_2.load_state_dict(projection[2].state_dict())


def make_inputs(shape: Shape, batch: int, supervised: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """The same batch for each side: an image first, then text, whose last `supervised` tokens carry labels."""
    generator = torch.Generator().manual_seed(1)
    planes = torch.randn(batch, 3, shape.image_size, shape.image_size, generator=generator)  # (B, C, H, W)
    ids = torch.randint(1, shape.vocabulary, (batch, shape.sequence), generator=generator)  # (B, L)
    ids[:, : shape.visual_tokens] = IMAGE_TOKEN
    labels = torch.full_like(ids, -100)
    labels[:, -supervised:] = ids[:, -supervised:]
    side = shape.image_size // shape.patch_size
    common = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    common = {name: value.to(device) for name, value in common.items()}
    patches = patchify(planes, (shape.patch_size, shape.patch_size)).flatten(0, 1)  # (B·h·w, C·ph·pw)
    grid = torch.tensor([[1, side, side]] * batch)  # (B, 3), on the CPU as from the processor
    own = {"pixel_values": patches.to(device), "image_grid_thw": grid.to(device), "supervised_only": True}
    shared = {**common, "use_cache": False}  # no trainer keeps a cache
    return {"ours": {**shared, **own}, "llava": {**shared, "pixel_values": planes.to(device)}}


class Step:
    """One training step of one side: forward, backward and, when asked, the optimiser."""

    def __init__(self, model: nn.Module, dtype: str, optimizer: str, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if optimizer == "adamw" else None

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bf16")

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        """The loss, a scalar without gradient. Gradients stay until the caller clears them."""
        with self.autocast():
            loss = self.model(**inputs).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def seconds(self, inputs: dict[str, Any]) -> float:
        synchronise(self.device)
        start = time.perf_counter()
        self(inputs)
        synchronise(self.device)
        elapsed = time.perf_counter() - start
        self.clear()
        return elapsed


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_equal(
    ours: nn.Module, llava: nn.Module, inputs: dict[str, dict[str, Any]], device: torch.device, dtype: str = "fp32"
) -> dict[str, float]:
    """Loss and relative differences of loss and gradients. Exits when they exceed the tolerance.

    fp32 compares losses within 1e-5 and gradients within 1e-4; bf16, whose rounding differs, losses within 1e-2.
    """
    steps = {"ours": Step(ours, dtype, "none", device), "llava": Step(llava, dtype, "none", device)}
    losses = {side: steps[side](inputs[side]) for side in SIDES}
    difference = float((losses["ours"] - losses["llava"]).abs() / losses["ours"])
    result = {"loss": float(losses["ours"]), "loss_difference": difference}
    tolerance = LOSS_TOLERANCE if dtype == "fp32" else BF16_LOSS_TOLERANCE
    if not difference <= tolerance:
        sys.exit(f"{dtype} losses differ: {losses['ours']:.7f} and {losses['llava']:.7f}, relative {difference:.1e}")
    if dtype == "fp32":
        own, other = dict(ours.named_parameters()), dict(llava.named_parameters())
        for name, their_name in COMPARED.items():
            gradient = own[name].grad
            gap = float((gradient - other[their_name].grad).norm() / gradient.norm())
            if not gap <= GRADIENT_TOLERANCE:
                sys.exit(f"gradients of {name} differ by {gap:.1e} (relative norm)")
            result["gradient_difference"] = max(gap, result.get("gradient_difference", 0.0))
    for step in steps.values():
        step.clear()
    return result


def compare_times(
    steps: dict[str, Step], inputs: dict[str, dict[str, Any]], batch: int, repeats: int, warmup: int
) -> dict[str, float]:
    """Median seconds of both sides and the ratio of times over interleaved repeats (above 1: ours is faster)."""
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for repeat in range(-warmup, repeats):
        for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
            elapsed = steps[side].seconds(inputs[side])
            if repeat >= 0:
                times[side].append(elapsed)
    ratios = [theirs / own for own, theirs in zip(times["ours"], times["llava"], strict=True)]
    result = {f"{side}_seconds": statistics.median(times[side]) for side in SIDES}
    result |= {f"{side}_samples_per_second": batch / result[f"{side}_seconds"] for side in SIDES}
    return {**result, "ratio_median": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process. ru_maxrss will not do on Linux: a child starts with its parent's peak in it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_memory(side: str, shape: Shape, arguments: argparse.Namespace, batch: int, supervised: int) -> dict:
    """Bytes of the built model with its inputs, and the peak above that over two steps, in this process alone."""
    device = torch.device(arguments.device)
    model = BUILDERS[side](shape, device)
    inputs = make_inputs(shape, batch, supervised, device)[side]
    step = Step(model, arguments.dtype, arguments.optimizer, device)
    if on_cuda := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        baseline = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        baseline = resident_bytes("VmRSS")
    for _ in range(2):
        step(inputs)
        step.clear()
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else resident_bytes("VmHWM")
    return {"baseline_bytes": baseline, "step_bytes": peak - baseline}


def memory_apart(side: str, arguments: argparse.Namespace, batch: int, supervised: int) -> dict[str, int]:
    """`measure_memory` in a process of its own. Exits with that process's last line when it fails."""
    command = [sys.executable, __file__, "--memory-of", side, "--batch", str(batch), "--supervised", str(supervised)]
    for name in ("scale", "dtype", "device", "optimizer", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode} (out of memory?)"]
        sys.exit(f"memory of {side} at batch {batch}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(arguments: argparse.Namespace, shape: Shape) -> list[dict[str, Any]]:
    """A row of figures for each batch size and number of supervised positions, printed as they come."""
    device = torch.device(arguments.device)
    cases = [(batch, supervised) for batch in arguments.batch for supervised in arguments.supervised]
    # Memory first, before the models of this process are built: never three models at a time.
    measured_cases = [] if arguments.no_memory else cases
    memory = {case: {side: memory_apart(side, arguments, *case) for side in SIDES} for case in measured_cases}
    models = {side: BUILDERS[side](shape, device) for side in SIDES}
    copy_weights(**models)
    parameters, others = (sum(parameter.numel() for parameter in model.parameters()) for model in models.values())
    assert parameters == others, "unequal numbers of parameters"
    print(f"{parameters / 1e6:.1f}M parameters each, sequence {shape.sequence}, {shape.visual_tokens} visual tokens")
    checked = {}
    for case in cases:  # all of them before an optimiser moves the weights apart
        inputs = make_inputs(shape, *case, device)
        checked[case] = check_equal(**models, inputs=inputs, device=device)
        if arguments.dtype == "bf16":
            bf16 = check_equal(**models, inputs=inputs, device=device, dtype="bf16")
            checked[case]["bf16_loss_difference"] = bf16["loss_difference"]
    steps = {side: Step(models[side], arguments.dtype, arguments.optimizer, device) for side in SIDES}
    rows = []
    for batch, supervised in cases:
        inputs = make_inputs(shape, batch, supervised, device)
        row: dict[str, Any] = {"batch": batch, "supervised": supervised, **checked[batch, supervised]}
        row |= compare_times(steps, inputs, batch, arguments.repeats, arguments.warmup)
        line = (
            f"batch {batch}, {supervised} of {shape.sequence} supervised: ours {row['ours_seconds']:.3f} s, LLaVA "
            f"{row['llava_seconds']:.3f} s, ratio {row['ratio_median']:.2f} [{row['ratio_low']:.2f}, "
            f"{row['ratio_high']:.2f}]; loss difference {row['loss_difference']:.0e}"
        )
        if memory:
            measured = memory[batch, supervised]
            row |= {f"{side}_{name}": value for side in SIDES for name, value in measured[side].items()}
            own, theirs = (measured[side]["step_bytes"] / 2**20 for side in SIDES)
            row["memory_ratio"] = own / theirs
            line += f"; peak of a step {own:.0f} MiB against {theirs:.0f} MiB ({own / theirs:.2f})"
        rows.append(row)
        print(line, flush=True)
    return rows


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SHAPES, default="full", help="full: 222M; small: fewer layers; tiny: a test")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast over fp32 weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, nargs="+", help="default 4 on CPU, 1 8 32 128 256 on CUDA")
    parser.add_argument("--supervised", type=int, nargs="+", default=[32, 6], help="labelled positions; default 32 6")
    parser.add_argument("--optimizer", choices=("none", "adamw"), default="none", help="time its step too")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats; fewer than 7 say little")
    parser.add_argument("--warmup", type=int, default=1, help="untimed repeats before")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory measurement out")
    parser.add_argument("--json", metavar="FILE", help="write figures, settings and versions here")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    shape = SHAPES[(arguments := parser.parse_args()).scale]
    arguments.batch = arguments.batch or ([1, 8, 32, 128, 256] if arguments.device.startswith("cuda") else [4])
    longest = shape.sequence - shape.visual_tokens
    if not all(1 <= count <= longest for count in arguments.supervised):
        parser.error(f"--supervised: expected 1 … {longest}, the text positions, found {arguments.supervised}")
    if min(*arguments.batch, arguments.repeats, arguments.threads) < 1:
        parser.error("--batch, --repeats and --threads: at least 1")
    if not (arguments.no_memory or arguments.device.startswith("cuda") or Path("/proc/self/clear_refs").exists()):
        parser.error("the memory of a CPU step is read from /proc, which is Linux only: add --no-memory")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.scale]
    if arguments.memory_of:
        case = arguments.batch[0], arguments.supervised[0]
        print(json.dumps(measure_memory(arguments.memory_of, shape, arguments, *case)))
        return
    hardware = hardware_name(torch.device(arguments.device))
    print(
        f"{hardware}, {arguments.threads} threads, {arguments.dtype}, scale {arguments.scale}, {arguments.repeats} "
        f"repeats, optimiser {arguments.optimizer}; ratio above 1: ours is faster"
    )
    if arguments.scale != "full":
        print("a reduced shape: the output layer weighs more than in the 222M model, so read no 222M ratio off it")
    rows = run(arguments, shape)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "memory_of")}
        versions = {package.__name__: package.__version__ for package in (torch, transformers)}
        versions["python"] = platform.python_version()
        result = {"hardware": hardware, "versions": versions, "settings": settings, "shape": vars(shape), "rows": rows}
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
