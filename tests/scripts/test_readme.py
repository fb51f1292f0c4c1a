"""Python examples in README.md and docs/ run as they stand and print what is shown below them."""
import re
from pathlib import Path

import pytest

from data.text import sources

ROOT = Path(__file__).parents[2]
EXAMPLES = [(path, *found) for path in ("README.md", "docs/notation.md") for found in re.findall(
    r"```python\n(.*?)```\n\n```\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)]


@pytest.mark.parametrize("path, code, output", EXAMPLES, ids=lambda value: value if value.endswith(".md") else "")
def test_an_example_prints_what_is_shown_below_it(path, code, output, capsys):
    exec(code, {})
    assert capsys.readouterr().out == output


def test_each_python_example_is_tested():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        name = path.relative_to(ROOT).as_posix()
        assert path.read_text(encoding="utf-8").count("```python") == [example[0] for example in EXAMPLES].count(name)
    assert {"README.md", "docs/notation.md"} == {path for path, _, _ in EXAMPLES}


def test_the_built_in_text_has_the_checksum_that_the_documentation_gives():
    """Of torch 2.13.0; for another version train_lm.py says that losses are not comparable."""
    assert sources.REFERENCE in (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
