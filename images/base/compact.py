"""Reduction of an installed tree: removes test suites and headers, and compiles the rest for a quick start.

Byte code is not checked at start (`unchecked-hash`) and contains no time: equal sources give equal layers, and a
read-only root starts as fast as a writable one.
"""

import argparse
import compileall
import py_compile
import shutil
import sys
from pathlib import Path

# Paths below site-packages: tests and examples of libraries, and headers for C++ extensions.
# kubernetes/aio is a second client for asyncio, as large as the first.
UNUSED = ("torch/include", "torch/share", "torch/test", "kubernetes/aio")
TESTED = ("joblib", "networkx", "numpy", "scipy", "sklearn", "sympy")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tree", type=Path)
    parser.add_argument("--installed-as", help="where the tree will lie; its own place if not given")
    arguments = parser.parse_args()

    for packages in arguments.tree.glob("lib/python3*/site-packages"):
        for unused in UNUSED:
            shutil.rmtree(packages / unused, ignore_errors=True)
        for library in TESTED:
            for tests in sorted((packages / library).rglob("tests")):
                shutil.rmtree(tests, ignore_errors=True)
        # torch needs its shared-memory manager at import; the rest of torch/bin is tests.
        for program in (*packages.glob("torch/bin/*"), *packages.glob("torch/lib/*.a")):
            if program.is_file() and program.name != "torch_shm_manager":
                program.unlink()
    for cached in arguments.tree.rglob("__pycache__"):
        shutil.rmtree(cached)
    compiled = compileall.compile_dir(
        arguments.tree,
        maxlevels=50,
        stripdir=arguments.tree,
        prependdir=arguments.installed_as or arguments.tree,
        quiet=2,  # some libraries contain templates that are not valid Python
        workers=0,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    print(f"{arguments.tree} is compiled{'' if compiled else ', except for files that are no Python'}", file=sys.stderr)


if __name__ == "__main__":
    main()
