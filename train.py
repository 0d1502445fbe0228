"""Train TecNets, or a baseline of the paper, on demonstrations of pushing.

    python train.py --preset smoke      # everything in three minutes, to see it work
    python train.py --name ours         # our recipe for an hour (--steps 33000: all of it); makes missing data first
    python train.py --resume --name ours
    python train.py --init results/weights.pt --data data/mine --lr 1e-4   # fine-tune

writes runs/NAME/log.jsonl, last.pt, best.pt (lowest control loss on validation tasks) and weights alone, to be kept or
shipped: step-N.pt, of the last step and of others with `--keep`. An interrupted run goes on with `--resume` to the same
numbers as an uninterrupted one.

`torchrun --nproc-per-node N train.py ...` shares every batch's tasks among N processes (and GPUs):
the same numbers up to the order of summation. srun and mpirun do as well, with MASTER_ADDR and MASTER_PORT set.
"""
import argparse
import contextlib
import ctypes
import datetime
import io
import json
import math
import signal
import statistics
import time
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

import baselines
import tecnets
from common import (Parser, UserError, checked, choice, command, cores, installed_packages, launched, locked, number,
                    progress, say, warn_of_packages, write_atomically, write_checked)
from data import FULL_DATA, TaskLoader, TaskSet, generate, read_manifest, same_data, task_path
from tecnets import CHOICES, TecNets, control_loss, embedding_loss

FORMAT = 2  # of a checkpoint
SECONDS_PER_DEMO = 1.0  # that a core needs to record one, for the announcement only
CALIBRATION_STEPS = 12
CHECKPOINT_SECONDS = 60
LOG_STEPS = 50

# The methods: network, its settings, the defaults below that it changes, and the options that it has no use for.
LOSS_OPTIONS = ("margin", "lambda_emb", "lambda_U", "lambda_q", "normalise_queries", "support_mean", "negatives", "hinge_mean",
                "ends")
