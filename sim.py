"""A compact PyBullet simulator of the one-shot pushing benchmark.

A 7-DoF torque-controlled arm pushes the *target* object onto a red disc and leaves the
*distractor* alone; which of the two is the target is told by a demonstration only. The start
ranges, the camera, the control rate and the success rule are those of MIL's simulated pushing
(Finn et al., CoRL 2017), the benchmark of the TecNets paper. Lengths are metres, angles radians,
torques newton metres; the goal is the origin, +x points from the robot to the camera.
"""
import colorsys
import functools
import itertools
import math
import os
import re
import tempfile
import xml.etree.ElementTree as ElementTree
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pybullet
import pybullet_data
from PIL import Image
from pybullet_utils.bullet_client import BulletClient

VERSION = 3  # of all below: results of one version say nothing of another

# The benchmark's rules (MIL's simulated pushing).
CONTROL_HZ = 20
HORIZON = 100  # control steps, 5 s
IMAGE_SIZE = 125  # pixels
STATE_DIM = 20  # 7 joint angles, 7 joint velocities, end effector (3), goal (3)
ACTION_DIM = 7
GOAL_RADIUS = 0.08  # of the drawn disc
SUCCESS_DISTANCE = 0.017 ** 0.5  # 0.13 m, beyond the disc; MIL's rule: squared distance < 0.017
SUCCESS_STEPS = 10  # control steps within SUCCESS_DISTANCE
STRICT_DISTANCE = 0.05  # final distance of the stricter rule reported beside it
MOVED_DISTANCE = 0.03  # a distractor moved further than this counts as moved
START_X, START_Y = (-0.3, 0.0), (0.0, 0.2)  # of an object; -y for the other side
GOAL_CLEARANCE = 0.17  # of an object's start
OBJECT_CLEARANCE = 0.10  # between the objects, if the sum of their radii is not more
MAX_CLEARANCE = 0.45  # the start area has places that far apart
START_SPEED = 0.005  # joint velocities at the start, U(-0.005, 0.005) rad/s

