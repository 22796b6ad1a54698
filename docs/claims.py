"""The runs behind docs/results.md: what the papers claim, on the embedded model.

    python docs/claims.py list                        the runs of each claim
    python docs/claims.py show grpo-s0                the command of one run
    python docs/claims.py run grpo-s0 nft             some runs: by name, without the seed, by claim (4), or all
    python docs/claims.py table                       the tables of docs/results/claim-*.md
    python docs/claims.py figures                     their figures (needs matplotlib)
    python docs/claims.py ratios gpu-guard            GRPO-Guard's ratios by step: of a run, or of metrics.csv files

All of them exist in two sizes: one for a GPU, and with SCALE=cpu in the environment one for two CPU cores, where a run
is the script as it comes plus the flags of the claim, and takes two to six minutes.

A run is its script with the flags that `show` prints, then docs/evaluate.py on its last weights. `run --parallel 16
--gpus 2` does many at once on the GPUs; after an interruption the same line goes on with the runs that it had not
finished. A run leaves rows in the tables of docs/results/, and is only repeated with `--again`: its metrics.csv in
gpu.csv or cpu.csv (the columns that their header names), GRPO-Guard's columns of single steps in steps.csv, and the
evaluations in finals.csv.
"""

import argparse
import csv
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SCALE = os.environ.get("SCALE", "gpu")
SEEDS = (0, 1, 2)
CPU = SCALE == "cpu"
if SCALE not in ("gpu", "cpu"):
    sys.exit(f"error: SCALE={SCALE} should be gpu or cpu")

# On a GPU: 48 prompts x 24 = 1152 images an epoch, 30 epochs, evaluated every 2 epochs. On a CPU: the scripts' own
# defaults for the embedded model, 32 x 16 = 512 images an epoch, 10 epochs, evaluated after 5 and 10. Both: full
# fine-tuning from the same base model without guidance, evaluated on 96 held-out prompts x 4 (x 1 at last on a CPU).
GPU_WORLD = {
    "train.unique_sample_num_per_epoch": 48, "train.group_size": 24, "train.max_epochs": 30,
    "eval.images_per_prompt": 4, "eval.per_device_batch_size": 384, "eval.eval_freq": 2, "checkpoint_freq": 1000,
}  # fmt: skip
POLICY_GRADIENT = {"train.train_steps": None, "train.num_train_steps": 4}
GPU_SCRIPTS = {
    "grpo": POLICY_GRADIENT | {
        "train.per_device_batch_size": 1152, "train.gradient_step_per_epoch": 1,
        "train.learning_rate": 2e-4, "train.clip_range": 1e-4,
    },
    "grpo_guard": POLICY_GRADIENT | {
        "train.per_device_batch_size": 576, "train.gradient_step_per_epoch": 2,
        "train.learning_rate": 1e-4, "train.clip_range": 3e-5,
    },
    "nft": {"train.per_device_batch_size": 288, "train.num_train_steps": 6},
    "awm": {"train.per_device_batch_size": 288, "train.num_train_steps": 6},
    "dpo": {"train.per_device_batch_size": 288, "train.num_train_steps": None},
    "dgpo": {"train.per_device_batch_size": 288, "train.num_train_steps": 4},
}  # fmt: skip
EXAMPLES = ("awm", "dpo", "dgpo")
CPU_WORLD = {"train.max_epochs": 10}
CPU_SCRIPTS = {"grpo": 2, "grpo_guard": 2, "nft": 3, "awm": 3, "dpo": None, "dgpo": 3}
CPU_SCRIPTS = {script: {"train.num_train_steps": count} for script, count in CPU_SCRIPTS.items()}
WORLD, SCRIPTS = (CPU_WORLD, CPU_SCRIPTS) if CPU else (GPU_WORLD, GPU_SCRIPTS)
TOP = ("reward", "finetune_type", "lora_rank", "lora_alpha")  # keys that are not in a section