INNER_OPTIONS = "second_order", "inner_steps"
BASELINES = dict(support=1, random_support=0, query=3, features="points", schedule="hold", bfloat16=0)
METHODS = {
    "tecnets": (TecNets, tecnets.Settings, {}, ("demo_frames", *INNER_OPTIONS)),
    "contextual": (baselines.Contextual, baselines.Settings, dict(BASELINES, samples=8),
                   ("demo_frames", *INNER_OPTIONS, *LOSS_OPTIONS)),
    "lstm": (baselines.LSTM, baselines.Settings, dict(BASELINES, samples=8, demo_frames=10), (*INNER_OPTIONS, *LOSS_OPTIONS)),
    "mil": (baselines.MIL, baselines.Settings, dict(BASELINES, samples=10, demo_frames=10), LOSS_OPTIONS),
}
# Every hyper-parameter: type, default (our recipe for two cores), help.
OPTIONS = {
    "method": (choice(*METHODS), "tecnets", f"one of {', '.join(METHODS)}; the baselines change the defaults of --support, "
               "--random-support, --query, --features, --samples, --schedule, --demo-frames and --bfloat16"),
    "data": (str, "data/push", "folder of the data set; the default one is made when absent"),
    "tasks": (number(int, 1), None, "training tasks to use (default: all)"),
    "val_tasks": (number(int, 1), None, "validation tasks to use (default: all)"),
    "minutes": (number(float, 0.1), 60.0, "training time, turned into a number of steps by a calibration"),
    "steps": (number(int, 20), None, "number of steps, in place of --minutes"),
    "batch": (number(int, 2, 10_000), 16, "B, tasks a step"),
    "support": (number(int, 1, 1000), 5, "K, support demos a task"),
    "random_support": (number(int, 0, 1), 1, "1: every step draws its K from 1 to --support"),
    "query": (number(int, 1, 1000), 1, "Q, query demos a task"),
    "samples": (number(int, 1, 1000), 4, "control samples of the support and of the query set a task"),
    "early": (number(float, 1, 10), 3.0, "times of control samples are T u^early: 1 uniform (paper), more favours the start"),
    "mirror": (number(int, 0, 1), None, "1: half of the tasks are seen in a mirror (default: where the data tell how)"),
    "recolour": (number(int, 0, 1), None, "1: half of the tasks are seen with green and blue exchanged (default: where the data "
                 "allow it)"),
    "hue": (number(float, 0, 3.14), 0.6, "radians by which the colours of a task are turned at most, at random"),
    "pairs": (number(int, 0, 1), None, "1: tasks of the same objects are drawn together (default: where the data have pairs)"),
    "demo_frames": (number(int, 2), 2, "frames of a demonstration that lstm and mil read, evenly spaced"),
    "chunk": (number(int, 1), 256, "images a backward pass holds in memory"),
    "threads": (number(int, 1, 1000), 1, "that prepare batches; a GPU wants several"),
    "lr": (number(float, 0, 1), 1e-3, "Adam's learning rate, the peak of the schedule"),
    "schedule": (choice("one-cycle", "constant", "hold"), "one-cycle", "of the learning rate: one-cycle, constant, or hold: constant, and "
                 "down to zero in the last fifth of the steps"),
    "margin": (number(float, 0), 0.1, "of the embedding loss"),
    "lambda_emb": (number(float, 0), 1.0, "weight of the embedding loss"),
    "lambda_U": (number(float, 0), 1.0, "weight of the support's control loss"),
    "lambda_q": (number(float, 0), 1.0, "weight of the query's control loss"),
    "normalise_queries": (number(int, 0, 1), 1, "1: cosine similarity (paper); 0: raw queries (official code)"),
    "support_mean": (choice(*CHOICES["support_mean"]), "mean-norm", "mean-norm (paper) or norm-mean-norm (official code)"),
    "negatives": (choice(*CHOICES["negatives"]), "sentences", "other tasks' sentences (paper) or queries (official code)"),
    "hinge_mean": (choice(*CHOICES["hinge_mean"]), "violated", "pairs of tasks over which the hinge is averaged: all (paper), "
                   "or violated, those that violate the margin"),
    "ends": (choice(*CHOICES["ends"]), "both", "frames that are embedded: both, first or last"),
    "features": (choice(*CHOICES["features"]), "flat", "of the last convolution's maps: flat (paper), or points (MIL)"),
    "inner_steps": (number(int, 1, 100), 1, "MIL's gradient steps on a demonstration"),
    "second_order": (number(int, 0, 1), 1, "1: MIL's meta-gradient goes through the inner gradient; 0: first order, "
                     "which leaves its learned loss as it was drawn"),
    "validate_every": (number(int, 1), 500, "steps between validations"),
    "validation_batches": (number(int, 1), 8, "batches of a validation"),
    "keep": (number(int, 1, 1000), 1, "times, evenly spaced, at which the weights are kept, the last one being the last step"),
    "seed": (number(int, 0), 0, "of the weights and the batches"),
    "bfloat16": (number(int, 0, 1), None, "1: networks in bfloat16 (default where the processor has it; Intel's without AMX "
                 "are faster at 0)"),
    "device": (choice("cpu", "cuda"), "cpu", "cpu or cuda"),
}
DEFAULTS = {name: default for name, (_, default, _) in OPTIONS.items()}
BEFORE = dict(recolour=0, hue=0.0, pairs=0, hinge_mean="all")  # what programs did that lacked these options
SMOKE_DATA = {"tasks": {"train": 16, "val": 4, "test": 4}, "demos": 6, "seed": 0}
CHANGEABLE = ("device", "data", "threads")  # when a run is resumed
PRESETS = {
    "ours": {},
    "paper": dict(batch=64, support=5, random_support=0, query=5, samples=1, early=1.0, mirror=0, recolour=0, hue=0.0, pairs=0, lr=5e-4,
                  schedule="constant", steps=400_000, lambda_U=0.1, lambda_q=0.1, hinge_mean="all"),
    "smoke": dict(data="data/smoke", batch=8, support=2, query=2, minutes=1.0, validate_every=50,
                  validation_batches=2),
}


