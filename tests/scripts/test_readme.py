"""The README's example runs as it stands and prints what stands beneath it; its facts are those of the code."""
import re
from pathlib import Path

import pytest

from data.text import sources as text

README = Path(__file__).parents[2] / "README.md"


def test_the_example_prints_what_the_readme_shows(capsys):
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README.read_text(), re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == output


def test_the_corpus_has_the_checksum_that_the_readme_gives():
    assert text.REFERENCE in README.read_text()


@pytest.mark.parametrize("row", re.findall(r"^\| (\[.*\.py\]\(.*) \| (\d+) \|", README.read_text(), re.MULTILINE))
def test_the_code_tour_counts_lines_to_the_nearest_ten(row):
    files, lines = re.findall(r"\]\((.*?)\)", row[0]), int(row[1])
    counted = sum(len((README.parent / name).read_text().splitlines()) for name in files)
    assert abs(counted - lines) <= 10
