"""Every Triton kernel says what its arguments are and what a program owns."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(find_spec("fastplastic.kernels.gpu").origin).parent
KERNELS = {
    node.name: node
    for file in sorted(FOLDER.glob("*.py"))
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.FunctionDef) and "kernel" in map(ast.unparse, node.decorator_list)
}


def test_kernels_are_found():
    assert len(KERNELS) >= 8


@pytest.mark.parametrize("name", KERNELS)
def test_every_argument_is_explained(name):
    text = ast.get_docstring(KERNELS[name])
    assert "\nThis program owns " in text
    for argument in KERNELS[name].args.args:
        assert f"\n    {argument.arg}: " in text, argument.arg
