"""Mistakes of `unclipped train` (images, samples, data, recipes, overrides) and of the command line as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from bad_input.row import BAD, FOLDER, HUB, Arguments, Row, cut_image, sample
from bad_input_support import Place

TALK = [{"from": "human", "value": "<image><image>hi"}, {"from": "gpt", "value": "ho"}]


def train(*rows: Any, **changes: Any) -> Arguments:
    return lambda place: ["train", place.recipe(place.data(*rows) if rows else "", **changes), "--output", "out"]


def train_with(prepare: Callable[[Place], Any], *rows: Any) -> Arguments:
    """Training on rows that name a file which `prepare` puts into the data folder."""

    def arguments(place: Place) -> list[Any]:
        data = place.data(*rows)
        prepare(place)
        return ["train", place.recipe(data), "--output", "out"]

    return arguments


def override(*overrides: str) -> Arguments:
    return lambda place: ["train", place.recipe(), *overrides, "--output", "out"]


def bare_folder(place: Place) -> list[Any]:
    """A recipe whose data is a folder without any data file or image."""
    place.write("bare/notes.bin")
    return override("data.sources.0.source=bare")(place)


ROWS: dict[str, Row] = {
    "quickstart, minutes and steps": Row(
        lambda p: ["quickstart", "--minutes", "3", "stages.read.steps=5", "--output", "out"],
        2,
        ("--minutes: not used where stages are changed",),
    ),
    "train, image missing": Row(train(sample(image="no.png")), 1, ("train.jsonl", "line 1", "s1", "'image'", "no.png")),
    "train, image empty": Row(train_with(lambda p: p.write("data/bad.png"), BAD), 1, ("s1", "bad.png", "empty")),
    "train, image cut": Row(train_with(lambda p: cut_image(p, "data/bad.png"), BAD), 1, ("s1", "bad.png", "truncated")),
    "train, no image": Row(train_with(lambda p: p.write("data/bad.png", "hi"), BAD), 1, ("s1", "bad.png", "not an im")),
    "placeholders and images differ": Row(
        train({"id": "s1", "image": "good.png", "conversations": TALK}), 1, ("s1", "2 <image>", "1 images", "exactly")
    ),
    "a turn without its answer": Row(
        train({"id": "s1", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "text": "a"}]}),
        1,
        ("s1", "conversations[1]", "the answer is empty", "found the keys from, text"),
    ),
    "a boolean as an answer": Row(train(sample(answer=True)), 1, ("s1", "'answer'", "found a boolean")),
    "an index of no choice": Row(train(sample(answer=2, choices=["a", "b"])), 1, ("s1", "index 2", "answer_is")),
    "no answer": Row(train({"id": "s1", "question": "q"}), 1, ("s1", "no supervised token", "add or remove")),
    "no field that is known": Row(train({"picture": 1}), 1, ("train.jsonl", "picture", "question", "format")),
    "empty data set": Row(train(""), 1, ("train.jsonl", "empty", "one JSON object a line")),
    "cut in mid line": Row(train(sample(), json.dumps(sample())[:-9]), 1, ("train.jsonl, line 2", "cut", "repair")),
    "data missing": Row(override("data.sources.0.source=nowhere"), 1, ("nowhere", "no such file or folder")),
    "data in a folder without data": Row(bare_folder, 1, ("bare", "train.jsonl", "holds no data file")),
    "data in a folder of images": Row(
        override("data.sources.0.source=."), 1, ("good.png", "an image alone", "add the")
    ),
    "generated task unknown": Row(override("data.sources.0.source=generated:chars"), 2, ("'chars'", "characters")),
    "generated option unknown": Row(
        override("data.sources.0={source: generated:characters, options: {colour: 1}}"), 2, ("'colour'", "valid")
    ),
    "environment variable not set": Row(override("data.sources.0.source=$NO_SUCH/a"), 2, ("NO_SUCH is not set",)),
    "evaluation recipe given to train": Row(
        lambda p: ["train", "imagenet", "--output", "out"], 2, ("encoder_evaluation", "eval-encoder ENCODER --recipe")
    ),
    "recipe missing": Row(lambda p: ["train", "my.yaml", "--output", "out"], 2, ("my.yaml", "no such file")),
    "recipe name unknown": Row(lambda p: ["train", "quikstart", "--output", "out"], 2, ("did you mean 'quickstart'",)),
    "recipe to print unknown": Row(lambda p: ["recipes", "nosuch"], 2, ("unknown recipe 'nosuch'", "quickstart")),
    "recipe is a folder": Row(lambda p: ["train", p.data(), "--output", "out"], 2, ("data", ".yaml")),
    "recipe is not YAML": Row(
        lambda p: ["train", p.write("my.yaml", "a: [1"), "--output", "out"], 2, ("my.yaml, line", "not valid YAML")
    ),
    "recipe is a list": Row(lambda p: ["train", p.write("m.yaml", "- 1"), "--output", "out"], 2, ("m.yaml", "mapping")),
    "recipe is binary": Row(
        lambda p: ["train", p.write("m.yaml", b"\xff\xfe\x00a"), "--output", "out"], 2, ("m.yaml", "not UTF-8 text")
    ),
    "recipe of the other command": Row(
        lambda p: ["train", p.pretraining("a.txt"), "--output", "out"], 2, ("'pretrain'", "unclipped pretrain")
    ),
    "unknown field": Row(train(stagse=[]), 2, ("unknown field 'stagse'", "did you mean 'stages'")),
    "unknown inner field": Row(override("model.conector=mlp"), 2, ("'model.conector'", "did you mean 'connector'")),
    "wrong type": Row(override("stages.all.steps=many"), 2, ("'stages.0.steps'", "integer", "'many'")),
    "a seed beyond the range": Row(
        override("training.seed=100000000000000000000"), 2, ("'training.seed'", "found 1000", "from 0 to 2,147,483,647")
    ),
    "threads beyond the range": Row(override("training.threads=1000000000"), 2, ("training.threads", "1 to 4,096")),
    "a kind that is a list": Row(override("kind=[x]"), 2, ("'kind'", "'train'")),
    "a connector of many layers": Row(
        override("model={vision: v, text: t, connector: mlp(99999)}"), 2, ("at most 64",)
    ),
    "no number of steps": Row(override("stages.all.steps=0"), 2, ("'stages.0.steps'", "greater than 0")),
    "override without value": Row(override("training.seed"), 2, ("training.seed", "key.path=value")),
    "override of a stage that is not there": Row(override("stages.nope.steps=3"), 2, ("'nope'", "all")),
    "unknown part": Row(override("stages.all.train={visoin: 1e-3}"), 2, ("visoin", "vision")),
    "override that is no YAML": Row(override("training.seed=2020-99-99"), 2, ("2020-99-99", "not valid YAML", "quote")),
    "one line for a wrong entry of a list": Row(
        override("data.sources.0.weight=-1"), 2, ("'data.sources.0.weight': input should be greater than 0 (found -1)",)
    ),
    "inline encoder of a wrong type": Row(
        lambda p: [
            "train",
            p.recipe(model={"text": str(p.models.text), "vision": {"model_type": "vit", "hidden_size": "x"}}),
            "--output",
            "out",
        ],
        2,
        ("model.vision.hidden_size: vit takes a whole number, found 'x'",),
    ),
    "resume in a folder of something else": Row(
        lambda p: ["train", p.recipe(), "--output", p.data(), "--resume"], 2, ("--resume: data holds no run", "another")
    ),
    "command unknown": Row(lambda p: ["trian"], 2, ("trian", "train")),
    "argument missing": Row(lambda p: ["train", "--output", "out"], 2, ("'recipe'", "--help")),
    "option missing": Row(lambda p: ["train", "quickstart"], 2, ("--output", "--help")),
    "option unknown": Row(lambda p: ["train", "quickstart", "--outptu", "out"], 2, ("--outptu", "--output")),
    "quickstart, unknown field": Row(
        lambda p: ["quickstart", "modle.seed=1", "--output", "out"], 2, ("'modle'", "did you mean 'model'")
    ),
    "quickstart in no time": Row(
        lambda p: ["quickstart", "--minutes", "0", "--output", "out"], 2, ("--minutes", "0.5")
    ),
    "hub id without network, recipe": Row(override(f"model={{checkpoint: {HUB}}}"), 1, (HUB, "without net", FOLDER)),
    "train from no model": Row(override("model={checkpoint: .}"), 1, ("no config.json", FOLDER)),
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
    "filter unknown": Row(override("data.filter=text_ritch"), 2, ("data.filter.kind", "text_rich", "text_ritch")),
    "filter by threshold and share": Row(
        override("data.filter={kind: text_rich, threshold: 0.4, share: 0.1}"), 2, ("data.filter", "leave one out")
    ),
    "filter of an endless source": Row(
        override("data.sources=[{source: 'generated:shapes', filter: text_rich}]"), 2, ("endless", "limit")
    ),
}
