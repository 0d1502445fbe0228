"""Fill the tables of README.md and results/README.md, and draw the curves, from the files here.

    python results/readme.py

Every stored rate and interval is first computed again from its trial rows; a figure that differs
stops the program.

Folders: seedN holds a run of our recipe: its log.jsonl and a folder for each evaluation. expert and
random hold the evaluations of these, paper a short run of the paper's recipe. methods/NAME holds a
baseline's run; `first` in it the run from whose weights it went on. ablations/NAME holds one
evaluation and the run's log. curve/step-N holds validation trials of the weights at that step. A
table stands between `<!-- NAME -->` and `<!-- end -->`.
"""
import functools
import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import chart, learning_curves, write_atomically
from evaluate import interval, summary
from sim import make_task

SEEDS = sorted(HERE.glob("seed*"))
FOUND = sorted(path.parent.name for path in HERE.glob("methods/*/test"))
METHODS = {name: HERE / "methods" / name for name in ("lstm", "contextual", "mil", *FOUND)}
METHODS["tecnets"] = HERE / "seed2"  # whose weights are shipped

NAMES = {name: name for name in METHODS} | {
    "random": "random actions", "lstm": "LSTM", "mil": "MIL, video only", "tecnets": "TecNets",
    "no-demo": "TecNets with a zero sentence (`no-demo`)", "expert": "scripted expert"}
PUBLISHED = {"random": "0.45", "lstm": "34.23 / 31.98", "contextual": "56.98 / 59.01",
             "mil": "66.44 / 70.50", "tecnets": "77.25 / 80.86 (unverified)"}
COLOURS = {"lstm": "#7f8c8d", "contextual": "#2e86c1", "mil": "#d68910", "tecnets": "#c0392b"}
CORES = {"lstm": 1, "lstm, continued": 2, "contextual": 1, "mil": 2, "tecnets": 2}  # of older runs
FIGURES = ("success [95 % interval]", "final distance < 0.05 m", "distractor moved > 0.03 m",
           "both of a pair")

HEEDS = 1.2  # times its own, a heeding run's validation loss after the partner's demonstration
T_975 = 12.706, 4.303, 3.182, 2.776  # Student's quantiles for 2 to 5 runs
LOOK_ALIKE = 0.3  # most by which two colours differ, in [0, 1]

# Training options in results files of older programs.
RENAMED = {"early": "time_exponent", "hue": "hue_jitter", "keep": "snapshots"}
BEFORE = dict(recolour=0, hue_jitter=0.0, pairs=0, hinge_mean="all")  # what was done without them
NOT_COMPARED = ("name", "resume", "seed", "validate_every", "validation_batches", "snapshots")


# Files ----------------------------------------------------------------------------------------

def load(folder):
    """The report of an evaluation, its figures checked against its rows."""
    path = folder / "results.json"
    report = json.loads(path.read_text())
    for result in report["results"]:
        rows = result["trials"]
        if len(set(map(scene, rows))) < len(rows):
            raise SystemExit(f"{path}: a trial stands in more than one row")
        if result != summary(result["policy"], result["split"], result["shots"], result["seed"],
                             rows, result["seconds"]):
            raise SystemExit(f"{path}: its rows give other figures at {result['shots']} shots")
    return report


def scene(row):
    return row["task"], row["trial"]


def log_rows(folder, key):
    """The rows of a run's log that have a key."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row for row in rows if key in row]


def control_loss(folder):
    """A run's last control loss on validation tasks, and that after the partner's demonstration."""
    last = log_rows(folder, "val_loss_partner")[-1]
    return f"{last['val_loss_q']:.4f}, {last['val_loss_partner']:.4f}"


def options_of(report):
    """The training options of an evaluated network under today's names."""
    options = report["network"]["options"]
    return {**BEFORE, **{RENAMED.get(name, name): value for name, value in options.items()}}


