"""The house stands: imports go downward or sideways, without circles, at whatever line they are; heavy dependencies have one home."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [  # the first part of a module's name below `bigflax`, floor by floor
    "trees weights losses chips flops hlo topology checksum stored tensors yardsticks",
    "ops sharding pipeline hosts xla optim metrics scores writers curves",
    "nn data checkpoint peft compress",
    "models hub packed gguf parity train tasks generate explain export planner adversarial preference adapters",
    "main recipes runs exports taught chains steps summaries plans",
]
HOMES = {  # dependency -> where it may be imported
    "flax": ("bigflax/nn/", "bigflax/models/"),
    "grain": ("bigflax/data/",),
    "tensorflow_datasets": ("bigflax/data/",),
    "orbax": ("bigflax/checkpoint.py",),
    "absl": ("bigflax/main.py", "configs/", "bigflax/data/"),  # data: grain's worker processes want their flags parsed
    "ml_collections": ("bigflax/main.py", "bigflax/recipes.py", "bigflax/runs.py", "configs/"),
    "transformers": ("bigflax/parity.py",),
    "jinja2": ("bigflax/data/",),
    "gguf": ("bigflax/gguf.py",),
    "sacrebleu": ("bigflax/scores.py",),
    "rouge_score": ("bigflax/scores.py",),
    "tensorflow": (),
    "torch": ("bigflax/parity.py",),
}
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
FILES = {str(p.relative_to(ROOT)): p for top in ("bigflax", "configs") for p in sorted((ROOT / top).rglob("*.py"))}
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in FILES}


def imports(file):
    """Every module that a file imports, at module level or inside a function; `from a import b` is a.b where that is a module of ours."""
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively; write the whole name"
            yield from (f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names)


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("bigflax.")])
def test_imports_go_downward(module):
    floor = lambda name: FLOOR[name.split(".")[1]]
    assert module.split(".")[1] in FLOOR, f"give {module} a floor in FLOORS"
    upward = [name for name in imports(MODULES[module]) if name.startswith("bigflax.") and floor(name) > floor(module)]
    assert not upward, f"{module} is on floor {floor(module)} and imports from above: {upward}"


def test_no_circles():
    graphlib.TopologicalSorter({m: set(imports(f)) & MODULES.keys() - {m} for m, f in MODULES.items() if m != "bigflax"}).prepare()


@pytest.mark.parametrize("dependency", HOMES)
def test_one_home(dependency):
    users = {file for file in FILES if any(name.split(".")[0] == dependency for name in imports(file))}
    assert users == {file for file in users if file.startswith(HOMES[dependency])}


def test_importing_bigflax_starts_nothing():
    code = "import sys, bigflax; print(*sys.modules.keys() & {'jax', 'flax', 'numpy', 'grain', 'orbax', 'tokenizers', 'rich'})"
    shown = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout.strip()) == (0, ""), shown.stderr
