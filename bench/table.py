"""Markdown tables of the benchmarks' JSON lines: ``python -m bench.table FILE...``, or from standard input.

Other lines are skipped, so that the input can be a log. ``--into docs/design/benchmarks.md`` puts each table between
the comments ``<!-- table: NAME -->`` and ``<!-- end -->`` of that file; other tables stay as they are.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """Title of a column and the value of its cells; empty for lines without the value."""

    title: str
    key: str
    show: Callable[[Any], str] = str


def size(count: float) -> str:
    """Return a number of bytes in a suitable unit: 40 kB, 1.2 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count:.0f} GB"


def duration(seconds: float) -> str:
    """Return a duration, in milliseconds below one second."""
    return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def fixed(digits: int) -> Callable[[float], str]:
    """Return a format with this number of decimals."""
    return lambda value: f"{value:.{digits}f}"


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{share:.2%}".replace("%", " %")


def megabytes(count: float) -> str:
    """Return a number of megabytes as a size."""
    return f"{count:.0f} MB"


def of_a_core(value: float) -> str:
    """Return percent of one core."""
    return f"{value:.1f} %"


def percentages(shares: Iterable[float]) -> str:
    """Return several percentages without the percent sign."""
    return " ".join(f"{share * 100:.2f}" for share in shares)


def points(share: float) -> str:
    """Return a difference of percentages."""
    return f"{share * 100:.2f} points"


def bits(count: int) -> str:
    """Return the size of an integer."""
    return f"{count} bits"


def yes(fact: bool) -> str:
    """Return ``yes``, or nothing."""
    return "yes" if fact else ""


def kept(share: float) -> str:
    """Return the share of coordinates that travel; 0 means all."""
    return percent(share or 1.0)


def assignments(parameters: Mapping[str, str]) -> str:
    """Return the parameters of a strategy."""
    return ", ".join(f"{name} {value}" for name, value in parameters.items()) or "defaults"


_MODEL = Column("model", "model_bytes", size)
_CLIENTS = Column("clients", "clients")
_ACCURACY = (Column("accuracy", "accuracy", percent), Column("each seed", "accuracies", percentages))

