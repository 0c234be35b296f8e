"""What teams do on simple_spread_v3, beside scripts with the same eyes, and whether their critics see what actions do.

    python benchmark/ddpl_mpe_diagnosis.py                          # the scripts, with three and with six agents
    python benchmark/ddpl_mpe_diagnosis.py RUN_DIR [RUN_DIR ...]    # and the teams and critics of runs
    python benchmark/ddpl_mpe_diagnosis.py --examples               # what critics can learn from examples
    python benchmark/ddpl_mpe_diagnosis.py --imitate                # what policies can learn from the best script

Prints tables. Teams play deterministically, with averaged weights. Critics are asked what each of eight forces on
the first agent is worth, five steps into an episode; the answer is compared with what the force brings when it is
tried: the discounted return of the next 19 steps, a mean over eight rollouts of the sampled policies that the critics
belong to, with the same random numbers for all forces. That is noisy itself: the second correlation is that of four
rollouts with the four others. In brackets a 95 % percentile bootstrap over states.

The examples are random places of six agents and landmarks, a new batch for every update, and for each the sum of the
distances from a landmark to the nearest agent, which is most of the reward: R2 on other places, and how the change of
it goes with the true one where the first agent moves by 0.2 in eight directions (a correlation).

Imitation: one policy for all agents is fitted to the actions of the script that works out an assignment, in random
places at random velocities, a new batch for every update, and then plays: the share of the actions' variance that it
does not explain in other places, and its return.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

sys.path.insert(0, str(Path(__file__).parent.parent))
import ddpl_mpe as mpe  # noqa: E402

TASK = "simple_spread_v3"
EPISODES, STATES, ROLLOUTS = 200, 100, 8
STEPS_BEFORE, STEPS_TRIED = 5, 19  # together below an episode's 25: from its end there is no way back
TOUCH = 0.3  # agents closer than this collide

Actor = Callable[[np.ndarray], np.ndarray]  # observations [E, N, O] to actions [E, N, D]


def still(obs: np.ndarray) -> np.ndarray:
    return np.zeros((*obs.shape[:2], 2))


def nearest(obs: np.ndarray) -> np.ndarray:
    """Everyone goes to the landmark nearest to it."""
    landmarks, _ = places(obs)
    return go_to(obs, np.linalg.norm(landmarks, axis=-1).argmin(-1))


def assigned(obs: np.ndarray) -> np.ndarray:
    """Everyone works out the assignment with the shortest ways, from where it sees all others, and takes its part."""
    landmarks, others = places(obs)
    agents = np.concatenate([np.zeros_like(others[..., :1, :]), others], axis=-2)
    ways = np.linalg.norm(agents[..., :, None, :] - landmarks[..., None, :, :], axis=-1)
    chosen = [linear_sum_assignment(costs)[1][0] for costs in ways.reshape(-1, *ways.shape[2:])]
    return go_to(obs, np.reshape(chosen, obs.shape[:2]))


def places(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks [E, N, N, 2] and other agents [E, N, N - 1, 2], from where each agent stands."""
    num_envs, num_agents, _ = obs.shape
    landmarks, others, _ = np.split(obs[..., 4:], [2 * num_agents, 4 * num_agents - 2], axis=-1)
    return landmarks.reshape(num_envs, num_agents, -1, 2), others.reshape(num_envs, num_agents, -1, 2)


