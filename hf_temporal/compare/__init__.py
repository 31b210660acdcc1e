"""Comparisons of several p over several seeds: the grid, its runs, the statistics, the report."""

from importlib.util import find_spec

for _module, _extra in {"scipy": "memory", "matplotlib": "plots"}.items():
    if find_spec(_module) is None:
        raise ModuleNotFoundError(f"A comparison needs {_module}: pip install 'hf-temporal[{_extra}]'")