# A scene mirrored in the x-z plane, y for -y, is again a valid scene. The signs that mirror it:
_JOINT_SIGNS = [-1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
MIRROR = {"states": [*_JOINT_SIGNS, *_JOINT_SIGNS, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0],
          "actions": _JOINT_SIGNS}

# The objects. 999 usable meshes of pybullet_data/random_urdfs (168 holds NaNs), split for good.
SPLITS = ("train", "val", "test")
_MESHES = np.random.default_rng(0).permutation([i for i in range(1000) if i != 168]).tolist()
MESHES = dict(train=_MESHES[:699], val=_MESHES[699:850], test=_MESHES[850:])
SIZE = (0.055, 0.27)  # largest horizontal extent, the range of the benchmark
HEIGHT = (0.03, 0.08)  # a mesh is stretched or flattened into this range, the fork travels above
MASS = (0.1, 2.0)  # kg, log-uniform
FRICTION = (0.15, 0.5)  # sliding, against the table; with the mass 0.15-10 N of resistance
SIMILAR = 0.3  # share of pairs whose objects look nearly the same
PATTERNS = ("flat", "stripes", "checks", "patches")

# The arm: KUKA iiwa on a bracket that the camera does not see, flange down, a fork as the tool.
BASE = (-0.61, 0.0, 0.36)
FORK_LINK = 7  # its frame is the end effector: centre of the bar, prongs along -x, z down
FORK_WIDTH, PRONG, STEM = 0.15, 0.06, 0.12
FLANGE = STEM + 0.045  # from the last link's frame to the fork's
START_JOINTS = (0.0, 1.562, 0.0, -2.045, 0.0, -0.465, 0.0)  # fork at (-0.37, 0, 0.12), to +x
DAMPING = np.array([15, 15, 10, 8, 1.5, 1.5, 0.6])  # N m s/rad: torque acts like a velocity command
TORQUE = np.array([20, 20, 10, 10, 2, 2, 1.0])  # N m, of action 1
MAX_SPEED = math.pi  # rad/s, of the iiwa 7's fastest joints; no blow on the fork spins one faster
SUBSTEPS = 12  # of 1/240 s
# PyBullet's explicit damping D diverges where (time step) x (largest eigenvalue of M^-1 D), M the
# arm's mass matrix, is above 2. Demonstrations stay below this limit; in a pose that exceeds it
# the time step is divided.
MAX_DAMPING_STEP = 1.9

# The picture; more of it in Look.
CAMERA_FOV, NEAR, FAR = 45, 0.1, 3.0
SUPERSAMPLE = 2  # rendered at twice the size and averaged
TABLE_EDGE, TABLE_TILES = 2.0, 20  # from the goal, along x and y; of its texture, side by side
# All but the objects is as green as it is blue: exchange the two, and the scene is valid again.
TABLE_RGB, GOAL_RGB = (0.68, 0.70, 0.70), (0.85, 0.05, 0.05)
DRAWN_LINKS = 5, 6  # the other links are out of sight
LINK_CELL = 0.03  # vertices of these links that fall into one cell of this size become one


class _Client(BulletClient):
    """A physics client; BulletClient's own __init__ makes PyBullet print."""

    def __init__(self):
        self._client, self._pid = pybullet.connect(pybullet.DIRECT), os.getpid()
        self.setPhysicsEngineParameter(enableFileCaching=0)  # it would keep all bytes for ever

    def __reduce__(self):  # a copy would share the physics, and end it
        raise TypeError("a running simulation cannot be copied or pickled")


@dataclass(frozen=True)
class Appearance:
    """A two-colour procedural texture; `colours` are two RGB triples in [0, 1]."""
    pattern: str
    colours: tuple
    seed: int

    def __post_init__(self):
        if not (0 <= np.min(self.colours) and np.max(self.colours) <= 1):
            raise ValueError(f"colours are in [0, 1], not {self.colours}")


@dataclass(frozen=True)
class Look:
    """How a scene looks, apart from the goal and the objects; by default as in all benchmark tasks.

    The camera is opposite the robot: 0.73 m from the goal, looking 50 degrees down.
    """
    table: Appearance = Appearance("flat", (TABLE_RGB, TABLE_RGB), 0)
    arm: tuple = (0.55, 0.62, 0.62), (0.92, 0.92, 0.92)  # colours of DRAWN_LINKS
    light: tuple = (1.0, 0.0, 2.0)  # its direction
    brightness: float = 1.0  # of this light; that from everywhere stays
    # x and y of the point on the table that it looks at, distance from it, yaw, elevation (degrees)
    camera: tuple = (-0.12, 0, 0.8, 90, -50)
    noise: float = 0.0  # std of a pixel's colours, in grey levels, drawn for every picture


@dataclass(frozen=True)
class Body:
    """One object: `size` is its largest horizontal extent (m), `mass` in kg.

    `mesh_id` is the number of a mesh of pybullet_data/random_urdfs, or the path of an OBJ file of
    triangles.
    """
    mesh_id: int | str | os.PathLike
    size: float
    mass: float
    friction: float
    appearance: Appearance

    def __post_init__(self):  # a mass of 0 would be a body that nothing moves
        if not (self.size > 0 and 0 < self.mass < math.inf and self.friction >= 0):
            raise ValueError(f"size and mass are above 0, friction is not below: {self}")


@dataclass(frozen=True)
class Task:
    """Push `target` to the goal, leave `distractor`. Tasks 2k and 2k + 1 of a split swap the two.

    make_task gives those of the benchmark's splits; a task of your own bears another name for its
    split.
    """
    split: str
    index: int
    target: Body
    distractor: Body


# Tasks and objects ----------------------------------------------------------------------------

def make_task(split, index):
    """The task of a split ("train", "val", "test") with an index >= 0, always the same one."""
    meshes = MESHES[split]
    pair, swapped = divmod(index, 2)
    rng = np.random.default_rng([SPLITS.index(split), pair])
    looks = [_random_appearance(rng) for _ in range(2)]
    if rng.random() < SIMILAR:
        colours = np.clip(np.array(looks[0].colours) + rng.normal(0, 0.06, (2, 3)), 0, 1)
        colours = tuple(map(tuple, colours.tolist()))
        looks[1] = Appearance(looks[0].pattern, colours, looks[1].seed)
    bodies = []
    for i in range(2):
        bodies.append(Body(
            mesh_id=meshes[(2 * pair + i) % len(meshes)],
            size=float(np.exp(rng.uniform(*np.log(SIZE)))),
            mass=float(np.exp(rng.uniform(*np.log(MASS)))),
            friction=float(rng.uniform(*FRICTION)),
            appearance=looks[i]))
    return Task(split, index, bodies[swapped], bodies[1 - swapped])


def random_look(rng):
    """A look to train in (domain randomisation): tables and arms are of hues from yellow to blue.

    Its mirror image is as likely. Without noise, which would make data three times as large.
    """
    hsv = (0.15, 0, 0.2), (0.7, 0.6, 1)
    camera = rng.uniform((-0.14, -0.02, 0.77, 87, -53), (-0.10, 0.02, 0.83, 93, -47))
    return Look(_random_appearance(rng, *hsv), _random_appearance(rng, *hsv).colours,
                (1, rng.uniform(-1, 1), 2), rng.uniform(0.7, 1.2), tuple(camera))


HELD_OUT_LOOKS = {  # random_look draws nothing like them
    "table": Look(table=Appearance("checks", ((0.55, 0.15, 0.5), (0.8, 0.5, 0.75)), 0)),
    "arm": Look(arm=((0.8, 0.35, 0.0), (1.0, 0.5, 0.0))),
    "light": Look(light=(-1.0, 1.5, 1.0)),
    "camera": Look(camera=(-0.12, 0.04, 0.8, 97, -43)),
    "noise": Look(noise=12),
}


def split_key(split):
    """The number of a split in the seeds of its scenes; a name of your own is hashed."""
    return SPLITS.index(split) if split in SPLITS else len(SPLITS) + zlib.crc32(split.encode())


def _random_appearance(rng, low=(0, 0.1, 0.25), high=(1, 1, 1)):
    """With colours between two triples of hue, saturation and value."""
    colours = [colorsys.hsv_to_rgb(*rng.uniform(low, high)) for _ in range(2)]
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    return Appearance(pattern, tuple(colours), int(rng.integers(2 ** 31)))


def _texture(appearance):
    """The 64 x 64 pixel picture of an appearance, 8 x 8 cells."""
    row, column = np.indices((8, 8))
    mix = {
        "flat": 0 * row,
        "stripes": column // 2 % 2,
        "checks": (row // 2 + column // 2) % 2,
        "patches": np.random.default_rng(appearance.seed).random((8, 8)),
    }[appearance.pattern]
    a, b = np.array(appearance.colours) * 255
    pixels = (a + mix[..., None] * (b - a)).astype(np.uint8)
    return Image.fromarray(pixels.repeat(8, 0).repeat(8, 1))


def _mesh(mesh_id):
    """Path, vertices (V, 3) and triangles (T, 3) of a body's mesh, as its file is now."""
    path = mesh_id
    if hasattr(mesh_id, "__index__"):  # an int, or a number of numpy's
        name = f"{int(mesh_id):03d}"
        path = Path(pybullet_data.getDataPath(), "random_urdfs", name, f"{name}.obj")
    obj = re.sub(rb"/\S*", b"", Path(path).read_bytes())  # of corners like 1/2/3 only the vertex
    vertices = re.findall(rb"^\s*v\s+(\S+)\s+(\S+)\s+(\S+)", obj, re.MULTILINE)
    faces = re.findall(rb"^\s*f\s+(\d+)\s+(\d+)\s+(\d+)\s*$", obj, re.MULTILINE)
    if not faces or len(faces) != len(re.findall(rb"^\s*f\s", obj, re.MULTILINE)):
        raise ValueError(f"{path} must have triangles, with vertices counted from its beginning")
    return str(path), np.array(vertices, float), np.array(faces, int) - 1


def body_shape(body):
    """Scale (3,) and centre (3,) of a body's mesh; its vertices (V, 3) about the centre, scaled."""
    path, vertices, _ = _mesh(body.mesh_id)
    low, high = vertices.min(0), vertices.max(0)
    width, height = (high - low)[:2].max(), (high - low)[2]
    if not (width > 0 and height > 0):
        raise ValueError(f"{path} has no extent: it is {width} wide and {height} high")
    scale = body.size / width
    scale = np.array([scale, scale, np.clip(height * scale, *HEIGHT) / height])
    centre = (low + high) / 2
    return scale, centre, (vertices - centre) * scale


def _normals(vertices, faces):
    """Unit normals (V, 3) of a mesh, smooth over the triangles that share a vertex."""
    a, b, c = vertices[faces].swapaxes(0, 1)
    normals = np.zeros_like(vertices)
    np.add.at(normals, faces, np.cross(b - a, c - a)[:, None])
    return normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12)


def _obj(faces, **rows):
    """An OBJ, as bytes: triangles (T, 3) of vertices, which have a row each in v, vt and vn."""
    lines = []
    for kind in rows:
        for row in rows[kind].tolist():
            lines.append(" ".join([kind, *map(repr, row)]))
    for face in (faces + 1).tolist():
        lines.append("f {0}/{0}/{0} {1}/{1}/{1} {2}/{2}/{2}".format(*face))
    return "\n".join(lines).encode()


@functools.lru_cache(maxsize=4)
def _textured(triangles):
    """An OBJ of flat triangles (T, 3, 3), given as bytes; a tile of the texture is 8 cm wide.

    The texture is projected along the axis that a triangle faces most.
    """
    vertices = np.frombuffer(triangles).reshape(-1, 3)
    faces = np.arange(len(vertices)).reshape(-1, 3)
    normals = _normals(vertices, faces)
    axes = np.array([[1, 2], [0, 2], [0, 1]])[np.abs(normals).argmax(1)]
    uvs = np.take_along_axis(vertices, axes, 1) / 0.08
    return _obj(faces, v=vertices, vt=uvs, vn=normals)


# The arm --------------------------------------------------------------------------------------

# The fork's boxes are seen and touched, its flange is only seen.
_FORK_BOXES = f"""
<visual><material name="Fork"/>
  <geometry><box size="0.012 {FORK_WIDTH} 0.04"/></geometry></visual>
<visual><material name="Fork"/><origin xyz="0 0 {-STEM / 2}"/>
  <geometry><box size="0.02 0.02 {STEM}"/></geometry></visual>
<visual><material name="Fork"/><origin xyz="{-PRONG / 2} {(0.0075 - FORK_WIDTH) / 2} 0"/>
  <geometry><box size="{PRONG} 0.0075 0.04"/></geometry></visual>
<visual><material name="Fork"/><origin xyz="{-PRONG / 2} {(FORK_WIDTH - 0.0075) / 2} 0"/>
  <geometry><box size="{PRONG} 0.0075 0.04"/></geometry></visual>"""
_FORK = f"""
<fork>
  <material name="Fork"><color rgba="0.08 0.08 0.08 1"/></material>
  <link name="fork">
    <inertial><mass value="0.5"/>
      <inertia ixx="0.003" iyy="0.003" izz="0.003" ixy="0" ixz="0" iyz="0"/></inertial>
    {_FORK_BOXES}
    {_FORK_BOXES.replace("visual", "collision")}
    <visual><material name="Grey"/><origin xyz="0 0 {-FLANGE}"/>
      <geometry><cylinder radius="0.045" length="0.04"/></geometry></visual>
  </link>
  <joint name="fork_joint" type="fixed">
    <parent link="lbr_iiwa_link_7"/><child link="fork"/><origin xyz="0 0 {FLANGE}"/>
  </joint>
</fork>"""


@functools.lru_cache(maxsize=1)
def _arm():
    """The files (bytes by name) of pybullet_data's iiwa with the fork, and its drawn links' boxes.

    There are no collision shapes but the fork's, and no visuals that the camera never sees.
    """
    folder = Path(pybullet_data.getDataPath(), "kuka_iiwa")
    root, files = ElementTree.parse(folder / "model.urdf").getroot(), {}
    boxes = {FORK_LINK: _box((-PRONG, -FORK_WIDTH / 2, -FLANGE - 0.02),
                             (0.006, FORK_WIDTH / 2, 0.02))}
    for number, link in enumerate(root.findall("link")):
        link.remove(link.find("collision"))
        # Its centre of mass goes to the mirror plane, which is y = 0 or z = 0 of a link's frame.
        centre = link.find("inertial/origin")
        x, y, z = centre.get("xyz").split()
        centre.set("xyz", f"{x} 0 {z}" if number % 2 else f"{x} {y} 0")
        visual = link.find("visual")
        if number not in DRAWN_LINKS:
            link.remove(visual)
            continue
        name, mesh = f"link_{number}.obj", visual.find("*/mesh")
        _, vertices, faces = _mesh(folder / mesh.get("filename"))
        files[name] = _simplified(vertices, faces)
        boxes[number - 1] = _box(vertices.min(0), vertices.max(0))  # the base has no number
        mesh.set("filename", name)
    root.extend(ElementTree.fromstring(_FORK))
    return {**files, "arm.urdf": ElementTree.tostring(root)}, boxes


def _simplified(vertices, faces):
    """An OBJ of a mesh with a fifth of its triangles: vertices in one LINK_CELL become one."""
    _, cell = np.unique(np.round(vertices / LINK_CELL), axis=0, return_inverse=True)
    sums = np.stack([np.bincount(cell, column) for column in vertices.T], 1)
    vertices = sums / np.bincount(cell)[:, None]
    faces = cell[faces]
    faces = faces[(faces != np.roll(faces, 1, 1)).all(1)]
    return _obj(faces, v=vertices, vt=vertices, vn=_normals(vertices, faces))  # no texture: any vt


def _box(low, high):
    """The corners (8, 3) of a box."""
    return np.array([*itertools.product(*zip(low, high))])


def _rotation(quaternion):
    """Its matrix (3, 3)."""
    return np.reshape(pybullet.getMatrixFromQuaternion(quaternion), (3, 3))


# The picture ----------------------------------------------------------------------------------

@functools.lru_cache(maxsize=4)
def _background(size, look):
    """The empty scene that stands behind the bodies: RGBA (size, size) as uint32."""
    client = _Client()
    shape = client.createVisualShape(client.GEOM_BOX, halfExtents=(TABLE_EDGE, TABLE_EDGE, 0.01),
                                     rgbaColor=(*look.table.colours[0], 1))
    table = client.createMultiBody(0, -1, shape, (0, 0, -0.01))
    if look.table.pattern != "flat":
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            tiles = np.tile(_texture(look.table), (TABLE_TILES, TABLE_TILES, 1))
            Image.fromarray(tiles).save(file.name)
            client.changeVisualShape(table, -1, textureUniqueId=client.loadTexture(file.name),
                                     rgbaColor=(1, 1, 1, 1))
    disc = client.createVisualShape(client.GEOM_CYLINDER, radius=GOAL_RADIUS, length=0.001,
                                    rgbaColor=(*GOAL_RGB, 1))
    client.createMultiBody(0, -1, disc, (0, 0, 0.001))
    pixels, _ = _camera(client, size, (0, 0, size, size), look)
    return pixels


def _view(look):
    """The camera's view matrix, 16 numbers as PyBullet takes them."""
    x, y, *turned = look.camera
    return pybullet.computeViewMatrixFromYawPitchRoll((x, y, 0), *turned, 0, 2)


_SLOPE = math.tan(math.radians(CAMERA_FOV) / 2)  # of the picture's edges


def _camera(client, size, window, look):
    """The part of a picture of (size, size) within a window (left, top, right, bottom), in pixels.

    Returns RGBA (h, w) as uint32 and the mask (h, w) of the pixels that show a body.
    """
    # TinyRenderer looks through a pixel's lower left corner: half a pixel takes it to the middle.
    middles = np.add(window, (0.5, -0.5, 0.5, -0.5))
    left, top, right, bottom = ((2 * middles / size - 1) * _SLOPE * NEAR).tolist()
    projection = client.computeProjectionMatrix(left, right, -bottom, -top, NEAR, FAR)
    width, height = window[2] - window[0], window[3] - window[1]
    _, _, rgba, _, segmentation = client.getCameraImage(
        width, height, _view(look), projection, lightDirection=look.light, shadow=0,
        lightColor=(look.brightness,) * 3,
        renderer=client.ER_TINY_RENDERER)
    # pybullet-arm64 gives tuples: np.frombuffer(bytes()) is quick for those, too.
    pixels = np.frombuffer(bytes(rgba), np.uint32).reshape(height, width)
    return pixels, np.asarray(segmentation).reshape(height, width) >= 0


def _window(points, size, look):
    """The window (left, top, right, bottom) of a (size, size) picture that shows points (N, 3)."""
    view = np.reshape(_view(look), (4, 4))
    x, y, z = (points @ view[:3, :3] + view[3, :3]).T
    if (z > -NEAR).any():  # beside or behind the camera
        return 0, 0, size, size
    at = size / 2 * (1 + np.stack([x, -y]) / -z / _SLOPE)
    low, high = np.floor(at.min(1)) - 1, np.ceil(at.max(1)) + 1
    return np.clip([*low, *high], 0, size).astype(int).tolist()


# The environment ------------------------------------------------------------------------------

class PushEnv:
    """The pushing task, with the calls of a Gymnasium environment (gym_push.py makes it one).

    An observation is a dict of `state` (20,) float32 and, with `images`, `image` (image_size,
    image_size, 3) uint8, both of the same instant. The reward is 1.0 while the target is within
    SUCCESS_DISTANCE of the goal. `info` has `distance` (of the target from the goal),
    `distractor_displacement`, `success`, and `lost`: an object is wholly below the table, or its
    centre off it. An episode's course depends on the seed, the options of reset and the actions
    only: every reset starts a fresh physics client.
    """

    def __init__(self, image_size=IMAGE_SIZE, images=True):
        self.image_size, self.images = image_size, images
        self.client = self._rng = None

    def reset(self, *, seed=None, options=None):
        """Start an episode; `options` holds the `task` and, if wanted, the scene's `look` and the
        target's `side`, the sign of its y.

        With the option `swap` the distractor is placed first, the target second: the tasks of a
        pair, one of them swapped, start from the same scene for the same seed. Without a seed the
        generator of the last one goes on. Returns (obs, info).
        """
        if seed is not None or self._rng is None:
            self._rng = np.random.default_rng(seed)
        self._noise, = self._rng.spawn(1)
        self._start_episode(**(options or {}))
        self.steps = self.steps_at_goal = 0
        self._distractor_start = self.distractor_position
        return self._observe(), self._info()

    def step(self, action):
        """Apply an action (7,) in [-1, 1], clipped, for one control step (1/20 s).

        Returns (obs, reward, terminated, truncated, info).
        """
        client, q = self.client, self.q.tolist()
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"an action is {ACTION_DIM} finite numbers, not {action}")
        if self.steps >= HORIZON:
            raise RuntimeError(f"the episode has ended after {HORIZON} steps: call reset")
        gravity = client.calculateInverseDynamics(self.arm, q, [0] * 7, [0] * 7)
        torques = (np.clip(action, -1, 1) * TORQUE + gravity).tolist()
        mass, root = np.array(client.calculateMassMatrix(self.arm, q)), np.sqrt(DAMPING)
        damping = np.linalg.eigvalsh(root[:, None] * np.linalg.inv(mass) * root)[-1]
        damping_step = damping / CONTROL_HZ / SUBSTEPS
        substeps = SUBSTEPS * math.ceil(damping_step / MAX_DAMPING_STEP)  # more if stretched
        client.setTimeStep(1 / CONTROL_HZ / substeps)
        control, advance = client.setJointMotorControlArray, client.stepSimulation
        for _ in range(substeps):  # PyBullet clears the torques at every step
            control(self.arm, range(7), pybullet.TORQUE_CONTROL, forces=torques)
            advance()
        self.steps += 1
        reward = float(np.linalg.norm(self.target_position[:2]) < SUCCESS_DISTANCE)
        self.steps_at_goal += reward
        return self._observe(), reward, False, self.steps >= HORIZON, self._info()

    def render(self):
        """The scene as it is now, (image_size, image_size, 3) uint8, antialiased.

        The bodies are drawn over the empty scene: the same picture as drawing it all, but faster.
        """
        size, look = self.image_size * SUPERSAMPLE, self.look
        pixels = _background(size, look).copy()
        window = [SUPERSAMPLE * x for x in _window(self._drawn_points(), self.image_size, look)]
        left, top, right, bottom = window
        if left < right and top < bottom:
            drawn, body = _camera(self.client, size, window, look)
            np.copyto(pixels[top:bottom, left:right], drawn, where=body)
        picture = Image.frombuffer("RGBX", (size, size), pixels).reduce(SUPERSAMPLE)
        picture = np.array(picture.convert("RGB"))
        if look.noise:
            noisy = picture + self._noise.normal(0, look.noise, picture.shape)
            picture = noisy.round().clip(0, 255).astype(np.uint8)
        return picture

    def close(self):
        """End the physics client; the environment can be reset again."""
        self.client = None

    @property
    def target_position(self):
        """(3,) position of the target's centre."""
        return np.array(self.client.getBasePositionAndOrientation(self.target)[0])

    @property
    def distractor_position(self):
        """(3,) position of the distractor's centre."""
        return np.array(self.client.getBasePositionAndOrientation(self.distractor)[0])

    def _start_episode(self, task, side=None, swap=False, look=Look()):
        """A scene with the objects and the arm; the arguments are the options of reset."""
        if side not in (None, 1, -1):
            raise ValueError(f"side is 1, -1 or None, not {side}")
        self.close()
        self.task, self.look = task, look
        self.client = client = _Client()
        self._vertices = {}  # of an object about its centre, by body
        self._boxes = {}  # around what is drawn, in its own frame, by (body, link)
        client.setGravity(0, 0, -9.81)
        # Bullet's own 50 iterations would move an object by less than 1 mm more.
        client.setPhysicsEngineParameter(numSolverIterations=10)
        unseen = client.createVisualShape(client.GEOM_BOX, halfExtents=(0.01,) * 3,
                                          visualFramePosition=(0, 0, -99))
        plane = client.createCollisionShape(client.GEOM_PLANE)
        table = client.createMultiBody(0, plane, unseen)
        client.changeDynamics(table, -1, lateralFriction=1)
        self._place_objects(side, swap)
        self._load_arm()

    def _place_objects(self, side, swap):
        """Put the objects on the two sides of the table, and let them come to rest there."""
        client, order = self.client, -1 if swap else 1
        bodies, places = [self.task.target, self.task.distractor][::order], []
        side = side * order if side else self._rng.choice((-1, 1))
        shapes = [body_shape(body) for body in bodies]
        radii = [np.linalg.norm(vertices[:, :2], axis=1).max() for *_, vertices in shapes]
        clearance = max(OBJECT_CLEARANCE, sum(radii))
        if clearance > MAX_CLEARANCE:  # no places would ever be found
            raise ValueError(f"the bodies need {clearance:.2f} m between them, there are "
                             f"{MAX_CLEARANCE}: take smaller ones")
        while not places or np.linalg.norm(places[0] - places[1]) <= clearance:
            places = [self._draw_place(side), self._draw_place(-side)]
        ids = [*map(self._load_body, bodies, shapes, places)]
        self.target, self.distractor = ids[::order]
        for _ in range(120):  # of PyBullet's 1/240 s, to come to rest; then back to the place
            client.stepSimulation()
        for body_id, place in zip(ids, places):
            (_, _, z), turn = client.getBasePositionAndOrientation(body_id)
            client.resetBasePositionAndOrientation(body_id, (*place, z), turn)

    def _draw_place(self, side):
        """A start (2,) for an object on a side of the table, away from the goal."""
        while True:
            place = np.array([self._rng.uniform(*START_X), side * self._rng.uniform(*START_Y)])
            if np.linalg.norm(place) > GOAL_CLEARANCE:
                return place

    def _load_body(self, body, shape, place):
        """Its PyBullet number. The body floats 1 mm above its place (2,), turned at random."""
        client, (scale, centre, vertices) = self.client, shape
        path, _, faces = _mesh(body.mesh_id)
        half = np.ptp(vertices, axis=0) / 2
        turn = client.getQuaternionFromEuler((0, 0, self._rng.uniform(-np.pi, np.pi)))
        collision = client.createCollisionShape(
            client.GEOM_MESH, fileName=path, meshScale=scale.tolist(),
            collisionFramePosition=(-centre * scale).tolist())
        with tempfile.TemporaryDirectory() as folder:  # meshes given as lists leak in PyBullet
            mesh, picture = f"{folder}/body.obj", f"{folder}/texture.png"
            Path(mesh).write_bytes(_textured(vertices[faces].tobytes()))
            _texture(body.appearance).save(picture)
            visual = client.createVisualShape(client.GEOM_MESH, fileName=mesh)
            start = (*place, half[2] + 0.001)
            body_id = client.createMultiBody(body.mass, collision, visual, start, turn)
            client.changeVisualShape(body_id, -1, textureUniqueId=client.loadTexture(picture))
        client.changeDynamics(body_id, -1, lateralFriction=body.friction, rollingFriction=0.002,
                              spinningFriction=0.002)
        self._vertices[body_id] = vertices
        self._boxes[body_id, -1] = _box(-half, half)
        return body_id

    def _load_arm(self):
        """The arm in its start posture, nearly at rest, without PyBullet's motors."""
        client = self.client
        files, boxes = _arm()
        with tempfile.TemporaryDirectory() as folder:
            for name in files:
                Path(folder, name).write_bytes(files[name])
            # Inertias recomputed from the fork's thin boxes would let the last joint spin freely.
            self.arm = client.loadURDF(f"{folder}/arm.urdf", BASE, useFixedBase=True,
                                       flags=client.URDF_USE_INERTIA_FROM_FILE)
        for number, colour in zip(DRAWN_LINKS, self.look.arm, strict=True):
            client.changeVisualShape(self.arm, number - 1, rgbaColor=(*colour, 1))
        for link in boxes:
            self._boxes[self.arm, link] = boxes[link]
        client.setJointMotorControlArray(self.arm, range(7), client.VELOCITY_CONTROL,
                                         forces=[0] * 7)
        speeds = self._rng.uniform(-START_SPEED, START_SPEED, 7)
        for joint in range(7):
            client.changeDynamics(self.arm, joint, jointDamping=DAMPING[joint])
            client.resetJointState(self.arm, joint, START_JOINTS[joint], speeds[joint])
        client.changeDynamics(self.arm, FORK_LINK, lateralFriction=0.5,
                              maxJointVelocity=MAX_SPEED)  # of all joints

    def _observe(self):
        """Read the arm, and return the observation."""
        client = self.client
        joints = client.getJointStates(self.arm, range(7))
        self.q, self.dq = np.array([joint[:2] for joint in joints]).T
        fork = client.getLinkState(self.arm, FORK_LINK, computeLinkVelocity=True,
                                   computeForwardKinematics=True)
        self.fork_position, self.fork_rotation = np.array(fork[4]), _rotation(fork[5])
        self.fork_velocity = np.array(fork[6][:2])
        state = np.concatenate([self.q, self.dq, self.fork_position, np.zeros(3)])
        obs = {"state": state.astype(np.float32)}
        if self.images:
            obs["image"] = self.render()
        return obs

    def _info(self):
        target, distractor = self.target_position, self.distractor_position
        off_table = np.abs([target, distractor])[:, :2].max() > TABLE_EDGE
        tops = [self.client.getAABB(body)[1][2] for body in (self.target, self.distractor)]
        moved = distractor - self._distractor_start
        return {
            "distance": float(np.linalg.norm(target[:2])),
            "lost": bool(off_table or min(tops) < 0),
            "distractor_displacement": float(np.linalg.norm(moved[:2])),
            "success": self.steps_at_goal >= SUCCESS_STEPS,
        }

    def _drawn_points(self):
        """Points (N, 3) around all that is drawn."""
        client, points = self.client, []
        for (body_id, link), box in self._boxes.items():
            if link < 0:
                pose = client.getBasePositionAndOrientation(body_id)
            else:
                pose = client.getLinkState(body_id, link, computeForwardKinematics=True)[4:6]
            points.append(box @ _rotation(pose[1]).T + pose[0])
        return np.concatenate(points)