TABLES: Mapping[str, tuple[str, tuple[Column, ...]]] = {
    "rounds": (
        "Whole no-op rounds",
        (
            _CLIENTS,
            _MODEL,
            Column("Isthmus", "round_seconds", duration),
            Column("bare gRPC", "bare_grpc_seconds", duration),
            Column("bare TCP", "tcp_seconds", duration),
            Column("times bare gRPC", "times_bare_grpc", fixed(2)),
            Column("of its rate", "of_bare_grpc_rate", fixed(2)),
            Column("of which checkpoint", "checkpoint_seconds", duration),
            Column("aggregator's peak", "aggregator_peak_bytes", size),
        ),
    ),
    "wire": (
        "One client's pull and push",
        (
            _MODEL,
            Column("pull, GB/s", "pull_GBps", fixed(2)),
            Column("times bare gRPC's time", "pull_times_bare_grpc", fixed(2)),
            Column("times TCP's", "pull_times_tcp", fixed(2)),
            Column("push, GB/s", "push_GBps", fixed(2)),
            Column("times bare gRPC's time", "push_times_bare_grpc", fixed(2)),
            Column("times TCP's", "push_times_tcp", fixed(2)),
        ),
    ),
    "aggregation": (
        "Aggregation alone",
        (
            Column("strategy", "strategy"),
            _MODEL,
            Column("accept, GB/s", "accept_GBps", fixed(2)),
            Column("torch's add, GB/s", "add_GBps", fixed(2)),
            Column("of its rate", "of_add_rate", fixed(2)),
            Column("finish", "finish_seconds", duration),
        ),
    ),
    "secure_accuracy": (
        "Accuracy under secure aggregation",
        (
            Column("strategy", "strategy"),
            Column("ring", "ring", bits),
            Column("rotation", "rotation", yes),
            Column("kept", "keep", kept),
            Column("whole jobs", "processes", yes),
            Column("without", "plain_accuracies", percentages),
            Column("with", "accuracies", percentages),
            Column("largest difference", "largest_difference", points),
        ),
    ),
    "memory": (
        "The aggregator's peak memory",
        (
            _CLIENTS,
            _MODEL,
            Column("peak", "aggregator_peak_bytes", size),
            Column("models", "of_models", fixed(2)),
            Column("of the peak with fewest clients", "of_fewest_clients", fixed(3)),
            Column("bound: 2.5 models + 400 MB", "bound_bytes", size),
            Column("of the bound", "of_bound", fixed(2)),
        ),
    ),
    "client_memory": (
        "The client library's peak memory, beyond the script's own",
        (
            Column("upload", "upload"),
            _MODEL,
            Column("beyond", "beyond_own_bytes", size),
            Column("models", "of_models", fixed(2)),
            Column("of the bound: 2 models", "of_bound", fixed(2)),
        ),
    ),
    "codecs": (
        "Codecs: bytes and speed",
        (
            Column("chain", "chain"),
            Column("bytes per parameter", "bytes_per_parameter", fixed(3)),
            Column("stated", "stated", fixed(3)),
            Column("encode, GB/s", "encode_GBps", fixed(2)),
            Column("decode, GB/s", "decode_GBps", fixed(2)),
        ),
    ),
    "codec_accuracy": (
        "Codecs: accuracy",
        (
            Column("upload", "chain"),
            Column("download", "download"),
            Column("bytes of an update", "upload_bytes", "{:,}".format),
            Column("of raw", "of_raw", fixed(3)),
            *_ACCURACY,
        ),
    ),
    "privacy": (
        "Differential privacy",
        (
            _CLIENTS,
            Column("noise multiplier", "noise_multiplier", "{:g}".format),
            Column("noise of", "noise"),
            Column("epsilon", "epsilon", "{:.2f}".format),
            Column("accuracy", "accuracy", percent),
            Column("clipped updates", "clipped", percent),
            Column("last clipping norm", "last_clip_norm", "{:.2f}".format),
        ),
    ),
    "secure": (
        "Secure rounds beside plain ones",
        (
            _CLIENTS,
            _MODEL,
            Column("dropouts", "dropouts", percent),
            Column("training", "training_seconds", duration),
            Column("plain", "plain_seconds", duration),
            Column("secure", "secure_seconds", duration),
            Column("times plain", "times_plain", fixed(2)),
            Column("bound", "bound", fixed(1)),
            Column("plain, processor", "plain_processor_seconds", duration),
            Column("secure, processor", "secure_processor_seconds", duration),
            Column("aggregator's peak", "aggregator_peak_bytes", size),
            Column("of the bound", "of_memory_bound", fixed(2)),
            Column("client's peak", "client_peak_bytes", size),
            Column("plain client's", "plain_client_peak_bytes", size),
        ),
    ),
    "secure_parts": (
        "Parts of a secure round, in processor time",
        (
            _CLIENTS,
            _MODEL,
            Column("dropouts", "dropouts"),
            Column("neighbours", "neighbours"),
            Column("one client: protocol", "client_protocol_seconds", duration),
            Column("rounding", "quantise_seconds", duration),
            Column("masks", "mask_seconds", duration),
            Column("opening", "client_open_seconds", duration),
            Column("aggregator: protocol", "server_protocol_seconds", duration),
            Column("recovery of secrets", "recover_seconds", duration),
            Column("masks to remove", "masks_removed"),
            Column("removal", "unmask_seconds", duration),
        ),
    ),
    "soak": (
        "A job among hostile clients",
        (
            _CLIENTS,
            Column("hostile", "hostile"),
            Column("rounds", "rounds"),
            Column("attacks", "attacks", "{:,}".format),
            Column("a round", "round_seconds", duration),
            Column("alone", "alone_seconds", duration),
            Column("times alone", "times_alone", fixed(2)),
            Column("aggregator's peak", "aggregator_peak_bytes", size),
            Column("alone", "alone_peak_bytes", size),
            Column("log", "log_bytes", size),
            Column("largest difference of a weight", "difference", "{:g}".format),
        ),
    ),
    "strategies": (
        "Strategies",
        (
            Column("strategy", "strategy"),
            Column("parameters", "parameters", assignments),
            *_ACCURACY,
            Column("after the last round", "final_accuracy", percent),
        ),
    ),
    "operator_scale": (
        "The operator: one large job beside the same pods without an operator",
        (
            _CLIENTS,
            Column("created", "created_s", duration),
            Column("scheduled", "scheduled_s", duration),
            Column("all run", "running_s", duration),
            Column("the status says so", "status_says_so_s", duration),
            Column("without: created", "bare_created_s", duration),
            Column("without: all run", "bare_running_s", duration),
            Column("times as long", "times_bare", fixed(2)),
            Column("writes a client", "writes_per_client", fixed(2)),
            Column("reads a client", "reads_per_client", fixed(2)),
            Column("peak memory", "peak_memory_mb", megabytes),
            Column("CPU when idle", "steady_cpu_percent", of_a_core),
            Column("requests a second when idle", "steady_requests_per_s", fixed(2)),
        ),
    ),
    "operator_idle": (
        "The operator: many idle jobs",
        (
            Column("jobs", "jobs"),
            Column("peak memory", "peak_memory_mb", megabytes),
            Column("CPU when idle", "steady_cpu_percent", of_a_core),
            Column("requests a second when idle", "steady_requests_per_s", fixed(2)),
            Column("restarted: ready after", "restart_ready_s", duration),
            Column("all jobs looked at after", "restart_all_looked_at_s", duration),
            Column("memory then", "restarted_peak_memory_mb", megabytes),
            Column("CPU when idle then", "restarted_steady_cpu_percent", of_a_core),
        ),
    ),
    "operator_soak": (
        "The operator: short jobs one after the other",
        (
            Column("jobs", "jobs"),
            Column("minutes", "minutes", fixed(0)),
            Column("memory after the first wave", "after_first_mb", megabytes),
            Column("after a third", "warm_mb", megabytes),
            Column("at the end", "last_mb", megabytes),
            Column("growth a job", "kb_per_job", "{:.1f} kB".format),
            Column("tasks", "tasks_last"),
            Column("threads", "threads_last"),
            Column("open files", "files_last"),
        ),
    ),
    "peers": (
        "No-op rounds of others, in the same run",
        (
            Column("system", "system"),
            _CLIENTS,
            _MODEL,
            Column("round", "round_seconds", duration),
            Column("times Isthmus", "times_isthmus", fixed(1)),
            Column("server's peak", "server_peak_bytes", size),
            Column("note", "note"),
        ),
    ),
}


