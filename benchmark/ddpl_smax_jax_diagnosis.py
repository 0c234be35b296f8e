"""What a team on SMAX lacks: what it wins when a part of its actions is a script's, and what its critics have learned.

    python benchmark/ddpl_smax_jax_diagnosis.py              # win rates of scripted teams on three maps
    python benchmark/ddpl_smax_jax_diagnosis.py RUN_DIR      # the parts and the critics of a run (its first seed)
    python benchmark/ddpl_smax_jax_diagnosis.py TEAM.safetensors      # the parts alone, which need no checkpoint

Writes benchmark/results/smax/scripts.csv, and of a run parts_<map>_<policy>.csv and critic_<map>_<policy>.png.
"""

import csv
import sys
from functools import partial
from pathlib import Path

import jax
import matplotlib
import numpy as np
from jax import Array
from jax import numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))
import ddpl_smax_jax as smax  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "smax"
BATTLES = 256


def look(env, obs: Array) -> tuple[Array, Array, Array, Array]:
    """What agents see of the enemies: their places relative to each agent [N, E, 2], health, distance, in range [N, E].

    An enemy out of sight is infinitely far.
    """
    own, features = obs[:, -len(env.own_features) :], len(env.unit_features)
    enemies = obs[:, (env.num_agents - 1) * features : -len(env.own_features)]
    enemies = enemies.reshape(env.num_agents, env.num_enemies, features)
    kind = own[:, 4:].argmax(-1)
    away = enemies[..., 1:3] * env.unit_type_sight_ranges[kind][:, None, None]
    distance = jnp.where(enemies[..., 0] > 0, jnp.linalg.norm(away, axis=-1), jnp.inf)
    return away, enemies[..., 0], distance, distance < env.unit_type_attack_ranges[kind][:, None]


def towards(away: Array, target: Array, walk: Array) -> Array:
    """Actions [N, D] in [-1, 1] that walk to, or else shoot towards, each agent's target among places [N, E, 2]."""
    x, y = jnp.take_along_axis(away, target[:, None, None], axis=1)[:, 0].T
    length = jnp.hypot(x, y).clip(1e-6)
    return jnp.stack([jnp.ones_like(x), 2.0 * walk - jnp.ones_like(x), x / length, y / length], axis=-1)


def nearest(env, obs: Array) -> Array:
    """Walk to the nearest enemy and shoot it; with none in sight, walk to their side."""
    away, _, distance, in_range = look(env, obs)
    sees = jnp.isfinite(distance).any(-1)
    away = jnp.where(sees[:, None, None], away, jnp.array([1.0, 0.0]))
    return towards(away, distance.argmin(-1), ~in_range.any(-1))


def weakest(env, obs: Array) -> Array:
    """As nearest, but shoot towards the weakest in range, as near as the aim, one length at most, comes to it."""
    away, health, _, in_range = look(env, obs)
    shoot = towards(away, jnp.where(in_range, health, jnp.inf).argmin(-1), jnp.zeros(len(obs)))
    return jnp.where(in_range.any(-1, keepdims=True), shoot, nearest(env, obs))


def hurt_retreat(env, obs: Array) -> Array:
    """As weakest, but who has less health than a friend in sight steps back while the weapon is not ready."""
    away, _, distance, in_range = look(env, obs)
    own = obs[:, -len(env.own_features) :]
    friends = obs[:, : (env.num_agents - 1) * len(env.unit_features) : len(env.unit_features)]
    back = in_range.any(-1) & (own[:, 3] > 0.3) & (friends > own[:, :1] + 0.3).any(-1)
    return jnp.where(back[:, None], towards(-away, distance.argmin(-1), jnp.ones(len(obs))), weakest(env, obs))


SCRIPTS = {"nearest": nearest, "weakest": weakest, "the hurt step back": hurt_retreat}


def play(env, policy, key: Array) -> tuple[tuple[Array, ...], Array, smax.Step, Array]:
    """One battle of policy(key, obs [N, O]) -> actions [N, D]: [T, ...] (obs, state), actions, outcomes, playing."""
    reset_key, key = jax.random.split(key)

    def play_step(carry: tuple, key: Array) -> tuple[tuple, tuple]:
        (env_state, *seen), playing = carry
        act_key, step_key = jax.random.split(key)
        actions = policy(act_key, seen[0])
        after, *going_on = smax.step(env, step_key, env_state, actions)
        return (tuple(going_on), playing & ~after.ended), (tuple(seen), actions, after, playing)

    start = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), smax.reset(env, reset_key))
    return jax.lax.scan(play_step, (start, jnp.array(True)), jax.random.split(key, env.max_steps + 1))[1]


