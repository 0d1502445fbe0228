"""Fill the tables of README.md and results/README.md, and draw the learning curves, from the files beside this one.

    python results/readme.py

Every stored rate and interval is first computed again from its trial rows; a figure that differs stops the program.

Directories: seedN holds a run of our recipe, with its log.jsonl and a folder for each evaluation; expert and random hold the
evaluations of these; fast is a short run of our recipe and paper one of the paper's; methods/NAME holds a baseline's run, and
in first the run from whose weights it went on; recipe/NAME and ablations/NAME one evaluation and the run's log; curve/step-N
beside a log holds validation trials of the weights at that step. A table stands between `<!-- NAME -->` and `<!-- end -->`.
"""
import json
import math
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
SEEDS = sorted(HERE.glob("seed*"))
sys.path.insert(0, str(HERE.parent))
from common import write_atomically
from evaluate import interval, summary
from train import BEFORE, DEFAULTS

PUBLISHED = {"random": "0.45", "lstm": "34.23 / 31.98", "contextual": "56.98 / 59.01", "mil": "66.44 / 70.50",
             "tecnets": "77.25 / 80.86 (unverified)"}
NAMES = {"random": "random actions", "lstm": "LSTM", "contextual": "contextual", "mil": "MIL, video only",
         "tecnets": "TecNets", "no-demo": "TecNets with a zero sentence (`no-demo`)", "expert": "scripted expert"}
METHODS = {name: HERE / "methods" / name for name in ("lstm", "contextual", "mil")} | {"tecnets": HERE / "seed2"}
COLOURS = {"lstm": "#7f8c8d", "contextual": "#2e86c1", "mil": "#d68910", "tecnets": "#c0392b"}
CORES = {"lstm": 1, "lstm, continued": 2, "contextual": 1, "mil": 2, "tecnets": 2}  # that a method's run had
EQUAL_CORE_HOURS = 2 * 100 / 60  # 100 minutes on two cores
MEASURES = {"final distance < 0.05 m": "strict_success_rate", "distractor moved > 0.03 m": "distractor_moved_rate"}


def load(folder):
    """The report of an evaluation, its figures checked against its rows."""
    path = folder / "results.json"
    report = json.loads(path.read_text())
    for result in report["results"]:
        rows = result["trials"]
        trials = {(row["task"], row["trial"]) for row in rows}
        if len(trials) < len(rows):
            raise SystemExit(f"{path}: a trial stands in more than one row at {result['shots']} shots")
        again = summary(result["policy"], result["split"], result["shots"], result["seed"], rows, result["seconds"])
        for name in set(again) - {"trials"}:
            if again[name] != result[name]:
                raise SystemExit(f"{path}: {name} at {result['shots']} shots is {result[name]}, its rows give {again[name]}")
    return report


def percent(result):
    low, high = result["ci95"]
    return f"{100 * result['success_rate']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def measures(result):
    """The stricter figures of an evaluation, in the order of MEASURES."""
    return [f"{100 * result[key]:.1f}" for key in MEASURES.values()]


def grid(*rows):
    """A Markdown table; the first row is its head. Raises ValueError if another has more or fewer cells."""
    if any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"rows of different lengths: {rows}")
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def length(network):
    """Steps and minutes of a training run, from the row of its log or from its evaluation."""
    return f"{network['step']:,}", f"{network['seconds'] / 60:.0f} min"


def over_seeds(values):
    """Mean and, for several, the range."""
    values = [100 * value for value in values]
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f} - {max(values):.1f})"


def results(seeds):
    rows = [("policy", "published, 1 / 5 shots", "here, 1 shot", "here, 5 shots", "trials per figure", "training, core-hours")]
    for policy in ("random", *METHODS, "no-demo", "expert"):
        folders = {"tecnets": [seed / "test" for seed in seeds], "no-demo": [seed / "no-demo" for seed in seeds]}.get(
            policy, [METHODS[policy] / "test" if policy in METHODS else HERE / policy])
        by_shots = list(zip(*(load(folder)["results"] for folder in folders)))
        cells = [over_seeds([result["success_rate"] for result in runs]) if len(runs) > 1 else percent(runs[0]) for runs in by_shots]
        cells = [f"**{cell}**" if policy == "tecnets" else cell for cell in cells] + [""] * (2 - len(cells))
        trials = f"{len(folders)} seeds x " * (len(folders) > 1) + str(by_shots[0][0]["n_trials"])
        hours = [trained(policy, load(folder)["network"])[1] for folder in folders] if policy in METHODS else []
        rows.append((NAMES[policy], PUBLISHED.get(policy, ""), *cells, trials, f"{statistics.mean(hours):.1f}" if hours else ""))
    return grid(*rows)