def read(lines: Iterable[str]) -> list[Line]:
    """Return the lines of benchmarks among other lines."""
    found: list[Line] = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("bench") in TABLES:
            found.append(value)
    return found


def tables(lines: Iterable[Line]) -> str:
    """Return a table for each benchmark, in the order of :data:`TABLES`, without empty columns."""
    parts = []
    lines = list(lines)
    for name, (title, columns) in TABLES.items():
        if rows := [line for line in lines if line["bench"] == name]:
            parts.append(f"### {title}\n\n{_table(columns, rows)}")
    return "\n\n".join(parts)


def _table(columns: Iterable[Column], rows: list[Line]) -> str:
    filled = [column for column in columns if any(column.key in row for row in rows)]
    cells = [[column.show(row[column.key]) if column.key in row else "" for column in filled] for row in rows]
    titles = [column.title for column in filled]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *cells))


def filled_in(text: str, lines: Iterable[Line]) -> str:
    """Return the document with the tables of these lines in their places. Tables without a place are left out."""
    by_name: dict[str, list[Line]] = {}
    for line in lines:
        by_name.setdefault(line["bench"], []).append(line)
    for name, rows in by_name.items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        table = _table(TABLES[name][1], rows)
        text = place.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Parse the command line and print the tables, or insert them into a document."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--into", type=Path, metavar="DOCUMENT")
    options = parser.parse_args()
    texts = [file.read_text(encoding="utf-8") for file in options.files] or [sys.stdin.read()]
    lines = read(line for text in texts for line in text.splitlines())
    if options.into is None:
        print(tables(lines))
    else:
        options.into.write_text(filled_in(options.into.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main()
