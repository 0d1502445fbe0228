"""Fill the tables of README.md and results/README.md, and draw the curves, from the files here.

    python results/readme.py

Every stored rate and interval is first computed again from its trial rows; a figure that differs
stops the program.

Folders: seedN holds a run of our recipe: its log.jsonl and a folder for each evaluation. expert and
random hold the evaluations of these, paper a short run of the paper's recipe. pairs/seedN and
lambda_emb_0/seedN hold runs of ours with --pairs 1 and without the embedding loss, older/seedN runs
of an older recipe. methods/NAME holds a baseline's run; `first` in it the run from whose weights it
went on, others runs with one change. ablations/NAME/seedN and quick/NAME hold one evaluation and
the run's log. curve/step-N holds validation trials of the weights at that step. looks/one and
looks/many hold trials in other looks with weights trained in one look, the shipped ones, and in
many; looks/first, second and third validation trials after each part of the training in many. A
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
from evaluate import LOOKS, interval, summary
from sim import make_task
from train import CHANGEABLE

SEEDS = sorted(HERE.glob("seed*"))
FOUND = sorted(path.parent.name for path in HERE.glob("methods/*/test"))
METHODS = {name: HERE / "methods" / name for name in ("lstm", "contextual", "mil", *FOUND)}
METHODS["tecnets"] = HERE / "seed2"  # whose weights are shipped
TRAINED = *METHODS, "lambda_emb_0"  # the last is the paper's ablation

NAMES = {name: name for name in METHODS} | {
    "random": "random actions", "lstm": "LSTM", "mil": "MIL, video only", "tecnets": "TecNets",
    "lambda_emb_0": "TecNets, `--lambda-emb 0`", "no-demo": "TecNets, `no-demo`",
    "expert": "scripted expert"}
PUBLISHED = {"random": "0.45", "lstm": "34.23 / 31.98", "contextual": "56.98 / 59.01",
             "mil": "66.44 / 70.50", "tecnets": "77.25 / 80.86 (unverified)",
             "lambda_emb_0": "58.56 (unverified)"}
COLOURS = {"lstm": "#7f8c8d", "contextual": "#2e86c1", "mil": "#d68910", "tecnets": "#c0392b"}
CORES = {"lstm": 1, "lstm, continued": 2, "contextual": 1, "mil": 2}  # of older runs
COLUMNS = [0], [1, 5], [1, 5, 1, 5]  # shots of the README's columns
FIGURES = ("success [95 % interval]", "final distance < 0.05 m", "distractor moved > 0.03 m",
           "both of a pair")

PROTOCOL = {"split": "test", "tasks": 74, "trials": 6, "seed": 0,
            "redraw": False, "look": "default", "demo_look": "default"}  # older files lack these

HEEDS = 1.2  # times its own, a heeding run's validation loss after the partner's demonstration
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's quantiles, by number of differences
LOOK_ALIKE = 0.3  # most by which two colours differ, in [0, 1]


# Files ----------------------------------------------------------------------------------------

def read(name):
    return json.loads((HERE / name).read_text())


def load(folder):
    """The report of an evaluation, its figures checked against its rows."""
    path = folder / "results.json"
    report = read(path)
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
    return mean_and_range([100 * result["success_rate"] for result in results], "{:.1f}")


def passed(result):
    """The (task, trial) that succeeded."""
    return {scene(row) for row in result["trials"] if row["success"]}


def both(result):
    """In how many scenes the trials of both tasks of a pair succeeded."""
    found = passed(result)
    twice = sum((task ^ 1, trial) in found for task, trial in found)
    return f"{twice // 2}/{result['n_trials'] // 2}"


@functools.cache
def look_alike(split, index):
    """Whether the objects of a task have one pattern and nearly the same colours."""
    task = make_task(split, index)
    looks = [body.appearance for body in (task.target, task.distractor)]
    differences = np.ptp([look.colours for look in looks], axis=0)
    return looks[0].pattern == looks[1].pattern and differences.max() < LOOK_ALIKE


def rated(rows):
    """The rate of rows and its interval."""
    rate = statistics.mean(row["success"] for row in rows)
    return {"success_rate": rate, "ci95": interval(rows)}


def look_alikes(result):
    """The rate in look-alike pairs."""
    return rated([row for row in result["trials"] if look_alike("test", row["task"])])


def figures(result):
    """The cells under FIGURES."""
    return (percent(result), f"{100 * result['strict_success_rate']:.1f}",
            f"{100 * result['distractor_moved_rate']:.1f}", both(result))


def gains(result, other):
    """Rows with the success of an evaluation less another's in the same scenes."""
    others = {scene(row): row["success"] for row in other["trials"]}
    return [{**row, "success": row["success"] - others[scene(row)]} for row in result["trials"]]


