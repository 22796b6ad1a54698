"""The runs behind docs/results.md: what the papers claim, on the embedded model.

    python docs/claims.py list                        the runs of each claim
    python docs/claims.py show grpo-s0                the command of one run
    python docs/claims.py run grpo-s0 nft             some runs: by name, without the seed, by claim (4), or all
    python docs/claims.py table                       the tables of docs/results.md, from docs/results/claims-gpu/
    python docs/claims.py figures                     its figures: docs/claim-*-gpu.png (needs matplotlib)
    python docs/claims.py ratios FILE ...             GRPO-Guard's ratios by step, from its metrics.csv, a file a seed

All of them exist in two sizes: one for a GPU, and with SCALE=cpu in the environment one for two CPU cores, where a run
is the script as it comes plus the flags of the claim, and takes two to six minutes.

A run is its script with the flags that `show` prints, then evaluations of its last weights on the held-out prompts (10
and 40 steps, without guidance and with 3). `run --parallel 16 --gpus 2` does many at once on the GPUs; what is
cut off by `--seconds` begins anew. A run leaves NAME.csv, which is its metrics.csv, and a row of finals.csv for each
evaluation, in docs/results/claims-gpu/ or -cpu/; one that is there is only repeated with `--again`.
"""

import argparse
import csv
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCALE = os.environ.get("SCALE", "gpu")
KEPT = HERE / "results" / f"claims-{SCALE}"
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
}  # fmt: skip
CPU_WORLD = {"train.max_epochs": 10}
CPU_SCRIPTS = {script: {"train.num_train_steps": 3 if script == "nft" else 2} for script in GPU_SCRIPTS}
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
        f"{name}-proxy": run(
            script,
            reward={"docs/proxy.py:colour": 1},
            eval_reward={"shapes": 1},
            **{"max_epochs": 20 if CPU else 60} | changes,
        )
        for name, script, changes in [
            ("grpo", "grpo", {}),
            ("grpo-slow", "grpo", SLOW),
            ("grpo-kl", "grpo", {"kl_beta": BETAS[1]}),
            ("guard", "grpo_guard", {}),
        ]
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
        **(
            {"grpo-one-update": run("grpo", gradient_step_per_epoch=1)}
            if CPU
            else {"grpo-two-updates": run("grpo", per_device_batch_size=576, gradient_step_per_epoch=2)}
        ),
        "grpo-lora": run("grpo", finetune_type="lora", learning_rate=2e-3),
    },
}
RUNS = {f"{name}-s{seed}": runs[name] for runs in CLAIMS.values() for name in runs for seed in SEEDS}
FINALS = [(10, 1.0), (10, 3.0), (40, 1.0), (40, 3.0)]  # sampling steps and guidance


def command(name, out):
    """The command line of a run, as a list."""
    script, settings = RUNS[name]
    settings = settings | {"train.seed": int(name[-1])}
    words = [f"{script}.py", "--run-name", name, "--output-dir", str(out)]
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


def run_all(args):
    """Run what was chosen and is not done, `--parallel` at a time, and keep what each leaves."""
    started, out = time.time(), Path(args.out)
    KEPT.mkdir(parents=True, exist_ok=True)
    names = [name for name in chosen(args.names) if args.again or not (KEPT / f"{name}.csv").exists()]
    if kept := len(chosen(args.names)) - len(names):
        print(f"{kept} of these runs are in {KEPT} already; --again repeats them")
    names.sort(key=lambda name: -RUNS[name][1]["train.max_epochs"] * forwards(name))  # the longest first
    numbers, one_at_a_time, running = iter(range(10**6)), threading.Lock(), {}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[: args.gpus]
    spawn = multiprocessing.get_context("spawn")
    free = spawn.Queue()
    for number in range(max(1, 2 * len(gpus))):
        free.put(gpus[number % len(gpus)] if gpus else None)
    evaluators = ProcessPoolExecutor(max(1, 2 * len(gpus)), spawn, see_gpu, (free,))

    def one(name):
        if left() < 0:
            return
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        env = dict(os.environ, OMP_NUM_THREADS="1")
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = gpus[next(numbers) % len(gpus)]
        out.mkdir(parents=True, exist_ok=True)
        with open(out / f"{name}.log", "w") as log:
            line = [sys.executable, *command(name, out)]
            running[name] = subprocess.Popen(line, cwd=HERE.parent, stdout=log, stderr=log, env=env)
            code = running[name].wait()
            del running[name]
        if code:
            last = (out / f"{name}.log").read_text().strip().splitlines()[-1:]
            return print(f"{time.time() - started:5.0f} s  {name}: exit status {code}: {last}", flush=True)
        rows = evaluators.submit(final_rows, name, folder).result()
        with one_at_a_time:
            keep(name, folder, rows)
        accuracy = ", ".join(f"{row['accuracy']:.3f}" for row in rows)
        print(f"{time.time() - started:5.0f} s  {name}: {accuracy}", flush=True)

    def left():
        return args.seconds - (time.time() - started)

    def end():
        while left() > 0 and not over.wait(1):
            pass
        for process in list(running.values()):
            process.kill()

    over = threading.Event()
    threading.Thread(target=end, daemon=True).start()
    with ThreadPoolExecutor(args.parallel) as pool:
        for future in [pool.submit(one, name) for name in names]:
            future.result()
    over.set()
    evaluators.shutdown()


