"""How large a folder, a file and a function of the product may be."""

import ast
from collections import Counter
from pathlib import Path

from tests.project.test_import_rules import modules

MAX_FILES_IN_FOLDER = 20
MAX_LINES_IN_FILE = 400
MAX_LINES_IN_FUNCTION = 60


def test_no_folder_has_more_files_than_a_screen_shows() -> None:
    num_files = Counter(path.parent for path in modules().values())
    assert {str(folder): count for folder, count in num_files.items() if count > MAX_FILES_IN_FOLDER} == {}


def test_no_file_is_longer_than_one_sitting() -> None:
    num_lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in num_lines.items() if count > MAX_LINES_IN_FILE} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    long = {
        f"{name}.{function.name}": num_lines
        for name, path in modules().items()
        for function in functions_in(path)
        if (num_lines := (function.end_lineno or 0) - function.lineno + 1) > MAX_LINES_IN_FUNCTION
    }
    assert long == {}


def functions_in(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text("utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
