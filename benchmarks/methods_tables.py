"""The tables of results/methods.json: what captures and methods cost and find, and curvature matrices side by side."""

from __future__ import annotations

from typing import Any

from datablame.evaluation import tables as bench_tables


def methods(r: dict[str, Any]) -> str:
    """Every method on the demo: cost, agreement with `exact`, planted rows found."""
    extra_of = {need: name for name, c in r["captures"].items() for need in c.get("serves", [])}
    heads = ["method", "s of computing", "peak GB", "extra", *AGREEMENT, "Spearman with `unroll`"]
    rows = [[*heads, "planted rows found", "one ranking for all"]]
    for name, m in r["methods"].items():
        low, high = m["interval95"]
        told = [f"`{m['spec']}`", f"{m['cpu_seconds']:.1f}"]
        told += [f"{m['peak_memory_gb']:.2f}", extra_of.get(name, "")]
        found = f"{m['recall']:.2f} ({low:.2f} to {high:.2f})"
        reference = _two(m["unrolled"]["spearman"]) if "unrolled" in m else ""
        rows.append([*told, *_agreement(m), reference, found, _two(m["query_independent_share"])])
    text = f"Chance: {r['chance_recall']:.2f} of planted rows found, {r['chance_top10']:.2f} of the top 10 shared, "
    text += f"1/{len(r['queries'])} for one ranking. {r['training_rows']} rows, {len(r['queries'])} queries, "
    text += f"one adapter, {r['machine']}, {r['threads']} thread."
    left = [f"`{name}`: {why}." for name, why in r["not_run"].items()]
    left += [f"Not finished: {', '.join(f'`{p}`' for p in r['not_finished'])}."] if r["not_finished"] else []
    told = [text, *(["Not run. " + " ".join(left)] if left else [])]
    return "\n\n".join([bench_tables.markdown(rows), *told])


def unrolled(r: dict[str, Any]) -> str:
    """Every method beside the exact derivative through the training: the nearest first."""
    u = r["unroll"]
    heads = [f"Spearman with `unroll`, {len(u['queries'])} queries", "top 10 shared", "error after the best factor"]
    rows = [["method", *heads]]
    beside = {m["spec"]: m["unrolled"] for m in r["methods"].values()}
    for name, x in sorted(beside.items(), key=lambda item: -(item[1]["spearman"] or 0)):
        rows.append([f"`{name}`", *(_two(x[k]) for k in ("spearman", "top10", "scaled"))])
    found = ", ".join(f"{n} of 12 for `{q}`" for q, n in u["found_of_12"].items())
    minutes = f"{u['seconds'] / 60:.0f} minutes ({u['cpu_seconds'] / 60:.0f} of computing)"
    cost = f"`unroll`: {minutes} for {len(u['queries'])} queries, its own training included, "
    cost += f"{u['peak_memory_gb']:.1f} GB; planted rows in its top 12: {found}. "
    cost += f"{r['training_rows']} rows; {r['machine']}, {r['threads']} thread. The adapter that it trains differs "
    cost += f"from the one whose gradients the methods have by {u['weights_error']:.1g} of its norm."
    return f"{bench_tables.markdown(rows)}\n\n{cost}"


AGREEMENT = ("Spearman with `exact`", "top 10 shared", "error after the best factor")


def _agreement(m: dict[str, Any]) -> list[str]:
    return [_two(m["agreement"][k]) for k in ("spearman", "top10", "scaled")]


def _two(x: float | None) -> str:
    return "–" if x is None else f"{x + 0.0:.2f}"


def captures(r: dict[str, Any]) -> str:
    """What the index and each extra cost."""
    heads = ["captured", "serves", "passes with gradients", "forward passes", "s of computing", "kB a row", "MB once"]
    rows = [[*heads, "peak GB"]]
    for c in r["captures"].values():
        what = f"`--extras {c['spec']}`" if c["spec"] else "the index"
        served = ", ".join(f"`{m}`" for m in c["serves"]) or "methods that need no extra"
        numbers = [f"{c['passes']:.1f}", f"{c['forward_passes']:.1f}", f"{c['cpu_seconds']:.0f}"]
        size = [f"{c['bytes_a_row'] / 1e3:,.1f}", f"{c['mb_once']:,.1f}", f"{c['peak_memory_gb']:.1f}"]
        rows.append([what, served, *numbers, *size])
    tokens = r["captures"]["base"]["tokens"]
    return f"{bench_tables.markdown(rows)}\n\n{r['training_rows']} rows, {tokens:,} tokens; {r['machine']}, one thread."


CURVATURES = {
    "exact": "empirical Fisher (`exact`)",
    "gauss-newton": "Gauss-Newton, sampled labels (`gauss-newton`)",
    "cg": "Gauss-Newton itself (`cg`)",
    "minres": "Hessian (`minres`)",
    "subspace": "Gauss-Newton, in the span of the gradients (`subspace`)",
}


def curvatures(r: dict[str, Any]) -> str:
    """Influence under each matrix beside each other one."""
    s = r["subset"]
    names = [n for n in CURVATURES if n in s["runs"]]
    rows = [["", *(CURVATURES[n] for n in names), "residual", "s of computing"]]
    for a in names:
        run = s["runs"][a]
        beside = [
            "" if a == b else f"{_two(s['beside'][a][b]['spearman'])} · {_two(s['beside'][a][b]['scaled'])}"
            for b in names
        ]
        rows.append([CURVATURES[a], *beside, _two(run.get("residual")), f"{run['cpu_seconds']:.0f}"])
    weights = next(iter(s["runs"].values()))["weights"] if names else 0
    text = f"Spearman's correlation · relative error after the best factor. {s['rows']} rows ({s['planted']} planted), "
    text += f"{len(s['queries'])} queries, {weights:,} weights (`{s['blocks']}`)."
    missing = [f"`{n}`" for n in CURVATURES if n not in names]
    return bench_tables.markdown(rows) + f"\n\n{text}" + (f" Not finished: {', '.join(missing)}." if missing else "")