# The expert -----------------------------------------------------------------------------------

# Every phase can be read from the picture and the state, so that it can be cloned.
TRAVEL_HEIGHT, PUSH_HEIGHT = 0.118, 0.022  # of the fork
TRAVEL_SPEED, PUSH_SPEED = 0.45, 0.20  # m/s
STOP_DISTANCE = 0.015  # of the target from the goal
# N, N s/m, N: the force grows with how far the push lags behind.
PUSH_FORCE, PUSH_GAIN, MAX_FORCE = 4.0, 50.0, 14.0
DETOUR = 0.6  # sideways per metre ahead, at most
DETOUR_WIDTH, DETOUR_MARGIN = 0.05, 0.02  # m over which it grows; m of air kept
JOINT_GAIN = 14.0  # 1/s, of the joint velocities' error
POSTURE = np.array([0, 1.4, 0, -1.5, 0, 0, 0])  # what the arm's spare degree of freedom tends to
# Its demonstrations.
NOISE = 0.1  # std of the noise on the executed actions; the clean ones are recorded
CLEAN_ATTEMPTS = 20  # later ones need only succeed
ATTEMPTS = 40


def record_demo(env, task, number, seed, look=Look()):
    """Record one demonstration of a task; those with even and odd numbers start on different sides.

    The expert's action plus noise is executed, the clean action is recorded. An attempt that fails
    is redrawn, up to ATTEMPTS times; the first CLEAN_ATTEMPTS are, too, if they move the distractor
    or end STRICT_DISTANCE off. `env` must have images. Returns a dict of `frames` (100, H, W, 3)
    uint8, `states` (100, 20) and `actions` (100, 7) float32; it depends on (task, number, seed,
    look) and the size of the images only.
    """
    options = {"task": task, "side": 1 if number % 2 else -1, "look": look}
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([seed, split_key(task.split), task.index, number, attempt])
        obs, info = env.reset(seed=int(rng.integers(2 ** 31)), options=options)
        frames, states, actions = [], [], []
        for _ in range(HORIZON):
            frames.append(obs["image"])
            states.append(obs["state"])
            actions.append(expert_action(env))
            obs, *_, info = env.step(actions[-1] + rng.normal(0, NOISE, ACTION_DIM))
        clean = (info["distance"] < STRICT_DISTANCE
                 and info["distractor_displacement"] < MOVED_DISTANCE)
        if info["success"] and (clean or attempt >= CLEAN_ATTEMPTS):
            return {"frames": np.array(frames), "states": np.array(states),
                    "actions": np.array(actions, np.float32)}
    raise RuntimeError(f"the expert failed {ATTEMPTS} times on {task}")


