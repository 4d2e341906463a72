#!/usr/bin/env python3
"""Result files of `warpstep bench`, `warpstep kernels bench` and tools/peers.py to pictures and one HTML page.

    python3 tools/plot.py --out plots benches/results/*.json

Every file gives what it holds: a roofline of its kernels, the parts of a token's latency by position, the token's time
against position; peers' files a comparison. Two model files or more give before and after, in the order of the
command line. The page holds its pictures itself and needs no network. Needs matplotlib.
"""

import argparse
import base64
import html
import json
import pathlib
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PARTS = ("LLM decoder", "projector", "FM head")


def load(path):
    with open(path) as file:
        report = json.load(file)
    if report.get("schema") not in ("warpstep-bench-1", "warpstep-peers-1"):
        sys.exit(f"{path}: not a result file of warpstep bench or tools/peers.py")
    report["path"] = path
    return report


def title(report):
    if report["schema"] == "warpstep-peers-1":
        return f"{report['device']}, torch {report['torch']}"
    header = report["header"]
    text = f"{header['model']} on {header['name']}, commit {header['commit']}"
    return text + ("\nemulated: these times say nothing about a GPU" if header["device"] != "cuda" else "")


def positions(report):
    """Row by position of every part of a token."""
    found = {}
    for row in report["rows"]:
        match = re.fullmatch(r"token @(\d+): (.*)", row["test"])
        if match and row["median_ms"] is not None:
            found.setdefault(int(match[1]), {})[match[2]] = row
    return dict(sorted(found.items()))


def roofline(report, axes):
    """Operations per byte against operations per second, under the run's own ceilings."""
    copy, _, product = report["ceilings"]
    bandwidth, peak = copy["gb_per_s"] * 1e9, product["tflop_per_s"] * 1e12
    rows = [r for r in report["rows"] if r["flops"] and r["bytes"] and r["median_ms"]]
    if not rows:
        return False
    for l2, marker in (("cold", "o"), ("hot", "x"), ("", "s")):
        shown = [r for r in rows if r["l2"] == l2]
        if not shown:
            continue
        axes.scatter([r["flops"] / r["bytes"] for r in shown], [r["flops"] / r["median_ms"] * 1e3 for r in shown],
                     marker=marker, s=22, label=l2 or "parts of a model")
    best = {}
    for r in rows:
        key = (r["test"], r["variant"])
        if key not in best or r["tflop_per_s"] > best[key]["tflop_per_s"]:
            best[key] = r
    for (test, variant), r in best.items():
        name = f"{test} {variant}" if " " not in variant else test
        axes.annotate(name, (r["flops"] / r["bytes"], r["flops"] / r["median_ms"] * 1e3), fontsize=6,
                      xytext=(3, 3), textcoords="offset points")
    intensities = [r["flops"] / r["bytes"] for r in rows] + [peak / bandwidth]
    span = [min(intensities) / 2, max(intensities) * 2]
    grid = [span[0] * (span[1] / span[0]) ** (i / 200) for i in range(201)]
    axes.plot(grid, [min(i * bandwidth, peak) for i in grid], color="black", linewidth=1, label="copy, own product")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axes.legend(fontsize=7)
    return True


def bandwidths(report, axes):
    """Share of the copy's bandwidth, row by row; rows of a load have no such share."""
    rows = [r for r in report["rows"] if r["of_copy"]]
    if not rows:
        return False
    names = [" ".join(filter(None, (r["test"], r["variant"] if " " not in r["variant"] else "", r["dtype"],
                                    r["shape"] if r["l2"] else "", r["l2"]))) for r in rows]
    axes.barh(range(len(rows)), [r["of_copy"] for r in rows], color="tab:blue")
    axes.set_yticks(range(len(rows)), [name[:60] for name in names], fontsize=5)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="share of the copy bandwidth of the same run")
    axes.figure.set_size_inches(8, max(3, 0.13 * len(rows)))
    return True