def go_to(obs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Forces [E, N, 2] towards each agent's target among the landmarks, braked by its velocity."""
    way = np.take_along_axis(places(obs)[0], target[..., None, None], axis=2)[:, :, 0]
    return np.clip(5 * way - 2 * obs[..., :2], -1, 1)


def playing(policy: torch.nn.Module, deterministic: bool = True) -> Actor:
    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        return policy.sample(torch.from_numpy(obs).transpose(0, 1), deterministic).transpose(0, 1).numpy()

    return act


def positions(env: mpe.VectorMPE) -> tuple[np.ndarray, np.ndarray]:
    """Of agents and landmarks, each [E, N, 2]."""
    worlds = [copy.unwrapped.world for copy in env.envs]
    groups = [world.agents for world in worlds], [world.landmarks for world in worlds]
    return tuple(np.array([[one.state.p_pos for one in of_copy] for of_copy in group]) for group in groups)


def team_row(name: str, num_agents: int, act: Actor) -> str:
    """Return, mean distance from a landmark to the nearest agent at the start and at the end, and collisions."""
    env = mpe.VectorMPE(TASK, num_agents, EPISODES)
    obs = env.reset(mpe.episode_seeds(1, 0, 0, EPISODES))
    returns, gaps, collisions = np.zeros(EPISODES), [], 0
    for step in range(env.episode_length + 1):
        agents, landmarks = positions(env)
        gaps.append(np.linalg.norm(agents[:, :, None] - landmarks[:, None], axis=-1).min(1).mean())
        between = np.linalg.norm(agents[:, :, None] - agents[:, None], axis=-1)
        if step:
            collisions += ((between < TOUCH).sum((1, 2)) - num_agents).mean() / 2
        if step < env.episode_length:
            obs, reward, *_ = env.step(act(obs))
            returns += reward
    return f"| {name} | {returns.mean():.1f} | {gaps[0]:.2f} | {gaps[-1]:.2f} | {collisions:.0f} |"


def critic_row(name: str, learner: mpe.Learner) -> str:
    """How the critics' values of eight forces on the first agent go with what they bring."""
    env = mpe.VectorMPE(TASK, len(learner.mask), STATES)
    act = playing(learner.policy, deterministic=False)
    torch.manual_seed(0)
    obs = env.reset(mpe.episode_seeds(1, 0, 0, STATES))
    for _ in range(STEPS_BEFORE):
        obs, *_ = env.step(act(obs))
    values, outcomes = compare(env, obs, act, learner.critic, learner.args.gamma)
    said, brought = values - values.mean(0), outcomes - outcomes.mean(0)  # [8, E], [8, ROLLOUTS, E]
    both, first, second = brought.mean(1), brought[:, ::2].mean(1), brought[:, 1::2].mean(1)
    states = np.random.default_rng(0).integers(STATES, size=(1000, STATES))
    low, high = np.percentile([correlation(said[:, rows], both[:, rows]) for rows in states], [2.5, 97.5])
    cells = f"{correlation(said, both):.2f} [{low:.2f}, {high:.2f}]", f"{correlation(first, second):.2f}"
    return f"| {name} | {cells[0]} | {cells[1]} | {said.std():.3f} | {both.std():.3f} |"


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return np.corrcoef(x.ravel(), y.ravel())[0, 1]


@torch.no_grad()
def compare(
    env: mpe.VectorMPE, obs: np.ndarray, act: Actor, critic: torch.nn.Module, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """What the critics say [8, E] if the first agent is pushed in each of eight directions, and what each of the
    rollouts brings [8, ROLLOUTS, E].
    """
    start = snapshot(env)
    state = torch.from_numpy(obs).flatten(1)
    values, outcomes = np.zeros((8, len(obs))), np.zeros((8, ROLLOUTS, len(obs)))
    for direction in range(8):
        angle = direction * np.pi / 4
        for rollout in range(ROLLOUTS):
            torch.manual_seed(rollout)
            restore(env, start)
            actions = act(obs)
            actions[:, 0, :2] = np.cos(angle), np.sin(angle)
            values[direction] += critic(state, torch.from_numpy(actions).transpose(0, 1)).mean(0).numpy() / ROLLOUTS
            for step in range(STEPS_TRIED):
                seen, reward, *_ = env.step(actions)
                outcomes[direction, rollout] += gamma**step * reward
                actions = act(seen)
    return values, outcomes


def snapshot(env: mpe.VectorMPE) -> list:
    """Places and velocities of the agents of every copy, and its step."""
    states = [[agent.state for agent in copy.unwrapped.world.agents] for copy in env.envs]
    moves = [[(state.p_pos.copy(), state.p_vel.copy()) for state in agents] for agents in states]
    return [(of_copy, copy.unwrapped.steps) for of_copy, copy in zip(moves, env.envs)]


def restore(env: mpe.VectorMPE, start: list) -> None:
    for copy, (moves, steps) in zip(env.envs, start):
        for agent, (place, velocity) in zip(copy.unwrapped.world.agents, moves):
            agent.state.p_pos, agent.state.p_vel = place.copy(), velocity.copy()
        copy.unwrapped.steps = steps


def observe(agents: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """Observations [E, N, O] of agents at rest at [E, N, 2] among landmarks at [E, N, 2], as the task gives them."""
    num_envs, num_agents, _ = agents.shape
    others = torch.tensor([[j for j in range(num_agents) if j != i] for i in range(num_agents)])
    ways = [landmarks[:, None] - agents[:, :, None], agents[:, others] - agents[:, :, None]]  # to landmarks, to others
    nothing = torch.zeros(num_envs, num_agents, 2)  # the velocity; what the others say is as long as the ways to them
    return torch.cat([nothing, agents, *(way.flatten(2) for way in ways), torch.zeros_like(ways[1]).flatten(2)], dim=-1)


def example_row(
    name: str, ensemble: type, *more: Any, num_agents: int = 6, updates: tuple[int, ...] = (1000, 2000, 4000)
) -> str:
    """R2 and correlation of two critics with the default widths and learning rate after so many updates.

    `more` is what this ensemble is made with besides, instead of whether it is normalised.
    """
    torch.manual_seed(0)
    args, obs_size = mpe.Args(), 6 * num_agents
    critic = ensemble(2, num_agents * obs_size, num_agents, 2, args.critic_hidden, *(more or [args.layer_norm]))
    optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr)

    def places(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return 2.4 * torch.rand(batch_size, num_agents, 2) - 1.2, 2 * torch.rand(batch_size, num_agents, 2) - 1

    def truth(agents: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(landmarks, agents).amin(-1).sum(-1)

    def guess(agents: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
        return critic(observe(agents, landmarks).flatten(1), torch.zeros(num_agents, len(agents), 2))

    agents, landmarks = places(1000)
    angles = torch.arange(8) * torch.pi / 4
    steps = 0.2 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    moved = [torch.cat([agents[:, :1] + step, agents[:, 1:]], dim=1) for step in steps]
    cells = []
    for update in range(1, updates[-1] + 1):
        batch = places(args.batch_size)
        optimizer.zero_grad()
        (guess(*batch) - truth(*batch)).square().mean(1).sum().backward()
        optimizer.step()
        if update in updates:
            with torch.no_grad():
                value = truth(agents, landmarks)
                r2 = 1 - (guess(agents, landmarks).mean(0) - value).square().mean() / value.var()
                said = torch.stack([guess(place, landmarks).mean(0) for place in moved])
                brought = torch.stack([truth(place, landmarks) for place in moved])
            said, brought = ((x - x.mean(0)).numpy() for x in (said, brought))
            cells.append(f"{r2:.2f}, {correlation(said, brought):.2f}")
    return f"| {name} | {' | '.join(cells)} |"


def imitation_row(num_agents: int, num_layers: int | None, updates: tuple[int, ...] = (2000, 4000, 8000)) -> str:
    """Error and return of a policy with so many layers for the observation (None: attention), after so many updates.

    The policy is a Gaussian, of whose tanh of the mean the squared distance to the script's action is brought down.
    """
    torch.manual_seed(0)
    args = mpe.Args(policy="gaussian", entities=num_layers is None, gaussian_encoder_layers=num_layers or 1)
    policy = mpe.make_policy(args, 1, 6 * num_agents, 2, torch.ones(num_agents, 2))
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)

    def examples(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Observations and the script's actions, both agents first."""
        agents, landmarks = (
            2.4 * torch.rand(batch_size, num_agents, 2) - 1.2,
            2 * torch.rand(batch_size, num_agents, 2) - 1,
        )
        obs = observe(agents, landmarks)
        obs[..., :2] = 0.4 * torch.randn(batch_size, num_agents, 2)
        return obs.transpose(0, 1), torch.from_numpy(assigned(obs.numpy())).float().transpose(0, 1)

    def error(obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        mean, _ = policy(obs)
        return (torch.tanh(mean) - actions).square().mean()

    held, cells = examples(2000), []
    for update in range(1, updates[-1] + 1):
        optimizer.zero_grad()
        error(*examples(256)).backward()
        optimizer.step()
        if update in updates:
            with torch.no_grad():
                missed = error(*held) / held[1].var()
            played = team_row("", num_agents, playing(policy)).split("|")[2]
            cells.append(f"{missed:.2f}, {played.strip()}")
    network = f"{num_layers} layer{'s' * (num_layers > 1)}" if num_layers else "attention"
    return f"| {num_agents} agents, {network} | {' | '.join(cells)} |"


def load(folder: str) -> mpe.Learner:
    """What a run on simple_spread_v3 has learned. Raises RunError, naming the choices, if it is not one."""
    run_dir = mpe.existing_run("RUN_DIR", folder)
    args, checkpoint = mpe.load_checkpoint("RUN_DIR", run_dir, mpe.Args(env_id=TASK), ("env_id",), ())
    env = mpe.VectorMPE(TASK, args.num_agents, 1)
    learner = mpe.Learner(args, env.obs_size, env.state_size, env.action_mask(), env.alike)
    learner.load_state_dict(checkpoint["learner"])
    return learner


def main(folders: list[str]) -> None:
    if folders == ["--examples"]:
        print("| R2, correlation after so many updates | 1,000 | 2,000 | 4,000 |\n|---|---|---|---|")
        print(example_row("flat critics", mpe.CriticEnsemble), flush=True)
        print(example_row("pooled critics", mpe.PooledCriticEnsemble), flush=True)
        more = mpe.observed_entities(mpe.Args(), 6), mpe.Args().entity_width
        print(example_row("critics that look at one agent and one thing at a time", mpe.EntityCriticEnsemble, *more))
        return
    if folders == ["--imitate"]:
        print("| error, return after so many updates | 2,000 | 4,000 | 8,000 |\n|---|---|---|---|")
        for num_agents in 3, 6:
            for num_layers in 1, 3, None:
                print(imitation_row(num_agents, num_layers), flush=True)
        return
    try:
        learners = [load(folder) for folder in folders]
    except mpe.RunError as error:
        raise SystemExit(f"ddpl_mpe_diagnosis.py: error: {error}") from None
    teams = [(len(learner.mask), f"{learner.args.policy}, seed {learner.args.seed}", learner) for learner in learners]
    print("| team | return | from a landmark to the nearest agent, start | end | collisions |\n|---|---|---|---|---|")
    for num_agents in sorted({3, 6, *(number for number, _, _ in teams)}):
        for script in (still, nearest, assigned):
            print(team_row(f"{num_agents} agents, {script.__name__}", num_agents, script))
    for num_agents, name, learner in teams:
        print(team_row(f"{num_agents} agents, {name}", num_agents, playing(learner.average_policy)))
    columns = "critics of", "correlation", "of the rollouts' halves", "deviation over forces: said", "brought"
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for num_agents, name, learner in teams:
        print(critic_row(f"{num_agents} agents, {name}", learner), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