def difference(result, other):
    """By how much an evaluation's success exceeds another's in the same scenes."""
    return percent(rated(gains(result, other)))


# Tables ---------------------------------------------------------------------------------------

def evaluations(policy, kind="test"):
    """The reports of a policy on test trials, of several seeds where there are."""
    places = {"tecnets": f"seed*/{kind}", "no-demo": "seed*/no-demo", "expert": "expert",
              "random": "random", "lambda_emb_0": f"lambda_emb_0/seed*/{kind}"}
    place = places.get(policy, f"methods/{policy}/{kind}")
    reports = [load(folder) for folder in sorted(HERE.glob(place))]
    for report in reports:
        found = {**PROTOCOL, **report["evaluation"]}
        if {**found, **PROTOCOL, "redraw": kind == "redrawn"} != found:
            raise SystemExit(f"{place} has other trials than the tables: {PROTOCOL}")
    return reports


def results():
    rows = [("policy", "published, 1 / 5 shots", "one draw, 1 shot", "one draw, 5 shots",
             "redrawn, 1 shot", "redrawn, 5 shots", "core-hours")]
    for policy in ("random", *TRAINED, "no-demo", "expert"):
        groups = []  # the seeds' results of one kind and number of shots
        for kind in ("test", "redrawn")[:1 + (policy in TRAINED)]:
            groups += zip(*(report["results"] for report in evaluations(policy, kind)))
        assert [group[0]["shots"] for group in groups] in COLUMNS, f"{policy} has other shots"
        cells = [*map(over_seeds, groups)]
        hours = ""
        if policy in TRAINED:
            spent = [trained(policy, report["network"])[1] for report in evaluations(policy)]
            hours = f"{statistics.mean(spent):.1f}"
        if policy == "tecnets":
            cells = [f"**{cell}**" for cell in cells]
        rows.append((NAMES[policy], PUBLISHED.get(policy, ""), *(*cells, "", "", "")[:4], hours))
        if policy == "tecnets":
            alike = [over_seeds([*map(look_alikes, group)]) for group in groups]
            rows.append(("TecNets, look-alike pairs only", "", *alike, ""))
    return grid(*rows)


def redrawn():
    """Trials with demonstrations of their own: shots, and pairs that look alike."""
    rows = [("", "shots", FIGURES[0], "five shots more than one", "look-alike pairs")]
    for method in METHODS:
        gained = []  # by five shots, in all seeds
        for report in evaluations(method, "redrawn"):
            one, five = report["results"]
            seed = f", seed {report['network']['options']['seed']}" if method == "tecnets" else ""
            for result, more in ((one, ""), (five, difference(five, one))):
                rows.append((NAMES[method] + seed, result["shots"], percent(result), more,
                             percent(look_alikes(result))))
            gained += gains(five, one)
        if method == "tecnets":
            rows.append(("TecNets, all seeds", 5, "", percent(rated(gained)), ""))
    return grid(*rows)


def reads():
    """In how many scenes the first action heads for the object of a demonstration, in %."""
    heads = read("reads.json")
    rows = [("given", *(NAMES[method] for method in heads))]
    for kind in heads["tecnets"]:
        ones = [heads[method][kind] for method in heads]
        rows.append((kind, *(f"{100 * found.count('1') / len(found):.1f}" for found in ones)))
    return grid(*rows)


