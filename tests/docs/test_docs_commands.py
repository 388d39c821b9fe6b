"""Every command on the pages is run in a folder prepared as they say, or stands here with the reason why it is not."""

# ruff: noqa: E501 - commands stand here as they stand on the pages
from __future__ import annotations

from pathlib import Path

import pytest
import typer
from docs_pages import PAGES, ROOT, arguments, blocks, commands
from typer.testing import CliRunner

from unclipped.audit.config import EncoderEvaluationConfig
from unclipped.cli.app import app
from unclipped.core.errors import CheckpointError
from unclipped.recipes.loading import read_recipe
from unclipped.recipes.schema import SCHEMAS
from unclipped.recipes.validation import COMMANDS, load_recipe, validate

SHORT = ["training.threads=1", "evaluation.bootstrap_samples=100", "evaluation.tasks.0.max_new_tokens=2"]
TWO_STAGES = [f"stages.{i}.{field}" for i in (0, 1) for field in ("steps=2", "warmup_steps=0", "batch_size=4")] + SHORT
ONE_STAGE = ["stages.0.steps=2", "stages.0.warmup_steps=0", "stages.0.batch_size=4", *SHORT]
EVAL = ["bootstrap_samples=100"]
PROBES = [*EVAL, "linear.steps=2", "knn.k=[1,2]"]
FEW_IMAGES = [*PROBES, "data.train_limit=90", "data.test_limit=4"]
FEW_TOKENS = ["--max-new-tokens", "2"]