def play_all(env, policy) -> tuple:
    """BATTLES battles of play, with a leading axis of battles."""
    return jax.jit(jax.vmap(partial(play, env, policy)))(jax.random.split(jax.random.PRNGKey(0), BATTLES))


def unreachable(env, obs: Array) -> tuple[Array, Array]:
    """[N, E]: an agent's targets, where it has two or more in range, and those of them at which it cannot aim.

    A shot goes to the enemy in range that is nearest to a point at most one length away, whatever the weapon's range.
    """
    away, _, distance, in_range = look(env, obs)
    angles = 2 * jnp.pi * jnp.arange(64) / 64
    aims = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    gaps = jnp.linalg.norm(away[:, None] - aims[:, None], axis=-1)  # [N, angles, E]
    hit = jnp.where(in_range[:, None], gaps, jnp.inf).argmin(-1)
    reached = (hit[..., None] == jnp.arange(env.num_enemies)).any(1) | (distance <= 1)  # or aimed at directly
    targets = in_range & (in_range.sum(-1, keepdims=True) > 1) & (obs[:, -len(env.own_features)] > 0)[:, None]
    return targets, targets & ~reached


def scripted_teams() -> None:
    """Win rates of SCRIPTS on three maps, and the share of targets in range that the actions cannot choose."""
    rows = []
    for map_name in ("3m", "2s3z", "5m_vs_6m"):
        env = smax.make_env(smax.Args(map_name=map_name))
        for name, script in SCRIPTS.items():
            (obs, _), _, after, playing = play_all(env, lambda key, obs: script(env, obs))  # noqa: B023
            targets, missed = (x[playing].sum() for x in jax.vmap(jax.vmap(partial(unreachable, env)))(obs))
            row = {"map": map_name, "script": name, "win_rate": round(float((after.won & playing).any(1).mean()), 3)}
            rows.append(row | {"unreachable": round(float(missed / targets), 3)})
            print(rows[-1])
    with open(RESULTS / "scripts.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


PARTS = {  # which of them are the script's: to shoot if one can, at whom, where to walk if not
    "as learned": (False, False, False),
    "shoots whenever it can": (True, False, False),
    "aims at the nearest": (False, True, False),
    "shoots whenever it can, at the nearest": (True, True, False),
    "walks to the nearest when it cannot shoot": (False, False, True),
    "all three: the script": (True, True, True),
}


def mixed(env, parts: Array, actions: Array, obs: Array) -> Array:
    """Actions [N, D] of a team, of which some parts are those of the script `nearest`."""
    script = nearest(env, obs)
    in_range = look(env, obs)[-1].any(-1)
    shoots, aims, walks = parts
    actions = actions.at[:, 1].set(jnp.where(shoots & in_range, script[:, 1], actions[:, 1]))
    aims = aims & in_range & (actions[:, 1] < 0)  # who shoots: the others walk where they want
    actions = jnp.where(aims[:, None], script.at[:, 1].set(actions[:, 1]), actions)
    return jnp.where((walks & ~in_range)[:, None], script, actions)


def load(run_dir: Path) -> tuple:
    """Arguments, environment and learner (first seed) of a run."""
    run_dir = smax.existing_run("RUN_DIR", str(run_dir))
    args, checkpoint = smax.load_checkpoint("RUN_DIR", run_dir, smax.Args(), given=(), free=())
    env = smax.make_env(args)
    training, _ = smax.restore("RUN_DIR", run_dir, checkpoint, env, args)
    return args, env, jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), training.learner)