def trained(method, network):
    """(steps, core-hours) of a method's training up to the weights of an evaluation, with the run from which it went on."""
    init = network["options"].get("init")
    steps, hours = network["step"], network["seconds"] / 3600 * CORES[f"{method}, continued" if init else method]
    if init:
        first = trained(method, load(METHODS[method] / "first" / "curve" / Path(init).stem)["network"])
        steps, hours = steps + first[0], hours + first[1]
    return steps, hours


def every_seed(seeds):
    rows = [("seed", "shots", "success [95 % interval]", *MEASURES, "both of a pair", "validation, 1 shot", "steps", "training")]
    for seed in seeds:
        report = load(seed / "test")
        validation = percent(load(seed / "val")["results"][0])
        log = [json.loads(line) for line in (seed / "log.jsonl").read_text().splitlines()]
        last = [row for row in log if "seconds" in row][-1]
        for result in report["results"]:
            rows.append((seed.name.removeprefix("seed"), str(result["shots"]), percent(result), *measures(result),
                         both(result), validation, *length(last)))
    others = [(f"{seed.name.removeprefix('seed')}, `no-demo`", seed / "no-demo") for seed in seeds]
    for name, folder in (*others, ("`expert`", HERE / "expert"), ("`random`", HERE / "random")):
        result = load(folder)["results"][0]
        rows.append((name, "", percent(result), *measures(result), both(result), "", "", ""))
    return grid(*rows)


def both(result):
    """The scenes where the trials of both tasks of a pair, which differ in the demonstration only, passed."""
    found = passed(result)
    return f"{sum((task ^ 1, trial) in found for task, trial in found) // 2} of {result['n_trials'] // 2}"


def passed(result):
    """The (task, trial) that succeeded."""
    return {(row["task"], row["trial"]) for row in result["trials"] if row["success"]}


def last_validation(folder):
    """The last row of a run's log with the losses on validation tasks."""
    log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row for row in log if "val_loss_q" in row][-1]


def methods():
    """The paper's comparison, each method at its last step."""
    rows = [("", "shots", "success [95 % interval]", "more than MIL", *MEASURES, "both of a pair", "control loss, partner's",
             "parameters", "adaptation, action", "steps", "training")]
    mil = {result["shots"]: result for result in load(METHODS["mil"] / "test")["results"]}
    for method, folder in METHODS.items():
        report, losses = load(folder / "test"), last_validation(folder)
        network = report["network"]
        steps, hours = trained(method, network)
        once = (f"{losses['val_loss_q']:.4f}, {losses['val_loss_partner']:.4f}", f"{network['parameters']:,}",
                f"{network['adapt_ms']:.1f}, {network['act_ms']:.1f} ms", f"{steps:,}", f"{hours:.1f} core-hours")
        for result in report["results"]:
            more = difference(result, mil[result["shots"]]) if method != "mil" else ""
            rows.append((NAMES[method], str(result["shots"]), percent(result), more, *measures(result), both(result), *once))
    return grid(*rows)


def difference(result, other):
    """By how much an evaluation's success exceeds another's in the same scenes, with its interval."""
    others = {(row["task"], row["trial"]): row["success"] for row in other["trials"]}
    rows = [{**row, "success": row["success"] - others[row["task"], row["trial"]]} for row in result["trials"]]
    return percent({"success_rate": statistics.mean(row["success"] for row in rows), "ci95": interval(rows)})


def curve(method):
    """[(steps, core-hours, the evaluation's report), ...] of the weights kept along a method's run, on validation trials."""
    reports = [load(path.parent) for path in METHODS[method].glob("**/curve/*/results.json")]
    return sorted(((*trained(method, report["network"]), report) for report in reports), key=lambda point: point[0])


def equal_time():
    """The last weights that each method had kept within EQUAL_CORE_HOURS."""
    rows = [("", "validation, 1 shot", "both of a pair", "steps", "core-hours")]
    for method in METHODS:
        steps, hours, report = [point for point in curve(method) if point[1] <= EQUAL_CORE_HOURS][-1]
        result = report["results"][0]
        rows.append((NAMES[method], percent(result), both(result), f"{steps:,}", f"{hours:.1f}"))
    return grid(*rows)


def failures():
    """What happened in the one-shot test trials that failed; a trial counts once, in the first column that holds."""
    kinds = {"the distractor moved > 0.1 m": lambda row, _: row["distractor_displacement"] > 0.1,
             "neither object moved": lambda row, rest: row["distractor_displacement"] <= 0.03 and abs(row["final_distance"] - rest) < 0.02,
             "other": lambda row, _: True}
    rest = {(row["task"], row["trial"]): row["final_distance"] for row in load(HERE / "random")["results"][0]["trials"]}
    rows = [("", "failed", *kinds)]
    for method, folder in METHODS.items():
        result = load(folder / "test")["results"][0]
        failed = [row for row in result["trials"] if not row["success"]]
        found = [next(kind for kind, holds in kinds.items() if holds(row, rest[row["task"], row["trial"]])) for row in failed]
        rows.append((NAMES[method], f"{len(failed)} of {result['n_trials']}", *(str(found.count(kind)) for kind in kinds)))
    return grid(*rows)