def trained(method, network):
    """(steps, core-hours) of a training up to its evaluated weights, with what it went on from."""
    init, machine = network["options"].get("init"), network.get("machine")
    if machine:
        cores = machine["threads"] * machine["processes"]
    else:
        cores = CORES[f"{method}, continued" if init else method]
    steps, hours = network["step"], network["seconds"] / 3600 * cores
    if init:
        first = load(METHODS[method] / "first" / "curve" / Path(init).stem)["network"]
        first_steps, first_hours = trained(method, first)
        steps, hours = first_steps + steps, first_hours + hours
    return steps, hours


# Cells ----------------------------------------------------------------------------------------

def grid(*rows):
    """A Markdown table; the first row is its head."""
    assert all(len(row) == len(rows[0]) for row in rows), rows
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def percent(result):
    low, high = result["ci95"]
    return f"{100 * result['success_rate']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def over_seeds(results):
    """The interval of one evaluation; mean and range of several."""
    if len(results) == 1:
        return percent(results[0])
    rates = [100 * result["success_rate"] for result in results]
    return f"{statistics.mean(rates):.1f} ({min(rates):.1f} - {max(rates):.1f})"


def passed(result):
    """The (task, trial) that succeeded."""
    return {scene(row) for row in result["trials"] if row["success"]}


def both(result):
    """In how many scenes the trials of both tasks of a pair succeeded."""
    found = passed(result)
    twice = sum((task ^ 1, trial) in found for task, trial in found)
    return f"{twice // 2}/{result['n_trials'] // 2}"


@functools.cache
def look_alike_task(index):
    task = make_task("test", index)
    looks = [body.appearance for body in (task.target, task.distractor)]
    differences = np.ptp([look.colours for look in looks], axis=0)
    return looks[0].pattern == looks[1].pattern and differences.max() < LOOK_ALIKE


def look_alike(row):
    """Whether the objects of a row's test task have one pattern and nearly the same colours."""
    return look_alike_task(row["task"])


def part(result, wanted):
    """The result of those of its trials that are wanted."""
    rows = [row for row in result["trials"] if wanted(row)]
    return summary(result["policy"], result["split"], result["shots"], result["seed"], rows, 0)


def figures(result):
    """The cells under FIGURES."""
    return (percent(result), f"{100 * result['strict_success_rate']:.1f}",
            f"{100 * result['distractor_moved_rate']:.1f}", both(result))


def difference(result, other):
    """By how much an evaluation's success exceeds another's in the same scenes."""
    others, rows = passed(other), []
    for row in result["trials"]:
        rows.append({**row, "success": row["success"] - (scene(row) in others)})
    rate = statistics.mean(row["success"] for row in rows)
    return percent({"success_rate": rate, "ci95": interval(rows)})


# Tables ---------------------------------------------------------------------------------------

def evaluations(policy, kind="test"):
    """The reports of a policy on test trials, of several seeds where there are."""
    if policy in ("tecnets", "no-demo"):
        folders = [seed / (policy if policy == "no-demo" else kind) for seed in SEEDS]
    else:
        folders = [METHODS[policy] / kind if policy in METHODS else HERE / policy]
    return [load(folder) for folder in folders if folder.exists()]


def results():
    rows = [("policy", "published, 1 / 5 shots", "one draw, 1 shot", "one draw, 5 shots",
             "redrawn, 1 shot", "redrawn, 5 shots", "core-hours")]
    for policy in ("random", *METHODS, "no-demo", "expert"):
        drawn = [[report["results"] for report in evaluations(policy, kind)]
                 for kind in ("test", "redrawn")[:1 + (policy in METHODS)]]
        cells = [over_seeds(of_a_shot) for runs in drawn for of_a_shot in zip(*runs)]
        alike = [over_seeds([part(result, look_alike) for result in of_a_shot])
                 for runs in drawn for of_a_shot in zip(*runs)]
        hours = ""
        if policy in METHODS:
            spent = [trained(policy, report["network"])[1] for report in evaluations(policy)]
            hours = f"{statistics.mean(spent):.1f}"
        if policy == "tecnets":
            cells = [f"**{cell}**" for cell in cells]
        rows.append((NAMES[policy], PUBLISHED.get(policy, ""), *(*cells, "", "", "")[:4], hours))
        if policy == "tecnets":
            rows.append(("TecNets, look-alike pairs only", "", *alike, ""))
    return grid(*rows)


