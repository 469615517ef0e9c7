"""Checks of ours that no third-party linter makes: import cycles, the environment, globals, pickle, sizes, names.

    python tools/boundaries.py [ROOT]

Reads the sources of ``packages/*/src`` as syntax trees, so it needs nothing installed and imports nothing.
Prints one line a violation, ``file:line: rule: what and why``, and exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Module", "Violation", "check", "read_modules"]

FORBIDDEN_NAMES = ("utils", "helpers", "common", "dataclasses")
"""A file is named by the noun it owns."""
MAX_LINES = 500
MAX_LINES_OF = {"accel.accelerator": 599}
MAX_FUNCTION_LINES = 60
ENVIRONMENT_OWNER = "accel_state.env"
GLOBAL_ALLOWED = ("accel_state.process", "_current")
FOR_TESTS = "accel_state.testing"
"""Module or package that may pickle: what ranks of a test say to the test, none of it stored."""
ON_THE_WIRE = ("accel_data.packing",)
"""Modules that pickle what one rank of a run sends another, as torch's collectives of objects do; none of it stored."""
WEIGHTS_ONLY = ("accel_parallel.checkpoint_commands.convert.foreign", "accel_bigmodel.loading.pickled")
"""Modules that read somebody else's pickles, by ``torch.load(..., weights_only=True)`` and in no other way."""
PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal")
ENVIRONMENT_FUNCTIONS = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")
TORCH_FREE = (
    "accel_state",
    "accel_state.config",
    "accel_state.env",
    "accel_state.errors",
    "accel_state.protocols",
    "accel_state.topology",
    "accel_launch",
    "accel_launch.cli",
)
"""Modules whose import must not load torch, directly or through another module of ours."""


@dataclass(frozen=True, order=True)
class Violation:
    """One line of the report."""

    file: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.message}"


@dataclass(frozen=True)
class Import:
    """One imported module, by its absolute name."""

    target: str
    line: int
    lazy: bool
    """Inside a function or under ``TYPE_CHECKING``: not executed when the module is imported."""


class Module:
    """One source file, parsed."""

    def __init__(self, name: str, path: Path, root: Path) -> None:
        self.name = name
        self.file = str(path.relative_to(root))
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text, filename=self.file)
        self.is_package = path.name == "__init__.py"

    def imports(self, known: frozenset[str]) -> list[Import]:
        """Every import of the file. ``from package import name`` is the module ``package.name`` where there is one."""
        found: list[Import] = []
        for node, lazy in _walk(self.tree, lazy=False):
            if isinstance(node, ast.Import):
                found += [Import(alias.name, node.lineno, lazy) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                for alias in node.names:
                    target = f"{base}.{alias.name}"
                    found.append(Import(target if target in known else base, node.lineno, lazy))
        return found

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*base, *([node.module] if node.module else [])])

    def violation(self, node: ast.AST | None, rule: str, message: str) -> Violation:
        """A violation at the line of `node`."""
        return Violation(self.file, getattr(node, "lineno", 1), rule, message)