# Commands that are run, with what is appended to keep them short.
RUN: dict[str, list[str]] = {
    'unclipped chat quickstart/model quickstart/examples/1.png -q "number?"': FEW_TOKENS,
    'unclipped chat runs/meters/model my-folder/images/90.png -q "what number?"': FEW_TOKENS,
    'unclipped assemble --vision ./my-vit --text ./my-lm --connector "pixel_shuffle(2x2) + mlp(2)" --output my-model': [],
    "unclipped recipes quickstart": [],
    "unclipped train my-recipe.yaml --output runs/meters": TWO_STAGES,
    "unclipped train my-recipe.yaml --output runs/meters --resume": TWO_STAGES,
    "unclipped train my-recipe.yaml stages.all.steps=4000 training.seed=1 --output runs/meters-seed-1": [
        *TWO_STAGES, "baselines=[]",
    ],
    "unclipped train my-quick.yaml --output runs/meters-quick": [
        *ONE_STAGE, "baselines=[]", "held_out_blocks=2", "held_out_length=16",
    ],
    "unclipped train my-dev.yaml --output runs/meters-dev": [*TWO_STAGES, "baselines=[]"],
    "unclipped pretrain real-lm data.sources.0.source=my-text data.sources.0.options={} steps=500 --output runs/my-lm": [
        "steps=2", "warmup_steps=0", "batch_size=2", "block_length=16", "tokenizer.vocabulary_size=300",
        "shape.hidden_size=32", "shape.intermediate_size=64", "shape.head_dim=8", "training.threads=1",
    ],
    "unclipped pretrain my-phases.yaml --output runs/my-phases": [
        "steps=2", "warmup_steps=0", "batch_size=2", "phases.0.steps=1", "dinov2.prototypes=16", "dinov2.head_hidden=16",
        "training.threads=1",
    ],
    "unclipped eval runs/meters/model --data my-folder --split val --blind --output runs/meters-eval": [
        *EVAL, *FEW_TOKENS,
    ],
    "unclipped eval runs/meters/model --data my-folder --split val --scorer exact_match --blind --output runs/meters-eval": [
        *EVAL, *FEW_TOKENS,
    ],
    "unclipped eval runs/meters/model --output runs/meters-eval --rescore": [],
    "unclipped compare runs/meters runs/meters-seed-1": [],
    "unclipped compare model=runs/meters blind=runs/meters/baselines/blind --reference blind "
    "--output runs/meters-against-blind": [],
    "unclipped compare sighted=runs/meters-eval blind=runs/meters-eval/predictions-blind --output runs/meters-compared": [],
    "unclipped eval runs/meters/model --recipe my-recipe.yaml --output runs/meters-eval-recipe": [
        *EVAL, "tasks.0.max_new_tokens=2",
    ],
    "unclipped eval runs/meters/model --data generated:characters --split test --limit 400 --output runs/characters-eval": [
        *EVAL, *FEW_TOKENS, "--limit", "4",
    ],
    'unclipped chat quickstart/model quickstart/examples/1.png -q "number?" '
    '--sparse "global_text + sink(128) + topk(16)"': FEW_TOKENS,
    'unclipped eval quickstart/model --data generated:characters --limit 20 --sparse "sink(128) + window(512)" '
    "--output runs/sparse-eval": [*EVAL, *FEW_TOKENS, "--limit", "4"],
    "unclipped import-encoder my-weights.pth --attention-heads 4 --output my-imported-vit": [],
    'unclipped prefill quality quickstart/model --data generated:characters --limit 40 --pattern "topk(2)" '
    '--pattern "sink(8) + window(16)" --key-block 4 --query-block 8 --output runs/quality': [
        "bootstrap_samples=100", *FEW_TOKENS, "--limit", "3",
    ],
    'unclipped prefill search quickstart/model --data generated:characters --limit 8 --bound kl=0.05 --candidate "topk(1)" '
    '--candidate "topk(4)" --candidate "sink(8) + window(16)" --key-block 4 --query-block 8 --output runs/search': [
        "--limit", "2", "--bound", "kl=5",
    ],
    "unclipped eval quickstart/model --data generated:characters --limit 20 --sparse runs/search/pattern.yaml "
    "--output runs/searched-eval": [*EVAL, *FEW_TOKENS, "--limit", "4"],
    'unclipped prefill bench 0.6b --layers 1 --tokens 1024,2048 --pattern "topk(2)" --threads 1 --repeats 3 '
    "--output runs/bench": ["--tokens", "64,128", "--repeats", "1", "--key-block", "8", "--query-block", "16"],
    "unclipped eval-encoder my-vit --data my-photos --output runs/my-vit-probes": PROBES,
    "unclipped eval-encoder my-vit --data my-photos fine_tuning.steps=500 --output runs/my-vit-fine-tuned": [
        *PROBES, "fine_tuning.steps=2", "fine_tuning.learning_rates=[1e-3]",
    ],
    "unclipped eval-encoder my-vit --recipe probe-position --output runs/my-vit-position": FEW_IMAGES,
    "unclipped eval-encoder my-vit --recipe probe-reading --output runs/my-vit-reading": FEW_IMAGES,
    "unclipped eval-encoder my-vit --recipe imagenet data.source=my-imagenet --output runs/my-vit-imagenet": PROBES,
    "unclipped eval-encoder my-clip --recipe imagenet-zero-shot data.source=my-imagenet --output runs/my-clip-imagenet": EVAL,
    "unclipped eval-encoder my-vit --recipe ade20k segmentation.source=my-ade20k --output runs/my-vit-ade20k": [
        *EVAL, "segmentation.steps=2",
    ],
    "unclipped eval-encoder llm:my-lm --data generated:shapes image_size=64 patch_size=16 --output runs/lm-probes": [
        *PROBES, "data.train_limit=20", "data.test_limit=4",
    ],
    "unclipped eval-encoder my-vit --segmentation generated:shapes --output runs/my-vit-masks": [
        *EVAL, "segmentation.steps=2", "segmentation.train_limit=4", "segmentation.test_limit=3",
    ],
    'unclipped pretrain clothing-contrastive "data.sources=[{source: generated:captions}]" data.augment=null '
    "pairs.context_length=128 tokenizer.vocabulary_size=600 --output runs/captions-contrastive": [
        "steps=2", "warmup_steps=0", "batch_size=4", "tokenizer.documents=50", "training.threads=1",
    ],
    "unclipped data stats my-folder --output runs/my-folder-stats": [],
    "unclipped data stats my-recipe.yaml --limit 50 --output runs/my-recipe-stats": [],
    'unclipped data stats generated:captions "options.size=[64,64]" --limit 40 --output runs/captions-stats': [],
    "unclipped data stats my-folder --filter text_rich --share 0.5 --output runs/text-rich": [],
    "unclipped eval-encoder my-clip --recipe my-zero-shot.yaml --output runs/my-clip-probes": EVAL,
}  # fmt: skip

# Run without a network: they must end with one line that says so and names the folder form that works instead.
HUB = {
    "unclipped assemble --vision llm:Qwen/Qwen3-0.6B --text Qwen/Qwen3-0.6B --output qwen-vl",
    'unclipped assemble --vision llm:Qwen/Qwen3-0.6B --text Qwen/Qwen3-0.6B --connector "pixel_shuffle(2x2) + mlp(2)" '
    "--output qwen-vl",
    "unclipped assemble --vision facebook/dinov2-small --text Qwen/Qwen3-0.6B --output dinov2-qwen",
    "unclipped train hub-recipe.yaml --output runs/hub",
    "unclipped eval-encoder facebook/dinov2-small --data my-photos --output runs/dinov2-probes",
}