def expert_action(env):
    """The expert's action (7,) in [-1, 1] for the state of `env`; it sees the bodies' poses.

    High up it travels to a point behind the target on the line to the goal and turns the fork
    there, comes down in a funnel, and pushes while it is low and has the target in the fork;
    otherwise it goes up and comes again. The line bends away from a distractor beside it.
    """
    target, fork, rotation = env.target_position[:2], env.fork_position, env.fork_rotation
    distance = np.linalg.norm(target)
    ahead = _push_direction(env, target, distance)
    aside = np.array([-ahead[1], ahead[0]])
    gap = _extent(env, env.target, -ahead) + PRONG + 0.02
    behind = target - ahead * gap
    offset = fork[:2] - target
    along, lateral = offset @ ahead, offset @ aside
    facing = -rotation[:2, 0]
    yaw_error = np.arctan2(facing[0] * ahead[1] - facing[1] * ahead[0], facing @ ahead)
    in_the_fork = -gap - 0.04 < along < 0 and abs(lateral) < 0.05 and abs(yaw_error) < 0.6
    velocity = force = np.zeros(2)
    if distance < STOP_DISTANCE:
        height, yaw_error = fork[2], 0.0
    elif fork[2] < 0.05 and in_the_fork:
        speed, height = min(PUSH_SPEED, 2 * distance + 0.02), PUSH_HEIGHT
        velocity = ahead * speed - 4 * lateral * aside
        lag = speed - env.fork_velocity @ ahead
        force = ahead * np.clip(PUSH_FORCE + PUSH_GAIN * lag, 0, MAX_FORCE)
    else:
        offset = behind - fork[:2]
        away = np.linalg.norm(offset)
        height = PUSH_HEIGHT + 2 * (away - 0.015) + 0.1 * max(0, abs(yaw_error) - 0.2)
        height = np.clip(height, PUSH_HEIGHT, TRAVEL_HEIGHT)
        speed = min(TRAVEL_SPEED, 4 * away) * np.clip(1 - (height - fork[2] - 0.02) / 0.03, 0, 1)
        velocity = offset / max(away, 1e-6) * speed
    climb = np.clip(8 * (height - fork[2]), -0.35, 0.35)
    twist = np.concatenate([velocity, [climb], 4 * np.cross(rotation[:, 2], (0, 0, -1))])
    twist[5] = np.clip(5 * yaw_error, -3, 3)
    return _joint_control(env, twist, force)


