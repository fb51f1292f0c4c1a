"""Python examples in README.md and docs/ run as they stand and print what is shown below them."""
import re
from pathlib import Path

import pytest
import torch

from data.text import tokens

ROOT = Path(__file__).parents[2]
EXAMPLES = [(path, *found) for path in ("README.md", "docs/notation.md") for found in re.findall(
    r"```python\n(.*?)```\n\n```\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)]


@pytest.mark.parametrize("path, code, output", EXAMPLES, ids=lambda value: value if value.endswith(".md") else "")
def test_an_example_prints_what_is_shown_below_it(path, code, output, capsys):
    exec(code, {})
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("path", ["README.md", "docs/notation.md"])
def test_each_python_example_has_an_output_and_is_tested(path):
    n = (ROOT / path).read_text(encoding="utf-8").count("```python")
    assert n == [example[0] for example in EXAMPLES].count(path) > 0


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="the text is the source of torch 2.13.0")
def test_the_built_in_text_is_the_one_that_the_documentation_describes(tmp_path):
    facts = tokens.load("torch", "bytes", tmp_path).facts
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert facts["sha256"] in text and f"{facts['bytes']:,} bytes" in text