def redrawn():
    """Trials with demonstrations of their own: shots, and pairs that look alike."""
    rows = [("", "shots", FIGURES[0], "five shots more than one", "look-alike pairs",
             "other pairs")]
    for method in METHODS:
        for report in evaluations(method, "redrawn"):
            one, five = report["results"]
            seed = f", seed {report['network']['options']['seed']}" if method == "tecnets" else ""
            for result, more in ((one, ""), (five, difference(five, one))):
                rows.append((NAMES[method] + seed, result["shots"], percent(result), more,
                             percent(part(result, look_alike)),
                             percent(part(result, lambda row: not look_alike(row)))))
    return grid(*rows)


def reads():
    """In how many scenes the first action heads for the object of a demonstration, in %."""
    heads = json.loads((HERE / "reads.json").read_text())
    methods = [method for method in METHODS if method in heads]
    rows = [("given", *(NAMES[method] for method in methods))]
    for kind in heads["lstm"]:
        rows.append((kind, *(share(heads[method].get(kind)) for method in methods)))
    return grid(*rows)


def share(ones):
    """The share of the ones in a string of ones and zeros, in %."""
    return f"{100 * ones.count('1') / len(ones):.1f}" if ones else ""


def every_seed():
    rows = [("seed", "shots", *FIGURES, "validation, 1 shot")]
    others = {}
    for seed in SEEDS:
        name = seed.name.removeprefix("seed")
        validation = percent(load(seed / "val")["results"][0])
        for result in load(seed / "test")["results"]:
            rows.append((name, result["shots"], *figures(result), validation))
            validation = ""
        others[f"{name}, `no-demo`"] = seed / "no-demo"
    others |= {"`expert`": HERE / "expert", "`random`": HERE / "random"}
    for name, folder in others.items():
        rows.append((name, "", *figures(load(folder)["results"][0]), ""))
    return grid(*rows)


def methods():
    """The paper's comparison, each method at its last step."""
    rows = [("", "shots", *FIGURES, "more than MIL", "control loss, partner's", "steps",
             "core-hours")]
    mil = {result["shots"]: result for result in load(METHODS["mil"] / "test")["results"]}
    for method, folder in METHODS.items():
        report = load(folder / "test")
        steps, hours = trained(method, report["network"])
        once = control_loss(folder), f"{steps:,}", f"{hours:.1f}"
        for result in report["results"]:
            more = "" if method == "mil" else difference(result, mil[result["shots"]])
            rows.append((NAMES[method], result["shots"], *figures(result), more, *once))
            once = [""] * len(once)
    return grid(*rows)


def curve(method):
    """[(steps, core-hours, result), ...] on validation trials along a method's run."""
    points = []
    for path in METHODS[method].glob("**/curve/*/results.json"):
        report = load(path.parent)
        points.append((*trained(method, report["network"]), report["results"][0]))
    return sorted(points, key=lambda point: point[0])


def heeds_from(folder):
    """The first step at which a run heeds the demonstration; None if it does not at its last."""
    rows = log_rows(folder, "val_loss_partner")
    steps = [row["step"] for row in rows if row["val_loss_partner"] > HEEDS * row["val_loss_q"]]
    return steps[0] if steps and steps[-1] == rows[-1]["step"] else None


def mean_and_range(values, form):
    low, high = form.format(min(values)), form.format(max(values))
    return f"{form.format(statistics.mean(values))} ({low} - {high})" if values else ""


