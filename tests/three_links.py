"""A task of our own for Isaac Lab 3.0, small enough for a CPU: three agents raise an arm of three links to a target.

    python ddpl_isaaclab.py --task tests.three_links:Three-Links-MARL-Direct

The arm hangs from a fixed base and moves in a vertical plane. Each joint's motor is an agent: it sees its own joint,
the angles of its neighbours and the target, says where to turn to, and shares the reward. An episode succeeds if at
its end the tip has been within 0.1 m of the target for half a second.
"""

import math
from pathlib import Path

import gymnasium as gym
import torch
from isaaclab.actuators import ImplicitActuatorCfg
from isaaclab.assets import ArticulationCfg
from isaaclab.envs import DirectMARLEnv, DirectMARLEnvCfg
from isaaclab.scene import InteractiveSceneCfg
from isaaclab.sim import SimulationCfg, UsdFileCfg
from isaaclab.utils import configclass
from isaaclab_newton.physics import MJWarpSolverCfg, NewtonCfg
from torch import Tensor

LINK = 0.4  # m
JOINTS = {"shoulder": 40.0, "elbow": 20.0, "wrist": 8.0}  # stiffness of their motors, Nm/rad
RANGE = 2.0  # rad, the joint angle that an action of 1 asks for
NEAR, HOLD = 0.1, 0.5  # m, s


@configclass
class SceneCfg(InteractiveSceneCfg):
    """The arm; no ground, which it does not reach."""

    arm: ArticulationCfg = ArticulationCfg(
        prim_path="{ENV_REGEX_NS}/Arm",
        spawn=UsdFileCfg(usd_path=str(Path(__file__).parent / "assets" / "three_links.usda")),
        init_state=ArticulationCfg.InitialStateCfg(pos=(0.0, 0.0, 2.0)),
        actuators={
            joint: ImplicitActuatorCfg(joint_names_expr=[joint], stiffness=stiffness, damping=stiffness / 10)
            for joint, stiffness in JOINTS.items()
        },
    )


@configclass
class ThreeLinksCfg(DirectMARLEnvCfg):
    """Episodes of 2.5 s, 20 steps a second."""

    decimation = 3
    episode_length_s = 2.5
    possible_agents = list(JOINTS)
    action_spaces = dict.fromkeys(JOINTS, 1)
    observation_spaces = {"shoulder": 5, "elbow": 6, "wrist": 5}
    state_space = -1
    sim: SimulationCfg = SimulationCfg(
        dt=1 / 60,
        render_interval=3,
        physics=NewtonCfg(solver_cfg=MJWarpSolverCfg(njmax=5, nconmax=3, integrator="implicitfast")),
    )
    scene: SceneCfg = SceneCfg(num_envs=256, env_spacing=4.0, replicate_physics=True)


class ThreeLinks(DirectMARLEnv):
    """The task. Angles are 0 where the arm hangs down; the target is seen from the shoulder, in m, (sideways, up)."""

    def __init__(self, cfg: ThreeLinksCfg, render_mode: str | None = None, **kwargs):
        super().__init__(cfg, render_mode, **kwargs)
        self.arm = self.scene["arm"]
        self.joints = torch.tensor(self.arm.find_joints(list(JOINTS), preserve_order=True)[0], device=self.device)
        self.target = torch.zeros(self.num_envs, 2, device=self.device)
        self.held = torch.zeros(self.num_envs, device=self.device)  # for how many steps the tip has been there

    def _pre_physics_step(self, actions: dict[str, Tensor]) -> None:
        self.actions = torch.cat([actions[agent] for agent in JOINTS], dim=1)

    def _apply_action(self) -> None:
        self.arm.set_joint_position_target_index(target=RANGE * self.actions, joint_ids=self.joints)

    def distance(self) -> Tensor:
        """[E] of the tip from the target, in m."""
        angles = self.arm.data.joint_pos.torch[:, self.joints].cumsum(1)  # of the links, from hanging down
        tip = LINK * torch.stack([angles.sin().sum(1), -angles.cos().sum(1)], dim=1)
        return (tip - self.target).norm(dim=1)

    def _get_observations(self) -> dict[str, Tensor]:
        angles = self.arm.data.joint_pos.torch[:, self.joints].split(1, dim=1)
        velocities = (self.arm.data.joint_vel.torch[:, self.joints] / 5).split(1, dim=1)
        seen = {}
        for i, agent in enumerate(JOINTS):
            neighbours = [angles[j] for j in (i - 1, i + 1) if 0 <= j < len(JOINTS)]
            seen[agent] = torch.cat([angles[i], velocities[i], *neighbours, self.target], dim=1)
        return seen

    def _get_rewards(self) -> dict[str, Tensor]:
        distance = self.distance()
        reward = 2 - 2 * distance + 2 * (distance < NEAR) - 0.01 * self.actions.square().sum(1)
        return dict.fromkeys(JOINTS, reward * self.step_dt)

    def _get_dones(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.held = torch.where(self.distance() < NEAR, self.held + 1, 0)
        late = self.episode_length_buf >= self.max_episode_length - 1
        return dict.fromkeys(JOINTS, torch.zeros_like(late)), dict.fromkeys(JOINTS, late)

    def _reset_idx(self, env_ids: Tensor | None) -> None:
        if env_ids is None:
            env_ids = torch.arange(self.num_envs, device=self.device)
        if hasattr(self, "held"):
            succeeded = self.held[env_ids] >= round(HOLD / self.step_dt)
            self.extras.setdefault("log", {})["Metrics/success_rate"] = succeeded.float().mean()
        super()._reset_idx(env_ids)
        self.held[env_ids] = 0
        size = len(env_ids)
        direction = math.pi * (0.25 + 0.5 * torch.rand(size, device=self.device))  # from straight down
        radius = 0.7 + 0.3 * torch.rand(size, device=self.device)
        self.target[env_ids] = (radius * torch.stack([direction.sin(), -direction.cos()])).T
        angles = torch.rand(size, len(JOINTS), device=self.device) - 0.5
        self.arm.write_joint_position_to_sim_index(position=angles, joint_ids=self.joints, env_ids=env_ids)
        self.arm.write_joint_velocity_to_sim_index(velocity=0 * angles, joint_ids=self.joints, env_ids=env_ids)


gym.register(
    id="Three-Links-MARL-Direct",
    entry_point=f"{__name__}:ThreeLinks",
    disable_env_checker=True,
    kwargs={"env_cfg_entry_point": f"{__name__}:ThreeLinksCfg"},
)