def see_gpu(free):
    """Give a process that evaluates one GPU of those that are free."""
    gpu = free.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def final_rows(name, folder):
    """Four evaluations of a run's last weights: rows of finals.csv."""
    sys.path[:0] = [path for path in (str(HERE.parent),) if path not in sys.path]
    import torch
    from safetensors.torch import load_file

    import common
    import rewards
    from shapes import world

    script, settings = RUNS[name]
    resolution = settings.get("eval.resolution", 32)
    module = __import__(script)
    device = common.pick_device(module.Args())
    if device.type == "cpu":
        torch.set_num_threads(1)
    pipe = common.load_pipeline(module.Args.model, device, torch.float32)
    if settings.get("finetune_type") == "lora":
        pipe.load_lora_weights(str(folder / "lora"))
    else:
        pipe.transformer.load_state_dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    reward, _ = rewards.make_rewards({"shapes": 1.0}, {}, device, {})
    prompts = common.read_prompts(str(HERE.parent / "shapes" / "prompts" / "eval.txt"))
    rows = []
    for steps, guidance in FINALS:
        evaluation = common.EvalArgs(
            images_per_prompt=1 if CPU else 4, resolution=resolution, num_inference_steps=steps,
            guidance_scale=guidance,
            per_device_batch_size=384 if device.type == "cuda" else 64,
        )  # fmt: skip
        args = module.Args(eval=evaluation, call={"max_sequence_length": 1})
        asked, scores, looks, _ = common.evaluate(pipe, args, prompts, reward)
        kinds = {}
        for prompt, score in zip(asked, scores["shapes"].tolist(), strict=True):
            kinds.setdefault(world.kind(prompt), []).append(score)
        rows.append(
            {"run": name, "steps": steps, "guidance": guidance, "accuracy": scores["shapes"].mean().item()}
            | {of: statistics.mean(right) for of, right in sorted(kinds.items())}
            | looks
        )
    return rows