# Not run; options and recipe are checked.
REAL = "needs the real data and minutes"
CLUSTER = "needs GPUs, billions of images and weeks: tests/recipes/test_web_recipes.py compares it with its table"
TWO_ENCODERS = "two processes: tests/training/test_pretraining_distributed.py trains under torchrun"
TWO = "two processes: tests/training/test_training_distributed.py trains under torchrun"
CHECKED = {
    "unclipped pretrain real-lm --output runs/real-lm": REAL,
    "unclipped train nlvr --output runs/nlvr": REAL,
    "unclipped pretrain real-lm-characters --output runs/real-lm-characters": REAL,
    "unclipped train sroie-lines --output runs/sroie-lines": REAL,
    "unclipped train table-lookups --output runs/table-lookups": REAL,
    "unclipped pretrain clothing-mae --output runs/clothing-mae": REAL,
    "unclipped pretrain clip-free-lm --output runs/clip-free-lm": REAL,
    "unclipped train clip-free --output runs/clip-free": REAL,
    "unclipped compare-objectives clothing-objectives --output runs/objectives": REAL,
    "unclipped pretrain real-lm-gpu --output runs/real-lm-gpu": REAL,
    "unclipped train nlvr-gpu --output runs/nlvr-gpu": REAL,
    "torchrun --nproc-per-node 8 -m unclipped pretrain webdino-1b data.sources.0.source=my-images --output runs/webdino-1b": CLUSTER,
    "torchrun --nproc-per-node 8 -m unclipped pretrain webmae-1b data.sources.0.source=my-images --output runs/webmae-1b": CLUSTER,
    "torchrun --nproc-per-node 2 -m unclipped pretrain clothing-dino training.parallel=fsdp2 --output runs/clothing-dino-fsdp2": TWO_ENCODERS,
    "torchrun --nproc-per-node 2 -m unclipped train my-recipe.yaml --output runs/meters-ddp": TWO,
    "torchrun --nproc-per-node 2 -m unclipped train my-recipe.yaml training.parallel=fsdp2 --output runs/meters-fsdp2": TWO,
}

# Other programs.
OTHER = {
    "make quickstart": "minutes",
    "make test": "is what runs this",
    "make test-all": "is what runs this",
    "make lint types": "runs before a change lands",
    "bash .ci/run": "runs before a change lands",
    "export UNCLIPPED_DATA=/path/to/data": "a variable",
    "hf download facebook/dinov2-small --local-dir models/dinov2-small": "needs the hub",
    "python -m unclipped.recipes.reference > docs/recipe-reference.md": "test_docs_pages.py compares its output",
    "python -m pytest tests/encoders/test_encoders_contract.py -k vit_msn": "test_docs_extending.py runs it",
    "python -m pytest tests/connectors/test_connectors.py": "test_docs_extending.py runs it",
    "python benchmarks/sparse_prefill_gpu.py --tune --backward --json gpu.json": "needs a GPU; its dry run is tested",
}


def test_every_command_is_accounted_for() -> None:
    shown = {command for page in PAGES for command in commands(page)}
    known = {*RUN, *HUB, *CHECKED, *OTHER}
    assert shown - known == set(), "say here how each new command is tested"
    assert known - shown == set(), "these commands have left the pages"
    assert all(arguments(command) is not None for command in {*RUN, *HUB, *CHECKED})
    assert all(arguments(command) is None for command in OTHER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if {*commands(page)} & {*RUN, *HUB}], ids=lambda page: page.name
)
def test_commands_run_in_the_order_of_the_page(page: Path, workspace: Path) -> None:
    for command in commands(page):
        if command in OTHER or command in CHECKED:
            continue
        given = arguments(command)
        assert given is not None
        if command in HUB:
            with pytest.raises(CheckpointError, match=r"could not be fetched as a hub id .* holds config\.json"):
                invoke(given)
            continue
        output = invoke([*given, *RUN[command]])
        if "--output" in given:
            folder = workspace / given[given.index("--output") + 1]
            assert any(folder.iterdir()), command
            if given[0] == "train":
                assert {"report.html", "results.json", "model", "recipe.yaml"} <= {
                    path.name for path in folder.iterdir()
                }
        else:
            assert output, command  # an untrained model may answer with an empty line


def invoke(given: list[str]) -> str:
    """Run the command line in this process and return what it printed; its errors are raised."""
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", sorted(CHECKED))
@pytest.mark.usefixtures("workspace")
def test_options_and_recipe_of_long_commands(command: str) -> None:
    name, *given = arguments(command) or []
    group = typer.main.get_command(app)
    subcommand = group.commands[name]  # type: ignore[attr-defined]
    options = subcommand.make_context(name, given).params  # raises for an unknown option
    kind = read_recipe(options["recipe"])["kind"]
    assert COMMANDS.get(kind, kind) == name
    load_recipe(options["recipe"], SCHEMAS[kind], options["overrides"])


@pytest.mark.usefixtures("workspace")
def test_recipes_on_the_pages_are_valid() -> None:
    files = {block.file for page in PAGES for block in blocks(page) if block.language == "yaml"}
    assert files
    for file in files:
        assert file is not None, "name the file of each recipe in the sentence before it"
        recipe = read_recipe(file)
        if "kind" not in recipe:
            validate(recipe, EncoderEvaluationConfig, file)
            continue
        load_recipe(file, SCHEMAS[recipe["kind"]])


def test_make_targets_and_scripts_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in OTHER:
        program, *words = command.split()
        if program == "make":
            assert all(f"\n{target}:" in makefile for target in words)
        if program == "bash":
            assert (ROOT / words[0]).is_file()
