"""The table of mistakes: for each the arguments that make it, the exit status and what the one line must say."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bad_input_support import Place

from support.original_vit import OriginalVit

PNG = b"\x89PNG\r\n\x1a\n"
ASK = ("-q", "what?", "--max-new-tokens", "2", "--device", "cpu")


@dataclass(frozen=True)
class Row:
    """One mistake: the arguments that make it, the exit status, and what the line must say."""

    arguments: Callable[[Place], list[Any]]
    status: int
    says: tuple[str, ...]
    output_stays: bool = False
    """The folder `out` was there before, and is what the line is about."""


def sample(**fields: Any) -> dict[str, Any]:
    return {"id": "s1", "image": "good.png", "question": "what", "answer": "a", **fields}


def chat(image: Callable[[Place], str], *more: str) -> Callable[[Place], list[Any]]:
    return lambda place: ["chat", place.models.vlm, image(place), *ASK, *more]


def bare_folder(place: Place) -> list[Any]:
    """A recipe whose data is a folder without any data file or image."""
    place.write("bare/notes.bin")
    return override("data.sources.0.source=bare")(place)


def cut_image(place: Place, name: str) -> str:
    """A PNG without its last half."""
    place.image(name, 64, 64)
    path = place.folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return name


def large_image(place: Place) -> str:
    from PIL import Image

    Image.new("1", (30_000, 40)).save(place.folder / "large.png")
    return "large.png"


def train(*rows: Any, **changes: Any) -> Callable[[Place], list[Any]]:
    return lambda place: ["train", place.recipe(place.data(*rows) if rows else "", **changes), "--output", "out"]


def train_with(prepare: Callable[[Place], Any], *rows: Any) -> Callable[[Place], list[Any]]:
    """Training on rows that name a file which `prepare` puts into the data folder."""

    def arguments(place: Place) -> list[Any]:
        data = place.data(*rows)
        prepare(place)
        return ["train", place.recipe(data), "--output", "out"]

    return arguments


def evaluate(*rows: Any, more: tuple[str, ...] = ()) -> Callable[[Place], list[Any]]:
    return lambda place: ["eval", place.models.vlm, "--data", place.data(*rows), "--output", "out", *more]


def evaluate_with(prepare: Callable[[Place], Any], *rows: Any) -> Callable[[Place], list[Any]]:
    def arguments(place: Place) -> list[Any]:
        data = place.data(*rows)
        prepare(place)
        return ["eval", place.models.vlm, "--data", data, "--output", "out"]

    return arguments


def assemble(vision: Callable[[Place], Any], text: Callable[[Place], Any], *more: str) -> Callable[[Place], list[Any]]:
    return lambda place: ["assemble", "--vision", vision(place), "--text", text(place), "--output", "out", *more]


def encoder(**fields: Any) -> Callable[[Place], list[Any]]:
    """Pretraining of a tiny encoder on generated images."""
    given = {
        "objective": "dinov2",
        "shape": {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "dinov2": {"prototypes": 8, "head_hidden": 16, "bottleneck": 8, "local_crops": 1, "local_size": 16},
        "image_size": 32,
    }
    return lambda place: ["pretrain", place.pretraining("generated:shapes", **(given | fields)), "--output", "out"]


def the(name: str) -> Callable[[Place], Any]:
    """A folder of the tiny models by name."""
    return lambda place: getattr(place.models, name)


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


def extra(tensors: dict[str, Any]) -> None:
    tensors["surplus.weight"] = torch.zeros(2)


def misshaped(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = torch.zeros(3, 5)

    return change


def broken(model: str, change: Callable[[dict[str, Any]], Any], prefix: str = "") -> Callable[[Place], str]:
    return lambda place: prefix + place.tampered(getattr(place.models, model), change)


def cut_weights(place: Place, model: str) -> str:
    """A copy of a model folder with half of its weights."""
    whole = (getattr(place.models, model) / "model.safetensors").read_bytes()
    return place.file_of(model, "model.safetensors", whole[: len(whole) // 2], name="cut")


def original(
    change: Callable[[dict[str, Any]], Any] = lambda tensors: None, *more: str
) -> Callable[[Place], list[Any]]:
    """An import of a tiny encoder's weights under original names, changed."""

    def arguments(place: Place) -> list[Any]:
        tensors: dict[str, Any] = OriginalVit().tensors()
        change(tensors)
        torch.save(tensors, place.folder / "weights.pth")
        return ["import-encoder", "weights.pth", "--attention-heads", "3", *more, "--output", "out"]

    return arguments


def import_file(content: bytes) -> Callable[[Place], list[Any]]:
    return lambda p: ["import-encoder", p.write("weights.pth", content), "--output", "out"]


class Command:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("harmed",)


def occupied(arguments: Callable[[Place], list[Any]]) -> Callable[[Place], list[Any]]:
    """The folder `out` holds a run already."""

    def with_run(place: Place) -> list[Any]:
        place.write("out/training.json", "{}")
        return arguments(place)

    return with_run


def prefill(command: str, *more: str) -> Callable[[Place], list[Any]]:
    data = [] if command == "bench" else ["--data"]
    return lambda place: [
        "prefill", command, place.models.vlm, *data, *([place.data()] if data else []), *more, "--output", "out"
    ]  # fmt: skip