def parse(argv=None):
    """(the run's folder, preset, whether to resume, the checkpoint to start from, the options that were given)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, default=None, help="changes the defaults below (default: ours)")
    parser.add_argument("--name", default=None, help="of the run's folder in runs/, the method's or the preset's by default")
    parser.add_argument("--resume", action="store_true", default=False, help="go on with an interrupted run; --device, "
                        "--data and --threads may change, as after a move to another machine")
    parser.add_argument("--init", metavar="CHECKPOINT", default=None, help="start from the weights of a checkpoint: fine-tuning")
    for name, (kind, default, text) in OPTIONS.items():
        text += f" (default: {default})" if default is not None else ""
        parser.add_argument("--" + name.replace("_", "-"), dest=name, type=kind, help=text)
    given = vars(parser.parse_args(argv))
    preset, name, resume, init = (given.pop(key) for key in ("preset", "name", "resume", "init"))
    return Path("runs") / (name or given.get("method", preset or "ours")), preset, resume, init, given


def keep_freed_memory():
    """Let glibc keep what is freed: handing big blocks back costs a quarter of a step in page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def has_bfloat16(device):
    return torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()


# Several processes ----------------------------------------------------------------------------

def join(device):
    """Join the processes that torchrun, srun or mpirun started, if any. Raises UserError if they cannot be found."""
    rank, processes, local_rank = launched()
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if processes > 1:
        try:
            dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=processes,
                                    timeout=datetime.timedelta(days=1))  # while the first process makes the data
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the {processes} processes do not find each other: set MASTER_ADDR and MASTER_PORT ({error})")


def add_up(tensors):
    """Replace tensors by their sums over all processes, in one exchange."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def first_then_others(make):
    """What `make()` returns, called by the first process before the others."""
    made = make() if launched()[0] == 0 else None
    if dist.is_initialized():
        dist.barrier()
    return make() if made is None else made


# A run ----------------------------------------------------------------------------------------

def load_checkpoint(path, device="cpu", content=None):
    """The dict of a checkpoint, from its file or the file's content. Raises UserError if it is missing or not one of ours."""
    try:
        content = Path(path).read_bytes() if content is None else content
        checkpoint = torch.load(io.BytesIO(checked(content)), map_location=device, weights_only=True)
        version = checkpoint["format"]
        checkpoint["options"] = {**DEFAULTS, **BEFORE, **checkpoint["options"]}
        for name, (kind, default, _) in OPTIONS.items():
            if checkpoint["options"][name] != default:
                kind(str(checkpoint["options"][name]))  # raises if it is not what the program admits
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: train one with python train.py")
    except OSError:
        raise
    except Exception:  # torch raises whatever the damaged bytes lead it to
        raise UserError(f"{path} is not a checkpoint of this program, or damaged: train anew or take another")
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this program reads {FORMAT}: train anew")
    return checkpoint


def load_model(path, device="cpu", content=None):
    """(the network in evaluation mode, the checkpoint's dict)."""
    checkpoint = load_checkpoint(path, device, content)
    try:
        network, settings, _, unused = METHODS[checkpoint["options"]["method"]]
        model = network(settings(**checkpoint["settings"])).to(device)
        model.load_state_dict(checkpoint["model"])
        if not all(values.isfinite().all() for values in checkpoint["model"].values()) or not (model.state_std > 0).all():
            raise ValueError("not finite")
        if "demo_frames" in unused and checkpoint["options"]["demo_frames"] != DEFAULTS["demo_frames"]:
            raise ValueError("demo_frames")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise UserError(f"{path} does not hold usable weights and settings of this program: take another checkpoint")
    return model.eval(), checkpoint


def to_tensors(batch, device):
    return {name: torch.from_numpy(batch[name]).to(device, non_blocking=True)
            for name in ("frames_U", "frames_q", "images", "states", "actions")}


def open_data(options):
    """The training and validation sets; what is missing of the data is made first."""
    folder, counts = Path(options["data"]), {"train": options["tasks"], "val": options["val_tasks"]}  # None: all
    if (folder / "manifest.json").exists():
        manifest = read_manifest(folder)
        tasks = {split: min(count or manifest["tasks"][split], manifest["tasks"][split]) for split, count in counts.items()}
    else:
        manifest = SMOKE_DATA if options["preset"] == "smoke" else FULL_DATA
        tasks = {**manifest["tasks"], **{split: count for split, count in counts.items() if count}}
    missing = sum(not task_path(folder, split, index).exists() for split in tasks for index in range(tasks[split]))
    if missing and manifest["seed"] is not None:
        minutes = missing * manifest["demos"] * SECONDS_PER_DEMO / cores() / 60
        say(f"making {missing} tasks of the data set {folder}: about {minutes:.1f} min on {cores()} cores")
        generate(folder, tasks, manifest["demos"], manifest["seed"])
    return [TaskSet(folder, split, count) for split, count in counts.items()]


