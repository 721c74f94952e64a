"""Tell TorchScript that only computes, as this package exports it, from TorchScript that could do anything else.

A traced model is straight-line code: operators on tensors, called one after the other. TorchScript as such also has
loops, and operators that read and write files. Its code lies in the archive as text that Python can parse, so it is
checked before torch opens the file, which can already run some of it.
"""

import ast
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

from dpm_cli.export.exported import EXTRA

MOST_CODE = 4 << 20  # bytes; a model of a thousand layers has a tenth of that
MOST_EXTRA = 4 << 20  # bytes of our metadata
MOST_TIMES, MOST_MORE = 2, 32 << 20  # what an archive may unpack to: times its size, plus bytes for its code
LARGEST_NUMBER = 1 << 26  # product of the numbers in one call, which may be the sizes of a tensor
WITHOUT_TENSORS = frozenset(  # operators that make tensors from numbers, or compute with sizes
    "Bool Float Int IntImplicit __and__ __contains__ __getitem__ __is__ __isnot__ __not__ __or__ add append arange "
    "ceil device dict div empty eq extend eye floor floordiv format full ge gt insert keys le len linspace list lt max "
    "mean min mul ne neg ones pow rand randn remainder round scalar_tensor slice sqrt str sub sum tensor truediv "
    "unbind update values zeros".split()
)
PLAIN_CALLS = frozenset("annotate bool float int isinstance list unchecked_cast uninitialized".split())
PRIMITIVES = frozenset("NumToTensor data device dtype layout is_cuda max min".split())  # called as ops.prim.NAME
STATEMENTS = (
    ast.Module, ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign, ast.Return, ast.Expr, ast.Pass,
    ast.arguments, ast.arg, ast.keyword, ast.Call, ast.Attribute, ast.Name, ast.Constant, ast.List, ast.Tuple, ast.Dict,
    ast.Subscript, ast.Slice, ast.UnaryOp, ast.USub, ast.Not, ast.Load, ast.Store, ast.BinOp, ast.operator,
    ast.Compare, ast.cmpop, ast.IfExp, ast.BoolOp, ast.boolop,
)  # fmt: skip


def find_excess(path: Path) -> str | None:
    """Say in one line why an archive unpacks to far more than its size; None if it does not."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MOST_TIMES * path.stat().st_size + MOST_MORE:
        return f"it unpacks to {unpacked:,} bytes"
    if any(entry.file_size > MOST_EXTRA for entry in entries if entry.filename.endswith(f"extra/{EXTRA}")):
        return f"its {EXTRA} is no metadata of this package"
    return None


def find_foreign(path: Path) -> str | None:
    """Say in one line what in a TorchScript archive this package does not write; None if there is nothing.

    Raises what zipfile raises for damaged archives.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        code = [entry for entry in entries if entry.filename.partition("/")[2].startswith("code/")]
        code = [entry for entry in code if not entry.filename.endswith(".debug_pkl")]
        if not any(entry.filename.endswith(f"extra/{EXTRA}") for entry in entries):
            return f"it has no {EXTRA}"
        if sum(entry.file_size for entry in code) > MOST_CODE:
            return "it holds too much code"
        try:
            for entry in code:
                _check_code(archive.read(entry).decode("ascii"))
            for entry in entries:
                if entry.filename.endswith(("/data.pkl", "/constants.pkl")):
                    _check_pickle(archive.read(entry))
        except _Foreign as error:
            return str(error)
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError, MemoryError):
            return "its code cannot be read"
    return None


class _Foreign(Exception):
    """Says what is not ours."""


def _check_code(text: str) -> None:
    # Where Python and TorchScript could read the same text in two ways.
    if re.search(r"""[\\#]|'''|\"""|[^\n\x20-\x7e]""", text):
        raise _Foreign("its code holds comments or characters that no export writes")
    if "torch.classes" in text:
        raise _Foreign("it holds classes of TorchScript's own")
    nodes = list(ast.walk(ast.parse(text)))
    parents = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if not isinstance(node, STATEMENTS):
            raise _Foreign(f"its code has a {type(node).__name__}")
        match node:
            case ast.FunctionDef(name=name) if not re.fullmatch(r"forward\d*", name):
                raise _Foreign(f"its code has a function {name[:40]}")
            case ast.Name(id="torch" | "ops") if id(node) not in parents:
                raise _Foreign("it gives another name to torch")
            case ast.Attribute(value=ast.Name(id="torch"), attr=name) if not _computes(name):
                raise _Foreign(f"it calls torch.{name[:40]}")
            case ast.Call(func=function, args=arguments):
                _check_call(function, arguments)
                if _product(node) > LARGEST_NUMBER:
                    raise _Foreign("it makes a huge tensor")
            case _:
                pass


def _check_call(function: ast.expr, arguments: Iterable[ast.expr]) -> None:
    match function:
        case ast.Attribute(value=ast.Name(id="torch")):
            pass  # its name is checked as an attribute
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="ops"), attr="prim"), attr=name) if name in PRIMITIVES:
            pass
        case ast.Attribute(attr=name) if re.fullmatch(r"forward\d*", name):
            pass
        case ast.Name(id=name) if name in PLAIN_CALLS:
            pass
        case ast.Name(id="getattr") if not any(_is_namespace(node) for each in arguments for node in ast.walk(each)):
            pass  # of a submodule whose name is a number
        case _:
            raise _Foreign(f"it calls {ast.unparse(function)[:60]}")


def _is_namespace(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "ops")


def _computes(name: str) -> bool:
    """Tell whether torch.NAME only computes: each of its forms takes a tensor, none a file."""
    if name in ("float32", "float16", "bool", "device"):
        return True
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    if any("file" in argument.name for schema in schemas for argument in schema.arguments):
        return False
    takes_tensors = any("Tensor" in str(argument.type) for schema in schemas for argument in schema.arguments)
    return bool(schemas) and (takes_tensors or name in WITHOUT_TENSORS)


def _product(call: ast.Call) -> int:
    product = 1
    for argument in call.args:
        for node in [argument, *getattr(argument, "elts", ())]:
            if isinstance(node, ast.Constant) and type(node.value) is int:
                product *= max(1, abs(node.value)) if abs(node.value) < 2**62 else 1  # 2**63 - 1: "to the end"
    return product


def _check_pickle(data: bytes) -> None:
    """Classes of TorchScript's own C++ may do anything when they are made."""
    for opcode, argument, _ in pickletools.genops(data):
        name = str(argument).replace(" ", ".")
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and "torch.classes" in name:
            raise _Foreign(f"it holds a {name[:80]}")