def prefill_with_file(content: str) -> Callable[[Place], list[Any]]:
    """`prefill quality` under a pattern file of this content."""
    return lambda place: prefill("quality", "--pattern", place.write("own.yaml", content))(place)


def a_file_as_output(arguments: Callable[[Place], list[Any]]) -> Callable[[Place], list[Any]]:
    def with_file(place: Place) -> list[Any]:
        place.write("out", "not a folder")
        return arguments(place)

    return with_file


def override(*overrides: str) -> Callable[[Place], list[Any]]:
    return lambda place: ["train", place.recipe(), *overrides, "--output", "out"]


def photographs(place: Place) -> str:
    for split in ("train", "test"):
        for number in range(8):
            place.image(f"photos/{split}/{'ab'[number % 2]}/{number}.png", 16 + number, 16 + len(split))
    return "photos"


def probe(*arguments: str, source: Callable[[Place], str] = photographs) -> Callable[[Place], list[Any]]:
    return lambda p: ["eval-encoder", p.models.vision, "--data", source(p), *arguments, "--output", "out"]


def ade20k(prepare: Callable[[Place], Any]) -> Callable[[Place], list[Any]]:
    """An evaluation on a tiny ADEChallengeData2016 that `prepare` has spoilt."""

    def arguments(place: Place) -> list[Any]:
        for split in ("training", "validation"):
            for name in ("one", "two"):
                place.image(f"ade/images/{split}/{name}.jpg", 12, 20)
                mask(place, f"{split}/{name}", 12, 20, 1)
        prepare(place)
        return ["eval-encoder", place.models.vision, "--segmentation", "ade", "--output", "out"]

    return arguments


def mask(place: Place, name: str, height: int, width: int, value: int) -> None:
    from PIL import Image

    path = place.folder / "ade" / "annotations" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height), value).save(path)


QKV = "layers.0.self_attn.q_proj.weight"
HUB = "some-lab/some-model"
FOLDER = "config.json and model.safetensors"
BAD = sample(image="bad.png")
TALK = [{"from": "human", "value": "<image><image>hi"}, {"from": "gpt", "value": "ho"}]

