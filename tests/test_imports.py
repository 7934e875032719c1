"""Who may import whom: floors of the house, no cycles, models without TensorFlow."""

import ast
import subprocess
import sys
from pathlib import Path

import vit_jax

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vit_jax"

# Lowest first. A module may import from lower floors, and from its own room.
FLOORS = [
    {"version", "errors", "types"},
    {"plugins", "storage"},
    {"config", "parallel"},
    {"models", "optim", "tracking"},
    {"augment", "checkpoints"},
    {"data"},
    {"report", "recipes"},
    {"tasks", "attention"},
    {"training"},
    {"inference", "planning", "bench", "launch"},
    {"cli"},
    {"__main__"},
]


def room(module):
    """`vit_jax.data.sources.tfds` → `data`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path):
    """Modules of ours that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("vit_jax."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vit_jax"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_module(inner) else node.module


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files():
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def test_every_file_has_a_floor():
    known = set.union(*FLOORS)
    assert {room(module_name(path)) for path in files()} - known == set()


def test_imports_go_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in files()
        for target in imports(path)
        if room(target) != room(module_name(path))
        and floor[room(target)] >= floor[room(module_name(path))]
        and (room(module_name(path)), room(target)) not in SAME_FLOOR
    ]
    assert wrong == []


# Rooms of one floor that may lean on another, in this direction only.
SAME_FLOOR = {("attention", "tasks")}


def test_no_cycles_between_modules():
    modules = {module_name(path): path for path in files()}
    graph = {
        name: {target for target in imports(path) if target in modules and target != name}
        for name, path in modules.items()
    }
    done = set()

    def visit(name, above):
        assert name not in above, " → ".join([*above, name])
        if name not in done:
            for target in graph[name]:
                visit(target, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_helpers_of_tests_do_not_hide_one_another():
    """The folders of several lie on `sys.path` together, so that the first of a name wins."""
    helpers = [
        path.name
        for path in Path(__file__).parent.rglob("*.py")
        if not path.name.startswith(("test_", "__init__", "conftest"))
    ]
    assert sorted(helpers) == sorted(set(helpers))


def test_only_data_imports_tensorflow():
    for path in files():
        if room(module_name(path)) == "data":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0].startswith("tensorflow") for name in names), path


def test_imports_load_what_they_need():
    """Importing the package loads nothing; training on arrays, with plug-ins, no TensorFlow."""
    code = (
        "import sys, vit_jax\n"
        "print([name for name in ('jax', 'flax', 'numpy', 'tensorflow') if name in sys.modules])\n"
        "print('Predictor' in dir(vit_jax))\n"
        "import vit_jax.models, vit_jax.training.loop\n"
        "print('matplotlib' in sys.modules)\n"
        "print(vit_jax.Predictor.from_workdir.__qualname__)\n"
        "vit_jax.models.build('vit_ti16', num_classes=10)\n"
        "sys.path.append('tests')\n"
        "import own_plugins\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'tensorflow'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines() == ["[]", "True", "False", "Predictor.from_workdir", "[]"]


def test_the_names_at_the_top_are_declared_once():
    assert sorted([*vit_jax._SUBMODULES, *vit_jax._HOMES]) == vit_jax.__all__