def success_curves(path):
    """Success on validation trials along each method's run."""
    lines = [(NAMES[method], COLOURS[method], [(hours, 100 * report["results"][0]["success_rate"]) for _, hours, report in curve(method)])
             for method in METHODS]
    last = max(points[-1][0] for _, _, points in lines)
    chart(path, lines, "core-hours of training", range(0, math.ceil(last) + 1), range(0, 101, 20), legend="bottom")


def one_change(parent):
    """A row for each one-shot evaluation in a folder, named after the training options that differ from those of `reference`."""
    rows = [("", "success [95 % interval]", "lost, won", *MEASURES, "both of a pair", "control loss, retrieval", "steps", "training")]
    recipe = load(parent / "reference")
    options = lambda report: {**DEFAULTS, **BEFORE, **report["network"]["options"]}  # those that came later, too
    own, expected = options(recipe), passed(recipe["results"][0])
    folders = sorted(path.parent for path in parent.glob("*/results.json"))
    for folder in sorted(folders, key=lambda folder: folder.name != "reference"):
        report = load(folder)
        result, network = report["results"][0], report["network"]
        changed = [f"--{name.replace('_', '-')} {f'{value:g}' if isinstance(value, float) else value}"
                   for name, value in options(report).items() if value != own[name] and not name.startswith(("valid", "keep"))]
        if bool(changed) == (folder.name == "reference"):
            raise SystemExit(f"{folder}: its training options differ from those of `reference` by {changed or 'nothing'}")
        name, found = f"`{' '.join(changed)}`" if changed else "`reference`", passed(result)
        against = f"{len(expected - found)}, {len(found - expected)}" if changed else ""
        last = last_validation(folder)
        validation = f"{last['val_loss_q']:.4f}, {100 * last['val_accuracy']:.1f} %"
        rows.append((name, percent(result), against, *measures(result), both(result), validation, *length(network)))
    return grid(*rows)


def short_runs(ours, papers):
    """Sentences on the two short runs, of our recipe and of the paper's."""
    texts = []
    for text, report in (("A shorter run did most of it: {} on 400 tasks gave {} (`fast/`).", ours),
                         ("The paper's own recipe (`--preset paper`), stopped after {} on all tasks, gave {} (`paper/`).", papers)):
        result, network = report["results"][0], report["network"]
        texts.append(text.format(f"{network['seconds'] / 60:.0f} minutes of training ({network['step']:,} steps)",
                                 f"{percent(result)} % of {result['n_trials']} validation trials, one shot"))
    last = [json.loads(line) for line in (HERE / "paper" / "log.jsonl").read_text().splitlines()][-1]
    texts.append(f"Its policy hardly uses the demonstration: the control loss on validation tasks is {last['val_loss_q']:.4f}, and "
                 f"{last['val_loss_partner']:.4f} with the demonstration of the pair's other task (`paper/log.jsonl`).")
    return "\n".join(texts)


def sentences(figures):
    nearness = figures["nearest_similarity"]
    return (f"*The sentences of the {figures['tasks']} test tasks, each shown by the last frame of one demonstration. Each of the "
            f"{figures['demos']} test demonstrations is compared with all {figures['tasks']} sentences, its own task's made without it: "
            f"for {100 * figures['retrieval']:.1f} % the own task's is the nearest. The cosine similarity of a test task to the "
            f"nearest training task is {statistics.median(nearness):.2f} in the median, {min(nearness):.2f} at least.*")


def costs(report):
    seconds = lambda s: f"{1000 * s:.1f} ms" if s < 0.1 else f"{s:.2f} s"
    step, mil, act, loader, memory = (report[name] for name in ("training_step", "mil_step", "act", "loader", "memory"))
    one, several = list(report["evaluation"].values())
    small, large, _ = memory.values()
    return grid(
        ("stage", "cost"),
        ("training step, 64 tasks, 256 control images, 128 demonstrations",
         f"{seconds(step['bfloat16'])} in bfloat16, {seconds(step['float32'])} in float32; plain formulation {seconds(step['plain'])}, "
         f"or {seconds(step['plain, memory kept'])} with our setting of glibc's allocator (float32); "
         f"in bfloat16 {step['bfloat16 / roofline']:.1f} times the roofline"),
        *((f"training step of MIL, 15 tasks, {frames} frames of the demonstration and of the query, float32",
           f"{seconds(mil[f'{frames} + {frames} frames, ours'])}, plain {seconds(mil[f'{frames} + {frames} frames, plain'])}")
          for frames in (10, 20)),
        ("one action, one core", f"{seconds(act['ours'])}, plain {seconds(act['plain'])}"),
        ("a batch for that step", f"{seconds(loader['batch'])} beside the step, which it slows by {100 * (loader['slow-down'] - 1):.0f} %"),
        ("control step of the simulator, one core",
         f"{seconds(report['simulator']['step'])}, rendered {seconds(report['simulator']['rendered step'])}"),
        ("evaluation, with loading", f"{one:.1f} trials a second on one core, {several:.1f} on two"),
        ("peak memory of a step", f"{small / 1e9:.2f} GB for 64 tasks, {large / 1e9:.2f} GB for 512"))