def run(script, **changes):
    """(script, {dotted key: value}) of a run; a change without a dot is one of train."""
    changes = {key.replace("eval_", "eval.") if key.startswith("eval_") else key: v for key, v in changes.items()}
    changes = {key if "." in key or key in TOP else f"train.{key}": v for key, v in changes.items()}
    return script, WORLD | SCRIPTS[script] | changes


def group(size):
    """Groups of another size, at equal images."""
    return run("grpo", group_size=size, unique_sample_num_per_epoch=(512 if CPU else 1152) // size)


def steps(count, **changes):
    """Another number of sampling steps; the trained ones are of the same part of the way."""
    if CPU:
        return run("grpo", num_inference_steps=count, train_steps=list(range(count // 3, count // 3 + 2)), **changes)
    return run("grpo", num_inference_steps=count, num_train_steps=min(4, count - 1), **changes)


CPS = {"dynamics_type": "CPS", "noise_level": 0.8}
DANCE = {"dynamics_type": "Dance-SDE", "noise_level": 0.3}
X = 86 if CPU else 37.5  # (h (1 + a²/2))² of the trained steps is on average 1 / this, so a KL of x needs so much more
BETAS = (0.003, 0.01) if CPU else (0.01, 0.04)
SLOW = {"learning_rate": 1e-4}  # as slow as GRPO-Guard; on a GPU that is with its learning rate and updates
SLOW |= {"max_epochs": 40} if CPU else {"per_device_batch_size": 576, "gradient_step_per_epoch": 2}


def proxy(script, **changes):
    """Trained on a reward that can be cheated, evaluated by the checker, for longer."""
    changes = {"max_epochs": 20 if CPU else 60} | changes
    return run(script, reward={"docs/proxy.py:colour": 1}, eval_reward={"shapes": 1}, **changes)


# {claim: {name: run}}; a name stands for its three seeds, and a run may serve several claims
CLAIMS = {
    "1 Flow-GRPO": {
        "grpo": run("grpo"),
        **{f"grpo-noise{a:g}": run("grpo", noise_level=a) for a in (0.1, 0.4, 1.0)},
        **{f"grpo-group{n}": group(n) for n in (4, 8, 16) if n != 16 or not CPU},
    },
    "2 KL": {
        "grpo": run("grpo"),
        **{f"grpo-kl-v{beta:g}": run("grpo", kl_beta=beta) for beta in BETAS},
        **{f"grpo-kl-x{beta * X:g}": run("grpo", kl_beta=beta * X, kl_type="x-based") for beta in BETAS},
    },
    "3 DanceGRPO": {
        "grpo": run("grpo"),
        "grpo-same": run("grpo", same_init_noise=True),
        "dance.3": run("grpo", **DANCE),
        "dance.3-same": run("grpo", **DANCE, same_init_noise=True),
        "dance.7": run("grpo", **DANCE | {"noise_level": 0.7}),
    },
    "4 MixGRPO": {
        "mix1": run("grpo", num_train_steps=1),
        "mix2": run("grpo", num_train_steps=2, train_steps=None),
        "grpo": run("grpo"),
        "mix9": run("grpo", num_train_steps=None, train_steps=None),
        "mix2-early": run("grpo", num_train_steps=2, train_steps=[0, 1, 2]),
        "mix2-middle": run("grpo", num_train_steps=2, train_steps=[3, 4, 5]),
        "mix2-late": run("grpo", num_train_steps=2, train_steps=[6, 7, 8]),
        "mix2-sliding": run("grpo", num_train_steps=2, train_steps=None, shift_interval=4),
    },
    "5 TempFlow-GRPO": {
        "grpo": run("grpo"),
        "grpo-noise-aware": run("grpo", loss_weighting="noise-aware"),
        "mix1": run("grpo", num_train_steps=1),
        "branch": run("grpo", num_train_steps=1, same_init_noise=True),
        "branch-noise-aware": run("grpo", num_train_steps=1, same_init_noise=True, loss_weighting="noise-aware"),
        "mix9": run("grpo", num_train_steps=None, train_steps=None),
        "mix9-noise-aware": run("grpo", num_train_steps=None, train_steps=None, loss_weighting="noise-aware"),
    },
    "6 GRPO-Guard": {
        "grpo": run("grpo"),
        "guard": run("grpo_guard"),
        "guard-plain": run("grpo_guard", reweight=False),
    },
    "over-optimisation": {
        "grpo-proxy": proxy("grpo"),
        "grpo-slow-proxy": proxy("grpo", **SLOW),
        "grpo-kl-proxy": proxy("grpo", kl_beta=BETAS[1]),
        "guard-proxy": proxy("grpo_guard"),
    },
    "7 CPS": {
        "grpo": run("grpo"),
        "cps": run("grpo", **CPS),
        **{f"{name}-T{T}": steps(T, **how) for T in (6, 4) for name, how in (("grpo", {}), ("cps", CPS))},
    },
    "8 PaCo-RL": {
        "paco-32": run("grpo", eval_resolution=64),
        "paco-64": run("grpo", eval_resolution=64, resolution=64),
    },
    "9 DiffusionNFT": {
        "grpo": run("grpo"),
        "nft": run("nft"),
        "nft-cps": run("nft", **CPS),
        "nft-flow": run("nft", dynamics_type="Flow-SDE", noise_level=0.7),
        "nft-beta.1": run("nft", nft_beta=0.1),
        "nft-positive": run("nft", negative_term=False),
        "nft-decay.5": run("nft", old_decay_slope=0.001, old_decay_max=0.5),
    },
    "10 the rest": {
        "grpo": run("grpo"),
        "grpo-global-std": run("grpo", global_std=True),
        "grpo-ema": run("grpo", ema_decay=0.9, ema_update_interval=1),
        **({"grpo-one-update": run("grpo", gradient_step_per_epoch=1)} if CPU else {}),
        "grpo-lora": run("grpo", finetune_type="lora", learning_rate=2e-3),
    },
    "examples": {
        "grpo": run("grpo"),
        "nft": run("nft"),
        "awm": run("awm"),
        "awm-ema1": run("awm", ema_beta=1.0),
        "awm-free": run("awm", clip_range=10.0, ema_beta=0.0),
        "dpo": run("dpo"),
        "dpo-beta10": run("dpo", dpo_beta=10.0),
        "dgpo": run("dgpo"),
        "dgpo-free": run("dgpo", clip_range=10.0, dgpo_beta=10.0),
    },
}
FALLEN = ("awm-free", "dpo-beta10", "dgpo-free")  # some have fewer seeds or epochs, or no evaluations at last
CUT = ("awm",) if CPU else ("dpo", "awm-ema1")  # a time limit ended them: fewer epochs, or no evaluations at last
RUNS = {f"{name}-s{seed}": runs[name] for runs in CLAIMS.values() for name in runs for seed in SEEDS}
# {label: name} of the README's figure: the scripts as they come, or the long runs on a GPU
LONG = {"grpo.py": "cpu-grpo", "grpo_guard.py": "cpu-guard", "nft.py": "cpu-nft"}
if not CPU:
    LONG = {"GRPO": "gpu-grpo", "GRPO-Guard": "gpu-guard", "DiffusionNFT": "nft", "DiffusionNFT, lr 5e-5": "gpu-nft"}
    LONG |= {"lr 5e-5, sampled by CPS": "gpu-nft-cps"}
FINALS = [(10, 1.0), (10, 3.0), (40, 1.0), (40, 3.0)]  # sampling steps and guidance


def command(name, out):
    """The command line of a run, as a list."""
    script, settings = RUNS[name]
    settings = settings | {"train.seed": int(name[-1])}
    folder = "docs/examples/" if script in EXAMPLES else ""
    words = [f"{folder}{script}.py", "--run-name", name, "--output-dir", str(out)]
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            head, _, last = flag.rpartition(".")
            words.append(flag if value else f"{head}.no-{last}")
        elif isinstance(value, dict):
            words += [flag, *(f"{k}={v}" for k, v in value.items())]
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def chosen(words):
    """Names of runs, in the order of CLAIMS, from names, names without seed, numbers of claims, or all."""
    names = {}
    for word in words:
        found = [n for c, runs in CLAIMS.items() if word in ("all", c.split()[0]) for r in runs for n in seeds_of(r)]
        found = found or [n for n in RUNS if word in (n, n[:-3])]
        if not found:
            size = "without SCALE=cpu" if CPU else "with SCALE=cpu"
            sys.exit(f"error: {word!r} is no run, no claim and not all; see `list`, and that {size} before the command")
        names |= dict.fromkeys(found)
    return list(names)


def seeds_of(name):
    return [f"{name}-s{seed}" for seed in SEEDS]


def show_claims(args):
    for claim, runs in CLAIMS.items():
        print(f"{claim}\n    {' '.join(runs)}")


def show(args):
    for name in chosen(args.names):
        print("PYTHONPATH=. " * (RUNS[name][0] in EXAMPLES) + "python", shlex.join(command(name, args.out)))


def read(path):
    """The rows of a table, as dicts of strings."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def kept():
    """{name of a run with its seed: its rows of the table of this size}."""
    runs = {}
    for row in read(RESULTS / f"{SCALE}.csv"):
        runs.setdefault(f"{row['run']}-s{row['seed']}", []).append(row)
    return runs


def replace(path, run, rows):
    """Put rows in the place of those that a table has of a run {column: value}; the file is whole at any time.

    Numbers keep five digits; those of an evaluation all, since means of them are quoted.
    """

    def short(key, value):
        return f"{float(value):.{9 if key.startswith('eval/') else 5}g}" if re.search("[.e]", value) else value

    old = read(path)
    rows = [run | {key: short(key, value) for key, value in row.items()} for row in rows]
    rows += [row for row in old if any(row[key] != value for key, value in run.items())]
    order = [key for key in ("size", "run", "seed", "epoch", "step", "steps", "guidance") if key in old[0]]
    rows.sort(key=lambda row: [row[key] if key in ("size", "run") else float(row[key]) for key in order])
    new = path.with_suffix(".new")
    with open(new, "w", newline="") as file:
        writer = csv.DictWriter(file, list(old[0]), restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    new.replace(path)


def keep(name, folder):
    """Take what docs/results.md quotes from a run's folder into the tables."""
    run = dict(zip(("run", "seed"), name.rsplit("-s", 1), strict=True))
    rows = read(folder / "metrics.csv")
    replace(RESULTS / f"{SCALE}.csv", run, rows)
    replace(RESULTS / "steps.csv", {"size": SCALE} | run, [step for row in rows for step in by_step(row)])
    replace(RESULTS / "finals.csv", {"size": SCALE} | run, read(folder / "finals.csv"))


def by_step(row):
    """A row of metrics.csv as a row for each step that it has columns of, which GRPO-Guard writes: train/NAME@STEP."""
    steps = {}
    for column, value in row.items():
        name, _, step = column.removeprefix("train/").partition("@")
        if step and value:
            steps.setdefault(step, {"epoch": row["epoch"], "step": step})[name] = value
    return steps.values()


def run_all(args):
    """Run what was chosen and is not done, `--parallel` at a time, and keep what each leaves."""
    started, out, done = time.time(), Path(args.out).absolute(), kept()
    names = [name for name in chosen(args.names) if args.again or name not in done]
    if there := len(chosen(args.names)) - len(names):
        print(f"{there} of these runs are in {RESULTS} already; --again repeats them")
    names.sort(key=lambda name: -RUNS[name][1]["train.max_epochs"] * forwards(name))  # the longest first
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[: args.gpus]
    one_at_a_time = threading.Lock()
    out.mkdir(parents=True, exist_ok=True)

    def one(number, name):
        folder, log, env = out / name, out / f"{name}.log", dict(os.environ, OMP_NUM_THREADS="1")
        env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        shutil.rmtree(folder, ignore_errors=True)
        evaluation = ["docs/evaluate.py", str(folder), "--images-per-prompt", "1" if CPU else "4"]
        evaluation += ["--resolution", str(RUNS[name][1].get("eval.resolution", 32))]
        with open(log, "w") as file:
            for words in (command(name, out), evaluation):
                line = [sys.executable, *words]
                code = subprocess.run(line, cwd=HERE.parent, stdout=file, stderr=file, env=env).returncode
                if code:
                    last = log.read_text().strip().splitlines()[-1:]
                    return print(f"{time.time() - started:5.0f} s  {name}: exit status {code}: {last}", flush=True)
        with one_at_a_time:
            keep(name, folder)
        accuracy = ", ".join(f"{float(row['accuracy']):.3f}" for row in read(folder / "finals.csv"))
        print(f"{time.time() - started:5.0f} s  {name}: {accuracy}", flush=True)

    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(one, range(len(names)), names))


def values(rows, column="eval/total", by="epoch"):
    """{epoch: value} of a column where it has one, by epoch or by another column."""
    return {float(row[by]): float(row[column]) for row in rows if row[column]}


def spread(seeds, digits=3):
    """The mean of some seeds, and half of their range."""
    seeds = [value for value in seeds if value is not None]
    if not seeds:
        return "–"
    half = (max(seeds) - min(seeds)) / 2
    mean, half = (f"{value:.{digits}f}".replace("0.", ".", digits == 3) for value in (statistics.mean(seeds), half))
    return f"{mean} ± {half}" if len(seeds) > 1 else mean


def forwards(name):
    """What an image costs, in forward passes: its sampling, and its training, where a backward pass counts as two."""
    script, settings = RUNS[name]
    steps = settings.get("train.num_inference_steps", 10)
    trained = settings["train.num_train_steps"] or steps - 1
    others = {"nft": 2, "awm": 2, "dpo": 2, "dgpo": 1}  # old policy, and base model or average
    others = others.get(script, int(settings.get("train.kl_beta", 0) > 0))
    if script == "dpo":  # the pairs are sampled once more, and they alone are trained
        return steps + (steps + trained * (3 + others)) * 2 / settings.get("train.group_size", 16)
    return steps + trained * (3 + others)


def reached(accuracy, rows, by):
    """Images or seconds until an evaluation has that accuracy, between two by a straight line; None if none has."""
    before = (0, 0.0)
    for spent, value in values(rows, by=by).items():
        if value >= accuracy:
            return before[0] + (spent - before[0]) * (accuracy - before[1]) / (value - before[1])
        before = spent, value


def tables(args):
    """One table for each claim; a number is the mean of the seeds, and ± half of their range."""
    epochs, all_kept, finals = (5, 10, 20) if CPU else (4, 10, 20, 30, 60), kept(), {}
    for row in read(RESULTS / "finals.csv"):
        if row["size"] == SCALE:
            how = int(row["steps"]), float(row["guidance"])
            finals.setdefault(f"{row['run']}-s{row['seed']}", {})[how] = float(row["accuracy"])
    for claim, runs in CLAIMS.items():
        done = {name: [seed for seed in seeds_of(name) if seed in all_kept] for name in runs}
        done = {name: seeds for name, seeds in done.items() if seeds}
        if len(done) < 2:
            continue  # nothing beside the run to compare with
        last = max(settings["train.max_epochs"] for _, settings in runs.values())
        shown = [epoch for epoch in epochs if epoch <= last]
        print(f"\n### {claim}\n")
        head = ["run", *(f"{epoch} epochs" for epoch in shown), "seeds 0, 1, 2 at last"]
        head += ["1000 images to .80", "million forwards", "seconds in all"]
        head += [f"{steps} steps" + f", guidance {guidance:g}" * (guidance > 1) for steps, guidance in FINALS[1:]]
        print("|", " | ".join(head), "|\n|" + "---|" * len(head))
        for name, seeds in done.items():
            curves, ends = [values(all_kept[seed]) for seed in seeds], [finals.get(seed, {}) for seed in seeds]
            cells = [f"`{name}`", *(spread([curve.get(epoch) for curve in curves]) for epoch in shown)]
            cells += [", ".join(spread([list(curve.values())[-1]]) for curve in curves)]
            images = [reached(0.8, all_kept[seed], "images") for seed in seeds]
            images = [] if None in images else images
            cells += [spread([n / 1e3 for n in images], 1), spread([n * forwards(seeds[0]) / 1e6 for n in images], 2)]
            cells += [f"{statistics.mean(list(values(all_kept[seed], by='seconds'))[-1] for seed in seeds):.0f}"]
            cells += [spread([end.get(how) for end in ends]) for how in FINALS[1:]]
            print("|", " | ".join(cells), "|")


def figures(args):
    """A figure for each claim, accuracy against images, and the reward trained on, where that is another; README's."""
    import plot

    all_kept = kept()
    for claim, runs in (CLAIMS | {"README": LONG}).items():
        series = {label: [all_kept[s] for s in seeds_of(LONG.get(label, label)) if s in all_kept] for label in runs}
        fewer = (*LONG, *FALLEN)  # than three seeds will do
        series = {label: seeds for label, seeds in series.items() if seeds and (len(seeds) == 3 or label in fewer)}
        columns = {"eval/total": "held-out accuracy"}
        if any(label.endswith("-proxy") for label in runs):
            columns = {"train/reward/total": "reward trained on"} | columns
        out = HERE / f"{SCALE}.png" if runs is LONG else RESULTS / f"claim-{claim.split()[0]}-{SCALE}.png"
        if len(series) > 1:
            plot.draw(out, series, columns)


def ratios(args):
    """Means over the epochs of the log-ratio before and after GRPO-Guard's normalisation, and of its gradient."""
    seeds = {}
    for word in args.names:
        if word.endswith(".csv"):
            seeds[word] = [step for row in read(word) for step in by_step(row)]
        else:
            rows = [row for row in read(RESULTS / "steps.csv") if (row["size"], row["run"]) == (SCALE, word)]
            seeds |= {(word, seed): [row for row in rows if row["seed"] == seed] for seed in {r["seed"] for r in rows}}
    if not any(seeds.values()):
        sys.exit(f"error: no such steps of GRPO-Guard, neither in {RESULTS / 'steps.csv'} nor in a file")
    names = ("raw_log_ratio", "raw_log_ratio_std", "log_ratio", "log_ratio_std", "gradient_scale")
    print("| step |", " | ".join(names), "|\n|" + "---|" * (len(names) + 1))
    for k in sorted({int(row["step"]) for rows in seeds.values() for row in rows}):
        cells = []
        for name in names:
            columns = [[float(row[name]) for row in rows if row["step"] == str(k)] for rows in seeds.values()]
            means = [statistics.mean(column) for column in columns if column]
            cells.append(f"{statistics.mean(means):.2g} ({min(means):.2g} to {max(means):.2g})")
        print("|", k, "|", " | ".join(cells), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for verb, do in {"list": show_claims, "table": tables, "figures": figures}.items():
        verbs.add_parser(verb).set_defaults(do=do)
    for verb, do in {"show": show, "run": run_all, "ratios": ratios}.items():
        verb = verbs.add_parser(verb)
        verb.set_defaults(do=do)
        verb.add_argument("names", nargs="+")
        if do is not ratios:
            verb.add_argument("--out", default=f"runs/claims-{SCALE}")
        if do is run_all:
            verb.add_argument("--parallel", type=int, default=1, help="runs at a time")
            verb.add_argument("--gpus", type=int, default=0, help="share the runs out to so many GPUs")
            verb.add_argument("--again", action="store_true", help="repeat those that are kept already")
    args = parser.parse_args()
    if getattr(args, "parallel", 1) < 1:
        sys.exit(f"error: --parallel {args.parallel}: take at least 1")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for | head
    args.do(args)


if __name__ == "__main__":
    main()
