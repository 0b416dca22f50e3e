"""Settings travel whole: no function takes nine parameters or more, but the public face and the kernels' launches."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("ledits_min", "weights", "kernels")
PUBLIC = Path("ledits_min/pipeline.py")  # whose arguments are what people may say, each with its default
MOST = 8


def sources() -> list[Path]:
    """Once each: ledits_min/ links to the other two."""
    return sorted(
        {path.resolve().relative_to(ROOT.resolve()) for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    )


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Their names, without self and cls."""
    args = function.args
    every = [*args.posonlyargs, *args.args, *filter(None, [args.vararg]), *args.kwonlyargs, *filter(None, [args.kwarg])]
    return [one.arg for n, one in enumerate(every) if n or one.arg not in ("self", "cls")]


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Its arguments are pointers and strides."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_function_takes_nine_parameters() -> None:
    found = sources()
    assert PUBLIC in found and len(found) > 40
    offenders = []
    for path in found:
        for function in functions(ast.parse((ROOT / path).read_text())):
            excepted = path == PUBLIC or (path.parts[0] == "kernels" and is_kernel(function))
            if len(parameters(function)) > MOST and not excepted:
                offenders.append(f"{path}:{function.lineno} {function.name} takes {len(parameters(function))}")
    assert not offenders, "\n".join(offenders)


def test_parameters_are_counted() -> None:
    code = (
        "class A:\n def f(self, a, /, b, *c, d=1, **e): ...\n"
        "@triton.jit\ndef g(p_ptr): ...\n"
        "@triton.jit(x=1)\ndef h(): ...\n"
    )
    f, g, h = sorted(functions(ast.parse(code)), key=lambda one: one.name)
    assert parameters(f) == ["a", "b", "c", "d", "e"]
    assert not is_kernel(f) and is_kernel(g) and is_kernel(h)