def ablations():
    """A row for the runs that share their options but the seed, named after those that differ."""
    rows = [("", "seeds that heed", "from step", "success of these in %", "more than `reference`")]
    runs, changes = {}, {}  # {name of a folder: {seed: success or None}}
    for path in sorted((HERE / "ablations").glob("*/*/results.json")):
        report, name = load(path.parent), path.parent.parent.name
        seed = report["network"]["options"]["seed"]
        begun = heeds_from(path.parent)
        runs.setdefault(name, {})[seed] = begun and (
            begun, 100 * report["results"][0]["success_rate"])
        changes[name] = options_of(report)
    usual, reference = changes["reference"], runs["reference"]
    for name in ("reference", *(name for name in runs if name != "reference")):
        changed = [f"--{option.replace('_', '-')} {value}"
                   for option, value in changes[name].items()
                   if option not in NOT_COMPARED and value != usual.get(option)]
        heeding = {seed: found for seed, found in runs[name].items() if found}
        begun, success = zip(*heeding.values()) if heeding else ((), ())
        more = [heeding[seed][1] - reference[seed][1]
                for seed in heeding if name != "reference" and reference.get(seed)]
        rows.append((f"`{' '.join(changed) or name}`", f"{len(heeding)} of {len(runs[name])}",
                     mean_and_range(begun, "{:,.0f}"), mean_and_range(success, "{:.1f}"),
                     paired(more)))
    return grid(*rows)


def paired(differences):
    """The mean of differences between runs of equal seed, and its 95 % interval by Student's t."""
    n = len(differences)
    if n < 2:
        return ""
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(n)
    reach = T_975[n - 2] * error
    return f"{mean:.1f} [{mean - reach:.1f}, {mean + reach:.1f}]"


def map_caption():
    found = json.loads((HERE / "embedding-map.png.json").read_text())
    nearness = found["nearest_similarity"]
    return (f"*The sentences of the {found['tasks']} test tasks, each shown by the last frame of "
            f"a demonstration.\nOf {found['demos']} test demonstrations "
            f"{100 * found['retrieval']:.1f} % are nearest to their own task's sentence, made "
            "without them.\nThe cosine similarity of a test task to the nearest training task is "
            f"{statistics.median(nearness):.2f} in the median, {min(nearness):.2f} at least.*")


def costs(report):
    """The seconds that benchmark.py measured."""
    rows = [("", "cost")]
    for name, value in report.items():
        rows.append((name, f"{1000 * value:.1f} ms" if value < 0.1 else f"{value:.2f} s"))
    return grid(*rows)


# Files filled and drawn -----------------------------------------------------------------------

def success_curves(path):
    """Success on validation trials along each method's run."""
    lines, last = [], 0
    for method in METHODS:
        points = []
        for _, hours, result in curve(method):
            points.append((hours, 100 * result["success_rate"]))
            last = max(last, hours)
        lines.append((NAMES[method], COLOURS.get(method, "black"), points))
    ticks = range(0, math.ceil(last) + 1)
    chart(path, lines, "core-hours of training", ticks, range(0, 101, 20), legend="bottom")


def fill(text, tables):
    """A text with its tables filled."""
    for name, table in tables.items():
        place = f"<!-- {name} -->\n.*?<!-- end -->"
        filled = f"<!-- {name} -->\n{table}\n<!-- end -->"
        text, found = re.subn(place, lambda _: filled, text, flags=re.DOTALL)
        assert found == 1, f"<!-- {name} --> stands {found} times in a README"
    return text


def filled():
    """{path: its text with all tables filled} of both READMEs."""
    benchmark = json.loads((HERE / "benchmark.json").read_text())
    own = {"seeds": every_seed(), "methods": methods(), "redrawn": redrawn(), "reads": reads(),
           "ablations": ablations(), "map": map_caption(), "costs": costs(benchmark)}
    tables = {HERE.parent / "README.md": {"results": results()}, HERE / "README.md": own}
    return {path: fill(path.read_text(), tables[path]) for path in tables}


def main():
    for path in HERE.rglob("results.json"):
        load(path.parent)  # those without a table are checked too
    for path, text in filled().items():
        write_atomically(path, lambda file: file.write(text.encode()))
    learning_curves(HERE / "learning-curves.png", [log_rows(seed, "step") for seed in SEEDS])
    success_curves(HERE / "success-curves.png")


if __name__ == "__main__":
    main()
