"""What a person looks at after a run: a line, a table, curves."""

import pathlib
from collections.abc import Sequence

import numpy as np

from fedgalore_jax.folder import SUMMARY, write_json
from fedgalore_jax.forecast import Forecast
from fedgalore_jax.journal import Finished
from fedgalore_jax.progress import human
from fedgalore_jax.train import Result

Record = Result | Finished


def result_line(result: Record, out_dir: pathlib.Path) -> str:
    """A finished run in one line."""
    summary = result.summary
    final = ", ".join(f"{name} {value:.4f}" for name, value in summary["final"].items())
    return (
        f"{summary['method']}: test {final} after {summary['kept']['round']} rounds"
        f" (validation {summary['metric']} {summary['validation']['final']:.4f}); in {out_dir}"
    )


def compare(out: pathlib.Path, results: list[Record]) -> None:
    """Prints the comparison, best first, and writes `summary.json` and `curves.png` into `out`."""
    metric = results[0].summary["metric"]
    results = sorted(results, key=lambda r: -r.summary["final"][metric])
    titles = ("up", "down", "catch-up", "optimizer", "memory", "all", "gradients/step", "s/round")
    rows = [("method", metric, *titles)]
    for summary in (result.summary for result in results):
        wire = summary["bytes_per_client_and_round"]
        held = (summary["optimizer_bytes"], summary["client_memory_bytes"])
        sizes = (wire["up"], wire["down"], summary["catch_up_bytes_per_missed_round"], *held)
        rows.append(
            (
                summary["method"] + " *" * summary["personal"],
                f"{summary['final'][metric]:.4f}",
                *map(human, (*sizes, summary["bytes_total"])),
                f"{summary['gradients_per_step']:g}",
                f"{summary['seconds_per_round']:.3f}",
            )
        )
    print(f"\nTest {metric}; bytes of one client (up and down each round, for rounds missed, held), of all:")
    _table(rows)
    if any(result.summary["personal"] for result in results):
        print("* a model per client, each judged on its own share of the test split")
    curves(out, results)
    write_json(out / SUMMARY, {r.summary["method"]: r.summary for r in results})


def plans(forecasts: list[Forecast]) -> None:
    """Prints what runs would take, a row each."""
    titles = ("up", "down", "catch-up", "optimizer", "memory", "all", "gradients/step", "flop", "device")
    rows = [("method", *titles)]
    for method, wire, traffic, flops, memory in forecasts:
        sizes = (wire.up, wire.down, wire.catch_up, wire.optimizer, wire.memory, traffic)
        rows.append((method, *map(human, sizes), f"{wire.gradients:g}", f"{flops:.2e}", human(memory)))
    print("\nBytes of one client (up and down each round, for rounds missed, held), of all, on each device;")
    print("floating-point operations of a round:")
    _table(rows)


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *cells]))


def curves(out: pathlib.Path, results: list[Record]) -> None:
    """Draws the validation metric and the training loss over rounds into `out/curves.png`."""
    pyplot = _pyplot()
    metric = results[0].summary["metric"]
    columns = -(-len(results) // 15) if len(results) > 6 else 0  # of the legend, where it fits in no corner
    figure, axes = pyplot.subplots(1, 2, figsize=(10 + 1.5 * columns, 4), layout="constrained")
    colours = pyplot.get_cmap("tab10").colors
    for i, result in enumerate(results):
        style = {"color": colours[i % 10], "linestyle": ("-", "--", ":")[i // 10 % 3], "linewidth": 1.6}
        for axis, name in zip(axes, (metric, "train_loss"), strict=True):
            points = [(h["round"], h[name]) for h in result.history if name in h]
            marker = "o" if len(points) <= 12 else None  # between few points a line says little
            axis.plot(*zip(*points, strict=True), marker=marker, label=result.summary["method"], **style)
    for axis, title in zip(axes, (f"validation {metric}", "training loss"), strict=True):
        axis.set(xlabel="round", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(min(0, axes[0].get_ylim()[0]), 1.02)
    if columns:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right center", ncols=columns, fontsize="small", frameon=False)
    else:
        axes[0].legend(loc="lower right")
    _save(figure, out / "curves.png")


def save_curves(path: pathlib.Path, curves: dict[str, tuple[Sequence[int], Sequence[float]]]) -> None:
    """Draws `{title: (sizes, seconds)}`, one picture beside the other, on logarithmic axes."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.2 * len(curves), 3), layout="constrained")
    for axis, (title, (sizes, seconds)) in zip(axes, curves.items(), strict=True):
        axis.loglog(sizes, seconds, marker="o", linewidth=1.6)
        axis.set(title=title, ylabel="seconds", ylim=(min(seconds) / 3, max(seconds) * 3))
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ticks = seconds if max(seconds) > 2 * min(seconds) else [max(seconds)]
        axis.set_yticks(ticks, [f"{s:.2g}" for s in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    _save(figure, path)


def heat_map(path: pathlib.Path, counts: np.ndarray, names: Sequence[str] = ()) -> None:
    """Draws how many samples of each class each client has.

    Args:
      path: of the PNG.
      counts: `[N, classes]`, as `data.partition.counts`. Clients are drawn in order of their most frequent
        class, so that skew shows as a diagonal; the colour is logarithmic, and white is none.
      names: of the classes.
    """
    pyplot = _pyplot()
    from matplotlib import colors

    clients, classes = counts.shape
    order = np.lexsort((-counts.max(1), counts.argmax(1)))
    size = (2.5 + min(max(classes * 0.4, 3), 14), 1.5 + min(max(clients * 0.3, 2.5), 7))
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    shown = np.ma.masked_equal(counts[order], 0)
    norm = colors.LogNorm(1, max(int(counts.max()), 2))
    image = axis.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis_r", norm=norm)
    figure.colorbar(image, label="samples")
    axis.set(xlabel="class", ylabel="client" if clients <= 30 else f"{clients} clients, by main class")
    if clients <= 30:
        axis.set_yticks(range(clients), [str(client) for client in order])
    else:
        axis.set_yticks([])
    if len(names) == classes <= 40:
        names = [name if len(name) <= 30 else f"{name[:29]}…" for name in names]
        long = max(map(len, names)) > 3
        turned = {"rotation": 60, "ha": "right"} if long else {}
        axis.set_xticks(range(classes), names, parse_math=False, **turned)
    if clients <= 20 and classes <= 12:
        for (row, column), count in np.ndenumerate(counts[order]):
            if count:
                dark = norm(count) > 0.5
                colour = "white" if dark else "black"
                axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)
    _save(figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: pathlib.Path) -> None:
    """A picture is there whole or not at all."""
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    partial.replace(path)
    _pyplot().close(figure)
