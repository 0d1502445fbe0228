"""Train TecNets, or a baseline of the paper, on demonstrations of pushing.

    python train.py --preset smoke      # everything in three minutes, to see it work
    python train.py --preset quick      # a policy that mostly succeeds, within half an hour
    python train.py --name ours         # our recipe, 2.5 hours; makes missing data first
    python train.py --resume --name ours
    python train.py --init runs/ours/last.pt --data data/more --name more --lr 1e-4   # fine-tune

writes into runs/NAME: log.jsonl, curves.png, last.pt (all that `--resume` needs) and step-N.pt
(weights alone, after the last step; `--snapshots 4` keeps three earlier ones). With `--resume` an
interrupted run loses a minute at most, and ends with the same numbers as an uninterrupted one.

`torchrun --nproc-per-node N train.py ...` shares every batch's tasks among N processes (and GPUs):
the same numbers up to the order of summation. srun and mpirun do as well, with MASTER_ADDR and
MASTER_PORT set.
"""
import argparse
import ctypes
import datetime
import fcntl
import io
import json
import math
import statistics
import time
import zipfile
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import baselines
import tecnets
from common import (UserError, installed_packages, launched, learning_curves, option_parser,
                    progress, run_program, write_atomically)
from data import FULL_DATA, TaskLoader, TaskSet, generate, read_manifest, task_path
from tecnets import TecNets, embedding_loss, processes

FORMAT = 4  # of a checkpoint
CHECKPOINT_SECONDS = 60
LOG_STEPS = 50

# The methods: network, settings, and the defaults of options that it changes.
BASELINE = dict(support=1, random_support=0, query=3, samples=8, schedule="hold", bfloat16=0)
METHODS = {
    "tecnets": (TecNets, tecnets.Settings, {}),
    "contextual": (baselines.Contextual, baselines.Settings, BASELINE),
    "lstm": (baselines.LSTM, baselines.LSTMSettings, BASELINE),
    "mil": (baselines.MIL, baselines.MILSettings, {**BASELINE, "samples": 10}),
}
PRESETS = {
    "ours": {},
    "paper": dict(batch=64, support=5, random_support=0, query=5, samples=1, time_exponent=1.0,
                  mirror=0, recolour=0, hue_jitter=0.0, lr=5e-4, schedule="constant",
                  steps=400_000, bfloat16=0),
    "quick": dict(data="data/quick", support=3, steps=5500, lr=2e-3),
    "smoke": dict(data="data/smoke", batch=8, support=2, query=2, steps=200, validate_every=50,
                  validation_batches=2),
}
MADE_DATA = {  # when absent
    "data/push": FULL_DATA,
    "data/quick": {"tasks": {"train": 320, "val": 16}, "demos": 4, "seed": 0},
    "data/smoke": {"tasks": {"train": 16, "val": 4}, "demos": 6, "seed": 0},
}
STATISTICS = "state_mean", "state_std", "action_mean", "action_std"  # of the training data
SIZES = [field.name for field in fields(tecnets.Sizes)]  # settings that the data tell
CHANGEABLE = "device", "data", "loader_threads", "resume", "name"  # by a resumed run
HELP = {  # of settings
    "demo_frames": "evenly spaced frames of a demonstration that are read",
    "embedding_dim": "numbers in a sentence",
    "filters": "of a convolution",
    "units": "of a fully connected layer",
    "margin": "of the embedding loss",
    "lambda_emb": "weight of the embedding loss",
    "lambda_U": "weight of the control loss on support demonstrations",
    "lambda_q": "weight of the control loss on query demonstrations",
    "normalise_queries": "1: cosine similarity (paper); 0: raw queries (official code)",
    "support_mean": "of embeddings: mean-norm (paper) or norm-mean-norm (official code)",
    "negatives": "other tasks' sentences (paper) or queries (official code)",
    "lstm_units": "of the LSTM",
    "bias_transform": "learned inputs of the first fully connected layer",
    "inner_lr": "rate of the gradient step on a demonstration",
    "inner_clip": "of the elements of that gradient",
    "action_scale": "of the actions in both losses",
}


