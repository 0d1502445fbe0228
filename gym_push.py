"""The pushing task for Gymnasium, which is needed here only: pip install gymnasium.

    import gymnasium, gym_push
    env = gymnasium.make("tecnets/Push-v3", split="train", tasks=1, dense_reward=True)
"""
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

import sim


class PushingEnv(gymnasium.Env):
    """sim.PushEnv, with one of the first `tasks` of a split drawn at every reset.

    Observations do not tell which object is the target, demonstrations do: with a single task it
    is always the same. Options of reset are those of PushEnv (`task`, `side`, `swap`). The reward
    is 1 while the target is at the goal or, if dense, minus its distance from it. `info` adds the
    poses (7,) of target, distractor and fork (position and quaternion), the goal and `is_success`.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": sim.CONTROL_HZ}

    def __init__(self, split="train", tasks=1, dense_reward=False, images=True,
                 image_size=sim.IMAGE_SIZE, render_mode=None):
        self.split, self.tasks, self.dense_reward = split, tasks, dense_reward
        self.render_mode = render_mode
        self.env = sim.PushEnv(image_size, "rgb_array" if images else None)
        spaces = {"state": Box(-np.inf, np.inf, (sim.STATE_DIM,), np.float32)}
        if images:
            spaces["image"] = Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = Dict(spaces)
        self.action_space = Box(-1, 1, (sim.ACTION_DIM,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        task = sim.make_task(self.split, int(self.np_random.integers(self.tasks)))
        scene = int(self.np_random.integers(2 ** 31))
        obs, info = self.env.reset(seed=scene, options={"task": task, **(options or {})})
        return obs, self._with_poses(info)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.dense_reward:
            reward = -info["distance"]
        return obs, reward, terminated, truncated, self._with_poses(info)

    def render(self):
        return self.env.render()

    def close(self):
        self.env.close()

    def _with_poses(self, info):
        env, client = self.env, self.env.client
        poses = {"target": client.getBasePositionAndOrientation(env.target),
                 "distractor": client.getBasePositionAndOrientation(env.distractor),
                 "fork": client.getLinkState(env.arm, sim.FORK_LINK)[4:6]}
        poses = {name: np.concatenate(pose) for name, pose in poses.items()}
        return {**info, **poses, "goal": np.zeros(3), "is_success": info["success"]}


gymnasium.register("tecnets/Push-v3", PushingEnv)
