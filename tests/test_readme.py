"""README says what is true: its program is the one that is tested, its recipes and notebooks are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_program_is_the_tested_one():
    tested = (ROOT / "tests/test_custom_step.py").read_text().split("# -- begin README\n")[1].split("# -- end README")[0]
    assert re.search(r"```python\n(.*?)```", README.split("## Your own step")[1], re.S)[1].strip() == tested.strip()


def test_every_recipe_and_file_it_names_is_there():
    recipes = README.split("## Recipes")[1].split("##")[0]
    named = set(re.findall(r"`(\w+)(?::\w+)?`", recipes))
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} <= named
    for path in re.findall(r"`((?:colab|tests|configs)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


def test_two_commands_and_no_more():
    assert re.findall(r"<!-- command: (\w+) -->\n```bash\n.+\n```", README) == ["run", "test"]