ROWS: dict[str, Row] = {
    # images, in each command that reads them
    "chat, image missing": Row(chat(lambda p: "no.png"), 1, ("no.png", "no such file", "check the path")),
    "chat, image empty": Row(chat(lambda p: p.write("bad.png")), 1, ("bad.png", "empty", "copy it again")),
    "chat, image cut": Row(chat(lambda p: cut_image(p, "bad.png")), 1, ("bad.png", "truncated", "copy it again")),
    "chat, header cut": Row(chat(lambda p: p.write("bad.png", PNG)), 1, ("bad.png", "cut off", "replace it")),
    "chat, no image": Row(chat(lambda p: p.write("bad.png", "hello, I am text")), 1, ("bad.png", "not an image")),
    "chat, an address": Row(chat(lambda p: "https://a.example/a.png"), 1, ("https://a.example/a.png", "download it")),
    "chat, no new tokens": Row(chat(lambda p: p.image("a.png"), "--max-new-tokens", "0"), 2, ("--max-new-tokens",)),
    "chat, a folder": Row(chat(lambda p: p.data()), 1, ("data", "is a folder", "one image")),
    "chat, 30,000 px": Row(chat(large_image), 1, ("large.png", "40x30000", "67108864 pixels or 20000 px a side")),
    "chat, empty question": Row(chat(lambda p: p.image("a.png"), "-q", " "), 2, ("question is empty", "-q")),
    "train, image missing": Row(train(sample(image="no.png")), 1, ("train.jsonl", "line 1", "s1", "'image'", "no.png")),
    "train, image empty": Row(train_with(lambda p: p.write("data/bad.png"), BAD), 1, ("s1", "bad.png", "empty")),
    "train, image cut": Row(train_with(lambda p: cut_image(p, "data/bad.png"), BAD), 1, ("s1", "bad.png", "truncated")),
    "train, no image": Row(train_with(lambda p: p.write("data/bad.png", "hi"), BAD), 1, ("s1", "bad.png", "not an im")),
    "eval, image missing": Row(evaluate(sample(image="no.png")), 1, ("val.jsonl", "line 1", "s1", "no.png")),
    "eval, image empty": Row(evaluate_with(lambda p: p.write("data/bad.png"), BAD), 1, ("s1", "bad.png", "empty")),
    "eval, image cut": Row(evaluate_with(lambda p: cut_image(p, "data/bad.png"), BAD), 1, ("s1", "bad.png", "trunc")),
    "eval, no image": Row(evaluate_with(lambda p: p.write("data/bad.png", "hi"), BAD), 1, ("s1", "bad.png", "not an")),
    # samples and files of samples
    "placeholders and images differ": Row(
        train({"id": "s1", "image": "good.png", "conversations": TALK}), 1, ("s1", "2 <image>", "1 images", "exactly")
    ),
    "the image token in a text": Row(train(sample(question="a <|image|> b")), 1, ("s1", "<|image|>", "remove it")),
    "no answer": Row(train({"id": "s1", "question": "q"}), 1, ("s1", "no supervised token", "add or remove")),
    "no answer to score": Row(evaluate({"id": "s1", "question": "q"}), 1, ("s1", "no gold answer", "add `answer`")),
    "no field that is known": Row(train({"picture": 1}), 1, ("train.jsonl", "picture", "question", "format")),
    "empty data set": Row(train(""), 1, ("train.jsonl", "empty", "one JSON object a line")),
    "empty data set, eval": Row(evaluate(""), 1, ("val.jsonl", "empty")),
    "cut in mid line": Row(train(sample(), json.dumps(sample())[:-9]), 1, ("train.jsonl, line 2", "cut", "repair")),
    "cut in mid line, eval": Row(evaluate(sample(), '{"id": '), 1, ("val.jsonl, line 2", "cut", "repair")),
    "data missing": Row(override("data.sources.0.source=nowhere"), 1, ("nowhere", "no such file or folder")),
    "data in a folder without data": Row(bare_folder, 1, ("bare", "train.jsonl", "holds no data file")),
    "data in a folder of images": Row(
        override("data.sources.0.source=."), 1, ("good.png", "an image alone", "add the")
    ),
    "split missing": Row(evaluate(more=("--split", "dev")), 1, ("no dev.jsonl", "train, val")),
    "generated split unknown": Row(
        lambda p: [
            "eval",
            p.models.vlm,
            "--data",
            "generated:characters",
            "--split",
            "tset",
            "--limit",
            "2",
            "--output",
            "out",
        ],
        2,
        ("unknown split 'tset'", "did you mean 'test'"),
    ),
    "generated task unknown": Row(override("data.sources.0.source=generated:chars"), 2, ("'chars'", "characters")),
    "generated option unknown": Row(
        override("data.sources.0={source: generated:characters, options: {colour: 1}}"), 2, ("'colour'", "valid")
    ),
    "endless without limit": Row(
        lambda p: ["eval", p.models.vlm, "--data", "generated:characters", "--split", "test", "--output", "out"],
        2,
        ("endless", "limit"),
    ),
    "environment variable not set": Row(override("data.sources.0.source=$NO_SUCH/a"), 2, ("NO_SUCH is not set",)),
    "pretrain, text missing": Row(
        lambda p: ["pretrain", p.pretraining("nothing.txt"), "--output", "out"], 1, ("nothing.txt", "no such file")
    ),
    "pretrain, text empty": Row(
        lambda p: ["pretrain", p.pretraining(p.write("a.txt", " \n")), "--output", "out"], 1, ("a.txt", "no sample")
    ),
    "pretrain, a single line of text": Row(
        lambda p: ["pretrain", p.pretraining(p.write("a.txt", "short\n")), "--output", "out"], 1, ("document",)
    ),
    "pretrain images, none there": Row(
        lambda p: [
            "pretrain",
            p.pretraining(
                p.data({"id": "s1", "question": "q", "answer": "a"}), shape={}, objective="masked_autoencoder"
            ),
            "--output",
            "out",
        ],
        1,
        ("image",),
    ),
    "pretrain phases of a language model": Row(
        lambda p: ["pretrain", p.pretraining("a.txt", phases=[{"image_size": 64, "steps": 1}]), "--output", "out"],
        2,
        ("phases", "language_model trains no encoder"),
    ),
    "phase that is no larger": Row(encoder(phases=[{"image_size": 32, "steps": 1}]), 2, ("phases.0.image_size", "32")),
    "phase that patches do not fill": Row(
        encoder(phases=[{"image_size": 36, "steps": 1}]), 2, ("phases.0.image_size", "36 px", "8×8")
    ),
    "phase field unknown": Row(
        encoder(phases=[{"image_sise": 64, "steps": 1}]), 2, ("phases.0.image_sise", "did you mean 'image_size'")
    ),
    "init missing": Row(encoder(shape={}, init="no/where/at/all"), 1, ("init: no/where/at/all", "no such folder")),
    "init is no encoder": Row(lambda p: encoder(shape={}, init=str(p.models.text))(p), 1, ("init", "llm:")),
    "init with a shape": Row(
        lambda p: encoder(init=str(p.models.vision))(p), 2, ("shape.hidden_size", "has its shape already")
    ),
    "init is a baseline": Row(
        lambda p: encoder(shape={}, init=str(p.models.clip))(p),
        2,
        ("init", "comparing images with text", "`baseline: true` beside init"),
    ),
    # encoders: labels, masks, fine-tuning
    "mask missing": Row(
        ade20k(lambda p: (p.folder / "ade/annotations/validation/two.png").unlink()),
        1,
        ("validation/two.jpg", "no mask", "two.png", "add it or remove the image"),
    ),
    "mask of another size": Row(
        ade20k(lambda p: mask(p, "training/one", 6, 10, 1)), 1, ("one.png: 6x10 px", "one.jpg has 12x20", "one size")
    ),
    "mask value above the classes": Row(
        ade20k(lambda p: mask(p, "validation/one", 12, 20, 151)), 1, ("one.png: value 151", "1 to 150", "correct")
    ),
    "masks in no known layout": Row(
        lambda p: ["eval-encoder", p.models.vision, "--segmentation", p.data(), "--output", "out"],
        1,
        ("segmentation data", "<split>/images", "annotations/training", "found good.png", "check source"),
    ),
    "label that class folders do not have": Row(
        probe("data.label=position"), 2, ("data.label: position", "photos", "by their folder", "leave it out")
    ),
    "label of another generated task": Row(
        probe("data.label=figure", source=lambda p: "generated:characters"), 2, ("figure", "generated:shapes", "answer")
    ),
    "fine-tuning without labels": Row(
        lambda p: [*probe()(p)[:2], "--segmentation", "generated:shapes", "fine_tuning.steps=2", "--output", "out"],
        2,
        ("fine_tuning", "data, which is missing"),
    ),
    "fine-tuning at a rate of nothing": Row(
        probe("fine_tuning.learning_rates=[0]"), 2, ("'fine_tuning.learning_rates.0'", "greater than 0")
    ),
    "evaluation recipe of another command": Row(
        probe("--recipe", "nlvr"), 2, ("recipe nlvr", "kind 'train'", "unclipped train nlvr")
    ),
    "evaluation recipe given to train": Row(
        lambda p: ["train", "imagenet", "--output", "out"], 2, ("encoder_evaluation", "eval-encoder ENCODER --recipe")
    ),
    "data path of a recipe not set": Row(
        lambda p: [
            "eval-encoder",
            p.models.vision,
            "--recipe",
            "probe-category",
            "data.source=$NO_SUCH/x",
            "--output",
            "out",
        ],
        2,
        ("$NO_SUCH/x", "NO_SUCH is not set"),
    ),
    # recipes and arguments
    "recipe missing": Row(lambda p: ["train", "my.yaml", "--output", "out"], 2, ("my.yaml", "no such file")),
    "recipe name unknown": Row(lambda p: ["train", "quikstart", "--output", "out"], 2, ("did you mean 'quickstart'",)),
    "recipe to print unknown": Row(lambda p: ["recipes", "nosuch"], 2, ("unknown recipe 'nosuch'", "quickstart")),
    "recipe is a folder": Row(lambda p: ["train", p.data(), "--output", "out"], 2, ("data", ".yaml")),
    "recipe is not YAML": Row(
        lambda p: ["train", p.write("my.yaml", "a: [1"), "--output", "out"], 2, ("my.yaml, line", "not valid YAML")
    ),
    "recipe is a list": Row(lambda p: ["train", p.write("m.yaml", "- 1"), "--output", "out"], 2, ("m.yaml", "mapping")),
    "recipe is binary": Row(
        lambda p: ["train", p.write("m.yaml", b"\xff\xfe\x00a"), "--output", "out"], 2, ("m.yaml", "cannot be read")
    ),
    "recipe of the other command": Row(
        lambda p: ["train", p.pretraining("a.txt"), "--output", "out"], 2, ("'pretrain'", "unclipped pretrain")
    ),
    "unknown field": Row(train(stagse=[]), 2, ("unknown field 'stagse'", "did you mean 'stages'")),
    "unknown inner field": Row(override("model.conector=mlp"), 2, ("'model.conector'", "did you mean 'connector'")),
    "wrong type": Row(override("stages.all.steps=many"), 2, ("'stages.0.steps'", "integer", "'many'")),
    "no number of steps": Row(override("stages.all.steps=0"), 2, ("'stages.0.steps'", "greater than 0")),
    "override without value": Row(override("training.seed"), 2, ("training.seed", "key.path=value")),
    "override of a stage that is not there": Row(override("stages.nope.steps=3"), 2, ("'nope'", "all")),
    "unknown part": Row(override("stages.all.train={visoin: 1e-3}"), 2, ("visoin", "vision")),
    "override that is no YAML": Row(override("training.seed=2020-99-99"), 2, ("2020-99-99", "not valid YAML", "quote")),
    "one line for a wrong entry of a list": Row(
        override("data.sources.0.weight=-1"), 2, ("'data.sources.0.weight': input should be greater than 0 (found -1)",)
    ),
    "option of another kind of encoder": Row(
        assemble(the("vision"), the("text"), "--patch-size", "8"), 2, ("patch_size", "only for an encoder made from")
    ),
    "encoder without a name": Row(assemble(lambda p: "llm:", the("text")), 1, ("no model is named", FOLDER)),
    "inline encoder of a wrong type": Row(
        lambda p: [
            "train",
            p.recipe(model={"text": str(p.models.text), "vision": {"model_type": "vit", "hidden_size": "x"}}),
            "--output",
            "out",
        ],
        2,
        ("model.vision", "'hidden_size'", "int"),
    ),
    "evaluation section of a wrong type": Row(
        lambda p: ["eval", p.models.vlm, "--recipe", p.recipe(evaluation=[1]), "--output", "out"],
        2,
        ("'evaluation'", "mapping", "list"),
    ),
    "resume in a folder of something else": Row(
        lambda p: ["train", p.recipe(), "--output", p.data(), "--resume"], 2, ("--resume: data holds no run", "another")
    ),
    "shape of a wrong type": Row(
        lambda p: [*COMMANDS["pretrain"](p)[:2], "shape.hidden_size=big", "--output", "out"], 2, ("shape", "qwen3")
    ),
    "shape whose heads do not divide": Row(
        lambda p: [*COMMANDS["pretrain"](p)[:2], "shape.num_key_value_heads=3", "--output", "out"],
        2,
        ("shape", "qwen3"),
    ),
    "layer decay without an encoder": Row(
        lambda p: [*COMMANDS["pretrain"](p)[:2], "training.optimizer.layer_decay=0.9", "--output", "out"],
        2,
        ("layer_decay", "vision encoder", "leave them out"),
    ),
    "clipping by module without a norm": Row(
        lambda p: [*COMMANDS["pretrain"](p)[:2], "clip_per_module=true", "clip_norm=null", "--output", "out"],
        2,
        ("clip_per_module", "clip_norm", "give one"),
    ),
    "a final decay beside one for each part": Row(
        lambda p: [
            *COMMANDS["pretrain"](p)[:2],
            "training.optimizer={weight_decay: {text: 0.1}, final_weight_decay: 0.2}",
            "--output",
            "out",
        ],
        2,
        ("final_weight_decay", "one number"),
    ),
    "a final rate above the first": Row(
        lambda p: [*COMMANDS["pretrain"](p)[:2], "final_learning_rate=9", "--output", "out"],
        2,
        ("final_learning_rate", "found 9"),
    ),
    "tokenizer missing": Row(
        lambda p: [*COMMANDS["pretrain"](p)[:2], "tokenizer.source=no/where", "--output", "out"],
        1,
        ("tokenizer.source no/where", "tokenizer.json"),
    ),
    "connector unknown": Row(assemble(the("vision"), the("text"), "--connector", "mpl(2)"), 2, ("mpl", "mlp")),
    "scorer unknown": Row(evaluate(more=("--scorer", "exakt")), 2, ("'exakt'", "exact_match")),
    "eval of nothing": Row(lambda p: ["eval", p.models.vlm, "--output", "out"], 2, ("--recipe", "--data")),
    "eval of a recipe without tasks": Row(
        lambda p: ["eval", p.models.vlm, "--recipe", p.recipe(), "--output", "out"], 2, ("no tasks", "evaluation.tasks")
    ),
    "rescore of nothing": Row(lambda p: ["eval", p.models.vlm, "--rescore", "--output", "out"], 1, ("no predictions",)),
    "device unknown": Row(chat(lambda p: p.image("a.png"), "--device", "tpu"), 2, ("'tpu'", "cpu")),
    "device not there": Row(chat(lambda p: p.image("a.png"), "--device", "cuda:99"), 2, ("cuda:99", "not available")),
    "command unknown": Row(lambda p: ["trian"], 2, ("trian", "train")),
    "argument missing": Row(lambda p: ["train", "--output", "out"], 2, ("'recipe'", "--help")),
    "option missing": Row(lambda p: ["train", "quickstart"], 2, ("--output", "--help")),
    "option unknown": Row(lambda p: ["train", "quickstart", "--outptu", "out"], 2, ("--outptu", "--output")),
    "option of a wrong type": Row(evaluate(more=("--limit", "integer")), 2, ("--limit", "integer")),
    "quickstart, unknown field": Row(
        lambda p: ["quickstart", "modle.seed=1", "--output", "out"], 2, ("'modle'", "did you mean 'model'")
    ),
    "quickstart in no time": Row(
        lambda p: ["quickstart", "--minutes", "0", "--output", "out"], 2, ("--minutes", "0.5")
    ),
    # checkpoints
    "hub id without network, vision": Row(assemble(lambda p: HUB, the("text")), 1, (HUB, "without network", FOLDER)),
    "hub id without network, text": Row(assemble(the("vision"), lambda p: HUB), 1, (HUB, "without network", FOLDER)),
    "hub id without network, llm": Row(assemble(lambda p: f"llm:{HUB}", the("text")), 1, (HUB, "without net", FOLDER)),
    "hub id without network, chat": Row(lambda p: ["chat", HUB, p.image("a.png"), *ASK], 1, (HUB, "without", FOLDER)),
    "hub id without network, recipe": Row(override(f"model={{checkpoint: {HUB}}}"), 1, (HUB, "without net", FOLDER)),
    "no hub id and no folder": Row(assemble(lambda p: "./my-vit", the("text")), 1, ("./my-vit", "no such folder")),
    "a contrastive encoder": Row(
        assemble(the("clip"), the("text")), 2, ("contrastive", "baseline: true", "--baseline")
    ),
    "language model as encoder": Row(assemble(the("text"), the("text")), 1, ("qwen3", "llm:")),
    "encoder as language model": Row(assemble(the("vision"), the("vision")), 1, ("dinov2", "language model")),
    "vision tensor missing": Row(
        assemble(broken("vision", without("layernorm.weight")), the("text")), 1, ("tampered", "missing 1", "layernorm")
    ),
    "vision tensor extra": Row(
        assemble(broken("vision", extra), the("text")), 1, ("tampered", "unexpected 1", "surpl")
    ),
    "vision tensor misshaped": Row(
        assemble(broken("vision", misshaped("layernorm.weight")), the("text")), 1, ("misshaped 1", "(3, 5)", "(32,)")
    ),
    "llm tensor missing": Row(
        assemble(broken("text", without(f"model.{QKV}"), "llm:"), the("text")), 1, ("tampered", "missing 1", QKV)
    ),
    "llm tensor extra": Row(assemble(broken("text", extra, "llm:"), the("text")), 1, ("tampered", "unexpected 1")),
    "llm tensor misshaped": Row(
        assemble(broken("text", misshaped(f"model.{QKV}"), "llm:"), the("text")), 1, ("tampered", "misshaped 1", QKV)
    ),
    "text tensor missing": Row(
        assemble(the("vision"), broken("text", without(f"model.{QKV}"))), 1, ("tampered", "missing 1", QKV)
    ),
    "weights cut": Row(assemble(the("vision"), lambda p: cut_weights(p, "text")), 1, ("cut: weights cannot", FOLDER)),
    "vision weights cut": Row(assemble(lambda p: cut_weights(p, "vision"), the("text")), 1, ("cut: weights", FOLDER)),
    "model weights cut": Row(lambda p: ["chat", cut_weights(p, "vlm"), *ASK], 1, ("cut: cannot be read", "again")),
    "configuration cut": Row(
        lambda p: ["chat", p.file_of("vlm", "config.json", b'{"model_ty'), *ASK],
        1,
        ("config.json", "cannot be read", "again"),
    ),
    "configuration of an unknown kind": Row(
        lambda p: ["chat", p.file_of("vlm", "config.json", b'{"model_type": "xyz"}'), *ASK], 1, ("config.json", "xyz")
    ),
    "chat with a language model": Row(
        lambda p: ["chat", p.models.text, *ASK], 1, ("'qwen3'", "not an assembled model", "unclipped assemble")
    ),
    "chat with an encoder": Row(lambda p: ["chat", p.models.vision, *ASK], 1, ("'dinov2'", "unclipped assemble")),
    "chat with a folder of something else": Row(lambda p: ["chat", p.data(), *ASK], 1, ("no config.json", FOLDER)),
    "chat with a file": Row(lambda p: ["chat", p.write("model.bin"), *ASK], 1, ("is a file", FOLDER)),
    "chat without a processor": Row(
        lambda p: ["chat", p.file_of("vlm", "processor_config.json"), *ASK], 1, ("processor", "again")
    ),
    "chat without a tokenizer": Row(
        lambda p: ["chat", p.file_of("vlm", "tokenizer.json"), *ASK], 1, ("tokenizer", "again")
    ),
    "chat without weights": Row(lambda p: ["chat", p.file_of("vlm", "model.safetensors"), *ASK], 1, ("safetensors",)),
    "language model without a tokenizer": Row(
        assemble(the("vision"), lambda p: p.file_of("text", "tokenizer.json", None, "tokenizer_config.json")),
        1,
        ("tokenizer.json", "tokenizer_config.json"),
    ),
    "eval of a language model": Row(
        lambda p: ["eval", p.models.text, "--data", p.data(), "--output", "out"], 1, ("'qwen3'", "unclipped assemble")
    ),
    "train from no model": Row(override("model={checkpoint: .}"), 1, ("no config.json", FOLDER)),
    "model tensor missing": Row(
        lambda p: ["chat", broken("vlm", without(f"model.language_model.{QKV}"))(p), *ASK], 1, ("missing 1", QKV)
    ),
    "model tensor extra": Row(lambda p: ["chat", broken("vlm", extra)(p), *ASK], 1, ("unexpected 1: surplus",)),
    "model tensor misshaped": Row(
        lambda p: ["chat", broken("vlm", misshaped(f"model.language_model.{QKV}"))(p), *ASK], 1, ("misshaped 1", QKV)
    ),
    # weights of other code
    "import, file missing": Row(
        lambda p: ["import-encoder", "no.pth", "--output", "out"], 1, ("no.pth: no such file",)
    ),
    "import, a folder": Row(
        lambda p: ["import-encoder", p.data(), "--output", "out"], 1, ("data: is a folder", "needs no import")
    ),
    "import, no weights": Row(
        import_file(b"hello, this is text"), 1, ("weights.pth: cannot be read as weights", ".pth")
    ),
    "import, an empty file": Row(import_file(b""), 1, ("weights.pth: cannot be read as weights", "copy it again")),
    "import, code in the file": Row(
        original(lambda tensors: tensors.update(more=Command())),
        1,
        ("asks to run", "print", "refused", "tensors alone"),
    ),
    "import, tensor missing": Row(original(without("norm.bias")), 1, ("weights.pth", "missing 1: norm.bias", "whole")),
    "import, tensor extra": Row(original(extra), 1, ("unexpected 1: surplus.weight", "--leave-out NAME")),
    "import, tensor misshaped": Row(original(misshaped("norm.bias")), 1, ("misshaped 1", "(3, 5)", "(24,)")),
    "import, of something else": Row(
        original(lambda tensors: tensors.pop("pos_embed")), 1, ("no vision transformer", "pos_embed", "blocks.0")
    ),
    "import, wrong number of heads": Row(
        original(lambda tensors: None, "--attention-heads", "7"), 2, ("--attention-heads 7", "width 24")
    ),
    "import, no number of heads": Row(
        lambda p: [*original()(p)[:2], "--output", "out"], 2, ("width 24", "give --attention-heads")
    ),
    "import, no heads at all": Row(
        original(lambda t: None, "--attention-heads", "0"), 2, ("attention_heads", "found 0")
    ),
    "import, no such side": Row(original(lambda t: None, "--weights", "student"), 1, ("no student", "--weights out")),
    "import, unknown side": Row(
        original(lambda t: None, "--weights", "tacher"), 2, ("weights", "'teacher' or 'student'")
    ),
    "import, no decoder": Row(original(lambda t: None, "--decoder"), 2, ("no decoder", "leave --decoder out")),
    "import, heads of a decoder left out": Row(
        original(lambda t: None, "--decoder-heads", "2"), 2, ("decoder_heads", "only with decoder")
    ),
    "import, mean alone": Row(original(lambda t: None, "--mean", "0.5"), 2, ("mean and std", "both or neither")),
    "import, mean of a wrong type": Row(
        original(lambda t: None, "--mean", "0.5,x", "--std", "0.5,1"), 2, ("'mean.1'", "(found 'x')")
    ),
    "import, means of too few channels": Row(
        original(lambda t: None, "--mean", "0.4,0.5", "--std", "0.5,1"), 2, ("weights.pth", "mean needs 3 numbers")
    ),
    "import, unknown objective": Row(
        original(lambda t: None, "--objective", "dino"), 2, ("objective", "self_supervised")
    ),
    "import, a classifier": Row(
        original(lambda t: t.update({"head.weight": torch.zeros(2, 24)})), 2, ("classifier", "--objective supervised")
    ),
    "import, heads elsewhere missing": Row(
        original(lambda t: None, "--dino-heads", "no.pth"), 1, ("no.pth: no such file",)
    ),
    "import, no heads elsewhere": Row(
        original(lambda t: None, "--dino-heads", "weights.pth"), 1, ("weights.pth: holds no DINO heads", "leave it out")
    ),
}


