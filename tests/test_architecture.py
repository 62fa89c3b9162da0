"""The boundaries between the parts of the package, and its size and tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "wsp_compiler"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth, names from packages included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported_packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_the_helpers_see_imports(tmp_path: Path) -> None:
    """A checker that finds nothing would pass every test below."""
    file = tmp_path / "a.py"
    file.write_text("import tvm.tir\ndef f():\n    from torch import fx, nn\n    import tvm_ffi as t\n")
    assert imports(file) == {"tvm.tir", "torch", "torch.fx", "torch.nn", "tvm_ffi"}
    assert imported_packages(file) == {"tvm", "torch", "tvm_ffi"}
    assert len(SOURCES) > 30


def test_only_passes_edit_graphs() -> None:
    edit = re.compile(
        r"\.(erase_node|inserting_before|inserting_after|call_function|call_module|call_method)\("
    )
    allowed = {"wsp_compiler/runtime.py", "wsp_compiler/trace.py"}
    offenders = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in SOURCES
        if "passes" not in path.parts and name_of(path) not in allowed
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if edit.search(line)
    ]
    assert not offenders, "\n".join(offenders)


def test_only_codegen_and_the_runtime_import_tvm() -> None:
    offenders = [
        name_of(path)
        for path in SOURCES
        if imported_packages(path) & {"tvm", "tvm_ffi", "tvm_ffi_orcjit"}
        and "codegen" not in path.parts
        and name_of(path) != "wsp_compiler/runtime.py"
    ]
    assert not offenders


def test_what_comes_before_code_generation_does_not_know_it() -> None:
    """Nor through others, tvm: find_sites and plans work without it."""
    may = {f"wsp_compiler/{name}.py" for name in ("api", "runtime", "speedup", "__init__", "__main__")}
    offenders = [
        name_of(path)
        for path in SOURCES
        if "codegen" not in path.parts and name_of(path) not in may
        if any(name.startswith(("wsp_compiler.codegen", "wsp_compiler.runtime")) for name in imports(path))
    ]
    assert not offenders


def test_pruning_knows_tensors_and_not_graphs() -> None:
    for path in sorted((PACKAGE / "pruning").glob("*.py")):
        known = {name for name in imports(path) if name.startswith("wsp_compiler")}
        allowed = ("wsp_compiler.pruning", "wsp_compiler.winograd.")
        assert all(f"{name}.".startswith(allowed) for name in known), name_of(path)
        assert not any(name.startswith("torch.fx") for name in imports(path)), name_of(path)


def test_only_the_plan_decides() -> None:
    """Patterns and criteria are applied in plan.py alone."""
    users = [
        name_of(path)
        for path in SOURCES
        if {"wsp_compiler.pruning", "wsp_compiler.pruning.PATTERNS"} & imports(path)
    ]
    assert users == ["wsp_compiler/plan.py"]


STAGES = ("clone", "units", "trace", "sites", "plan", "passes", "runtime", "api")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_earlier_ones_only(stage: str) -> None:
    later = {f"wsp_compiler.{name}" for name in STAGES[STAGES.index(stage) + 1 :]}
    files = [PACKAGE / f"{stage}.py"] if stage != "passes" else sorted((PACKAGE / stage).glob("*.py"))
    for path in files:
        assert not imports(path) & later, name_of(path)


def test_filters_leave_between_plan_and_passes() -> None:
    later = ("wsp_compiler.passes", "wsp_compiler.codegen", "wsp_compiler.runtime", "wsp_compiler.api")
    files = sorted((PACKAGE / "filters").glob("*.py"))
    assert len(files) > 5
    for path in files:
        assert not any(name.startswith(later) for name in imports(path)), name_of(path)
    for early in ("plan", "trace", "sites", "site_plan"):
        assert not any("filters" in name for name in imports(PACKAGE / f"{early}.py"))


def test_every_file_has_its_tests() -> None:
    missing: list[str] = []
    for path in SOURCES:
        relative = path.relative_to(PACKAGE)
        if path.name in ("__init__.py", "base.py"):
            continue
        test = ROOT / "tests" / relative.parent / f"test_{relative.name}"
        if not test.is_file():
            missing.append(f"{name_of(path)} needs {name_of(test)}")
    assert not missing, "\n".join(missing)


def test_no_file_is_long() -> None:
    folders = ("wsp_compiler", "benchmarks", "examples")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_a_pass_is_one_file_with_one_class_of_its_name() -> None:
    for path in sorted((PACKAGE / "passes").glob("*.py")):
        if path.stem in ("__init__", "base", "layout_cut", "pipeline"):
            continue
        classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        passes = [
            node.name for node in classes if any(ast.unparse(base) == "PassBase" for base in node.bases)
        ]
        assert passes == ["".join(word.capitalize() for word in path.stem.split("_"))], name_of(path)


def test_errors_are_the_packages_own() -> None:
    """User-facing modules raise WspError subclasses; bare exceptions are for protocols and for fx."""
    allowed = {"TypeError", "ValueError", "KeyError", "AttributeError", "NotImplementedError"}
    pattern = re.compile(r"raise (\w*(?:Error|Exception))\(")
    for path in SOURCES:
        for error in pattern.findall(path.read_text(encoding="utf-8")):
            own = f"class {error}(" in (PACKAGE / "errors.py").read_text(encoding="utf-8")
            assert own or error in allowed, f"{name_of(path)} raises {error}"
