"""What trained policies play: histograms of the actions of finished runs of bang_bang.py, sampled and at the mode.

    python benchmark/bang_bang_histograms.py runs HalfCheetah-v5

Takes the runs of that task below a folder, with the default squash, entropy and copies, prints the mean square of each
one's deterministic actions and draws the heads with seed 1 to benchmark/results/bang_bang/actions_<task>.png.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import bang_bang  # noqa: E402


def actions_played(run_dir: Path) -> dict[str, np.ndarray]:
    """For each way to play all actions of five episodes."""
    args, checkpoint = bang_bang.load_checkpoint("--evaluate", run_dir, bang_bang.Args(), given=(), free=())
    env = bang_bang.make_costly_env(args)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    learner = bang_bang.Learner(args, *sizes)
    normalizer = bang_bang.Normalizer(sizes[0], 1, args.gamma)
    learner.load_state_dict(checkpoint["learner"])
    normalizer.load_state_dict(checkpoint["normalizer"])
    played = {}
    for mode, act in bang_bang.ways_to_play(learner, normalizer).items():
        actions = []

        def recorded(obs: np.ndarray, act=act, actions=actions) -> np.ndarray:
            actions.append(act(obs))
            return actions[-1]

        bang_bang.evaluate(recorded, args, 5, seed=0)
        played[mode] = np.concatenate(actions).flatten()
    return played


def main() -> None:
    runs, task = Path(sys.argv[1]), sys.argv[2]
    heads = {}
    for run_dir in sorted(runs.rglob(f"bang_bang__{task.replace('/', '-')}__*")):
        args = json.loads((run_dir / "args.json").read_text())
        if all(args[name] == getattr(bang_bang.Args, name) for name in ("squash", "ent_coef", "num_envs")):
            played = actions_played(run_dir)
            print(f"{args['policy']:11s} seed {args['seed']}  mean a^2 {np.square(played['deterministic']).mean():.3f}")
            if args["seed"] == 1:
                heads[args["policy"]] = played
    figure = Figure(figsize=(3 * len(heads), 2.8), dpi=80, layout="tight")
    (panels,) = figure.subplots(1, len(heads), squeeze=False, sharey=True)
    for (head, played), axes in zip(sorted(heads.items()), panels):
        for mode, actions in played.items():
            shares = np.full(len(actions), 1 / len(actions))
            axes.hist(actions, 41, range=(-1.025, 1.025), weights=shares, alpha=0.5, label=mode)
        axes.set(title=head, xlabel="action")
    panels[0].set_ylabel("share of actions")
    panels[0].legend()
    figure.savefig(ROOT / "benchmark" / "results" / "bang_bang" / f"actions_{task.replace('/', '-')}.png")


if __name__ == "__main__":
    main()