def _push_direction(env, target, distance):
    """The horizontal unit vector (2,) from target to goal, turned away from a distractor ahead."""
    ahead = -target / max(distance, 1e-6)
    aside = np.array([-ahead[1], ahead[0]])
    offset = env.distractor_position[:2] - target
    if not -0.12 < offset @ ahead < distance:
        return ahead
    aside *= np.copysign(1, offset @ aside)  # to the distractor's side
    width = max(FORK_WIDTH / 2, _extent(env, env.target, aside))
    width += _extent(env, env.distractor, -aside)
    missing = width + DETOUR_MARGIN - offset @ aside
    ahead = ahead - DETOUR * np.clip(missing / DETOUR_WIDTH, 0, 1) * aside
    return ahead / np.linalg.norm(ahead)


def _joint_control(env, twist, force):
    """Torques (as an action) for a fork velocity (6,) and a horizontal fork force (2,)."""
    q, zeros = env.q.tolist(), [0] * 7
    jacobian = env.client.calculateJacobian(env.arm, FORK_LINK, (0, 0, 0), q, zeros, zeros)
    jacobian = np.concatenate(jacobian)  # (6, 7)
    inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 1e-3 * np.eye(6))
    speeds = inverse @ twist + (np.eye(7) - inverse @ jacobian) @ (POSTURE - env.q)
    mass = np.array(env.client.calculateMassMatrix(env.arm, q))
    torque = DAMPING * speeds + mass @ (JOINT_GAIN * (speeds - env.dq)) + jacobian[:2].T @ force
    return np.clip(torque / TORQUE, -1, 1)


def _extent(env, body_id, direction):
    """How far an object reaches from its centre along a horizontal direction."""
    _, turn = env.client.getBasePositionAndOrientation(body_id)
    return (env._vertices[body_id] @ (np.append(direction, 0) @ _rotation(turn))).max()