def _walk(node: ast.AST, *, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for each in child.body:
                yield each, True
                yield from _walk(each, lazy=True)
            for each in child.orelse:
                yield each, lazy
                yield from _walk(each, lazy=lazy)
            continue
        yield child, lazy
        yield from _walk(child, lazy=lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def read_modules(root: Path) -> dict[str, Module]:
    """Every module of ``packages/*/src`` below `root`, by its import name."""
    modules = {}
    for source in sorted(root.glob("packages/*/src")):
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules[name] = Module(name, path, root)
    return modules


def check(root: Path) -> list[Violation]:
    """Every violation below `root`, in order of file and line."""
    modules = read_modules(root)
    found = [*_cycles(modules), *_loads_torch(modules), *_globals(modules)]
    for module in modules.values():
        found += [*_environment(module), *_pickle(module), *_broad_except(module), *_sizes(module), *_names(module)]
    return sorted(found)


def _graph(modules: dict[str, Module], *, lazy: bool) -> dict[str, dict[str, int]]:
    """Module → imported module of ours → line. A lazy re-export of a package's ``__init__`` is no arrow."""
    known = frozenset(modules)
    graph: dict[str, dict[str, int]] = {}
    for module in modules.values():
        edges: dict[str, int] = {}
        for each in module.imports(known):
            if each.target in known and each.target != module.name and (lazy or not each.lazy):
                if module.is_package and each.lazy:
                    continue
                edges.setdefault(each.target, each.line)
        graph[module.name] = edges
    return graph


def _cycles(modules: dict[str, Module]) -> Iterator[Violation]:
    """Imports under ``TYPE_CHECKING`` and inside functions count: they hide a cycle, they do not remove it."""
    graph = _graph(modules, lazy=True)
    for group in _strong_components(graph):
        if len(group) > 1:
            path = _shortest_cycle(graph, group)
            line = graph[path[0]][path[1]]
            yield Violation(modules[path[0]].file, line, "cycle", f"modules import one another: {' -> '.join(path)}")


def _strong_components(graph: dict[str, dict[str, int]]) -> list[list[str]]:
    """Tarjan's algorithm (SIAM J. Comput. 1972), with a stack of its own instead of recursion."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result: list[list[str]] = []
    for start in graph:
        if start in index:
            continue
        work = [(start, iter(graph[start]))]
        index[start] = low[start] = len(index)
        stack.append(start)
        while work:
            node, targets = work[-1]
            for target in targets:
                if target not in index:
                    index[target] = low[target] = len(index)
                    stack.append(target)
                    work.append((target, iter(graph[target])))
                    break
                if target in stack:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    cut = stack.index(node)
                    result.append(stack[cut:])
                    del stack[cut:]
    return result


def _shortest_cycle(graph: dict[str, dict[str, int]], group: list[str]) -> list[str]:
    start = min(group)
    paths = [[start]]
    seen = {start}
    while paths:
        path = paths.pop(0)
        for target in graph[path[-1]]:
            if target == start:
                return [*path, start]
            if target in group and target not in seen:
                seen.add(target)
                paths.append([*path, target])
    raise AssertionError("a strongly connected group holds a cycle through each of its members")


def _loads_torch(modules: dict[str, Module]) -> Iterator[Violation]:
    graph = _graph(modules, lazy=False)
    known = frozenset(modules)
    for start in TORCH_FREE:
        if start not in modules:
            continue
        paths = [[start]]
        seen = {start}
        while paths:
            path = paths.pop()
            module = modules[path[-1]]
            for each in module.imports(known):
                if not each.lazy and each.target.split(".")[0] == "torch":
                    chain = " -> ".join([*path, each.target])
                    yield Violation(module.file, each.line, "torch-free", f"importing {start} loads torch: {chain}")
            # Importing a module runs the packages it lies in first.
            parents = [".".join(path[-1].split(".")[:n]) for n in range(1, path[-1].count(".") + 1)]
            for target in [*graph[path[-1]], *parents]:
                if target not in seen and target in modules:
                    seen.add(target)
                    paths.append([*path, target])


def _globals(modules: dict[str, Module]) -> Iterator[Violation]:
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                for name in node.names:
                    if (module.name, name) != GLOBAL_ALLOWED:
                        owner = ".".join(GLOBAL_ALLOWED)
                        yield module.violation(
                            node, "global", f"`global {name}`: the only module-level variable is {owner}"
                        )


def _environment(module: Module) -> Iterator[Violation]:
    if module.name == ENVIRONMENT_OWNER:
        return
    for node in ast.walk(module.tree):
        name = ""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            name = node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            name = next((alias.name for alias in node.names if alias.name in ENVIRONMENT_FUNCTIONS), "")
        if name in ENVIRONMENT_FUNCTIONS:
            message = f"`os.{name}`: only {ENVIRONMENT_OWNER} touches the environment"
            yield module.violation(node, "environment", message)


def _is_for_tests(module: Module) -> bool:
    return f"{module.name}.".startswith(f"{FOR_TESTS}.")


def _pickle(module: Module) -> Iterator[Violation]:
    if _is_for_tests(module) or module.name in ON_THE_WIRE:
        return
    allowed = _restricted(module) if module.name in WEIGHTS_ONLY else set()
    for node in ast.walk(module.tree):
        if node in allowed:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "torch":
                names += [f"torch.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            names = [f"torch.{node.attr}"]
        else:
            continue
        for name in names:
            if name.split(".")[0] in PICKLES or name in ("torch.load", "torch.save"):
                yield module.violation(node, "pickle", f"`{name}` runs or writes pickle; nothing that is stored may")


def _restricted(module: Module) -> set[ast.AST]:
    """Each ``torch.load`` that is told, word for word, to read weights only; and the import of its error."""
    found: set[ast.AST] = set()
    for node in ast.walk(module.tree):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "torch.load"
            and any(
                each.arg == "weights_only" and isinstance(each.value, ast.Constant) and each.value.value is True
                for each in node.keywords
            )
        ):
            found.add(node.func)
        if isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] == ["UnpicklingError"]:
            found.add(node)
    return found


def _broad_except(module: Module) -> Iterator[Violation]:
    """A handler of everything that neither raises, keeps the error to be raised, nor ends the process hides it."""
    if _is_for_tests(module):
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.id if isinstance(node.type, ast.Name) else ""
            broad = node.type is None or caught in ("Exception", "BaseException")
            if broad and not any(_ends(each) or _keeps(each, node.name) for each in ast.walk(node)):
                yield module.violation(node, "broad-except", "catches everything and raises nothing: name the errors")


def _ends(node: ast.AST) -> bool:
    """Whether this raises, or ends the process by ``os._exit``, as the body of a forked child does."""
    if isinstance(node, ast.Raise):
        return True
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_exit"


def _keeps(node: ast.AST, error: str | None) -> bool:
    """Whether this returns or assigns the error itself, for somebody who raises it later."""
    if error is None or not isinstance(node, (ast.Return, ast.Assign)) or node.value is None:
        return False
    values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
    return any(isinstance(each, ast.Name) and each.id == error for each in values)


def _sizes(module: Module) -> Iterator[Violation]:
    lines = module.text.count("\n")
    limit = MAX_LINES_OF.get(module.name, MAX_LINES)
    if lines > limit:
        yield module.violation(None, "size", f"{lines} lines, at most {limit}: split it by the nouns it owns")
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = _body_lines(node)
            if length > MAX_FUNCTION_LINES:
                message = f"`{node.name}` has {length} lines without its docstring, at most {MAX_FUNCTION_LINES}"
                yield module.violation(node, "size", message)


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function after its signature and its docstring."""
    body = node.body
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        body = body[1:]
    if not body:
        return 0
    return (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1


def _names(module: Module) -> Iterator[Violation]:
    name = module.name.split(".")[-1].lstrip("_")
    if name in FORBIDDEN_NAMES:
        yield module.violation(None, "name", f"a file called {name}.py owns everything: name it by what it owns")


def main() -> int:
    """Print the violations; 1 if there are any."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    violations = check(root)
    for each in violations:
        print(each)
    modules = read_modules(root)
    print(f"boundaries: {len(modules)} modules, {len(violations)} violation(s)")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