def processes(report):
    return grid(("on two cores", "cost"),
                *((f"a training step, 64 tasks, {name}", f"{value:.2f} s") for name, value in report["processes"].items()),
                *((name.replace("batches/s", "batches of 64 tasks prepared in a second"), f"{value:.0f}")
                  for name, value in report["feeding"].items()))


def chart(path, lines, x_label, x_ticks, y_ticks, scale=float, legend="top", width=900, height=420, margin=60):
    """Draw lines [(label, colour, [(x, y), ...]), ...] between the first and the last tick; `scale` is applied to y and its ticks.

    The legend stands on the right, at the "top" or the "bottom".
    """
    (left, right), (bottom, top) = (x_ticks[0], x_ticks[-1]), sorted(map(scale, (y_ticks[0], y_ticks[-1])))
    at = lambda x, y: (margin + (width - 2 * margin) * (x - left) / (right - left),
                       margin / 2 + (height - 1.5 * margin) * min(1, max(0, (top - scale(y)) / (top - bottom))))
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for y in y_ticks:
        draw.line([at(left, y), at(right, y)], "#dddddd")
        draw.text((margin - 8, at(left, y)[1]), f"{y:g}", "black", font, "rm")
    for x in x_ticks:
        draw.text((at(x, y_ticks[0])[0], height - margin + 8), f"{x:,}", "black", font, "mt")
    draw.text((width / 2, height - 22), x_label, "black", font, "mt")
    for _, colour, points in lines:
        draw.line([at(*point) for point in points], colour, 2)
    labels = dict.fromkeys((label, colour) for label, colour, _ in lines)
    upper = margin / 2 + 8 if legend == "top" else height - margin - 20 * len(labels)
    for place, (label, colour) in enumerate(labels):
        draw.text((width - margin - 8, upper + 20 * place), label, colour, font, "rt")
    write_atomically(path, lambda file: picture.save(file, "png"))


def learning_curves(path, seeds):
    """Control loss on training and validation tasks against steps."""
    logs = [[json.loads(line) for line in (seed / "log.jsonl").read_text().splitlines()] for seed in seeds]
    lines = [(f"control loss, {label}", colour, [(row["step"], row[key]) for row in log if key in row])
             for colour, key, label in (("#9ab8dd", "loss_q", "training tasks"), ("#c0392b", "val_loss_q", "validation tasks"))
             for log in logs]
    last = max(row["step"] for log in logs for row in log)
    chart(path, lines, "steps", range(0, last + 5000, 5000), (0.005, 0.01, 0.03, 0.1, 0.3), math.log10)


def fill(text, tables):
    """A text with its tables filled."""
    for name, table in tables.items():
        before, tag, after = text.partition(f"<!-- {name} -->\n")
        if not tag or "<!-- end -->" not in after:
            raise SystemExit(f"there is no place for the table {name}: <!-- {name} --> and <!-- end -->")
        text = before + tag + table + "\n" + after[after.index("<!-- end -->"):]
    return text


def filled():
    """{path: its text with all tables filled} of both READMEs."""
    benchmark = json.loads((HERE / "benchmark.json").read_text())
    tables = {HERE.parent / "README.md": {"results": results(SEEDS)},
              HERE / "README.md": {
                  "seeds": every_seed(SEEDS),
                  "methods": methods(), "equal": equal_time(), "failures": failures(),
                  "recipe": one_change(HERE / "recipe"), "ablations": one_change(HERE / "ablations"),
                  "short": short_runs(load(HERE / "fast" / "val"), load(HERE / "paper" / "val")),
                  "map": sentences(json.loads((HERE / "embedding-map.png.json").read_text())),
                  "costs": costs(benchmark),
                  "processes": processes(benchmark)}}
    return {path: fill(path.read_text(), own) for path, own in tables.items()}


def main():
    for path in HERE.rglob("results.json"):
        load(path.parent)  # those without a table are checked too
    for path, text in filled().items():
        write_atomically(path, lambda file: file.write(text.encode()))
    learning_curves(HERE / "learning-curves.png", SEEDS)
    success_curves(HERE / "success-curves.png")


if __name__ == "__main__":
    main()