@torch.no_grad()
def validate(model, loader, options):
    """Means over the first batches of `loader`: the control loss on query demos; where tasks come in pairs, the same with the
    partner's demonstrations, which is no higher where a network does not heed them; and TecNets' retrieval accuracy."""
    rows = []
    for position in range(options["validation_batches"]):
        batch = to_tensors(loader.batch(position), options["device"])
        s_U = model.embed(batch["frames_U"])
        images, states, actions = (batch[name][:, 1] for name in ("images", "states", "actions"))
        rows.append({"val_loss_q": control_loss(model.predict(images, states, s_U), actions).item()})
        if loader.group == 2:
            partners = s_U.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            rows[-1]["val_loss_partner"] = control_loss(model.predict(images, states, partners), actions).item()
        if options["method"] == "tecnets":
            s_q = model.embed(batch["frames_q"][:, :, None])
            rows[-1]["val_accuracy"] = embedding_loss(s_U, s_q, negatives=model.settings.negatives)[1].item()
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


class Run:
    """One training run: the model and everything that a resumed run needs to go on as the same run."""

    def __init__(self, folder, options, task_set, val_set, checkpoint=None, init=None):
        self.folder, self.is_first = folder, launched()[0] == 0
        self.manifest = same_data(task_set.manifest)
        if checkpoint and same_data(checkpoint["manifest"]) != self.manifest:
            raise UserError(f"{options['data']} is not the data set that {folder} was started with: bring that one back, "
                            "or say with --data where it is now")
        allowed = {name: int(bool(self.manifest[name])) for name in ("mirror", "recolour", "pairs") if options[name] is None}
        self.options = {**options, **allowed, "tasks": task_set.n_tasks, "val_tasks": val_set.n_tasks}
        self.step, self.seconds, self.best, self.log, self.recent_losses = 0, 0.0, float("inf"), [], []
        self.build_model(task_set, init)
        self.build_loaders(task_set, val_set)
        self.steps = checkpoint["steps"] if checkpoint else options["steps"] or self.calibrate()
        self.build_scheduler()
        if checkpoint:
            self.load(checkpoint)
        else:
            self.save("last.pt")

    def build_model(self, task_set, init):
        """The network and its optimiser; `init`, what load_model returned, gives its weights and state statistics."""
        options = self.options
        torch.manual_seed(options["seed"])
        network, settings, *_ = METHODS[options["method"]]
        chosen = {field.name: options[field.name] for field in fields(settings) if field.name in options}
        sizes = {"image_size": task_set.frame_shape[0], **{name: self.manifest[name] for name in ("state_dim", "action_dim")}}
        self.model = network(settings(**sizes, **chosen), *task_set.state_statistics()).to(options["device"])
        self.model.use_bfloat16 = bool(options["bfloat16"])
        if init:
            given, content = init
            shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (self.model, given)]
            if content["options"]["method"] != options["method"] or shapes[0] != shapes[1]:
                raise UserError(f"{options['init']} is of another method, or of other sizes than {options['data']}: "
                                "--init needs weights of the same")
            self.model.load_state_dict(given.state_dict())
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=options["lr"])

    def build_loaders(self, task_set, val_set):
        options = self.options
        if options["demo_frames"] > task_set.horizon:
            raise UserError(f"--demo-frames {options['demo_frames']}: a demonstration has {task_set.horizon} frames")
        sizes = [options[name] for name in ("support", "query", "samples")]
        self.loader = TaskLoader(task_set, options["batch"], *sizes, options["seed"], options["early"],
                                 *(bool(options[name]) for name in ("random_support", "mirror", "recolour")), options["hue"],
                                 bool(options["pairs"]), options["demo_frames"], options["threads"], launched()[:2])
        B, pairs = min(options["batch"], val_set.n_tasks), self.manifest["pairs"] and val_set.n_tasks > 1
        self.val_loader = TaskLoader(val_set, B - B % 2 if pairs else B, 1, *sizes[1:], seed=0, pairs=pairs,  # one shot
                                     demo_frames=options["demo_frames"])

    def build_scheduler(self):
        schedules, schedule = torch.optim.lr_scheduler, self.options["schedule"]
        if schedule == "one-cycle":
            self.scheduler = schedules.OneCycleLR(self.optimiser, self.options["lr"], total_steps=self.steps + 1, pct_start=0.1,
                                                  cycle_momentum=False)
        else:
            fall = {"constant": 0, "hold": 0.2}[schedule] * self.steps
            self.scheduler = schedules.LambdaLR(self.optimiser, lambda step: min(1, (self.steps - step) / fall) if fall else 1)

    def calibrate(self):
        """The number of steps that fit into --minutes, from the pace of a few that change nothing."""
        seconds = []
        for _ in range(CALIBRATION_STEPS):
            start = time.monotonic()
            self.model.backward(to_tensors(next(self.loader), self.options["device"]), self.options["chunk"])
            self.model.zero_grad()
            seconds.append(time.monotonic() - start)
        self.loader.load_state_dict({"seed": self.options["seed"], "position": 0})
        start = time.monotonic()
        validate(self.model, self.val_loader, self.options)
        pace = statistics.median(seconds) + (time.monotonic() - start) / self.options["validate_every"]
        steps = torch.tensor([max(10, int(self.options["minutes"] * 60 / pace)) * self.is_first], device=self.options["device"])
        add_up([steps])  # the first process's
        return int(steps)

    def save(self, name, weights_only=False):
        if not self.is_first:
            return
        state = {"format": FORMAT, "options": self.options, "manifest": self.manifest, "packages": installed_packages(),
                 "settings": vars(self.model.settings), "step": self.step, "steps": self.steps, "seconds": self.seconds,
                 "model": self.model.state_dict()}
        if not weights_only:
            state |= {"best": self.best, "log": self.log, "recent_losses": self.recent_losses, "generator": torch.get_rng_state(),
                      **{name: getattr(self, name).state_dict() for name in ("optimiser", "scheduler", "loader")}}
        write_checked(self.folder / name, lambda file: torch.save(state, file))
        lines = "".join(json.dumps(row) + "\n" for row in self.log)
        write_atomically(self.folder / "log.jsonl", lambda file: file.write(lines.encode()))

    def load(self, state):
        try:
            self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
            self.log, self.recent_losses = state["log"], state["recent_losses"]
            for name in ("model", "optimiser", "scheduler", "loader"):
                getattr(self, name).load_state_dict(state[name])
            torch.set_rng_state(state["generator"].cpu())
            if not self.step == self.loader.position == self.scheduler.last_epoch <= self.steps:
                raise ValueError("of different steps")
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
            raise UserError(f"{self.folder}/last.pt does not hold the state of such a run: start another --name")

    def train(self, stop):
        """Train to the last step, or until `stop()` in any process; either way last.pt holds the state."""
        def agreed():
            stops = torch.tensor(int(stop()), device=self.options["device"])
            add_up([stops])
            return stops

        first, began, saved = self.step, time.monotonic() - self.seconds, time.monotonic()
        kept = {math.ceil(self.steps * (i + 1) / self.options["keep"]) for i in range(self.options["keep"])}
        while self.step < self.steps and not agreed():
            losses = self.model.backward(to_tensors(next(self.loader), self.options["device"]), self.options["chunk"])
            add_up([*(p.grad for p in self.model.parameters() if p.grad is not None), *losses.values()])
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            if not torch.isfinite(losses["loss"] + norm):
                raise UserError(f"step {self.step + 1}: the loss or its gradient is not finite; {self.folder}/last.pt "
                                "holds what was saved before it: start another --name with a lower --lr")
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.scheduler.step()
            self.step += 1
            self.seconds = time.monotonic() - began
            self.recent_losses.append([losses[name].item() for name in losses])
            if self.step % LOG_STEPS == 0 or self.step == self.steps:
                means = torch.tensor(self.recent_losses).mean(0).tolist()
                self.recent_losses.clear()
                self.log.append({"step": self.step, **dict(zip(losses, means)), "lr": self.scheduler.get_last_lr()[0],
                                 "seconds": round(self.seconds, 1)})
                self.show()
            if self.step % self.options["validate_every"] == 0 or self.step == self.steps:
                values = validate(self.model, self.val_loader, self.options)
                self.log.append({"step": self.step, **values})
                if values["val_loss_q"] < self.best:
                    self.best = values["val_loss_q"]
                    self.save("best.pt")
                saved = 0
            if self.step in kept:
                self.save(f"step-{self.step}.pt", weights_only=True)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save("last.pt")
                saved = time.monotonic()
        if self.step > first:  # a finished run keeps its bytes: an evaluation knows its checkpoint by them
            self.save("last.pt")

    def show(self):
        if not self.is_first:
            return
        row = self.log[-1]
        pace = self.step / self.seconds
        values = "  ".join(f"{name} {row[name]:.4f}" for name in ("loss_q", "loss_emb", "accuracy") if name in row)
        progress(f"step {self.step}/{self.steps}  {pace:.2f}/s  {values}  best val {self.best:.4f}  "
                 f"{(self.steps - self.step) / pace / 60:.1f} min left", end=self.step == self.steps)