def every_seed():
    rows = [("seed", "shots", *FIGURES, "validation, 1 shot")]
    for seed in SEEDS:
        name = seed.name.removeprefix("seed")
        validation = percent(load(seed / "val")["results"][0])
        for result in load(seed / "test")["results"]:
            rows.append((name, result["shots"], *figures(result), validation))
            validation = ""
    others = {f"{path.parent.name.removeprefix('seed')}, `no-demo`": path
              for path in sorted(HERE.glob("seed*/no-demo"))}
    others["`expert`"] = HERE / "expert"
    for name, folder in others.items():
        rows.append((name, "", *figures(load(folder)["results"][0]), ""))
    return grid(*rows)


def methods():
    """The paper's comparison, each method at its last step."""
    rows = [("", "shots", *FIGURES, "more than MIL", "steps", "core-hours")]
    mil = {result["shots"]: result for result in load(METHODS["mil"] / "test")["results"]}
    for method, folder in METHODS.items():
        report = load(folder / "test")
        steps, hours = trained(method, report["network"])
        once = f"{steps:,}", f"{hours:.1f}"
        for result in report["results"]:
            more = "" if method == "mil" else difference(result, mil[result["shots"]])
            rows.append((NAMES[method], result["shots"], *figures(result), more, *once))
            once = [""] * len(once)
    return grid(*rows)


def changed_baselines():
    """Runs of baselines with one change, beside those without it, which have as many steps."""
    rows = [("", "success, 1 shot", "more than usual", "5 shots", "more than usual")]
    for change, folder, usual in (
            ("LSTM, published sampling", METHODS["lstm"] / "published", METHODS["lstm"] / "first"),
            ("contextual, flat features", METHODS["contextual"] / "flat", METHODS["contextual"])):
        run, other = load(folder / "test"), load(usual / "test")
        assert run["network"]["step"] == other["network"]["step"], change
        cells = []
        for results in zip(run["results"], other["results"]):
            cells += percent(results[0]), difference(*results)
        rows.append((change, *cells))
    return grid(*rows)


def heeds_from(folder):
    """The first step at which a run heeds the demonstration; None if it does not at its last."""
    rows = log_rows(folder, "val_loss_partner")
    steps = [row["step"] for row in rows if row["val_loss_partner"] > HEEDS * row["val_loss_q"]]
    return steps[0] if steps and steps[-1] == rows[-1]["step"] else None


def mean_and_range(values, form):
    if not values:
        return ""
    low, high = form.format(min(values)), form.format(max(values))
    return f"{form.format(statistics.mean(values))} ({low} - {high})"


def ablations():
    """A row for the runs that differ in their seeds only; success is of those that heed."""
    rows = [("", "seeds that heed", "from step", "their success in %", "more than `reference`")]
    runs, options = {}, {}
    for folder in sorted(HERE.glob("ablations/*/*")):
        report, begun = load(folder), heeds_from(folder)
        success = 100 * report["results"][0]["success_rate"]
        runs.setdefault(folder.parent.name, {})[folder.name] = begun and (begun, success)
        options[folder.parent.name] = report["network"]["options"]
    usual, reference = options["reference"], runs["reference"]
    for name in sorted(runs, key=lambda name: name != "reference"):
        changed = [f"--{option.replace('_', '-')} {value:g}"
                   for option, value in options[name].items()
                   if option not in ("seed", *CHANGEABLE) and value != usual[option]]
        heeding = {seed: found for seed, found in runs[name].items() if found}
        begun, success = ([found[i] for found in heeding.values()] for i in (0, 1))
        more = [heeding[seed][1] - reference[seed][1] for seed in heeding if reference.get(seed)]
        rows.append((f"`{' '.join(changed) or name}`", f"{len(heeding)} of {len(runs[name])}",
                     mean_and_range(begun, "{:,.0f}"), mean_and_range(success, "{:.1f}"),
                     paired(more) if changed else ""))
    return grid(*rows)


