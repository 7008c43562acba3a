"""python -m benchmarks.downstream --data_dir=DIR --workdir=DIR --pretrained=RUN --set=NAME:test

Measures how much a pretrained encoder is worth on labelled sets, beside its baselines. Each method,
set, share of the labels and seed gives one row, which is appended to WORKDIR/rows.jsonl when it is
measured. A run that is started again skips the rows that exist. At the end it prints a table of
accuracies in per cent: mean and, after a slash, standard deviation of several seeds; or the 95 %
interval over the test clips of a single seed.

  fbank    mean and deviation over time of each mel band, a linear probe
  initial  the encoder at its initial values, a linear probe (linear) or neighbours (knn)
  frozen   the pretrained encoder, likewise
  scratch  the whole model fine-tuned from initial values
  tuned    the whole model fine-tuned from the pretrained values
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from maeast_jax.finetune import finetune
from maeast_jax.inference import pretrained

METHODS = (
    "fbank", "initial_linear", "initial_knn", "frozen_linear", "frozen_knn", "scratch", "tuned",
)  # fmt: skip


def configuration(method: str, options: argparse.Namespace, name: str, percent: float, seed: int):
    """Returns the configuration of one row, with the architecture of the pretrained model."""
    from configs.finetune_folder import get_config

    config = get_config()
    config.seed = seed
    data_set, _, tests = name.partition(":")
    config.data.update(
        dir=str(options.data_dir), train=data_set, valid=data_set, train_percent=percent,
        test=",".join(f"{data_set}@{split}" for split in (tests or "test").split("+")),
    )  # fmt: skip
    kind, _, mode = method.partition("_")
    config.mode = {"fbank": "linear", "scratch": "finetune", "tuned": "finetune"}.get(kind, mode)
    if kind == "fbank":
        config.features.source = "fbank"
    if kind in ("frozen", "tuned"):
        config.init_from = str(options.pretrained)
    else:
        model = pretrained.read(str(options.pretrained)).config.encoder_only()
        for field in model.architecture_fields:
            config.model[field] = getattr(model, field)
    # Runs with few labels take as many steps as with all, so that only the labels differ.
    config.total_steps = options.steps
    config.eval_every = 25
    return config


def measure(options: argparse.Namespace) -> list[dict]:
    """Measures the rows that WORKDIR/rows.jsonl lacks, and returns all rows."""
    path = options.workdir / "rows.jsonl"
    options.workdir.mkdir(parents=True, exist_ok=True)
    _check_same(options)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["method"], row["set"], row["percent"], row["seed"]) for row in rows}
    for percent in options.percents:
        for method in options.methods:
            # These methods draw no random numbers, so one seed is enough.
            is_fixed = percent == 100 and method in ("fbank", "frozen_linear", "frozen_knn")
            for seed in options.seeds[:1] if is_fixed else options.seeds:
                for name in options.set:
                    if (method, name, percent, seed) in done:
                        continue
                    start = time.monotonic()
                    config = configuration(method, options, name, percent, seed)
                    folder = f"{method}-{name.partition(':')[0]}-{percent:g}-{seed}"
                    found = finetune(config, options.workdir / folder)[""]
                    row = {
                        "method": method, "set": name, "percent": percent, "seed": seed,
                        "seconds": round(time.monotonic() - start, 1),
                        "accuracy": {k: [v.value, *v.interval] for k, v in found.items()},
                    }  # fmt: skip
                    rows.append(row)
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    return rows


def _check_same(options: argparse.Namespace) -> None:
    """Ends the program where the workdir holds rows of another encoder or number of steps."""
    path = options.workdir / "options.json"
    wanted = {"pretrained": str(options.pretrained), "steps": options.steps}
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise SystemExit(
            f"{options.workdir} holds rows of {path.read_text()}: choose another --workdir"
        )
    path.write_text(json.dumps(wanted))


def table(rows: list[dict]) -> str:
    """Returns a Markdown table: one row per method and share of labels, one column per test set."""
    columns = sorted({name for row in rows for name in row["accuracy"]})
    lines = [f"| method | labels | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for percent in sorted({row["percent"] for row in rows}, reverse=True):
        for method in METHODS:
            of_method = [r for r in rows if (r["method"], r["percent"]) == (method, percent)]
            if of_method:
                cells = " | ".join(_cell(of_method, column) for column in columns)
                lines.append(f"| {method} | {percent:g} % | {cells} |")
    return "\n".join(lines)


def _cell(rows: list[dict], column: str) -> str:
    values = [[100 * v for v in r["accuracy"][column]] for r in rows if column in r["accuracy"]]
    if not values:
        return ""
    if len(values) == 1:
        value, low, high = values[0]
        return f"{value:.1f} ({low:.1f} to {high:.1f})"
    accuracies = [value for value, _, _ in values]
    return f"{statistics.mean(accuracies):.1f} / {statistics.stdev(accuracies):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path, required=True, help="a run's workdir")
    parser.add_argument("--set", action="append", required=True, help="NAME:TESTSPLIT+TESTSPLIT")
    parser.add_argument("--methods", type=_list(str), default=METHODS)
    parser.add_argument("--percents", type=_list(float), default=(100.0, 10.0))
    parser.add_argument("--seeds", type=_list(int), default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=750, help="steps of fine-tuning")
    options = parser.parse_args()
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"--methods: {sorted(unknown)[0]!r} is unknown; known: {', '.join(METHODS)}")
    print(f"\n{table(measure(options))}")


def _list(kind):
    return lambda text: tuple(kind(part) for part in text.split(","))


if __name__ == "__main__":
    main()