def choose_options(preset, given):
    """All options of a new run: the defaults, changed by the preset, by the method, and by what is given."""
    preset = preset or "ours"
    if "minutes" in given and "steps" in given:
        raise UserError("give --minutes or --steps, not both")
    preset_options = dict(PRESETS[preset])
    if "minutes" in given:
        preset_options["steps"] = None
    method = given.get("method", "tecnets")
    if preset == "paper" and method != "tecnets":
        raise UserError(f"--preset paper is a recipe of tecnets: leave it out, {method} has its own settings")
    _, _, changed, unused = METHODS[method]
    for name in given:
        if name in unused:
            raise UserError(f"{method} has no use for --{name.replace('_', '-')}: leave it out")
    options = {**DEFAULTS, **preset_options, **changed, **given}
    if options["bfloat16"] is None:
        options["bfloat16"] = int(has_bfloat16(options["device"]))
    return {"preset": preset, **options}


def start(folder, preset, resume, init, given):
    """The new or resumed run of a folder. Raises UserError if it cannot be started."""
    if resume:
        checkpoint = load_checkpoint(folder / "last.pt")
        if "optimiser" not in checkpoint:
            raise UserError(f"{folder}/last.pt holds weights only and cannot be resumed: start another --name")
        options = checkpoint["options"]
        for name, value in {"preset": preset, "init": init, **given}.items():
            if value not in (None, options.get(name)) and name not in CHANGEABLE:
                raise UserError(f"{folder} was started with another --{name.replace('_', '-')} ({options.get(name)}): "
                                "resume without it, or start another --name")
        options, init = {**options, **given}, None
        if not (Path(options["data"]) / "manifest.json").exists():  # a new one is not made
            raise UserError(f"no data set in {options['data']}, where {folder} had it: say with --data where it is now")
        warn_of_packages(checkpoint.get("packages", {}), folder)
    else:
        if (folder / "last.pt").exists():
            raise UserError(f"{folder} holds a run: go on with --resume, choose another --name, or delete it")
        checkpoint, options = None, {**choose_options(preset, given), "init": init}
        if "data" in given:
            read_manifest(Path(given["data"]))  # perhaps mistyped: not made
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("no cuda device here: choose --device cpu")
    join(options["device"])
    init = load_model(init, options["device"]) if init else None
    return Run(folder, options, *first_then_others(lambda: open_data(options)), checkpoint, init)


def main():
    folder, *arguments = parse()
    keep_freed_memory()
    is_first = launched()[0] == 0
    with locked(folder) if is_first else contextlib.nullcontext():
        run = start(folder, *arguments)
        signals = []
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda signal_number, _: signals.append(signal_number))
        if is_first:
            say(f"{folder}: step {run.step} of {run.steps}, {run.options['tasks']} training tasks, {run.options['batch']} a step")
        run.train(stop=lambda: bool(signals))
    if is_first:
        say(f"stopped at step {run.step} of {run.steps}: go on with --resume" if run.step < run.steps else
            f"{folder}/best.pt: control loss {run.best:.4f} on validation tasks, {run.seconds / 60:.1f} min")
    if dist.is_initialized():
        dist.destroy_process_group()
    if run.step < run.steps:
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])


if __name__ == "__main__":
    command(main, "lower --chunk first, then --batch or --samples")
