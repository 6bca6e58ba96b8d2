"""Print the results of pytest-benchmark as a table: python benchmarks/table.py results.json."""

import json
import sys
from typing import Any


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Return one row per benchmark: name, median, spread, and all that it noted."""
    found = []
    for entry in results["benchmarks"]:
        stats = entry["stats"]
        notes = {key: value for key, value in entry["extra_info"].items() if key != "device"}
        found.append([
            entry["name"].removeprefix("test_"),
            f"{stats['median'] * 1e3:.3f}",
            f"{stats['iqr'] * 1e3:.3f}",
            ", ".join(f"{key} {value}" for key, value in notes.items()),
        ])  # fmt: skip
    return found


def main() -> None:
    """Print the table of each file named on the command line."""
    for path in sys.argv[1:]:
        with open(path) as file:
            results = json.load(file)
        devices = {entry["extra_info"].get("device") for entry in results["benchmarks"]}
        print(f"{', '.join(sorted(filter(None, devices)))}; {results['datetime'][:10]}\n")
        print("| benchmark | median ms | IQR ms | beside it |\n|---|---|---|---|")
        for row in rows(results):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
