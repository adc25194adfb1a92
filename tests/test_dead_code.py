"""No dead code: every name of the package is used, and every optional argument is given, somewhere besides its definition."""

import ast
from collections import Counter, defaultdict

import deq_flax
from deq_flax import equilibrium
from tests.commands import ROOT

TREES = {
    path: ast.parse(path.read_text()) for room in ("deq_flax", "configs", "benchmarks") for path in (ROOT / room).rglob("*.py")
}
TESTS = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py")]
PACKAGE = {path: tree for path, tree in TREES.items() if path.is_relative_to(ROOT / "deq_flax")}
EXPORTED = {*deq_flax.__all__, *equilibrium.__all__}
READ_BY_NAME = {"fsdp", "unused"}
"""Fields of dataclasses that are read by `getattr` or `asdict`."""
CALLED_BY_LIBRARIES = {"find_class", "persistent_load", "should_preserve"}
"""Methods of pickle and Orbax that classes of the package override."""
CALLED_BY_TABLE = {"ClassificationTask", "LanguageTask", "ReasoningTask", "SegmentationTask"}
"""Classes that are called as entries of a table."""


def used(tree):
    """How often each name is read, as a variable or an attribute."""
    found = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found[node.attr] += 1
    return found


def definitions(tree):
    """(name, node) of functions, classes, constants, methods and attributes, but for those of exported classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((name.id, node) for target in targets for name in ast.walk(target) if is_new(name))
        if isinstance(node, ast.ClassDef) and node.name not in EXPORTED:
            yield from definitions(node)
            stored = (x for x in ast.walk(node) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store))
            yield from ((x.attr, x) for x in stored if called_name(x.value) == "self")


def is_new(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def test_every_name_is_used():
    everywhere = sum(map(used, TREES.values()), Counter())
    for path, tree in PACKAGE.items():
        for name, node in definitions(tree):
            if not (name.startswith("_") or name in EXPORTED | READ_BY_NAME | CALLED_BY_LIBRARIES):
                assert everywhere[name] > used(node)[name], f"{path}:{node.lineno}: {name} is not used"


def called_name(function):
    """The name of a function, without the object or module that it belongs to."""
    return getattr(function, "id", getattr(function, "attr", None))


def calls(tree):
    """(name of the function, call) of every call; `cls` in a class means the class."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    own = {call: node.name for node in classes for call in ast.walk(node) if called_name(getattr(call, "func", None)) == "cls"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        # A conditional expression may choose the function.
        chosen = [call.func.body, call.func.orelse] if isinstance(call.func, ast.IfExp) else [call.func]
        yield from ((own.get(call) or called_name(function), call) for function in chosen)


def given(trees):
    """The keywords that calls of each name give, and the most positional arguments."""
    keywords, positions = defaultdict(set), Counter()
    for name, call in (pair for tree in trees for pair in calls(tree)):
        arguments = call.args
        if name == "partial":
            name, arguments = called_name(arguments[0]), arguments[1:]
        keywords[name] |= {keyword.arg for keyword in call.keywords}
        # * and ** may hold any argument.
        many = 99 if any(isinstance(argument, ast.Starred) for argument in arguments) else len(arguments)
        positions[name] = max(positions[name], many)
    return keywords, positions


def test_every_optional_argument_is_given_by_some_call():
    """By one in the tests only where it is of a public name, whose callers are elsewhere."""
    ours, anyones = given(TREES.values()), given((*TREES.values(), *TESTS))
    for path, tree in PACKAGE.items():
        for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.Module)):
            for function in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
                name = owner.name if function.name == "__init__" else function.name
                if name.startswith("_") or name in CALLED_BY_TABLE:
                    continue
                keywords, positions = anyones if {name, getattr(owner, "name", "")} & EXPORTED else ours
                start, arguments = isinstance(owner, ast.ClassDef), function.args.posonlyargs + function.args.args
                optional = list(enumerate(arguments))[len(arguments) - len(function.args.defaults) :]
                named = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
                optional += [(99, argument) for argument, default in named if default]
                for place, argument in optional:
                    found = argument.arg in keywords[name] or None in keywords[name] or place - start < positions[name]
                    assert found, f"{path}:{function.lineno}: no call of {name} gives {argument.arg}"