PAIRS = ["pretrain", "clothing-contrastive", "training.threads=1"]


def pretrain_pairs(prepare: Callable[[Place], str]) -> Callable[[Place], list[Any]]:
    """Pretraining on pairs from the source that `prepare` makes."""
    return lambda place: [*PAIRS, f"data.sources=[{{source: {prepare(place)}}}]", "--output", "out"]


def images_alone(place: Place) -> str:
    for name in "ab":
        place.image(f"photos/{name}.png")
    return "photos"


def corrupt_shard(place: Place) -> str:
    """A tar shard whose only image is a damaged PNG."""
    with tarfile.open(place.folder / "shard.tar", "w") as archive:
        for name, content in (("0001.png", PNG + b"no image"), ("0001.txt", b"a boat")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return "shard.tar"


def stats(*more: str) -> Callable[[Place], list[Any]]:
    return lambda place: ["data", "stats", place.data(), *more, "--output", "out"]


ROWS |= {
    "pairs wanted, images alone": Row(pretrain_pairs(images_alone), 1, ("sample ", "exactly one assistant turn", "0")),
    "pair without a caption": Row(
        pretrain_pairs(lambda p: p.data({"image": "good.png"}, {"image": "good.png", "caption": "a"}) + "/train.jsonl"),
        1,
        ("train.jsonl",),
    ),
    "pair without a caption later on": Row(
        pretrain_pairs(lambda p: p.data({"image": "good.png", "caption": "a"}, {"image": "good.png"})),
        1,
        ("data/train.jsonl, line 2", "'caption'", "missing"),
    ),
    "corrupt tar member": Row(pretrain_pairs(corrupt_shard), 1, ("shard shard.tar, member 0001.png",)),
    "filter keeps nothing": Row(
        override("data.filter={kind: text_rich, threshold: 1.0}"),
        1,
        ("keeps none of 4 images", "highest score", "sample s0", "lower filter.threshold"),
    ),
    "filter of one source keeps nothing": Row(
        override("data.sources.0.filter={kind: text_rich, share: 0.1}"),
        1,
        ("less than half of one", "raise filter.share"),
    ),
    "filter keeps nothing of what an encoder learns from": Row(
        lambda p: [
            *("pretrain", "clothing-mae", f"data.sources=[{{source: {images_alone(p)}}}]"),
            *("data.filter={kind: text_rich, threshold: 1.0}", "training.threads=1", "--output", "out"),
        ],
        1,
        ("photos", "keeps none of 2 images"),
    ),
    "filter unknown": Row(override("data.filter=text_ritch"), 2, ("data.filter.kind", "text_rich", "text_ritch")),
    "filter by threshold and share": Row(
        override("data.filter={kind: text_rich, threshold: 0.4, share: 0.1}"), 2, ("data.filter", "leave one out")
    ),
    "filter of an endless source": Row(
        override("data.sources=[{source: 'generated:shapes', filter: text_rich}]"), 2, ("endless", "limit")
    ),
    "stats of nothing": Row(lambda p: ["data", "stats", "nowhere", "--output", "out"], 1, ("nowhere", "no such file")),
    "stats of an unknown task": Row(
        lambda p: ["data", "stats", "generated:shaps", "--output", "out"], 2, ("shaps", "did you mean 'shapes'")
    ),
    "stats, unknown field": Row(stats("formt=images"), 2, ("'sources.0.formt'", "did you mean 'format'")),
    "stats, unknown filter": Row(stats("--filter", "textrich"), 2, ("textrich", "text_rich")),
    "stats, threshold and no filter": Row(stats("--threshold", "0.5"), 2, ("--threshold", "--filter")),
    "stats, share of nothing": Row(stats("--filter", "text_rich", "--share", "0"), 2, ("share", "greater than 0")),
    "stats, share and threshold": Row(
        stats("--filter", "text_rich", "--share", "0.5", "--threshold", "0.5"), 2, ("leave one out",)
    ),
    "stats, limit of nothing": Row(stats("--limit", "0"), 2, ("--limit", "equal to 1")),
    "stats of a recipe without data": Row(
        lambda p: ["data", "stats", "clothing-objectives", "--output", "out"],
        2,
        ("clothing-objectives", "no section data"),
    ),
    "stats of a recipe, split": Row(
        lambda p: ["data", "stats", p.recipe(), "--split", "val", "--output", "out"], 2, ("--split", "data.sources.0")
    ),
    "stats, split that is not there": Row(stats("--split", "test"), 1, ("no test.jsonl", "train, val")),
    # measures of sparse prefill
    "prefill quality, unknown pattern": Row(
        prefill("quality", "--pattern", "topkk(2)"), 2, ("topkk", "did you mean 'topk'")
    ),
    "prefill quality, twice the same": Row(
        prefill("quality", "--pattern", "topk(2)", "--pattern", "topk(2)"), 2, ("'topk(2)' stands there twice",)
    ),
    "prefill quality, too many layers": Row(
        prefill("quality", "--pattern", "per_layer(full | full | full)"), 2, ("per_layer", "3 patterns", "2 layers")
    ),
    "prefill quality, no pattern file": Row(
        prefill("quality", "--pattern", "gone.yaml"), 1, ("pattern file gone.yaml", "No such file", "prefill search")
    ),
    "prefill quality, wrong pattern file": Row(
        prefill_with_file("patern: topk(2)"), 1, ("own.yaml", "field 'pattern'", "fields are pattern, key_block")
    ),
    "prefill quality, blocks": Row(
        prefill("quality", "--pattern", "topk(2)", "--key-block", "24"), 2, ("query_block (256)", "key_block (24)")
    ),
    "prefill quality, endless without limit": Row(
        lambda p: [
            "prefill",
            "quality",
            p.models.vlm,
            "--data",
            "generated:needle",
            "--pattern",
            "topk(2)",
            "--output",
            "out",
        ],
        2,
        ("endless", "limit"),
    ),
    "prefill quality, a decoder": Row(
        lambda p: ["prefill", "quality", p.models.text, "--data", p.data(), "--pattern", "topk(2)", "--output", "out"],
        1,
        ("holds a 'qwen3'", "assemble"),
    ),
    "prefill search, unknown bound": Row(
        prefill("search", "--bound", "kll=0.1"), 2, ("--bound kll=0.1", "did you mean 'kl'")
    ),
    "prefill search, bound without number": Row(prefill("search", "--bound", "kl"), 2, ("--bound kl", "kl=0.05")),
    "prefill search, bound of zero": Row(prefill("search", "--bound", "kl=0"), 2, ("field 'kl'", "greater than 0")),
    "prefill search, one prompt": Row(prefill("search", "--limit", "1"), 2, ("at least 2 prompts",)),
    "prefill search, a list as candidate": Row(
        prefill("search", "--candidate", "per_layer(full | topk(2))"), 2, ("per_layer", "makes the lists itself")
    ),
    "prefill bench, tokens": Row(
        prefill("bench", "--pattern", "topk(2)", "--tokens", "1k"), 2, ("--tokens", "'1k'", "whole numbers")
    ),
    "prefill bench, too few tokens": Row(
        prefill("bench", "--pattern", "topk(2)", "--tokens", "4"), 2, ("field 'tokens'", "at least 16")
    ),
    "prefill bench, beyond the positions": Row(
        prefill("bench", "--pattern", "topk(2)", "--tokens", "4096"), 2, ("4096 tokens", "512 positions")
    ),
    "prefill bench, layers of a saved model": Row(
        prefill("bench", "--pattern", "topk(2)", "--layers", "1"), 2, ("layers", "only shapes", "0.6b")
    ),
    "prefill bench, unknown model": Row(
        lambda p: ["prefill", "bench", "0.6c", "--pattern", "topk(2)", "--output", "out"],
        2,
        ("0.6c", "neither a model folder nor a shape", "0.6b"),
    ),
}


DOCUMENTS = '{"text": "a text of some words, longer than a block of sixteen tokens in any tokenizer"}\n' * 9
COMMANDS: dict[str, Callable[[Place], list[Any]]] = {
    "assemble": assemble(the("vision"), the("text")),
    "train": train(),
    "pretrain": lambda p: ["pretrain", p.pretraining(p.write("a.jsonl", DOCUMENTS)), "--output", "out"],
    "quickstart": lambda p: ["quickstart", "--output", "out"],
    "eval": evaluate(),
    "data stats": stats(),
    "import-encoder": original(),
}
for _command, _arguments in COMMANDS.items():
    ROWS |= {
        f"{_command}, output holds a run": Row(occupied(_arguments), 2, ("--output out", "not empty", "another"), True),
        f"{_command}, output is a file": Row(a_file_as_output(_arguments), 2, ("--output out", "is a file"), True),
        f"{_command}, output inside a file": Row(
            lambda p, make=_arguments: [*make(p)[:-1], p.write("file") + "/out"],
            1,
            ("file/out", "Not a dir", "another"),
        ),
    }