def parse(argv=None):
    """All options; None where nothing is given and the data, the processor or the run decide."""
    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe.add_argument("--method", choices=METHODS, default="tecnets",
                        help="each has options of its own: see --method NAME --help")
    recipe.add_argument("--preset", choices=PRESETS, default="ours", help="changes defaults")
    chosen, _ = recipe.parse_known_args(argv)
    _, settings, changed = METHODS[chosen.method]
    parser = option_parser(__doc__, parents=[recipe])
    flag = dict(type=int, choices=(0, 1))
    add = parser.add_argument
    add("--name", help="of the run's folder in runs/; the method's or the preset's by default")
    add("--resume", action="store_true", help="go on with the run of that name, if it has begun")
    add("--init", metavar="CHECKPOINT", help="start from a checkpoint's weights (fine-tuning)")
    add("--data", default="data/push", help="folder of the data set; the default one is made")
    add("--tasks", type=int, help="training tasks to use; all by default")
    add("--val-tasks", type=int, help="validation tasks to use; all by default")
    add("--steps", type=int, default=33_000, help="training steps")
    add("--batch", type=int, default=16, help="B, tasks of a step")
    add("--support", type=int, default=5, help="K, support demonstrations of a task")
    add("--random-support", **flag, default=1, help="1: every step draws K from 1 to --support")
    add("--query", type=int, default=1, help="Q, query demonstrations of a task")
    add("--samples", type=int, default=4, help="M, control samples of the support and of the query")
    add("--time-exponent", type=float, default=3.0, help="times of control samples are T u^this, u "
        "uniform: 1 is uniform (paper), more favours the start")
    add("--mirror", **flag, help="1: half of the tasks are seen in a mirror (paper: 0); by default "
        "where the data tell how")
    add("--recolour", **flag, help="1: half of the tasks are seen with green and blue exchanged "
        "(paper: 0); by default where the data allow it")
    add("--hue-jitter", type=float, help="the colours of a task are turned by up to this angle, "
        "drawn at random, in radians (paper: 0); 0.6 by default where --recolour is allowed")
    add("--pairs", **flag, default=0, help="1: the two tasks of a pair of objects come together")
    add("--chunk", type=int, default=256, help="images of which a backward pass keeps the "
        "activations; of more they are computed again")
    add("--loader-threads", type=int, default=1, help="that prepare batches; a GPU wants several")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate, the peak of the schedule")
    add("--schedule", choices=("one-cycle", "constant", "hold"), default="one-cycle",
        help="of the learning rate; hold is constant, and falls to zero in the last fifth")
    add("--validate-every", type=int, default=500, help="steps between validations")
    add("--validation-batches", type=int, default=8, help="batches of a validation")
    add("--snapshots", type=int, default=1, help="times, evenly spaced, at which weights are kept")
    add("--seed", type=int, default=0, help="of the weights and the batches")
    add("--bfloat16", **flag, help="1: networks in bfloat16; by default where the processor has it "
        "(Intel's without AMX are faster at 0)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="to train on")
    for field in fields(settings):
        if field.name in SIZES:
            continue
        kind = dict(type=type(field.default), choices=tecnets.CHOICES.get(field.name))
        default = field.default
        if isinstance(default, bool):
            kind, default = flag, int(default)
        add("--" + field.name.replace("_", "-"), **kind, default=default,
            help=HELP.get(field.name, "a setting of the method"))
    if chosen.preset in ("paper", "quick") and chosen.method != "tecnets":
        parser.error(f"--preset {chosen.preset} is a recipe of tecnets: leave it out")
    parser.set_defaults(**{**PRESETS[chosen.preset], **changed})
    return vars(parser.parse_args(argv))


# Machines -------------------------------------------------------------------------------------

def keep_freed_memory():
    """Let glibc keep what is freed: handing big blocks back costs a quarter of a step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def has_bfloat16(device):
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def machine(device="cpu"):
    """What a run's numbers depend on beside its options, in their last digits."""
    return {**installed_packages(), "processor": torch.backends.cpu.get_cpu_capability(),
            "amx": torch.cpu._is_amx_tile_supported(), "threads": torch.get_num_threads(),
            "processes": processes(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device}


def join(device):
    """Join the processes that torchrun, srun or mpirun started, if any."""
    rank, size, local_rank = launched()
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if size > 1:
        patience = datetime.timedelta(days=1)  # while the first process makes the data
        dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=size,
                                timeout=patience)


def add_up(tensors):
    """Replace tensors by their sums over all processes, in one exchange."""
    if processes() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


# Checkpoints and data -------------------------------------------------------------------------

def load_checkpoint(content, name):
    """The dict of a checkpoint from its file's bytes; `name` is for messages.

    Raises UserError if a bit of it was changed (torch.load would take that), or for other files.
    """
    try:
        intact = zipfile.ZipFile(io.BytesIO(content)).testzip() is None
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        intact &= checkpoint["format"] == FORMAT
    except Exception:  # whatever damaged bytes lead to
        intact = False
    if not intact:
        raise UserError(f"{name} is damaged, or no checkpoint of format {FORMAT}: train anew, or "
                        "take another")
    return checkpoint


def load_model(content, name="the checkpoint"):
    """(the network in evaluation mode, the checkpoint's dict) from the bytes of its file."""
    checkpoint = load_checkpoint(content, name)
    network, settings, _ = METHODS[checkpoint["options"]["method"]]
    model = network(settings(**checkpoint["settings"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint


def open_data(options):
    """The training and the validation set; what is missing of the benchmark's data is made."""
    folder = Path(options["data"])
    sizes = MADE_DATA.get(options["data"])
    if sizes is None or (folder / "manifest.json").exists():
        sizes = read_manifest(folder)
    counts = {"train": options["tasks"], "val": options["val_tasks"]}
    counts = {split: sizes["tasks"][split] if number is None else number
              for split, number in counts.items()}
    missing = sum(not task_path(folder, split, index).exists()
                  for split in counts for index in range(counts[split]))
    if missing and sizes["seed"] is not None and launched()[0] == 0:
        print(f"{folder}: recording {missing} tasks of {sizes['demos']} demonstrations", flush=True)
        generate(folder, counts, sizes["demos"], sizes["seed"], looks=sizes.get("looks"))
    if processes() > 1:
        dist.barrier()  # the others wait for the first
    return [TaskSet(folder, split, counts[split]) for split in counts]


def to_tensors(batch, device):
    """The arrays of a batch that a network takes, without the notes on what was drawn."""
    return {name: torch.from_numpy(batch[name]).to(device, non_blocking=True)
            for name in ("frames_U", "frames_q", "images", "states", "actions") if name in batch}


def fine_tune(model, path):
    """Give a network the weights of a checkpoint; the statistics of its data stay its own."""
    given, _ = load_model(Path(path).read_bytes(), path)
    own = {name: model.get_buffer(name) for name in STATISTICS}
    try:
        model.load_state_dict({**given.state_dict(), **own})
    except RuntimeError:
        raise UserError(f"{path} is of another method, or of other sizes than these data: --init "
                        "needs weights of the same")
    others = [f"{name} {value}" for name, value in vars(given.settings).items()
              if value != getattr(model.settings, name)]
    far = []
    for kind in ("state", "action"):
        mean, std, new_mean, new_std = (getattr(network, f"{kind}_{name}").cpu()
                                        for network in (given, model) for name in ("mean", "std"))
        differs = torch.maximum((new_mean - mean).abs(), new_std) > 10 * std
        far += [f"{kind} {i}" for i in differs.nonzero().flatten().tolist()]
    if launched()[0] == 0:
        print(f"{path}: weights are taken, the statistics of states and actions are the new data's"
              + f"; it was trained with {', '.join(others)}" * bool(others)
              + f"; more than 10 old deviations away: {', '.join(far)}" * bool(far), flush=True)


# A run ----------------------------------------------------------------------------------------

@torch.no_grad()
def validate(model, loader, options):
    """Means over the first batches of `loader`.

    val_loss_q is the control loss on query demos; val_loss_partner that given the partner's
    demonstrations, where the data have pairs, or else another task's: no higher if the
    demonstration is ignored; val_loss_constant that of the constant action that fits a batch best.
    TecNets only: val_accuracy, of retrieval, and val_norm, the embeddings' median norm (the longer
    they are, the slower they turn).
    """
    rows = []
    model.eval()
    for position in range(options["validation_batches"]):
        batch = to_tensors(loader.batch(position), options["device"])
        s_U = model.embed(batch["frames_U"])
        samples = [batch[name][:, 1] for name in ("images", "states", "actions")]
        row = {"val_loss_q": model.imitation_loss(*samples, s_U).item()}
        expected = model.normalise_actions(samples[2]).flatten(0, 1)
        row["val_loss_constant"] = expected.var(0, correction=0).mean().item()
        if len(s_U) > 1:
            pairs = s_U.unflatten(0, (-1, 2)) if loader.group == 2 else s_U[None]
            others = pairs.roll(1, 1).flatten(0, 1)
            row["val_loss_partner"] = model.imitation_loss(*samples, others).item()
        if isinstance(model, TecNets) and len(s_U) > 1:
            s_q, c = model.embeddings(batch["frames_q"]), model.settings
            row["val_norm"] = s_q.norm(dim=-1).median().item()
            if c.normalise_queries:
                s_q = F.normalize(s_q, dim=-1)
            row["val_accuracy"] = embedding_loss(s_U, s_q, negatives=c.negatives)[1].item()
        rows.append(row)
    model.train()
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


class Run:
    """One training run: the model and everything that a resumed run needs to go on as the same."""

    def __init__(self, folder, options, train_set, val_set):
        self.folder, self.is_first = folder, launched()[0] == 0
        self.options, self.steps, self.manifest = options, options["steps"], train_set.manifest
        self.step, self.seconds, self.log, self.recent_losses = 0, 0.0, [], []
        torch.manual_seed(options["seed"])
        network, settings, _ = METHODS[options["method"]]
        values = {**options, **{name: self.manifest[name] for name in SIZES}}
        chosen = {field.name: type(field.default)(values[field.name])  # 0 and 1 become bool
                  for field in fields(settings)}
        self.model = network(settings(**chosen),
                             **train_set.statistics(mirrored=options["mirror"] != 0))
        self.model.to(options["device"]).use_bfloat16 = bool(options["bfloat16"])
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=options["lr"])
        self.scheduler = self.build_scheduler()
        self.build_loaders(train_set, val_set)
        self.machine = machine(options["device"])
        self.log.append({"step": 0, "machine": self.machine})

    def build_loaders(self, train_set, val_set):
        o = self.options
        if isinstance(self.model, TecNets) and o["batch"] < 2:
            raise UserError("the embedding loss compares tasks: --batch at least 2")
        frames = dict(Q=o["query"], M=o["samples"], demo_frames=self.model.settings.demo_frames,
                      query_frames=isinstance(self.model, TecNets))
        self.loader = TaskLoader(
            train_set, o["batch"], o["support"], seed=o["seed"], **frames,
            time_exponent=o["time_exponent"], random_support=o["random_support"],
            mirror=o["mirror"], recolour=o["recolour"], hue_jitter=o["hue_jitter"],
            pairs=o["pairs"], threads=o["loader_threads"], shard=launched()[:2])
        B = min(o["batch"], val_set.n_tasks)
        pairs = self.manifest["pairs"] and B > 1
        self.val_loader = TaskLoader(
            val_set, B - B % 2 if pairs else B, K=1, seed=0, **frames, time_exponent=1.0,
            random_support=False, mirror=False, recolour=False, hue_jitter=0.0, pairs=pairs)

    def build_scheduler(self):
        schedules, schedule = torch.optim.lr_scheduler, self.options["schedule"]
        if schedule == "one-cycle":
            return schedules.OneCycleLR(self.optimiser, self.options["lr"], pct_start=0.1,
                                        total_steps=self.steps + 1, cycle_momentum=False)
        fall = 0.2 * self.steps
        return schedules.LambdaLR(
            self.optimiser,
            lambda step: 1 if schedule == "constant" else min(1, (self.steps - step) / fall))

    def save(self, name, weights_only=False):
        if not self.is_first:
            return
        state = {"format": FORMAT, "options": self.options, "data": self.manifest,
                 "machine": self.machine, "settings": vars(self.model.settings),
                 "step": self.step, "seconds": self.seconds, "model": self.model.state_dict()}
        if not weights_only:
            state |= {"log": self.log, "recent_losses": self.recent_losses,
                      "generator": torch.get_rng_state()}
            state |= {part: getattr(self, part).state_dict() for part in ("optimiser", "scheduler")}
        write_atomically(self.folder / name, lambda file: torch.save(state, file))
        lines = "".join(json.dumps(row) + "\n" for row in self.log)
        write_atomically(self.folder / "log.jsonl", lambda file: file.write(lines.encode()))
        if any("loss_q" in row for row in self.log):
            learning_curves(self.folder / "curves.png", [self.log])

    def load(self, state):
        """Go on from what `save` wrote."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.log, self.recent_losses = state["log"], state["recent_losses"]
        self.loader.position = self.step
        for part in ("model", "optimiser", "scheduler"):
            getattr(self, part).load_state_dict(state[part])
        torch.set_rng_state(state["generator"])
        others = [f"{name} {value}, not {state['machine'].get(name)}"
                  for name, value in self.machine.items() if state["machine"].get(name) != value]
        if others:
            self.log.append({"step": self.step, "machine": self.machine})
        if others and self.is_first:
            print(f"{self.folder}: goes on to other numbers than without the interruption, as the "
                  f"machine is another: {'; '.join(others)}", flush=True)

    def train(self):
        """Train to the last step; last.pt is about a minute old at the most."""
        o, model = self.options, self.model
        begun_at, saved = self.step, time.monotonic()
        began = saved - self.seconds
        n = o["snapshots"]
        snapshots = {math.ceil(self.steps * (i + 1) / n) for i in range(n)}
        while self.step < self.steps:
            losses = model.backward(to_tensors(next(self.loader), o["device"]), o["chunk"])
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            add_up([*gradients, *losses.values()])
            norm = torch.nn.utils.get_total_norm(gradients)
            if not torch.isfinite(losses["loss"] + norm):
                raise UserError(
                    f"step {self.step + 1}: the loss or its gradient is not finite: check the "
                    "data, or start another --name with a lower --lr")
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.scheduler.step()
            self.step += 1
            self.seconds = time.monotonic() - began
            self.recent_losses.append(torch.stack([*losses.values()]).tolist())
            last = self.step == self.steps
            if self.step % LOG_STEPS == 0 or last:
                means = torch.tensor(self.recent_losses).mean(0).tolist()
                means = dict(zip(losses, means))
                self.recent_losses.clear()
                self.log.append({"step": self.step, **means, "lr": self.scheduler.get_last_lr()[0],
                                 "seconds": round(self.seconds, 1)})
                if self.is_first:
                    self.show(means)
            if self.step % o["validate_every"] == 0 or last:
                values = validate(model, self.val_loader, o)
                self.log.append({"step": self.step, **values})
            if self.step in snapshots:
                self.save(f"step-{self.step}.pt", weights_only=True)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save("last.pt")
                saved = time.monotonic()
        if self.step > begun_at:  # a finished run keeps its bytes: evaluations know it by them
            self.save("last.pt")

    def show(self, losses):
        pace, left = self.step / self.seconds, self.steps - self.step
        values = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        progress(f"step {self.step}/{self.steps}  {pace:.2f}/s  {values}  "
                 f"{left / pace / 60:.1f} min left", end=not left)


def choose(folder, options):
    """(the run's options, its checkpoint or None) of a new run, or of one to be resumed.

    Raises UserError if the folder holds a run that is not to be resumed, or one of other options.
    """
    path = folder / "last.pt"
    if not path.exists():
        if options["bfloat16"] is None:
            options["bfloat16"] = int(has_bfloat16(options["device"]))
        return options, None
    if not options["resume"]:
        raise UserError(f"{folder} holds a run: go on with --resume, choose another --name, or "
                        "delete it")
    checkpoint = load_checkpoint(path.read_bytes(), path)
    begun = checkpoint["options"]
    for name, value in options.items():
        if value not in (None, begun.get(name)) and name not in CHANGEABLE:
            raise UserError(f"{folder} was begun with another --{name.replace('_', '-')} "
                            f"({begun.get(name)}): repeat its command, or start another --name")
    return {**begun, **{name: options[name] for name in CHANGEABLE}}, checkpoint


def start(folder, options):
    """The new or resumed run of a folder."""
    options, checkpoint = choose(folder, options)
    other_data = UserError(f"{options['data']} is not the data set that {folder} was begun with: "
                           "bring that one back, or say with --data where it is")
    moved = checkpoint and options["data"] != checkpoint["options"]["data"]
    if moved or checkpoint and (Path(options["data"]) / "manifest.json").exists():
        manifest = read_manifest(options["data"])
        if manifest | checkpoint["data"] != manifest:
            raise other_data
    join(options["device"])
    train_set, val_set = open_data(options)
    options |= {"tasks": train_set.n_tasks, "val_tasks": val_set.n_tasks}
    run = Run(folder, options, train_set, val_set)
    if checkpoint:
        for name in STATISTICS:
            if not torch.allclose(run.model.get_buffer(name).cpu(), checkpoint["model"][name]):
                raise other_data
        run.load(checkpoint)
    elif options["init"]:
        fine_tune(run.model, options["init"])
    steps = torch.tensor(run.step, device=options["device"])
    add_up([steps])
    if steps != run.step * processes():
        raise UserError(f"not all processes see the same {folder}/last.pt: put it where they do")
    return run


def main():
    options = parse()
    method, preset = options["method"], options["preset"]
    folder = Path("runs") / (options["name"] or (preset if method == "tecnets" else method))
    keep_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    is_first = launched()[0] == 0
    with open(folder / ".lock", "w") as lock:
        try:
            if is_first:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being trained by another process: choose another --name")
        for stale in folder.glob("*.unfinished") if is_first else ():  # left by a kill
            stale.unlink()
        run = start(folder, options)
        if is_first:
            print(f"{folder}: step {run.step} of {run.steps}, {run.options['tasks']} training "
                  "tasks", flush=True)
        run.train()
    if is_first:
        print(f"{folder}/last.pt: {run.seconds / 60:.1f} min")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