def keep(name, folder, rows):
    """Copy what docs/results.md quotes from a run's folder, and add its evaluations to finals.csv."""
    table = KEPT / "finals.csv"
    old = []
    if table.exists():
        with open(table, newline="") as file:
            old = [row for row in csv.DictReader(file) if row["run"] != name]
    new = [{key: f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(new[0]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(old + new, key=lambda row: (row["run"], int(row["steps"]), float(row["guidance"]))))
    shutil.copy(folder / "metrics.csv", KEPT / f"{name}.csv")


def evaluations(name, column="eval/total", by="epoch"):
    """{epoch: value} of a column of a kept metrics.csv, by epoch or by another column."""
    with open(KEPT / f"{name}.csv", newline="") as file:
        return {float(row[by]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}


def finals(name):
    """{(steps, guidance): row} of a run."""
    with open(KEPT / "finals.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == name]
    return {(int(row["steps"]), float(row["guidance"])): row for row in rows}


def spread(values, digits=3):
    """The mean of some seeds, and half of their range."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    half = (max(values) - min(values)) / 2
    mean, half = (f"{value:.{digits}f}".replace("0.", ".", digits == 3) for value in (statistics.mean(values), half))
    return f"{mean} ± {half}" if len(values) > 1 else mean


def forwards(name):
    """What an image costs, in forward passes: its sampling, and its training, where a backward pass counts as two."""
    script, settings = RUNS[name]
    steps = settings.get("train.num_inference_steps", 10)
    trained = settings["train.num_train_steps"] or steps - 1
    others = 2 if script == "nft" else int(settings.get("train.kl_beta", 0) > 0)  # old policy and base model
    return steps + trained * (3 + others)


def reached(accuracy, name, by):
    """Images or seconds until an evaluation has that accuracy, between two by a straight line; None if none has."""
    before = (0, 0.0)
    for spent, value in evaluations(name, by=by).items():
        if value >= accuracy:
            return before[0] + (spent - before[0]) * (accuracy - before[1]) / (value - before[1])
        before = spent, value


def tables(args):
    """One table for each claim; a number is the mean of the seeds, and ± half of their range."""
    epochs = (5, 10, 20) if CPU else (4, 10, 20, 30, 60)
    for claim, runs in CLAIMS.items():
        kept = {name: [seed for seed in seeds_of(name) if (KEPT / f"{seed}.csv").exists()] for name in runs}
        if sum(map(bool, kept.values())) < 2:
            continue  # nothing beside the run to compare with
        last = max(settings["train.max_epochs"] for _, settings in runs.values())
        shown = [epoch for epoch in epochs if epoch <= last]
        print(f"\n### {claim}\n")
        head = ["run", *(f"{epoch} epochs" for epoch in shown), "seeds 0, 1, 2 at last"]
        head += ["1000 images to .80", "million forwards", "seconds in all"]
        head += [f"{steps} steps" + f", guidance {guidance:g}" * (guidance > 1) for steps, guidance in FINALS[1:]]
        print("|", " | ".join(head), "|\n|" + "---|" * len(head))
        for name, done in kept.items():
            if not done:
                continue
            curves, ends = [evaluations(seed) for seed in done], [finals(seed) for seed in done]
            cells = [f"`{name}`", *(spread([curve.get(epoch) for curve in curves]) for epoch in shown)]
            cells += [", ".join(spread([list(curve.values())[-1]]) for curve in curves)]
            images = [reached(0.8, seed, "images") for seed in done]
            if None in images:
                cells += ["–", "–"]
            else:
                cells += [spread([n / 1e3 for n in images], 1)]
                cells += [spread([n * forwards(done[0]) / 1e6 for n in images], 2)]
            cells += [f"{statistics.mean(list(evaluations(seed, by='seconds'))[-1] for seed in done):.0f}"]
            cells += [spread([float(end[how]["accuracy"]) for end in ends if how in end]) for how in FINALS[1:]]
            print("|", " | ".join(cells), "|")


def figures(args):
    """One figure for each claim, of accuracy against images; and of the reward trained on, where that is another."""
    sys.path.insert(0, str(HERE))
    import plot

    for claim, runs in CLAIMS.items():
        series = {name: [KEPT / f"{seed}.csv" for seed in seeds_of(name)] for name in runs}
        series = {name: paths for name, paths in series.items() if all(path.exists() for path in paths)}
        columns = {"eval/total": "held-out accuracy"}
        if any("eval.reward" in settings for _, settings in runs.values()):
            columns = {"train/reward/total": "reward trained on"} | columns
        if len(series) > 1:
            plot.draw(HERE / f"claim-{claim.split()[0]}-{SCALE}.png", series, columns)


def ratios(args):
    """Means over the epochs of the log-ratio before and after GRPO-Guard's normalisation, and of its gradient."""
    names = ("raw_log_ratio", "raw_log_ratio_std", "log_ratio", "log_ratio_std", "gradient_scale")
    print("| step |", " | ".join(names), "|\n|" + "---|" * (len(names) + 1))
    tables = []
    for path in args.files:
        with open(path, newline="") as file:
            tables.append(list(csv.DictReader(file)))
    for k in range(100):
        cells = []
        for name in names:
            columns = [
                [float(row[f"train/{name}@{k}"]) for row in rows if row.get(f"train/{name}@{k}")] for rows in tables
            ]
            means = [statistics.mean(column) for column in columns if column]
            if means:
                cells.append(f"{statistics.mean(means):.2g} ({min(means):.2g} to {max(means):.2g})")
        if cells:
            print("|", k, "|", " | ".join(cells), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verbs.add_parser("list").set_defaults(do=lambda args: print_list())
    show = verbs.add_parser("show")
    show.add_argument("names", nargs="+")
    show.set_defaults(do=lambda args: [print("python", shlex.join(command(n, args.out))) for n in chosen(args.names)])
    runs = verbs.add_parser("run")
    runs.add_argument("names", nargs="+")
    runs.add_argument("--parallel", type=int, default=1, help="runs at a time")
    runs.add_argument("--gpus", type=int, default=0, help="share the runs out to so many GPUs")
    runs.add_argument("--again", action="store_true", help="repeat those that are kept already")
    runs.add_argument("--seconds", type=float, default=float("inf"), help="end what still runs then")
    runs.set_defaults(do=run_all)
    for verb in (show, runs):
        verb.add_argument("--out", default=f"runs/claims-{SCALE}")
    verbs.add_parser("table").set_defaults(do=tables)
    verbs.add_parser("figures").set_defaults(do=figures)
    of_steps = verbs.add_parser("ratios")
    of_steps.add_argument("files", nargs="+")
    of_steps.set_defaults(do=ratios)
    args = parser.parse_args()
    if getattr(args, "parallel", 1) < 1:
        sys.exit(f"error: --parallel {args.parallel}: take at least 1")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for | head
    args.do(args)


def print_list():
    for claim, runs in CLAIMS.items():
        print(f"{claim}\n    {' '.join(runs)}")


if __name__ == "__main__":
    main()
