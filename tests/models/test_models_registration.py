"""`import unclipped` in a new process: light, and the Auto classes know our models in every order of imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LOAD = """
import sys
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
assert type(model).__name__ == "UnclippedForConditionalGeneration", type(model)
assert type(processor).__name__ == "UnclippedProcessor", type(processor)
assert type(processor.image_processor).__name__ == "UnclippedImageProcessor"
print("loaded")
"""
AUTO = "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
ORDERS = {
    "Auto classes first": AUTO + "import unclipped\n",
    "our modules first": "import unclipped.models.modeling\n" + AUTO,
}


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "PIL", "pydantic")
    out = run(f"import sys, unclipped; print([name for name in {heavy} if name in sys.modules], unclipped.__version__)")
    assert out.split() == ["[]", "0.1.0"]


def test_recipe_sections_load_no_torch() -> None:
    code = "import sys, unclipped.models.config, unclipped.models.chat; print('torch' in sys.modules)"
    assert run(code).strip() == "False"


@pytest.mark.parametrize("order", list(ORDERS.values()), ids=list(ORDERS))
def test_auto_classes(assembled: Any, order: str) -> None:
    assert run(order + LOAD, assembled.folder / "model").strip() == "loaded"


def test_between_lazy_imports_and_the_hook_goes_away(assembled: Any) -> None:
    """transformers imported but nothing of it used yet; then a tokenizer class alone; then everything."""
    code = """
import sys, transformers, unclipped
count = lambda: sum("_Watcher" in type(finder).__name__ for finder in sys.meta_path)
assert count() == 1
from transformers import AutoTokenizer, PreTrainedModel, AutoConfig
assert count() == 0
assert AutoConfig.for_model("unclipped_llm_encoder").model_type == "unclipped_llm_encoder"
"""
    assert run(code + AUTO + LOAD, assembled.folder / "model").strip() == "loaded"


def test_pipeline_from_a_folder(assembled: Any, tmp_path: Path) -> None:
    from support.tiny_models import tiny_image

    tiny_image(20, 40).save(tmp_path / "picture.png")
    code = """
import sys, unclipped
from transformers import pipeline
pipe = pipeline("image-text-to-text", model=sys.argv[1])
content = [{"type": "image", "path": sys.argv[2]}, {"type": "text", "text": "what is this"}]
one, two = pipe(
    text=[[{"role": "user", "content": content}], [{"role": "user", "content": content + content[1:]}]],
    max_new_tokens=4, generate_kwargs={"do_sample": False, "min_new_tokens": 4}, return_full_text=False, batch_size=2,
)
print(repr(one[0]["generated_text"] if isinstance(one, list) else one["generated_text"]))
"""
    assert run(code, assembled.folder / "model", tmp_path / "picture.png").strip()


@pytest.mark.parametrize("name", ["AutoModelForImageTextToText", "AutoProcessor", "AutoConfig"])
@pytest.mark.parametrize("trust", [None, True], ids=["default", "trust_remote_code"])
def test_without_the_package_every_auto_class_ends_in_an_error_that_names_it(
    assembled: Any, name: str, trust: bool | None
) -> None:
    """`AutoProcessor` would else give the tokenizer alone, and prompts without their images."""
    code = f"""
import sys
from transformers import {name}
try:
    found = {name}.from_pretrained(sys.argv[1], trust_remote_code={trust})
except (ValueError, OSError) as error:
    assert "unclipped" in str(error), error
    print("refused")
else:
    print(type(found).__name__)
"""
    assert run(code, assembled.folder / "model").endswith("refused\n")  # after transformers' question