def breakdown(report, axes):
    """Parts of a token's latency, stacked, by position."""
    # A report may have ended in the middle of a position.
    found = {p: rows for p, rows in positions(report).items() if "total" in rows}
    if not found:
        return False
    ticks = range(len(found))
    bottom = [0.0] * len(found)
    for part in PARTS:
        heights = [rows[part]["median_ms"] if part in rows else 0.0 for rows in found.values()]
        axes.bar(ticks, heights, bottom=bottom, label=part)
        bottom = [a + b for a, b in zip(bottom, heights)]
    totals = [rows["total"] for rows in found.values()]
    axes.plot(ticks, [r["median_ms"] for r in totals], "k_", markersize=24, label="total, one graph")
    axes.plot(ticks, [r["floor_ms"] for r in totals], "r_", markersize=24, label="floor: bytes / copy")
    axes.set_xticks(ticks, [str(p) for p in found])
    axes.set(xlabel="filled cache slots", ylabel="ms per token")
    axes.legend(fontsize=7)
    return True


def curve(report, axes):
    """A token's time against position, p10 to p90."""
    found = {p: rows["total"] for p, rows in positions(report).items() if "total" in rows}
    if not found:
        return False
    x, rows = list(found), list(found.values())
    axes.plot(x, [r["median_ms"] for r in rows], "o-", label="median")
    axes.fill_between(x, [r["p10_ms"] for r in rows], [r["p90_ms"] for r in rows], alpha=0.25, label="p10 to p90")
    axes.plot(x, [r["floor_ms"] for r in rows], "r--", label="floor: bytes / copy")
    axes.set(xlabel="filled cache slots", ylabel="ms per token", ylim=(0, None))
    axes.legend(fontsize=7)
    return True


def peers(report, axes):
    """Backbone and flow head per token, row by row."""
    rows = [r for r in report["rows"] if r["backbone_ms"]]
    if not rows:
        return False
    axes.barh(range(len(rows)), [r["backbone_ms"] for r in rows], label="backbone")
    axes.barh(range(len(rows)), [r["flow_ms"] or 0 for r in rows], left=[r["backbone_ms"] for r in rows],
              label="FM head")
    axes.set_yticks(range(len(rows)), [r["name"] for r in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="ms per token")
    axes.legend(fontsize=7)
    return True


def before_after(reports, axes):
    """Medians of the rows that all files have, next to one another."""
    medians = [{r["test"]: r["median_ms"] for r in report["rows"] if r["median_ms"]} for report in reports]
    names = [name for name in medians[0] if all(name in other for other in medians)]
    if not names:
        return False
    height = 0.8 / len(reports)
    for i, (report, values) in enumerate(zip(reports, medians)):
        label = f"{report['header']['commit']} {pathlib.Path(report['path']).stem}"
        axes.barh([k + i * height for k in range(len(names))], [values[n] for n in names], height, label=label)
    axes.set_yticks([k + 0.4 - height / 2 for k in range(len(names))], names, fontsize=6)
    axes.invert_yaxis()
    axes.set(xlabel="median ms", xscale="log")
    axes.legend(fontsize=7)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--out", default="plots", help="folder for the page and the pictures (default: plots)")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    reports = [load(path) for path in args.files]
    page = []

    def picture(name, heading, draw):
        figure, axes = plt.subplots(figsize=(8, 5))
        if draw(axes):
            axes.set_title(heading, fontsize=8)
            figure.savefig(out / name, dpi=140, bbox_inches="tight")
            encoded = base64.b64encode((out / name).read_bytes()).decode()
            what = html.escape(name.removesuffix(".png"))
            page.append(f'<h2>{what}</h2><p>{html.escape(heading)}</p><img alt="{what}" '
                        f'src="data:image/png;base64,{encoded}">')
            print(out / name)
        plt.close(figure)

    for report in reports:
        stem = pathlib.Path(report["path"]).stem
        plots = (peers,) if report["schema"] == "warpstep-peers-1" else (breakdown, curve, roofline, bandwidths)
        for plot in plots:
            picture(f"{stem}-{plot.__name__}.png", title(report), lambda axes: plot(report, axes))
    models = [r for r in reports if r["schema"] == "warpstep-bench-1" and r["header"]["kind"] == "model"]
    if len(models) > 1:
        picture("before-after.png", "the same rows of " + ", ".join(r["path"] for r in models),
                lambda axes: before_after(models, axes))
    if not page:
        sys.exit("nothing to draw in " + ", ".join(args.files))
    text = ('<!doctype html><meta charset="utf-8"><title>warpstep results</title>'
            '<style>body{font:15px sans-serif;max-width:960px;margin:2em auto}img{max-width:100%}</style>'
            "<h1>warpstep results</h1>" + "".join(page))
    (out / "index.html").write_text(text)
    print(out / "index.html")


if __name__ == "__main__":
    main()