def replaced_parts(args: smax.Args, env, policy) -> None:
    """Win rates and returns of deterministic policies when parts of their actions are the script's."""

    def battles(parts: Array) -> tuple[Array, Array]:
        def team(key: Array, obs: Array) -> Array:
            return mixed(env, parts, smax.act(policy, env, key, obs[None], True)[0], obs)

        _, _, after, playing = play_all(env, team)
        return (after.won & playing).any(1).mean(), (after.reward * playing).sum(1).mean()

    play_parts = jax.jit(battles)
    rows = []
    for name, parts in PARTS.items():
        wins, returns = play_parts(jnp.array(parts))
        rows.append({"team": name, "win_rate": round(float(wins), 3), "return": round(float(returns), 3)})
        print(rows[-1], flush=True)
    with open(RESULTS / f"parts_{args.map_name}_{args.policy}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def critics(args: smax.Args, env, learner: smax.Learner) -> None:
    """Plot and print what the central and local critics say along battles of the run's own policies."""
    (obs, state), actions, after, playing = play_all(
        env, lambda key, obs: smax.act(learner.average_policy, env, key, obs[None])[0]
    )

    # The returns that came of it, bootstrapped with 0 at the time limit, whose battles are left out.
    playing = playing & (after.terminated & playing).any(1, keepdims=True)
    discounts = jnp.cumprod(jnp.full(playing.shape[1], args.gamma)) / args.gamma
    gains = after.reward * playing * discounts
    returns = np.asarray(gains[:, ::-1].cumsum(1)[:, ::-1] / discounts)[playing]
    whole = len(returns) // args.num_critics * args.num_critics  # the critics share the states out evenly
    obs, state, actions = (jnp.asarray(np.asarray(x)[playing][:whole]) for x in (obs, state, actions))  # [B, ...]
    returns = returns[:whole]
    seen = obs.swapaxes(0, 1), state
    q = np.asarray(learner.critic(seen, actions.swapaxes(0, 1)).mean(0))
    error = np.corrcoef(q, returns)[0, 1], (q - returns).mean(), (q - returns).std(), returns.std()
    print("Q and return: correlation {:.2f}, bias {:+.3f}, deviation {:.3f}, of the returns {:.3f}".format(*error))

    # Each agent with an enemy in range: shoot the nearest, or walk away from it?
    away, _, distance, in_range = jax.vmap(partial(look, env))(obs)
    pairs = [jax.vmap(towards, (0, 0, None))(s * away, distance.argmin(-1), jnp.array(s < 0)) for s in (1, -1)]
    candidates = jnp.stack(pairs, 1).transpose(2, 1, 0, 3)  # [N, 2, B, D]
    own = actions.swapaxes(0, 1)
    engaged = np.asarray(in_range.any(-1) & (smax.living(env, obs) > 0)).T
    values = {"central": learner.critic.score(seen, own, candidates)}
    if learner.local_critic is not None:
        values["local"] = learner.local_critic(obs.swapaxes(0, 1), candidates)
    gaps = {name: np.asarray(value[:, 0] - value[:, 1])[engaged] for name, value in values.items()}
    shoots = np.asarray(own[..., 1] < 0)[engaged].mean()
    print(f"with an enemy in range: shoots in {shoots:.2f}; temperatures {jnp.exp(learner.log_temperature)}")
    for name, gap in gaps.items():
        above = (gap > 0).mean()
        print(f"{name}: Q(shoot) - Q(walk away) {gap.mean():+.3f} (deviation {gap.std():.3f}), above 0 in {above:.2f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), dpi=100)
    chosen = np.random.default_rng(0).choice(len(q), 2000)
    left.plot(returns[chosen], q[chosen], ".", markersize=1.5)
    left.plot([0, 2], [0, 2], color="black", linewidth=0.5)
    left.set(title=f"{args.map_name}, {args.policy}", xlabel="discounted return from here", ylabel="critics' Q")
    for name, gap in gaps.items():
        right.hist(gap, bins=60, range=(-0.2, 0.4), histtype="step", density=True, label=f"{name} critic")
    right.axvline(0, color="black", linewidth=0.5)
    right.set(xlabel="Q(shoot the nearest) - Q(walk away), enemy in range", yticks=[])
    right.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"critic_{args.map_name}_{args.policy}.png")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        scripted_teams()
    for run in sys.argv[1:]:
        if run.endswith(".safetensors"):
            team, team_args = smax.load_team(run)
            replaced_parts(team_args, smax.make_env(team_args), team)
            continue
        args, env, learner = load(Path(run))
        replaced_parts(args, env, learner.average_policy)
        critics(args, env, learner)