def full_length():
    """Success of runs with one change less that of ours in the same scenes, both protocols."""
    columns = {"validation, 1 shot": ("val", "val-redrawn", 0),
               "test, 1 shot": ("test", "redrawn", 0), "test, 5 shots": ("test", "redrawn", 1)}
    rows = [("", "seeds", *columns)]
    for name, change in (("pairs", "`--pairs 1`"), ("lambda_emb_0", "`--lambda-emb 0`")):
        folders, cells = sorted(HERE.glob(f"{name}/seed*")), []
        for *kinds, i in columns.values():
            found = []
            for kind in kinds:
                theirs, ours = ([load(folder / kind)["results"][i] for folder in place]
                                for place in (folders, SEEDS))
                found += [row for run in theirs for other in ours for row in gains(run, other)]
            cells.append(percent(rated(found)))
        rows.append((change, len(folders), *cells))
    return grid(*rows)


def paired(differences):
    """The mean of the differences between runs of equal seed; its 95 % interval (Student)."""
    if len(differences) < 2:
        return ""
    mean = statistics.mean(differences)
    reach = T_975[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:.1f} [{mean - reach:.1f}, {mean + reach:.1f}]"


def looks():
    """Trials in looks that training never showed, or with demonstrations from these."""
    rows = [("", "trained in one look", "trained in many", "many more than one")]
    for option in ("look", "demo-look"):
        for look in LOOKS:
            name = look if option == "look" else f"demo-{look}"
            if (HERE / "looks" / "many" / name).exists():
                one, many = (load(HERE / "looks" / kind / name)["results"][0]
                             for kind in ("one", "many"))
                rows.append((f"`--{option} {look}`", percent(one), percent(many),
                             difference(many, one)))
    return grid(*rows)


def map_caption():
    found = read("embedding-map.png.json")
    nearness = found["nearest_similarity"]
    return (f"*The sentences of the {found['tasks']} test tasks, each shown by the last frame of "
            f"a demonstration.\nOf {found['demos']} test demonstrations "
            f"{100 * found['retrieval']:.1f} % are nearest to their own task's sentence, made "
            "without them.\nThe cosine similarity of a test task to the nearest training task is "
            f"{statistics.median(nearness):.2f} in the median, {min(nearness):.2f} at least.*")


def costs():
    """The seconds that benchmark.py measured."""
    rows = [("", "cost")]
    for name, value in read("benchmark.json").items():
        rows.append((name, f"{1000 * value:.1f} ms" if value < 0.1 else f"{value:.2f} s"))
    return grid(*rows)


# Files filled and drawn -----------------------------------------------------------------------

def success_curves(path):
    """Success on validation trials along each method's run."""
    lines, last = [], 0
    for method, folder in METHODS.items():
        points = []
        for found in folder.glob("**/curve/*/results.json"):
            report = load(found.parent)
            _, hours = trained(method, report["network"])
            points.append((hours, 100 * report["results"][0]["success_rate"]))
            last = max(last, hours)
        lines.append((NAMES[method], COLOURS.get(method, "black"), sorted(points)))
    ticks = range(0, math.ceil(last) + 1)
    chart(path, lines, "core-hours of training", ticks, range(0, 101, 20), legend="bottom")


def filled():
    """{path: its text with all tables filled} of both READMEs."""
    tables = {"results": results(), "seeds": every_seed(), "methods": methods(),
              "changed": changed_baselines(), "redrawn": redrawn(), "reads": reads(),
              "looks": looks(), "ablations": ablations(), "full": full_length(),
              "map": map_caption(), "costs": costs()}
    texts = {}
    for path in (HERE.parent / "README.md", HERE / "README.md"):
        texts[path] = re.sub(
            r"<!-- (\w+) -->\n.*?<!-- end -->",
            lambda place: f"<!-- {place[1]} -->\n{tables.pop(place[1])}\n<!-- end -->",
            path.read_text(), flags=re.DOTALL)
    assert not tables, f"{[*tables]} have no place in a README"
    return texts


def main():
    for path in HERE.rglob("results.json"):
        load(path.parent)  # those without a table are checked too
    for path, text in filled().items():
        write_atomically(path, lambda file: file.write(text.encode()))
    learning_curves(HERE / "learning-curves.png", [log_rows(seed, "step") for seed in SEEDS])
    success_curves(HERE / "success-curves.png")


if __name__ == "__main__":
    main()
